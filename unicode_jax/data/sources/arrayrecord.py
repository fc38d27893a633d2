"""Images that `python -m unicode_jax.prepare` wrote, decoded as they are read.

Nothing is cached: a record is read and decoded when its image is asked for, so
a data set may be larger than the disk would hold as pixels. What is said of the
images, and what decides the split, lies in the indices of the shards and is
read at the start. The other sources' rules hold: held out by name, as `folder`
does; training images that equal held-out ones (here before they are resized)
are dropped.
"""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import os
from pathlib import Path
import resource
from typing import ClassVar, NamedTuple

from array_record.python import array_record_data_source
import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import cache
from unicode_jax.data.prepared import inputs, manifest, record
from unicode_jax.data.sources.images import decode_image
from unicode_jax.data.sources.source import (
  Annotation,
  ImageSource,
  check_split,
  is_heldout,
  split,
)

_OTHER_FILES = 512  # That a process has open beside the shards, at the most.


class _ShardFile(NamedTuple):
  """A shard, of which nobody need count the records."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


@dataclasses.dataclass(frozen=True)
class DecodedRecords:
  """Images of all shards by number, as an array of pixels would give them.

  Attributes:
    shards: their files and numbers of records.
    image_size: S, pixels.
  """

  shards: tuple[tuple[Path, int], ...]
  image_size: int

  @functools.cached_property
  def records(self) -> array_record_data_source.ArrayRecordDataSource:
    """What reads records by number; opens a shard when it is first needed."""
    return array_record_data_source.ArrayRecordDataSource(
      [_ShardFile(str(path), 0, count, count) for path, count in self.shards]
    )

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Shape of the array: N, S, S, 3."""
    count = sum(count for _, count in self.shards)
    return count, self.image_size, self.image_size, 3

  def __getitem__(self, rows: int | Sequence[int]) -> np.ndarray:
    """Returns uint8[S, S, 3] of one number, uint8[n, S, S, 3] of several."""
    if isinstance(rows, int):
      return self._decoded(rows)
    images = np.empty((len(rows), *self.shape[1:]), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
      for i, image in enumerate(executor.map(self._decoded, rows)):
        images[i] = image
    return images

  def _decoded(self, row: int) -> np.ndarray:
    try:
      image = record.image_file(self.records[row])
      return decode_image(io.BytesIO(image), self.image_size)
    # What array_record raises where a checksum differs or a file ends.
    except (RuntimeError, OSError, ValueError, IndexError) as error:
      stops = itertools.accumulate(count for _, count in self.shards)
      path = next(p for stop, (p, _) in zip(stops, self.shards) if row < stop)
      if isinstance(error.__cause__, MemoryError):
        raise config_lib.RunError(
          f"there is not enough memory to decode an image of {path}: read with "
          "fewer processes (config.data.num_workers)"
        ) from error
      raise config_lib.ConfigError(
        f"{path} is damaged ({error}): remove it and {manifest.REMEDY}"
      ) from error


@dataclasses.dataclass(frozen=True)
class RecordSource(ImageSource):
  """An `ImageSource` whose `row`s are numbers of records, decoded when read.

  Attributes:
    decoded: the images of both sides of the split.
  """

  decoded: DecodedRecords

  # Pillow lets others run while it decodes; more threads wait for each other.
  read_threads: ClassVar[int] = min(4, os.cpu_count() or 1)

  @functools.cached_property
  def _pixels(self) -> DecodedRecords:
    return self.decoded


def load_arrayrecord(
  path: str | os.PathLike[str],
  image_size: int,
  *,
  heldout_fraction: float = 0.1,
) -> tuple[ImageSource, ImageSource]:
  """Loads one prepared data set, or several.

  Args:
    path: a folder, or a pattern that matches some.
    image_size: S, pixels; see `decode_image`.
    heldout_fraction: share of the images that is held out, by the name that
      the record has.

  Returns:
    Training and held-out images. Where there are several folders, the names of
    the images begin with their folder's.

  Raises:
    ConfigError: no such folder, or one that is not finished or is damaged.
  """
  folders = _folders(path)
  files, items, annotations = [], [], {}
  for folder in folders:
    opened, headers = manifest.open_prepared(folder)
    files += opened
    for header in headers:
      key = header["name"]
      name = key if len(folders) == 1 else f"{folder.name}/{key}"
      if name in annotations:
        raise config_lib.ConfigError(
          f"config.data.path={str(path)!r} has two images named {name!r}: give "
          "the folders different names"
        )
      digest = header["digest"]
      row = len(items)
      items.append({"name": name, "key": key, "row": row, "digest": digest})
      annotations[name] = Annotation(
        captions=tuple(header["captions"]), label=header["label"]
      )
  _allow_open_files(len(files))
  decoded = DecodedRecords(tuple(files), image_size)
  sources = split(
    "arrayrecord",
    cache.CachedImages(folders[0], items, []),
    lambda item: is_heldout(item["key"], heldout_fraction),
    annotations,
  )
  check_split(sources, f"{len(items)} images in {path}", heldout_fraction)
  train, heldout = (
    RecordSource(s.name, s.path, s.items, s.annotations, decoded)
    for s in sources
  )
  return train, heldout


def _allow_open_files(count: int) -> None:
  """Lets this process and its workers hold so many shards open.

  Random access comes to all of them, and the usual limit is 1024 files.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + _OTHER_FILES
  if soft == resource.RLIM_INFINITY or soft >= needed:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise config_lib.ConfigError(
      f"config.data.path has {count} shards, but a process may open only "
      f"{hard} files: raise the limit (ulimit -Hn), or prepare the data with a "
      "larger --shard_size from fewer, larger files"
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _folders(path: str | os.PathLike[str]) -> list[Path]:
  """Returns the folders that a path or a pattern names."""
  folder = Path(os.path.expanduser(path))
  if folder.is_dir():
    return [folder]
  folders = sorted(
    found for found in inputs.matches(folder)[1] if found.is_dir()
  )
  if not folders:
    raise config_lib.ConfigError(
      f"config.data.path={str(path)!r} is no folder: name the --out of python "
      "-m unicode_jax.prepare, or a pattern that matches several"
    )
  return folders
