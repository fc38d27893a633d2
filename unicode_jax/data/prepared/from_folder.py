"""A folder of images with a captions file, as `data.source=folder` reads it.

Names are relative paths, so the same images are held out of either.
"""

from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path

from unicode_jax import config as config_lib
from unicode_jax.data.prepared.inputs import Broken, Inputs, Sample, stamped
from unicode_jax.data.sources.folder import read_captions
from unicode_jax.data.sources.images import (
  IMAGE_SUFFIXES,
  list_images,
  open_image_file,
)


@dataclasses.dataclass(frozen=True)
class FolderPiece:
  """Some images of a folder; see `inputs.Piece`.

  Attributes:
    name: for reports.
    folder: where they lie.
    images: relative path and captions of each.
  """

  name: str
  folder: Path
  images: tuple[tuple[str, tuple[str, ...]], ...]

  def samples(self) -> Iterator[Sample | Broken]:
    """Yields the images in order."""
    for name, captions in self.images:
      try:
        with open_image_file(self.folder / name) as file:
          image = file.read()
      except OSError as error:
        yield Broken(name, f"{type(error).__name__}: {error.strerror}")
      except ValueError as error:
        yield Broken(name, str(error))
      else:
        yield Sample(name, image, captions)


def folder_inputs(
  path: str, captions: str | None, images_per_piece: int
) -> Inputs:
  """Lists a folder of images.

  Args:
    path: the folder, searched recursively.
    captions: JSONL as of `data.captions`, or None.
    images_per_piece: images of one piece.

  Raises:
    ConfigError: no such folder, no image in it, or a bad captions file.
  """
  folder = Path(os.path.expanduser(path))
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f"--path={path!r} is not a folder: give one with images"
    )
  contents = list_images(folder)
  if not contents:
    raise config_lib.ConfigError(
      f"no image in {folder} or below it; looked for files that end in "
      f"{', '.join(IMAGE_SUFFIXES)}"
    )
  files = [(content["name"], *content["stamp"]) for content in contents]
  names = [name for name, *_ in files]
  said = read_captions(captions, set(names))
  if captions is not None:
    files += stamped([("captions", Path(os.path.expanduser(captions)))])
  pieces = [
    FolderPiece(
      f"images {start} to {min(start + images_per_piece, len(names)) - 1}",
      folder,
      tuple(
        (name, said.get(name, ()))
        for name in names[start : start + images_per_piece]
      ),
    )
    for start in range(0, len(names), images_per_piece)
  ]
  return Inputs(files, pieces)
