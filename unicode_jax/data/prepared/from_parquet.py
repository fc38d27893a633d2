"""Parquet files with images, as Hugging Face data sets are published.

The image is a column of bytes, or of {bytes, path}. A class that Hugging Face
stores as a number gets its name from the file's metadata.
"""

from collections.abc import Iterator
import dataclasses
import importlib
from pathlib import Path
from typing import Any

from unicode_jax import config as config_lib
from unicode_jax.data import text_files
from unicode_jax.data.prepared.inputs import (
  CAPTION_KEYS,
  LABEL_KEY,
  Broken,
  Columns,
  Inputs,
  Sample,
  find_files,
  read_captions,
  read_label,
  stamped,
)
from unicode_jax.data.sources.images import MAX_IMAGE_BYTES

_ROWS = 1  # Read at a time: few bytes may stand for many large images.


@dataclasses.dataclass(frozen=True)
class ParquetPiece:
  """Some row groups of one file; see `inputs.Piece`.

  Attributes:
    name: for reports.
    file: start of the names of its samples, which are numbers of rows.
    path: the file.
    row_groups: which.
    first_row: of the first row group.
    columns: all that are there.
  """

  name: str
  file: str
  path: Path
  row_groups: tuple[int, ...]
  first_row: int
  columns: Columns

  def samples(self) -> Iterator[Sample | Broken]:
    """Yields the rows in order."""
    _, parquet = _import_pyarrow()
    row = self.first_row
    try:
      with parquet.ParquetFile(self.path) as file:
        classes = _class_names(file.schema_arrow, self.columns.label)
        batches = file.iter_batches(
          _ROWS, self.row_groups, columns=[c for c in self.columns if c]
        )
        for batch in batches:
          for i in range(batch.num_rows):
            yield self._sample(f"{self.file}/{row}", batch, i, classes)
            row += 1
    except Exception as error:  # As in `parquet_inputs`.
      yield Broken(
        self.name, f"damaged, the rest from row {row} is left out: {error}"
      )

  def _sample(
    self, name: str, batch: Any, i: int, classes: list[str] | None
  ) -> Sample | Broken:
    """Returns a row of a batch."""

    def value(column):
      return None if column is None else batch.column(column)[i].as_py()

    try:
      image = value(self.columns.image)
      if isinstance(image, dict):
        image = image["bytes"]
      if image is None:
        return Broken(name, "no bytes of an image in this row")
      if len(image) > MAX_IMAGE_BYTES:
        return Broken(name, f"more than {MAX_IMAGE_BYTES} bytes")
      label = value(self.columns.label)
      if classes is not None and label is not None and label != -1:
        if not isinstance(label, int) or not 0 <= label < len(classes):
          raise ValueError(
            f"the label {label!r:.60} is none of {len(classes)} classes"
          )
        label = classes[label]
      captions = read_captions(value(self.columns.caption))
      return Sample(name, image, captions, read_label(label))
    except (ValueError, KeyError, OverflowError) as error:
      return Broken(name, str(error))


def parquet_inputs(
  path: str, columns: Columns, images_per_piece: int
) -> Inputs:
  """Lists parquet files and what their columns are.

  Args:
    path: one file, a folder or a pattern; see `inputs.find_files`.
    columns: where the fields lie.
    images_per_piece: rows of one piece, unless a row group is larger.

  Raises:
    ConfigError: the package is missing, there is no such file, one is damaged
      or lacks a column.
  """
  pyarrow, parquet = _import_pyarrow()
  files = find_files(path, ".parquet")
  pieces = []
  for name, file in files:
    try:
      with parquet.ParquetFile(file) as opened:
        rows = [
          opened.metadata.row_group(i).num_rows
          for i in range(opened.metadata.num_row_groups)
        ]
        found = _find_columns(pyarrow, file, opened.schema_arrow, columns)
    except config_lib.ConfigError:
      raise
    # Arrow's own, and what Python raises on names and numbers of a bad footer.
    except Exception as error:
      raise config_lib.ConfigError(
        f"{file} cannot be read as parquet ({text_files.printable(str(error))})"
        ": get it again, or leave it out of --path"
      ) from error
    for groups, first, stop in _spans(rows, images_per_piece):
      title = f"{name} rows {first} to {stop - 1}"
      pieces.append(ParquetPiece(title, name, file, groups, first, found))
  return Inputs(stamped(files), pieces)


def _spans(
  rows: list[int], images_per_piece: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
  """Yields (row groups, first row, row behind the last) of each piece."""
  groups, first, stop = [], 0, 0
  for group, count in enumerate(rows):
    if groups and stop - first + count > images_per_piece:
      yield tuple(groups), first, stop
      groups, first = [], stop
    groups.append(group)
    stop += count
  if groups:
    yield tuple(groups), first, stop


def _import_pyarrow() -> tuple[Any, Any]:
  """Imports pyarrow, or says how to install it."""
  try:
    return (
      importlib.import_module("pyarrow"),
      importlib.import_module("pyarrow.parquet"),
    )
  except ModuleNotFoundError as error:
    raise config_lib.ConfigError(
      f"--from=parquet needs the package {error.name!r}, which is not "
      'installed; run: pip install -e ".[parquet]"'
    ) from error


def _find_columns(
  pyarrow: Any, file: Path, schema: Any, columns: Columns
) -> Columns:
  """Returns the columns that are there; a ConfigError where one is missing."""
  types = pyarrow.types

  def is_bytes(kind):
    return types.is_binary(kind) or types.is_large_binary(kind)

  def is_image(kind):
    if types.is_struct(kind):
      return any(f.name == "bytes" and is_bytes(f.type) for f in kind)
    return is_bytes(kind)

  listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
  for flag, name in columns._asdict().items():
    if name is not None and schema.names.count(name) != 1:
      raise config_lib.ConfigError(
        f"{file} has no column {name!r} (--{flag}_column), or several: it has "
        f"{listed}"
      )
  image = columns.image
  if image is None:
    images = [field.name for field in schema if is_image(field.type)]
    image = "image" if "image" in images else None
    if image is None and len(images) == 1:
      image = images[0]
  if image is None or not is_image(schema.field(image).type):
    raise config_lib.ConfigError(
      f"{file} needs a column of image files, as bytes or as {{bytes, path}}: "
      f"it has {listed}; name one with --image_column"
    )
  caption, label = columns.caption, columns.label
  if caption is None:
    caption = next((key for key in CAPTION_KEYS if key in schema.names), None)
  if label is None and LABEL_KEY in schema.names:
    label = LABEL_KEY
  return Columns(image, caption, label)


def _class_names(schema: Any, label: str | None) -> list[str] | None:
  """Returns the names of the classes that Hugging Face keeps, if it does."""
  try:
    text = (schema.metadata or {})[b"huggingface"].decode()
    info = text_files.parse_json(text)
    names = info["info"]["features"][label]["names"]
  except (KeyError, TypeError, ValueError):
    return None
  return names if isinstance(names, list) else None
