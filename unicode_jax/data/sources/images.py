"""Image files of any kind as square RGB arrays, and where they lie.

Decoding decides the pixels of every source of data (METHOD section 2 reads
them); `cache` keeps what it returns. Nothing here knows of splits or texts.
"""

import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unicode_jax import config as config_lib

# Extensions that `load_folder` looks for.
IMAGE_SUFFIXES = (
  *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
  *(".tga", ".tif", ".tiff", ".webp"),
)
# Pillow's names of their formats. No others are read, whatever a file is named:
# Pillow would hand some to programs of their own.
IMAGE_FORMATS = (
  *("BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
  *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),
)


def decode_image(
  file: str | os.PathLike[str] | io.BytesIO, image_size: int
) -> np.ndarray:
  """Reads an image file of any size and mode.

  Turned as its EXIF tag says, put on white where it is transparent, cut to the
  central square and resized with antialiasing. An animation gives its first
  frame.

  Args:
    file: path or stream.
    image_size: S, pixels.

  Returns:
    uint8[S, S, 3], RGB.

  Raises:
    OSError, ValueError, SyntaxError: Pillow cannot read it.
  """
  try:
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
      # JPEGs can be decoded at a fraction of their size, at no loss here.
      opened.draft(None, (2 * image_size, 2 * image_size))
      image = ImageOps.fit(
        _to_rgb(ImageOps.exif_transpose(opened)),
        (image_size, image_size),
        Image.Resampling.BICUBIC,
      )
      return np.asarray(image)
  except Image.DecompressionBombError as error:
    raise config_lib.ConfigError(str(error)) from error


def decode_whole(file: io.BytesIO) -> np.ndarray:
  """Reads an image file as `decode_image` does, at its own size and shape.

  Args:
    file: of one of the kinds of `IMAGE_SUFFIXES`, whatever its name says.

  Returns:
    uint8[H, W, 3], RGB.

  Raises:
    OSError, ValueError, SyntaxError: as `decode_image`.
  """
  try:
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
      return np.asarray(_to_rgb(ImageOps.exif_transpose(opened)))
  except Image.DecompressionBombError as error:
    raise config_lib.ConfigError(str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any of Pillow's modes to RGB."""
  if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, one channel.
    values = np.asarray(image, np.float32)
    if image.mode == "F" and values.max(initial=0.0) <= 1:
      values = values * 255
    elif image.mode.startswith("I;16") or values.max(initial=0.0) > 255:
      values = values / 257
    values = np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(values).convert("RGB")
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
  """
  contents, seen = [], set()
  for parent, folders, files in os.walk(folder, followlinks=True):
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

  [0, 0] for one that is not there, e.g. a dangling link: that is reported when
  it is read.
  """
  try:
    status = path.stat()
  except (OSError, ValueError):  # ValueError: a name that no file can have.
    return [0, 0]
  return [status.st_size, status.st_mtime_ns]
