"""A folder of decoded images: written once, memory-mapped ever after.

Decoding PNGs and rendering SVGs costs more than training on them does, so each
source is turned once into `images.npy` (uint8[N, S, S, 3]) beside `meta.json`
in a folder whose name hashes everything that decides the pixels. A changed
source therefore gets a new folder and never a stale one (the concern of hazard
H12, for pixels). Folders appear by rename, so a killed or racing process can
never leave one half-written. What is read together with an image (a caption in
the same record) may be kept with it. Nothing here knows what the images are.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import hashlib
import json
import logging
import os
from pathlib import Path
import tempfile
from typing import Any, NamedTuple

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import text_files

# Raise it when the decoding of images or the fields kept with them change.
_FORMAT = 2
_CHUNK = 256  # Images held in memory while the cache is being written.


# What a decoder returns: uint8[S, S, 3], alone or with fields for the item.
Decoded = np.ndarray | tuple[np.ndarray, dict[str, Any]]


class CachedImages(NamedTuple):
  """Where the decoded images lie, and what is known about each.

  Attributes:
    path: the .npy file, uint8[N, S, S, 3].
    items: one dictionary per readable image: the caller's own fields, those
      that `decode` adds, `row` (its index in the array) and `digest` (hash of
      its pixels).
    broken: (name, reason) of each image that could not be read.
  """

  path: Path
  items: list[dict[str, Any]]
  broken: list[tuple[str, str]]


def default_cache_dir() -> Path:
  """Returns $UNICODE_JAX_CACHE, or ~/.cache/unicode_jax where that is unset."""
  configured = os.environ.get("UNICODE_JAX_CACHE")
  return Path(os.path.expanduser(configured or "~/.cache/unicode_jax"))


def cached_images(
  source: str,
  contents: Sequence[dict[str, Any]],
  decode: Callable[[dict[str, Any]], Decoded],
  image_size: int,
  *,
  version: str = "",
  cache_dir: str | os.PathLike[str] | None = None,
  max_broken: int = 0,
) -> CachedImages:
  """Returns the decoded images of a source, decoding them the first time.

  Args:
    source: short name of the source, the start of the folder's name.
    contents: one JSON-able dictionary per image, with at least `name`. All of
      it is hashed into the key: put sizes and mtimes in where files can change.
    decode: turns one of them into uint8[S, S, 3], or into that and a JSON-able
      dictionary that becomes part of the item; an `OSError`, `ValueError` or
      `SyntaxError` from it (what decoders raise) marks the image as broken.
      Runs in threads.
    image_size: S, pixels.
    version: versions of the packages that decide the pixels.
    cache_dir: parent of the cache folders; None for `default_cache_dir()`.
    max_broken: how many broken images to skip before giving up.

  Raises:
    ConfigError: more than `max_broken` images are broken, or none is readable;
      or the cache is damaged.
  """
  root = default_cache_dir()
  if cache_dir:
    root = Path(os.path.expanduser(cache_dir))
  key = json.dumps([_FORMAT, source, version, image_size, list(contents)])
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = root / f"{source}-{image_size}-{digest}"
  if not folder.is_dir():
    _write(folder, contents, decode, image_size, max_broken)
  cached = _read(folder, (len(contents), image_size, image_size, 3))
  broken = cached.broken
  _check_broken(broken, len(contents), max_broken)  # It may be lower now.
  if broken:
    logging.warning(
      "%s: skipped %d of %d images that could not be read: %s%s",
      source,
      len(broken),
      len(contents),
      "; ".join(_shown(broken)),
      "; ..." if len(broken) > 10 else "",
    )
  return cached


def _read(folder: Path, shape: tuple[int, ...]) -> CachedImages:
  """Opens a cache folder; a ConfigError where it is not what was written."""
  path = folder / "images.npy"
  try:
    found = np.load(path, mmap_mode="r")
    if found.shape != shape or found.dtype != np.uint8:
      raise ValueError(f"{path.name} holds {found.dtype}{list(found.shape)}")
    text = (folder / "meta.json").read_text(encoding="utf-8")
    meta = text_files.parse_json(text)
    if not all(0 <= item["row"] < len(found) for item in meta["items"]):
      raise ValueError("meta.json names rows that are not there")
    broken = [(name, reason) for name, reason in meta["broken"]]
  except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
    raise config_lib.ConfigError(
      f"the image cache {folder} is damaged ({type(error).__name__}: {error}): "
      "remove that folder, and it is made again"
    ) from error
  return CachedImages(path, meta["items"], broken)


def _write(
  folder: Path,
  contents: Sequence[dict[str, Any]],
  decode: Callable[[dict[str, Any]], Decoded],
  image_size: int,
  max_broken: int,
) -> None:
  """Decodes into a temporary folder, then renames it to `folder`."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(
      prefix=f"{folder.name}.tmp-",
      dir=folder.parent,
      ignore_cleanup_errors=True,
    )
  except OSError as error:
    raise _unwritable(folder, error) from error
  logging.info("decoding %d images into %s", len(contents), folder)
  items, broken = [], []

  def attempt(content):
    try:
      return decode(content)
    # Pillow raises SyntaxError for some broken PNGs.
    except (OSError, ValueError, SyntaxError) as error:
      return f"{type(error).__name__}: {error}"

  with temporary as name:
    building = Path(name) / folder.name
    building.mkdir()
    shape = (len(contents), image_size, image_size, 3)
    pixels = building / "images.npy"
    try:
      array = np.lib.format.open_memmap(
        pixels, mode="w+", dtype=np.uint8, shape=shape
      )
      # A disk that fills while it is written through memory kills the process.
      if hasattr(os, "posix_fallocate"):  # Not on a Mac.
        with pixels.open("r+b") as file:
          os.posix_fallocate(file.fileno(), 0, pixels.stat().st_size)
    except OSError as error:
      raise _unwritable(folder, error) from error
    workers = min(32, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
      for start in range(0, len(contents), _CHUNK):
        chunk = contents[start : start + _CHUNK]
        results = executor.map(attempt, chunk)
        for row, (content, decoded) in enumerate(zip(chunk, results), start):
          if isinstance(decoded, str):
            broken.append((content["name"], decoded))
            continue
          image, fields = (
            decoded if isinstance(decoded, tuple) else (decoded, {})
          )
          array[row] = image
          digest = hashlib.sha256(image.tobytes()).hexdigest()[:32]
          items.append({**content, **fields, "row": row, "digest": digest})
        _check_broken(broken, start + len(chunk), max_broken)
    if not items:
      raise config_lib.ConfigError(
        f"none of the {len(contents)} images could be read: {_shown(broken)[0]}"
      )
    array.flush()
    meta = json.dumps({"items": items, "broken": broken})
    (building / "meta.json").write_text(meta, encoding="utf-8")
    try:
      building.rename(folder)
    except OSError:
      if not folder.is_dir():
        raise
      # Another process was faster; what it wrote is the same.


def _unwritable(folder: Path, error: OSError) -> OSError:
  """Returns an error that says what to do where a cache cannot be written."""
  return OSError(
    error.errno,
    f"cannot write the image cache ({error.strerror}); make room, or set "
    "config.data.cache_dir or $UNICODE_JAX_CACHE to a writable folder",
    str(folder.parent),
  )


def _check_broken(
  broken: Sequence[tuple[str, str]], tried: int, max_broken: int
) -> None:
  """Raises ConfigError where more images are broken than may be skipped."""
  if len(broken) <= max_broken:
    return
  shown = "\n  ".join(_shown(broken))
  raise config_lib.ConfigError(
    f"{len(broken)} of the first {tried} images cannot be read, more than the "
    f"{max_broken} that are skipped; remove or repair them"
    # Sources that allow none leave the user no choice.
    + (", or raise config.data.max_broken" if max_broken else "")
    + f":\n  {shown}"
  )


def _shown(broken: Sequence[tuple[str, str]]) -> list[str]:
  """Returns the first broken images, a line each."""
  return [
    text_files.printable(f"{name}: {reason}") for name, reason in broken[:10]
  ]
