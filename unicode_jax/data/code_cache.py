"""A folder of codes: images encoded once, for stage II to train from.

METHOD section 6, H12. The tokenizer of stage II is frozen, so an image has the
same codes at every step. `CodeWriter` lays them out, `open_codes` reads them:

  manifest.json                               what made them, checksums; last
  easy_vqa_train-00000-of-00002.array_record  one record per image, in order
  easy_vqa_train-00001-of-00002.array_record

A record is the codes [views, P, D] of one image in row-major order, in the
smallest little-endian type that holds the vocabulary; the views are those of
`data.views`, the image as it is first. Codes mean nothing without the tokenizer
that made them, and nothing beside other images: both are hashed, and refused
when they differ. A folder that is not finished has `unfinished.json` in place
of the manifest, and whole shards only, so writing goes on where it stopped. How
images become codes is not known here (`unicode_jax.tokenize`).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import grain
import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import (
  shard_files,
  sources as sources_lib,
  views as views_lib,
)

# Raise it when the layout changes.
_FORMAT = 2
_MANIFEST, _UNFINISHED = "manifest.json", "unfinished.json"
# Shards are what is done again after an interruption, and what processes share
# the work by. At 64 positions of 5 codes and two views, 10 MB.
IMAGES_PER_SHARD = 8192

_AGAIN = (
  "run python -m unicode_jax.tokenize --workdir=RUN --out=DIR again into "
  "another folder"
)
_REPAIR = (
  "run python -m unicode_jax.tokenize --workdir=RUN --out=DIR again, with the "
  "same flags: it writes what is not there"
)


@dataclasses.dataclass(frozen=True)
class CodeFacts:
  """What decides the codes of an image, and their shape.

  Attributes:
    fingerprint: of the tokenizer, `loading.fingerprint`.
    vocab_size: K; ids are below it.
    positions: P.
    depth: D.
    views: of every image, in order.
  """

  fingerprint: str
  vocab_size: int
  positions: int
  depth: int
  views: tuple[views_lib.View, ...]

  @property
  def dtype(self) -> np.dtype:
    """Type of a stored id."""
    return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

  @property
  def shape(self) -> tuple[int, int, int]:
    """Shape of an image's codes: views, P, D."""
    return len(self.views), self.positions, self.depth

  def to_json(self) -> dict[str, Any]:
    """Returns what a manifest says of them."""
    facts = dataclasses.asdict(self)
    return facts | {"views": [list(view) for view in self.views]}

  @classmethod
  def from_json(cls, manifest: dict[str, Any]) -> "CodeFacts":
    """Reads them from a manifest."""
    facts = {f.name: manifest[f.name] for f in dataclasses.fields(cls)}
    views = tuple(views_lib.View(*view) for view in facts["views"])
    return cls(**facts | {"views": views})


@dataclasses.dataclass(frozen=True)
class Shard:
  """Images `start` to `stop` (exclusive) of a source, and their file."""

  source: sources_lib.ImageSource
  start: int
  stop: int
  path: Path

  def __len__(self) -> int:
    return self.stop - self.start


def items_hash(source: sources_lib.ImageSource) -> str:
  """Hashes which images a source has, in order: names and pixels."""
  digest = hashlib.sha256()
  for item in source.items:
    digest.update(json.dumps([item["name"], item["digest"]]).encode())
  return digest.hexdigest()


class CodeWriter:
  """Writes a folder of codes; several processes may share one.

  In order: every process makes a `CodeWriter`; one calls `prepare`, the others
  wait for it; then, unless `finished`, all write what is `missing`; when all
  have, one calls `finish`.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    sources: Sequence[sources_lib.ImageSource],
    facts: CodeFacts,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
  ):
    """Plans the shards and checks the folder; writes nothing.

    Args:
      folder: for the codes; new, or begun by an equal writer.
      sources: the images.
      facts: see `CodeFacts`.
      images_per_shard: in one file.

    Raises:
      ConfigError: the folder holds codes of another tokenizer or other images,
        or other files.
    """
    self.folder, self.facts = Path(os.path.expanduser(folder)), facts
    self.shards: list[Shard] = []
    self._plan = {"format": _FORMAT, **facts.to_json(), "sources": []}
    for source in sources:
      count = -(-len(source) // images_per_shard)
      shards = [
        Shard(
          source,
          i * images_per_shard,
          min((i + 1) * images_per_shard, len(source)),
          self.folder / f"{source.name}-{i:05d}-of-{count:05d}.array_record",
        )
        for i in range(count)
      ]
      self.shards += shards
      self._plan["sources"].append(
        {
          "name": source.name,
          "count": len(source),
          "items": items_hash(source),
          "shards": [{"file": s.path.name, "count": len(s)} for s in shards],
        }
      )
    self._check_folder()

  def _check_folder(self):
    """Raises ConfigError unless the folder is free or this plan's."""
    for name in (_MANIFEST, _UNFINISHED):
      if (self.folder / name).is_file():
        found = _read_json(self.folder / name)
        _check_made_for(self.folder, found, self.facts.fingerprint)
        _check_same_images(self.folder, found, self._plan["sources"])
        for what in ("views", "vocab_size", "positions", "depth"):
          if found[what] != self._plan[what]:
            raise config_lib.ConfigError(
              f"{self.folder} holds codes with {what}={found[what]}, but these "
              f"have {self._plan[what]}: choose another --out"
            )
        if _without_checksums(found) != self._plan:
          raise config_lib.ConfigError(
            f"{self.folder} holds the same codes in shards of another size: "
            "use the --images_per_shard that it was begun with"
          )
        return
    if self.folder.exists() and not self.folder.is_dir():
      raise config_lib.ConfigError(f"{self.folder} is a file: choose another")
    found = self.folder.iterdir() if self.folder.is_dir() else ()
    # An interruption, or another process, may be about to write the plan.
    if any(
      path.name != shard_files.begun(self.folder / _UNFINISHED).name
      for path in found
    ):
      raise config_lib.ConfigError(
        f"{self.folder} holds files that are not codes: choose a new folder"
      )

  @property
  def finished(self) -> bool:
    """Whether the manifest is there."""
    return (self.folder / _MANIFEST).is_file()

  def prepare(self) -> None:
    """Claims the folder; of a finished one, removes shards that are damaged."""
    if self.finished:
      found = _read_json(self.folder / _MANIFEST)
      damaged = [
        path
        for path, checksum in _checksums(self.folder, found["sources"])
        if not path.is_file() or shard_files.file_hash(path) != checksum
      ]
      if not damaged:
        return
      shard_files.write_json(self.folder / _UNFINISHED, self._plan)
      (self.folder / _MANIFEST).unlink()
      for path in damaged:
        path.unlink(missing_ok=True)
      return
    self.folder.mkdir(parents=True, exist_ok=True)
    shard_files.write_json(self.folder / _UNFINISHED, self._plan)

  def missing(
    self, process_index: int = 0, process_count: int = 1
  ) -> list[Shard]:
    """Returns the shards that a process has to write, in order."""
    own = self.shards[process_index::process_count]
    return [shard for shard in own if not shard.path.is_file()]

  def write(self, shard: Shard, batches: Iterable[np.ndarray]) -> None:
    """Writes a shard; it appears under its name when it is whole.

    Args:
      shard: of `missing`.
      batches: the codes of its images in order, int[n, views, P, D] each.

    Raises:
      ValueError: codes of another shape, number or range.
    """
    count = 0
    with shard_files.whole_files(shard.path) as (path,):
      with shard_files.record_writer(path) as writer:
        for codes in batches:
          self._check_codes(codes)
          count += len(codes)
          for image_codes in codes.astype(self.facts.dtype):
            writer.write(image_codes.tobytes())
      if count != len(shard):
        raise ValueError(
          f"{shard.path.name} has {len(shard)} images, but got codes of {count}"
        )

  def _check_codes(self, codes: np.ndarray) -> None:
    """Raises ValueError where codes cannot be stored as they are."""
    if codes.shape[1:] != self.facts.shape:
      raise ValueError(
        f"codes{list(codes.shape)} must be [n, *{list(self.facts.shape)}]"
      )
    if codes.min() < 0 or codes.max() >= self.facts.vocab_size:
      raise ValueError(
        f"codes from {codes.min()} to {codes.max()} are not all ids of a "
        f"vocabulary of {self.facts.vocab_size}"
      )

  def finish(self) -> None:
    """Writes the manifest, when every shard is there.

    Raises:
      ConfigError: a shard is not there.
    """
    for source in self._plan["sources"]:
      for shard in source["shards"]:
        path = self.folder / shard["file"]
        if not path.is_file():
          raise config_lib.ConfigError(
            f"{path} is not there, though every process is done: --out must be "
            "a folder that all processes share"
          )
    manifest = {
      **self._plan,
      "sources": [
        {
          **source,
          "shards": [
            {**s, "sha256": shard_files.file_hash(self.folder / s["file"])}
            for s in source["shards"]
          ],
        }
        for source in self._plan["sources"]
      ],
    }
    shard_files.write_json(self.folder / _MANIFEST, manifest)
    (self.folder / _UNFINISHED).unlink(missing_ok=True)
    shard_files.remove_left_overs(self.folder)


@dataclasses.dataclass(frozen=True)
class CodeReader:
  """Codes of one source, by number; nothing is held in memory.

  Pickling it (for worker processes) carries the paths; each process opens its
  files when it first reads from them.

  Attributes:
    records: one for each image.
    facts: see `CodeFacts`.
  """

  records: grain.sources.ArrayRecordDataSource
  facts: CodeFacts

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns int32[views, P, D], of the views that the facts name."""
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}")
    codes = np.frombuffer(self.records[index], np.uint8)
    if codes.nbytes != self.facts.dtype.itemsize * math.prod(self.facts.shape):
      raise config_lib.ConfigError(
        f"the codes of image {index} are not {list(self.facts.shape)}, as the "
        f"manifest beside them says: {_AGAIN}"
      )
    codes = codes.view(self.facts.dtype).reshape(self.facts.shape)
    return codes.astype(np.int32)


def open_codes(
  folder: str | os.PathLike[str],
  sources: Sequence[sources_lib.ImageSource],
  fingerprint: str,
  *,
  views: tuple[views_lib.View, ...] = (views_lib.AS_IS,),
) -> tuple[CodeReader, ...]:
  """Opens a folder of codes for the images that they were made of.

  Every file is read once to compare checksums, about a gigabyte a second.

  Args:
    folder: what `CodeWriter` finished. It may hold other sources too.
    sources: the images.
    fingerprint: of the tokenizer that is trained with.
    views: that are asked for; there may be more behind them.

  Returns:
    The codes of each source, in the order of `sources`.

  Raises:
    ConfigError: no finished folder; codes of another tokenizer or of other
      images; other views; a shard that is missing or damaged.
  """
  folder = Path(os.path.expanduser(folder))
  path = folder / _MANIFEST
  if not path.is_file():
    if (folder / _UNFINISHED).is_file():
      raise config_lib.ConfigError(
        f"config.data.codes={folder} is not finished: {_REPAIR}"
      )
    raise config_lib.ConfigError(
      f"config.data.codes={folder} holds no codes (no {_MANIFEST} in it): name "
      "the --out of python -m unicode_jax.tokenize"
    )
  manifest = _read_json(path)
  _check_made_for(folder, manifest, fingerprint)
  kept = {source["name"]: source for source in manifest["sources"]}
  wanted = [
    {"name": s.name, "count": len(s), "items": items_hash(s)} for s in sources
  ]
  chosen = [kept[w["name"]] for w in wanted if w["name"] in kept]
  _check_same_images(folder, {"sources": chosen}, wanted)
  facts = CodeFacts.from_json(manifest)
  if facts.views[: len(views)] != tuple(views):
    raise config_lib.ConfigError(
      f"config.data.codes={folder} has other views of the images (mirrored, "
      "moved) than config.data.flip and config.data.shift ask for: set them as "
      "they were when the codes were made, or make codes with these"
    )
  for file, checksum in _checksums(folder, chosen):
    if not file.is_file():
      raise config_lib.ConfigError(f"{file} is missing: {_REPAIR}")
    if shard_files.file_hash(file) != checksum:
      raise config_lib.ConfigError(f"{file} is damaged: {_REPAIR}")
  return tuple(
    CodeReader(
      grain.sources.ArrayRecordDataSource(
        [str(folder / shard["file"]) for shard in source["shards"]]
      ),
      facts,
    )
    for source in chosen
  )


def _check_made_for(
  folder: Path, found: dict[str, Any], fingerprint: str
) -> None:
  """Raises ConfigError where codes are of another tokenizer (H12)."""
  if found.get("format") != _FORMAT:
    raise config_lib.ConfigError(
      f"{folder} holds codes of format {found.get('format')!r:.20}, and this "
      f"version reads {_FORMAT}: {_AGAIN}"
    )
  try:
    _check_form(folder, found)
  except (TypeError, KeyError, ValueError, AttributeError) as error:
    raise config_lib.ConfigError(
      f"the manifest of {folder} is damaged ({error!r:.99}): {_AGAIN}"
    ) from None
  if found["fingerprint"] != fingerprint:
    raise config_lib.ConfigError(
      f"the codes in {folder} were made by another tokenizer (fingerprint "
      f"{found['fingerprint'][:16]}, and this one's is {fingerprint[:16]}): "
      f"{_AGAIN}"
    )


def _check_form(folder: Path, found: dict[str, Any]) -> None:
  """Raises an exception unless a manifest has the form that is written."""
  facts = CodeFacts.from_json(found)
  sizes = facts.vocab_size, facts.positions, facts.depth
  moves = [move for view in facts.views for move in view]
  if not isinstance(facts.fingerprint, str) or not all(
    isinstance(number, int) for number in (*sizes, *moves)
  ):
    raise TypeError("facts")
  if min(sizes) < 1 or facts.vocab_size > 2**31 or not facts.views:
    raise ValueError("facts")
  for source in found["sources"]:
    counts = [source["count"], *(s["count"] for s in source["shards"])]
    names = source["name"], source["items"]
    if not all(isinstance(count, int) for count in counts) or not all(
      isinstance(name, str) for name in names
    ):
      raise TypeError("sources")
    for shard in source["shards"]:
      shard_files.inside(folder, shard["file"], f"the manifest of {folder}")


def _check_same_images(
  folder: Path, found: dict[str, Any], wanted: Sequence[dict[str, Any]]
) -> None:
  """Raises ConfigError where codes are of other images than wanted."""

  def identity(sources):
    return [(s["name"], s["count"], s["items"]) for s in sources]

  def names(sources):
    listed = ", ".join(
      f"{s['count']} images of {s['name']} ({s['items'][:8]})" for s in sources
    )
    return listed or "none of them"

  if identity(found["sources"]) != identity(wanted):
    raise config_lib.ConfigError(
      f"{folder} holds codes of another data set: {names(found['sources'])} "
      f"there, {names(wanted)} wanted; give the same --config.data, or {_AGAIN}"
    )


def _without_checksums(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns the plan that a manifest came from."""
  sources = [
    {
      **source,
      "shards": [
        {k: v for k, v in shard.items() if k != "sha256"}
        for shard in source["shards"]
      ],
    }
    for source in manifest["sources"]
  ]
  return {**manifest, "sources": sources}


def _checksums(
  folder: Path, sources: Sequence[dict[str, Any]]
) -> list[tuple[Path, str]]:
  """Returns the file and checksum of every shard."""
  return [
    (folder / shard["file"], shard["sha256"])
    for source in sources
    for shard in source["shards"]
  ]


def _read_json(path: Path) -> dict[str, Any]:
  """Reads a manifest."""
  return shard_files.read_json(path, f"remove its folder and {_AGAIN}")
