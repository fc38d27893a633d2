"""Pictures of a run: originals beside reconstructions at every depth."""

from collections.abc import Sequence
import io
import pathlib

import numpy as np

from unicode_jax import files

TILE_GAP = 2
HEADER_HEIGHT = 14


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Maps pixels in [-1, 1] to uint8, clipping what lies outside."""
  return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def save_grid(
  path: pathlib.Path,
  columns: Sequence[np.ndarray],
  titles: Sequence[str],
  min_tile: int = 64,
) -> None:
  """Writes one PNG: a row per image, a column per version of it.

  Args:
    path: File to write; it is replaced atomically.
    columns: Arrays float32[N, H, W, 3] in [-1, 1], one per column.
    titles: One heading per column.
    min_tile: Images smaller than this many pixels are enlarged by a whole
      factor, without smoothing.
  """
  from PIL import Image, ImageDraw  # pylint: disable=g-import-not-at-top

  tiles = np.stack([to_uint8(c) for c in columns], axis=1)
  factor = -(-min_tile // tiles.shape[2])
  tiles = tiles.repeat(factor, axis=2).repeat(factor, axis=3)
  rows, cols, height, width, _ = tiles.shape
  tiles = np.pad(
    tiles,
    ((0, 0), (0, 0), (0, TILE_GAP), (0, TILE_GAP), (0, 0)),
    constant_values=255,
  )
  body = tiles.transpose(0, 2, 1, 3, 4).reshape(
    rows * (height + TILE_GAP), cols * (width + TILE_GAP), 3
  )
  sheet = Image.new(
    "RGB", (body.shape[1], body.shape[0] + HEADER_HEIGHT), "white"
  )
  sheet.paste(Image.fromarray(body), (0, HEADER_HEIGHT))
  draw = ImageDraw.Draw(sheet)
  for i, title in enumerate(titles):
    draw.text((i * (width + TILE_GAP) + 2, 1), title, fill="black")
  save_sheet(path, sheet)


def save_sheet(path: pathlib.Path, sheet) -> None:
  """Writes a `PIL.Image` as PNG, whole, in a folder that is made if missing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  sheet.save(content, "PNG")
  files.write_whole(path, content.getvalue())
