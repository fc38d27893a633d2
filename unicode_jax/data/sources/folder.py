"""Anyone's folder of images, with optional captions; held out by path.

Broken images are skipped, up to a limit, and named in the log every time. The
captions file is small and written by hand, so its first mistake is an error.
"""

from collections.abc import Collection
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import cache, text_files
from unicode_jax.data.sequences import Conversation
from unicode_jax.data.sources.images import (
  IMAGE_SUFFIXES,
  decode_image,
  list_images,
)
from unicode_jax.data.sources.source import (
  Annotation,
  ImageSource,
  check_split,
  is_heldout,
  max_skipped,
  split,
)

CAPTION_QUESTION = "Describe a picture."


def load_folder(
  path: str | os.PathLike[str],
  image_size: int,
  *,
  captions: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.1,
  cache_dir: str | os.PathLike[str] | None = None,
  max_broken: float = 0.1,
) -> tuple[ImageSource, ImageSource]:
  """Loads a folder of images of any size and mode, searched recursively.

  Args:
    path: the folder. Names that start with a dot are passed over.
    image_size: S, pixels; see `decode_image`.
    captions: JSONL of {"image": path relative to the folder, "text": caption};
      several lines may name one image.
    heldout_fraction: share of the images that is held out, by relative path.
    cache_dir: see `cache.cached_images`.
    max_broken: share of the images that may be broken; see `max_skipped`.

  Returns:
    Training and held-out images.

  Raises:
    ConfigError: no such folder, no image in it, too many broken ones, or a bad
      captions file.
  """
  folder = image_folder(path)
  contents = list_images(folder)
  if not contents:
    raise config_lib.ConfigError(
      f"no image in {folder} or below it; looked for files that end in "
      f"{', '.join(IMAGE_SUFFIXES)}"
    )
  texts = read_captions(captions, {c["name"] for c in contents})

  def decode(content: dict[str, Any]) -> np.ndarray:
    content["name"].encode()  # What is not UTF-8 cannot be hashed.
    return decode_image(folder / content["name"], image_size)

  cached = cache.cached_images(
    "folder",
    contents,
    decode,
    image_size,
    version=str(folder.resolve()),
    cache_dir=cache_dir,
    max_broken=max_skipped(max_broken, len(contents)),
  )
  sources = split(
    "folder",
    cached,
    lambda item: is_heldout(item["name"], heldout_fraction),
    {name: Annotation(captions=said) for name, said in texts.items()},
  )
  check_split(
    sources, f"{len(cached.items)} images in {folder}", heldout_fraction
  )
  return sources


def image_folder(path: str | os.PathLike[str]) -> Path:
  """Returns `config.data.path` as a path; a ConfigError unless it is there."""
  folder = Path(os.path.expanduser(path))
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f"config.data.path={str(path)!r} is not a folder: give one with images"
    )
  return folder


def read_captions(
  captions: str | os.PathLike[str] | None, names: Collection[str]
) -> dict[str, tuple[str, ...]]:
  """Reads a captions JSONL.

  Args:
    captions: the file; None for no captions.
    names: relative paths of the images that there are.

  Returns:
    Captions of those images, by name.

  Raises:
    ConfigError: no such file, a bad line, or no caption of any image.
  """
  if captions is None:
    return {}
  file = Path(os.path.expanduser(captions))
  if not file.is_file():
    raise config_lib.ConfigError(
      f"config.data.captions={str(captions)!r} is not a file"
    )
  found: dict[str, tuple[str, ...]] = {}
  missing = []
  for number, line in enumerate(text_files.read_utf8(file).split("\n"), 1):
    if not line.strip():
      continue
    try:
      record = config_lib.parse_json(line)
      image, text = record["image"], record["text"]
      if not (isinstance(image, str) and isinstance(text, str)):
        raise TypeError
      if not text.strip():
        raise ValueError("an empty caption")
      text_files.check_text(text)
    except (ValueError, KeyError, TypeError) as error:
      raise config_lib.ConfigError(
        f'{file}, line {number}: want {{"image": "relative/path.png", "text": '
        f'"a caption"}}, got {line[:120]!r}'
        + (f" ({error})" if isinstance(error, ValueError) else "")
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
      text_files.printable(missing[0]),
    )
  return found


def caption_conversations(source: ImageSource) -> list[Conversation]:
  """Returns the captions of a source as text-only conversations."""
  return [
    Conversation(((CAPTION_QUESTION, text),))
    for annotation in source.annotations
    for text in annotation.captions
  ]
