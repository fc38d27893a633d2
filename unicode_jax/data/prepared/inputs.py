"""What is converted: samples, the pieces of work they come in, and texts.

Each format gives `Inputs`: the files that it reads, by which a changed data set
is noticed, and pieces that any process can read on its own. A name of a sample
never holds a path outside of the data set, so it is the same on every machine.
"""

from collections.abc import Iterator, Sequence
import glob
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from unicode_jax import config as config_lib
from unicode_jax.data import text_files
from unicode_jax.data.sources.images import file_stamp

# Keys and columns that hold captions unless another is named; the first counts.
CAPTION_KEYS = ("caption", "captions", "text")
LABEL_KEY = "label"


class Sample(NamedTuple):
  """An image file with what is said of it.

  Attributes:
    name: unique in the data set.
    image: the file.
    captions: descriptions.
    label: name of its class, or None.
  """

  name: str
  image: bytes
  captions: tuple[str, ...] = ()
  label: str | None = None


class Broken(NamedTuple):
  """An input that is left out.

  Attributes:
    name: of the sample, or of the file that cannot be read (further).
    reason: in words.
  """

  name: str
  reason: str


class Piece(Protocol):
  """A part of the inputs; pickled into the process that converts it."""

  name: str

  def samples(self) -> Iterator[Sample | Broken]:
    """Yields what the piece holds, the same at every time."""


class Inputs(NamedTuple):
  """What a data set to convert consists of.

  Attributes:
    files: (name, bytes, mtime in ns) of every file that is read.
    pieces: in order.
  """

  files: Sequence[tuple[str, int, int]]
  pieces: Sequence[Piece]


class Columns(NamedTuple):
  """Where a sample's fields lie; None for the first usual one that is there.

  Attributes:
    image: column of a parquet file; extension in a webdataset.
    caption: column; key of a webdataset's JSON.
    label: column; key of a webdataset's JSON.
  """

  image: str | None = None
  caption: str | None = None
  label: str | None = None


def find_files(path: str, suffix: str) -> list[tuple[str, Path]]:
  """Finds the files to convert.

  Args:
    path: a file, a folder that is searched recursively, or a glob pattern.
    suffix: that the files of a folder have.

  Returns:
    Name and path of each, by name: relative to the folder, or to the part of
    the pattern before its first wildcard.

  Raises:
    ConfigError: there are none.
  """
  given = Path(os.path.expanduser(path))
  if given.is_file():
    return [(given.name, given)]
  if given.is_dir():
    root, found = given, given.rglob(f"*{suffix}")
  elif glob.has_magic(str(given)):
    root, found = matches(given)
  else:
    raise config_lib.ConfigError(
      f"--path={path!r} is neither a file nor a folder: name one, or a "
      f"pattern such as 'DIR/*{suffix}'"
    )
  files = sorted(
    (found_path.relative_to(root).as_posix(), found_path)
    for found_path in found
    if found_path.is_file() and not found_path.name.startswith(".")
  )
  if not files:
    raise config_lib.ConfigError(
      f"--path={path!r} names no file"
      + (f" that ends in {suffix}" if given.is_dir() else "")
      + ": name a file, a folder with some, or a pattern"
    )
  return files


def matches(pattern: Path) -> tuple[Path, list[Path]]:
  """Finds what a glob pattern matches.

  `**` follows no links, which could lead back into the tree and round it for
  ever, as they do in the module glob.

  Returns:
    The part of the pattern before its first wildcard, and paths below it.

  Raises:
    ConfigError: it is no pattern.
  """
  parts = pattern.parts
  wild = next(
    (i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1
  )
  root = Path(*parts[:wild])
  try:
    return root, list(root.glob(str(Path(*parts[wild:]))))
  except (ValueError, NotImplementedError, IndexError) as error:
    raise config_lib.ConfigError(
      f"{str(pattern)!r} is no pattern ({error}): write ** alone, as in "
      "'DIR/**/*.tar'"
    ) from None


def stamped(
  files: Sequence[tuple[str, Path]],
) -> list[tuple[str, int, int]]:
  """Returns files as `Inputs.files` has them."""
  return [(name, *file_stamp(path)) for name, path in files]


def read_captions(value: Any) -> tuple[str, ...]:
  """Returns captions, each once, without spaces around them.

  Args:
    value: a text, a list of texts, or None.

  Raises:
    ValueError: anything else.
  """
  texts = [] if value is None else [value] if isinstance(value, str) else value
  if not (
    isinstance(texts, list | tuple)
    and all(isinstance(text, str) for text in texts)
  ):
    raise ValueError(f"a caption must be a text, not {value!r:.60}")
  for text in texts:
    text_files.check_text(text)
  return tuple(dict.fromkeys(filter(None, map(str.strip, texts))))


def read_label(value: Any) -> str | None:
  """Returns the name of a class; None for none, or an unknown one (-1).

  Raises:
    ValueError: it is neither a text nor a whole number.
  """
  if value is None or value == -1:
    return None
  if isinstance(value, bool) or not isinstance(value, str | int):
    raise ValueError(f"a label must be a text or a number, not {value!r:.60}")
  label = str(value).strip()
  text_files.check_text(label)
  return label or None
