"""Image files of any kind as square RGB arrays, and where they lie.

Decoding decides the pixels of every source of data (METHOD section 2 reads
them); `cache` keeps what it returns. Nothing here knows of splits or texts.
"""

from collections.abc import Callable, Iterator
import contextlib
import io
import os
from pathlib import Path
import stat
import threading
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from unicode_jax import config as config_lib

_T = TypeVar("_T")

# Extensions that `load_folder` looks for.
IMAGE_SUFFIXES = (
  *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
  *(".tga", ".tif", ".tiff", ".webp"),
)
# Larger files are left out unread, bytes.
MAX_IMAGE_BYTES = 2**28
# Pillow's names of their formats. It would hand others, whatever the name of
# the file says, to programs of their own (Ghostscript).
_FORMATS = (
  *("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
)
# Where Pillow suspects a bomb, pixels: 0.7 GB, and a few times that on the way.
_MAX_PIXELS = 178_956_970
_STRIP_PIXELS = 2**22  # Converted at a time.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode_image(
  file: str | os.PathLike[str] | io.BytesIO, image_size: int
) -> np.ndarray:
  """Reads an image file of any size and mode.

  Turned as its EXIF tag says, put on white where it is transparent, cut to the
  central square and resized with antialiasing. An animation gives its first
  frame.

  Args:
    file: path or stream, of one of the kinds of `IMAGE_SUFFIXES`, whatever its
      name says.
    image_size: S, pixels.

  Returns:
    uint8[S, S, 3], RGB.

  Raises:
    OSError, ValueError, SyntaxError: it cannot be read, or is too large.
  """

  def square(opened):
    whole = opened.width * opened.height
    # JPEGs can be decoded at a fraction of their size, at no loss here; but a
    # progressive one is held as a whole until its last pass.
    opened.draft(None, (2 * image_size, 2 * image_size))
    small = opened.width * opened.height
    with _DECODING.take(whole if opened.info.get("progressive") else small):
      return np.asarray(
        ImageOps.fit(
          _to_rgb(_upright(opened)),
          (image_size, image_size),
          Image.Resampling.BICUBIC,
        )
      )

  return _with_opened(file, square)


def decode_whole(file: io.BytesIO) -> np.ndarray:
  """Reads an image file as `decode_image` does, at its own size and shape.

  Args:
    file: as of `decode_image`.

  Returns:
    uint8[H, W, 3], RGB.

  Raises:
    OSError, ValueError, SyntaxError: as `decode_image`.
  """

  def whole(opened):
    with _DECODING.take(opened.width * opened.height):
      return np.asarray(_to_rgb(_upright(opened)))

  return _with_opened(file, whole)


def stored_size(file: str | os.PathLike[str]) -> tuple[int, int]:
  """Returns width and height as the file has them; raises as `decode_image`."""
  return _with_opened(file, lambda opened: opened.size)


@contextlib.contextmanager
def open_image_file(file: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a regular file of at most `MAX_IMAGE_BYTES`.

  Raises:
    OSError: there is none, or it cannot be read.
    ValueError: it is larger, or something else: a pipe would keep its reader
      waiting, a device has no end.
  """

  def without_waiting(path, mode):
    return os.open(path, mode | os.O_NONBLOCK)

  with open(file, "rb", opener=without_waiting) as stream:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise ValueError("neither a file nor a link to one")
    if status.st_size > MAX_IMAGE_BYTES:
      raise ValueError(
        f"{status.st_size} bytes are more than {MAX_IMAGE_BYTES}"
      )
    yield stream


def _with_opened(
  file: str | os.PathLike[str] | io.BytesIO,
  work: Callable[[Image.Image], _T],
) -> _T:
  """Returns what `work` makes of an image; raises as `decode_image`."""
  with (
    contextlib.nullcontext(file)
    if isinstance(file, io.BytesIO)
    else open_image_file(file)
  ) as stream:
    try:
      with Image.open(stream, formats=_FORMATS) as opened:
        return work(opened)
    except UnidentifiedImageError:  # Its message names an address in memory.
      raise UnidentifiedImageError(
        "not an image file of a kind that is read"
      ) from None
    except Image.DecompressionBombError as error:
      raise config_lib.ConfigError(str(error)) from error
    except (OSError, ValueError, SyntaxError):
      raise
    # Whatever breaks inside of Pillow's readers on a damaged file gets out:
    # struct.error, KeyError, TypeError, zlib.error, MemoryError, ...
    except Exception as error:
      raise ValueError(f"{type(error).__name__}: {error}") from error


class _Budget:
  """Lets threads work side by side while what they take has room."""

  def __init__(self, total: int):
    self._total = self._left = total
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def take(self, amount: int) -> Iterator[None]:
    """Waits for room; more than there is in all takes all."""
    amount = min(amount, self._total)
    with self._changed:
      self._changed.wait_for(lambda: amount <= self._left)
      self._left -= amount
    try:
      yield
    finally:
      with self._changed:
        self._left += amount
        self._changed.notify_all()


# Of all threads of a process: as much memory as one largest image takes.
_DECODING = _Budget(_MAX_PIXELS)


def _upright(image: Image.Image) -> Image.Image:
  """Turns an image as its EXIF tag says; one that cannot be read is none."""
  image.load()
  try:
    tag = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # As in `_with_opened`; the pixels are there.
    tag = None
  turn = _UPRIGHT.get(tag) if isinstance(tag, int) else None
  return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any of Pillow's modes to RGB, with little memory besides."""
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  rows = max(_STRIP_PIXELS // image.width, 1)
  boxes = [
    (0, top, image.width, min(top + rows, image.height))
    for top in range(0, image.height, rows)
  ]
  largest = 0.0
  if image.mode in ("I", "F"):  # What white is, only the values can tell.
    largest = max(_largest(image.crop(box)) for box in boxes)
  if len(boxes) == 1:
    return _strip_to_rgb(image, largest)
  converted = Image.new("RGB", image.size)
  for box in boxes:
    converted.paste(_strip_to_rgb(image.crop(box), largest), box)
  return converted


def _largest(image: Image.Image) -> float:
  """Returns the largest finite value, or 0."""
  values = np.asarray(image, np.float32)
  return float(values.max(initial=0.0, where=np.isfinite(values)))


def _strip_to_rgb(image: Image.Image, largest: float) -> Image.Image:
  """Converts a part of an image whose largest value is given."""
  if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, one channel.
    values = gray = np.asarray(image, np.float32)
    if image.mode == "F" and largest <= 1:
      gray = values * 255
    elif image.mode.startswith("I;16") or largest > 255:
      gray = values / 257
    gray = np.nan_to_num(gray).clip(0, 255).round()
    if isinstance(clear := image.info.get("transparency"), int):
      gray[values == clear] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def list_images(folder: Path) -> list[dict[str, Any]]:
  """Lists images below a folder, following links.

  Args:
    folder: where to look. Names that start with a dot are passed over.

  Returns:
    {"name": relative path, "stamp": see `file_stamp`} of each, by name.

  Raises:
    OSError: a folder below cannot be read; it may be full of images.
  """

  def fail(error):
    raise error

  contents, seen = [], set()
  for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
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
      contents.append(
        {"name": path.relative_to(folder).as_posix(), "stamp": file_stamp(path)}
      )
  return sorted(contents, key=lambda content: content["name"])


def file_stamp(path: Path) -> list[int]:
  """Returns what changes when a file does: [bytes, mtime in ns].

  [0, 0] for one that is not there, e.g. a dangling link, or may not be read
  yet: that is reported when it is read.
  """
  try:
    status = path.stat()
    if not os.access(path, os.R_OK):  # Leave to read it changes no time.
      return [0, 0]
  except (OSError, ValueError):  # ValueError: a name that no file can have.
    return [0, 0]
  return [status.st_size, status.st_mtime_ns]
