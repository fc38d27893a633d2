"""The folder of a prepared data set: what lies in it, and whether it is whole.

  manifest.json             what it was made of, every shard, what was left out
  00000-000.array_record    records of the first piece of the inputs
  00000-000.jsonl           their headers, see `record`
  ...

While it is being made, `unfinished.json` stands in place of the manifest. It
holds the same, as far as it is done; a shard that it does not name does not
count. The manifest comes last.
"""

from collections.abc import Sequence
import hashlib
import json
from pathlib import Path
from typing import Any

from unicode_jax import config as config_lib
from unicode_jax.data import shard_files
from unicode_jax.data.prepared import record
from unicode_jax.data.prepared.inputs import Inputs
from unicode_jax.data.prepared.shards import Settings, index_path

# Raise it when the layout or the records change.
_FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"

REMEDY = (
  "run the python -m unicode_jax.prepare command that made the folder again: "
  "it writes what is missing"
)
_ANEW = "prepare the data again into a new folder"


def new_manifest(
  inputs: Inputs, options: dict[str, Any], settings: Settings, path: str
) -> dict[str, Any]:
  """Returns the manifest of a folder of which nothing is written.

  Args:
    inputs: what will be converted.
    options: from what, and where the fields lie.
    settings: how it will be written.
    path: where the inputs lie; only for who reads it.
  """
  listing = json.dumps([list(file) for file in inputs.files])
  return {
    "format": _FORMAT,
    "path": path,
    "options": {**options, **settings._asdict()},
    "inputs": {
      "files": len(inputs.files),
      "bytes": sum(size for _, size, _ in inputs.files),
      "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    },
    "records": 0,
    "broken": 0,
    "pieces": [None] * len(inputs.pieces),
  }


def read_manifest(folder: Path) -> dict[str, Any] | None:
  """Reads what was begun or finished in a folder; None where nothing was.

  Raises:
    ConfigError: it is damaged or of another version.
  """
  path = next(
    (p for n in (MANIFEST, UNFINISHED) if (p := folder / n).is_file()), None
  )
  if path is None:
    return None
  found = shard_files.read_json(path, _ANEW)
  if found.get("format") != _FORMAT:
    raise config_lib.ConfigError(
      f"{path} is of format {found.get('format')!r:.20}, and this version "
      f"reads {_FORMAT}: {_ANEW}"
    )
  if not _is_manifest(found):
    raise config_lib.ConfigError(f"{path} is damaged: {_ANEW}")
  return found


def _is_manifest(found: dict[str, Any]) -> bool:
  """Says whether fields have the types that they are written with."""
  match found:
    case {
      "path": str(),
      "options": dict(),
      "inputs": {"files": int(), "bytes": int(), "sha256": str()},
      "records": int(),
      "broken": int(),
      "pieces": list(pieces),
    }:
      return all(piece is None or _is_piece(piece) for piece in pieces)
  return False


def _is_piece(piece: Any) -> bool:
  match piece:
    case {"name": str(), "shards": list(entries), "broken": list(names)}:
      return all(map(_is_shard, entries)) and all(
        isinstance(entry, list) and list(map(type, entry)) == [str, str]
        for entry in names
      )
  return False


def _is_shard(shard: Any) -> bool:
  match shard:
    case {
      "file": str(file),
      "records": int(count),
      "bytes": int(),
      "sha256": str(),
      "index_sha256": str(),
    }:
      # Nothing outside of the folder is read.
      return shard_files.is_plain(file) and count >= 0
  return False


def check_same(
  folder: Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Raises ConfigError where a folder was begun in another way."""
  for key, value in wanted["options"].items():
    if found["options"].get(key) != value:
      raise config_lib.ConfigError(
        f"{folder} was begun with {key}={found['options'].get(key)}, not "
        f"{value}: give the same flags, or choose another --out"
      )
  if found["inputs"] != wanted["inputs"]:
    was, now = found["inputs"], wanted["inputs"]
    raise config_lib.ConfigError(
      f"{folder} was begun from other inputs: {was['files']} files of "
      f"{was['bytes']} bytes in {found['path']} then, {now['files']} of "
      f"{now['bytes']} in {wanted['path']} now, or their names or times "
      "differ: choose another --out"
    )
  if len(found["pieces"]) != len(wanted["pieces"]):
    raise config_lib.ConfigError(
      f"{folder} has {len(found['pieces'])} pieces, not "
      f"{len(wanted['pieces'])}: its manifest is damaged, {_ANEW}"
    )


def shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns what a manifest says of every shard, in order."""
  return [
    shard for piece in manifest["pieces"] if piece for shard in piece["shards"]
  ]


def broken(manifest: dict[str, Any]) -> list[Sequence[str]]:
  """Returns (name, reason) of everything that was left out, in order."""
  return [
    entry for piece in manifest["pieces"] if piece for entry in piece["broken"]
  ]


def damage(
  folder: Path, shard: dict[str, Any], *, thorough: bool = False
) -> str | None:
  """Returns what is wrong with a shard in words; None where nothing is.

  Args:
    folder: where it lies.
    shard: what the manifest says of it.
    thorough: compare the checksum of the shard too, about a gigabyte a second;
      that of its index, which is small, always is.
  """
  path = folder / shard["file"]
  index = index_path(path)
  for file in (path, index):
    if not file.is_file():
      return f"{file} is missing"
  if (size := path.stat().st_size) != shard["bytes"]:
    return f"{path} has {size} bytes instead of {shard['bytes']}"
  if shard_files.file_hash(index) != shard["index_sha256"]:
    return f"{index} is damaged (its checksum differs)"
  if thorough and shard_files.file_hash(path) != shard["sha256"]:
    return f"{path} is damaged (its checksum differs)"
  return None


def open_prepared(
  folder: Path, *, thorough: bool = False
) -> tuple[list[tuple[Path, int]], list[record.Header]]:
  """Opens a finished folder, without opening its shards.

  Args:
    folder: what `python -m unicode_jax.prepare` wrote.
    thorough: see `damage`.

  Returns:
    Path and number of records of every shard, and the headers of all records.

  Raises:
    ConfigError: it is none, not finished, or damaged; says which file.
  """
  found = read_manifest(folder)
  if found is None:
    raise config_lib.ConfigError(
      f"{folder} holds no prepared data set (no {MANIFEST} in it): name the "
      "--out of python -m unicode_jax.prepare"
    )
  if not (folder / MANIFEST).is_file():
    raise config_lib.ConfigError(f"{folder} is not finished: {REMEDY}")
  files, headers = [], []
  for shard in shards(found):
    problem = damage(folder, shard, thorough=thorough)
    if problem is not None:
      raise config_lib.ConfigError(f"{problem}: remove it and {REMEDY}")
    path = folder / shard["file"]
    index = index_path(path)
    lines = shard_files.read_text(index, _ANEW).split("\n")[:-1]
    if len(lines) != shard["records"]:  # All behind it would move.
      raise config_lib.ConfigError(
        f"{folder / MANIFEST} is damaged: it says that {path.name} has "
        f"{shard['records']} images, not {len(lines)}: {_ANEW}"
      )
    headers += [
      record.read_header(line, f"{index}, line {i}")
      for i, line in enumerate(lines, 1)
    ]
    files.append((path, shard["records"]))
  return files, headers
