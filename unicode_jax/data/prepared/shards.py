"""Converts one piece of the inputs: shards of records, each with its index.

What is written depends on the piece and the settings alone, not on which
process does it or when, so a piece that was interrupted is written again, byte
for byte.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import io
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from unicode_jax.data import shard_files, text_files
from unicode_jax.data.prepared import record
from unicode_jax.data.prepared.inputs import Broken, Piece, Sample
from unicode_jax.data.sources.images import decode_image, decode_whole


class Settings(NamedTuple):
  """What decides the shards beside the inputs.

  Attributes:
    shard_size: images of a shard at the most.
    image_size: side of the squares, pixels, that larger images are cut and
      shrunk to; None keeps every file as it is.
  """

  shard_size: int
  image_size: int | None = None


def write_piece(
  number: int, piece: Piece, folder: Path, settings: Settings
) -> dict[str, Any]:
  """Writes the shards of a piece.

  Args:
    number: of the piece, with which the names of the files begin.
    piece: what to convert.
    folder: where.
    settings: how.

  Returns:
    What the manifest says of it: {"name", "shards": [{"file", "records",
    "bytes", "sha256", "index_sha256"}], "broken": [[name, reason]]}.
  """
  broken: list[Broken] = []
  records = _records(piece, settings.image_size, broken)
  shards = []
  for part in itertools.count():
    first = next(records, None)
    if first is None:
      break
    path = folder / f"{number:05d}-{part:03d}.array_record"
    index = index_path(path)
    chosen = itertools.islice(records, settings.shard_size - 1)
    count = 0
    with shard_files.whole_files(path, index) as (new_path, new_index):
      with (
        shard_files.record_writer(new_path) as writer,
        new_index.open("w", encoding="utf-8") as lines,
      ):
        for header, image in itertools.chain([first], chosen):
          writer.write(record.encode_record(header, image))
          lines.write(record.header_line(header) + "\n")
          count += 1
      shards.append(
        {
          "file": path.name,
          "records": count,
          "bytes": new_path.stat().st_size,
          "sha256": shard_files.file_hash(new_path),
          "index_sha256": shard_files.file_hash(new_index),
        }
      )
  return {
    "name": piece.name,
    "shards": shards,
    "broken": [list(entry) for entry in broken],
  }


def index_path(shard: Path) -> Path:
  """Returns the file with the headers of a shard."""
  return shard.with_suffix(".jsonl")


def _records(
  piece: Piece, image_size: int | None, broken: list[Broken]
) -> Iterator[tuple[record.Header, bytes]]:
  """Yields header and image file of each sample; the others go to `broken`."""
  for sample in piece.samples():
    if isinstance(sample, Broken):
      broken.append(_printable(*sample))
      continue
    try:
      made = _record(sample, image_size)
    except UnidentifiedImageError as error:
      broken.append(_printable(sample.name, str(error)))
    # Pillow raises SyntaxError for some broken PNGs.
    except (OSError, ValueError, SyntaxError) as error:
      reason = f"{type(error).__name__}: {error}"
      broken.append(_printable(sample.name, reason))
    else:
      yield made


def _record(
  sample: Sample, image_size: int | None
) -> tuple[record.Header, bytes]:
  """Returns header and image file; raises what decoders raise."""
  sample.name.encode()  # A name that is not UTF-8 cannot be hashed.
  image = sample.image
  pixels = decode_whole(io.BytesIO(image))
  if image_size is not None and min(pixels.shape[:2]) > image_size:
    # What training would make of it at this size, and without a loss.
    pixels = decode_image(io.BytesIO(image), image_size)
    image = _png(pixels)
  height, width, _ = pixels.shape
  digest = hashlib.sha256(f"{width} {height} ".encode())
  digest.update(np.ascontiguousarray(pixels))
  header = {
    "name": sample.name,
    "captions": sample.captions,
    "label": sample.label,
    "digest": digest.hexdigest()[:32],
    "width": width,
    "height": height,
  }
  return header, image


def _png(pixels: np.ndarray) -> bytes:
  """Returns an image, uint8[H, W, 3], as a PNG file."""
  with contextlib.closing(io.BytesIO()) as stream:
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _printable(name: str, reason: str) -> Broken:
  """Returns what any JSON file and any terminal can show."""
  return Broken(text_files.printable(name), text_files.printable(reason))
