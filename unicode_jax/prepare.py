r"""Converts a data set to ArrayRecord shards, for training at any size.

WebDataset's tars, a folder of images, or parquet files:
  python -m unicode_jax.prepare --from=webdataset --path='DIR/*.tar' --out=OUT
  python -m unicode_jax.prepare --from=folder --path=DIR --captions=FILE \
    --out=OUT
  python -m unicode_jax.prepare --from=parquet --path=DIR --out=OUT

Then train with --config.data.source=arrayrecord --config.data.path=OUT. The
same command again goes on where this one stopped, or writes what is missing.
Compare every byte of a finished folder with its checksums:
  python -m unicode_jax.prepare --out=OUT --check
"""

from collections.abc import Callable
import os
from pathlib import Path
import sys
import time
from typing import Any

from absl import flags

from unicode_jax import command, config as config_lib

FORMATS = ("webdataset", "folder", "parquet")
_SHOWN = 10


def main() -> None:
  """Converts, or checks, what the flags name.

  Raises:
    ConfigError: If a flag names nothing that can be used.
  """
  values = flags.FLAGS
  if values.check:
    check(values.out)
    return
  for flag in ("from", "path"):
    if values[flag].value is None:
      raise config_lib.ConfigError(
        f"--{flag} is not set: name what to convert, or give --check to "
        "compare a finished --out with its checksums"
      )
  prepare(
    values["from"].value,
    values.path,
    values.out,
    captions=values.captions,
    image_column=values.image_column,
    caption_column=values.caption_column,
    label_column=values.label_column,
    image_size=values.image_size,
    shard_size=values.shard_size,
    workers=values.workers,
    max_broken=values.max_broken,
  )


def prepare(
  source: str,
  path: str,
  out: str | os.PathLike[str],
  *,
  captions: str | None = None,
  image_column: str | None = None,
  caption_column: str | None = None,
  label_column: str | None = None,
  image_size: int | None = None,
  shard_size: int = 8192,
  workers: int | None = None,
  max_broken: float = 0.1,
) -> dict[str, Any]:
  """Converts a data set to ArrayRecord shards.

  Args:
    source: One of FORMATS.
    path: File, folder or pattern; for "folder" a folder.
    out: Folder for the shards; one that was begun is finished.
    captions: For "folder", JSONL of {"image", "text"}.
    image_column: Parquet: column; webdataset: extension. None for the usual.
    caption_column: Parquet: column; webdataset: key in `json`.
    label_column: Parquet: column; webdataset: key in `json`.
    image_size: Pixels. Images whose shorter side is longer are stored as PNG
      squares of this size, which training at this size sees as it would see
      the originals; None keeps all files as they are.
    shard_size: Images in one file at the most.
    workers: Processes; None for one per core.
    max_broken: Share of the images that may be broken (10 always may).

  Returns:
    The manifest.

  Raises:
    ConfigError: If a value is bad, there is no data, too much of it is broken,
      or `out` holds other data.
  """
  for flag, value, low, high in (
    ("image_size", image_size, 1, 2**14),
    ("shard_size", shard_size, 1, 10**9),
    ("workers", workers, 1, 1024),
    ("max_broken", max_broken, 0, 1),
  ):
    if value is not None and not low <= value <= high:
      raise config_lib.ConfigError(
        f"--{flag}={value} must be between {low} and {high}"
      )
  columns = {
    "image_column": image_column,
    "caption_column": caption_column,
    "label_column": label_column,
  }
  unread = columns if source == "folder" else {"captions": captions}
  for flag, value in unread.items():
    if value is not None:
      raise config_lib.ConfigError(
        f"--{flag}={value} is not read with --from={source}: leave it out"
      )
  if captions is not None and not os.path.isfile(os.path.expanduser(captions)):
    raise config_lib.ConfigError(
      f"--captions={captions!r} is not a file: name one of JSON lines"
    )
  from unicode_jax.data.prepared import (
    from_folder,
    from_parquet,
    from_webdataset,
    inputs as inputs_lib,
    making,
    manifest as manifest_lib,
    shards,
  )

  settings = shards.Settings(shard_size, image_size)
  fields = inputs_lib.Columns(*columns.values())
  if source == "folder":
    inputs = from_folder.folder_inputs(path, captions, shard_size)
  elif source == "parquet":
    inputs = from_parquet.parquet_inputs(path, fields, shard_size)
  elif source == "webdataset":
    inputs = from_webdataset.webdataset_inputs(path, fields)
  else:
    raise config_lib.ConfigError(
      f"--from={source} must be one of {', '.join(FORMATS)}"
    )
  folder = Path(os.path.expanduser(out))
  wanted = manifest_lib.new_manifest(
    inputs, {"from": source, **columns}, settings, path
  )
  if (folder / manifest_lib.MANIFEST).is_file():
    print(f"{folder} is finished: only what is missing is done")
  manifest = making.make(
    inputs,
    wanted,
    settings,
    folder,
    workers=workers or os.cpu_count() or 1,
    max_broken=max_broken,
    report=_reporter(),
  )
  _summarise(manifest, folder)
  return manifest


def check(out: str | os.PathLike[str]) -> None:
  """Compares every byte of a finished folder with its checksums.

  Args:
    out: What `prepare` wrote.

  Raises:
    ConfigError: If something is missing or damaged; says what and the remedy.
  """
  from unicode_jax.data.prepared import manifest as manifest_lib

  files, headers = manifest_lib.open_prepared(
    Path(os.path.expanduser(out)), thorough=True
  )
  print(f"{out} is whole: {len(headers)} images in {len(files)} shards")


def _reporter() -> Callable[[dict[str, Any]], None]:
  """Returns what prints a line for every piece that is done."""
  start = time.monotonic()

  def report(manifest):
    pieces = manifest["pieces"]
    print(
      f"{sum(map(bool, pieces))} of {len(pieces)} pieces, "
      f"{manifest['records']} images, {manifest['broken']} broken, "
      f"{time.monotonic() - start:.0f} s",
      flush=True,
    )

  return report


def _summarise(manifest: dict[str, Any], folder: Path) -> None:
  """Says what a finished folder holds."""
  from unicode_jax.data.prepared import manifest as manifest_lib

  broken = manifest_lib.broken(manifest)
  for name, reason in broken[:_SHOWN]:
    print(f"left out {name}: {reason}", file=sys.stderr)
  if len(broken) > _SHOWN:
    print(
      f"... {len(broken)} in all: see {folder / manifest_lib.MANIFEST}",
      file=sys.stderr,
    )
  print(
    f"{manifest['records']} images in {len(manifest_lib.shards(manifest))} "
    f"shards, broken inputs left out: {len(broken)}; train with "
    f"--config.data.source=arrayrecord --config.data.path={folder}"
  )


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  flags.DEFINE_enum("from", None, FORMATS, "What is converted.")
  flags.DEFINE_string(
    "path", None, "File, folder or pattern in quotes; for a folder, its name."
  )
  flags.DEFINE_string("out", None, "Folder for the shards.", required=True)
  flags.DEFINE_string(
    "captions", None, "Captions of --from=folder, as of data.captions."
  )
  flags.DEFINE_string(
    "image_column",
    None,
    "Column of the image in parquet, by default 'image' or the only one; "
    "extension of the image in a webdataset that has several.",
  )
  flags.DEFINE_string(
    "caption_column",
    None,
    "Column of parquet, or key of a webdataset's json, with the caption or a "
    "list of captions; by default caption, captions or text.",
  )
  flags.DEFINE_string(
    "label_column", None, "The same for the class; by default label."
  )
  flags.DEFINE_integer(
    "image_size",
    None,
    "Cut images whose shorter side is longer to squares of so many pixels, "
    "stored as PNG, for training at this size; by default files are kept.",
  )
  flags.DEFINE_integer("shard_size", 8192, "Images in one file at the most.")
  flags.DEFINE_integer(
    "workers",
    None,
    "Processes, by default one per core; the result is the same.",
  )
  flags.DEFINE_float(
    "max_broken",
    0.1,
    "Share of the inputs that may be broken (10 always may).",
  )
  flags.DEFINE_bool("check", False, "Compare a finished --out with checksums.")
  command.run(main, "the same command goes on from here")


if __name__ == "__main__":
  run()
