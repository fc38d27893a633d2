"""Files that are whole as soon as they bear their name, and their checksums.

What `code_cache` and `prepare` write lies in folders of ArrayRecord shards
beside one JSON file that says what they are. A process may be killed at any
moment and the machine may lose its power: a file is written under another name,
brought to the disk, and renamed. Nothing here knows what a record holds.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from array_record.python import array_record_module

from unicode_jax import config as config_lib

_WRITING = ".writing-"
# Each record is read by itself, and neither codes nor images compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
  """Renames files to `paths` when the block ends without an exception.

  Args:
    paths: all in one folder.

  Yields:
    Where to write them; all must be there at the end.
  """
  folder = paths[0].parent
  with tempfile.TemporaryDirectory(
    prefix=_WRITING, dir=folder, ignore_cleanup_errors=True
  ) as name:
    written = tuple(Path(name) / path.name for path in paths)
    yield written
    for path in written:
      _to_disk(path)
    for begun_path, path in zip(written, paths):
      begun_path.replace(path)


@contextlib.contextmanager
def record_writer(
  path: Path,
) -> Iterator[array_record_module.ArrayRecordWriter]:
  """Opens an ArrayRecord file to write one record after the other.

  Raises:
    OSError: at the end, where something could not be written.
  """
  writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
  try:
    yield writer
  finally:
    try:
      writer.close()
    except RuntimeError as error:
      raise OSError(None, str(error)) from error


def remove_left_overs(folder: Path) -> None:
  """Removes what killed processes were writing."""
  for left_over in folder.glob(f"{_WRITING}*"):
    shutil.rmtree(left_over, ignore_errors=True)


def is_left_over(path: Path) -> bool:
  """Returns whether a path is what `remove_left_overs` removes."""
  return path.name.startswith(_WRITING)


def file_hash(path: Path) -> str:
  """Returns the SHA-256 of a file, in hexadecimal digits."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: dict[str, Any]) -> None:
  """Writes a JSON object, in place of one that is there or not."""
  temporary = begun(path)
  temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  _to_disk(temporary)
  temporary.replace(path)


def begun(path: Path) -> Path:
  """Returns the name of a JSON file while it is being written."""
  return path.with_suffix(".tmp")


def read_text(path: Path, remedy: str) -> str:
  """Reads a text file; a ConfigError where it is not UTF-8."""
  try:
    return path.read_text(encoding="utf-8")
  except ValueError as error:
    raise config_lib.ConfigError(
      f"{path} is damaged ({error}): {remedy}"
    ) from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
  """Reads what `write_json` wrote.

  Args:
    path: the file.
    remedy: what to do where it is damaged.

  Raises:
    ConfigError: it holds no JSON object.
  """
  try:
    found = config_lib.parse_json(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise config_lib.ConfigError(
      f"{path} is damaged ({error}): {remedy}"
    ) from None
  if not isinstance(found, dict):
    raise config_lib.ConfigError(f"{path} is no manifest: {remedy}")
  return found


def is_plain(name: str) -> bool:
  """Says whether a name is that of a file in its own folder."""
  return name not in ("", "..") and "\0" not in name and Path(name).name == name


def inside(folder: Path, name: Any, where: str) -> Path:
  """Returns the file that a manifest names, which must be in its own folder.

  Args:
    folder: of the manifest.
    name: what it says.
    where: the manifest, for the message.

  Raises:
    ConfigError: it is no plain name: a manifest must not lead out of its
      folder.
  """
  if not isinstance(name, str) or not is_plain(name):
    raise config_lib.ConfigError(
      f"{where} names the file {name!r:.99}, which is not in its own folder: "
      "get it again from where it is from"
    )
  return folder / name


def _to_disk(path: Path) -> None:
  """Waits until the bytes of a file are on the disk."""
  with path.open("rb") as file:
    os.fsync(file.fileno())
