"""Makes a prepared data set: pieces in parallel, going on where it stopped.

This process alone writes down which pieces are done, after their shards are on
the disk under their names. So whatever is killed, and when, the folder says no
more than what is there, and the same command finishes it.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import multiprocessing
from pathlib import Path
from typing import Any

from unicode_jax import config as config_lib, interruption
from unicode_jax.data import shard_files
from unicode_jax.data.prepared import manifest as manifest_lib
from unicode_jax.data.prepared.inputs import Inputs, Piece
from unicode_jax.data.prepared.manifest import MANIFEST, UNFINISHED
from unicode_jax.data.prepared.shards import Settings, write_piece
from unicode_jax.data.sources.source import max_skipped

Report = Callable[[dict[str, Any]], None]


def make(
  inputs: Inputs,
  manifest: dict[str, Any],
  settings: Settings,
  folder: Path,
  *,
  workers: int,
  max_broken: float,
  report: Report,
) -> dict[str, Any]:
  """Writes what is missing of a prepared data set.

  Args:
    inputs: what to convert.
    manifest: of `manifest.new_manifest`, of the same inputs and settings.
    settings: how.
    folder: where; new, or begun with an equal manifest.
    workers: processes that convert.
    max_broken: share of the images that may be broken; see `max_skipped`.
    report: called with the manifest after every piece.

  Returns:
    The finished manifest.

  Raises:
    ConfigError: the folder is of other data, holds other files or is full;
      too many inputs are broken, or all.
    RunError: a worker was killed.
  """
  manifest, missing = _begin(manifest, folder)
  if missing is None:
    return manifest
  try:
    for number, done in _written(
      inputs.pieces, missing, folder, settings, workers
    ):
      manifest["pieces"][number] = done
      manifest["records"] = sum(
        shard["records"] for shard in manifest_lib.shards(manifest)
      )
      manifest["broken"] = len(manifest_lib.broken(manifest))
      shard_files.write_json(folder / UNFINISHED, manifest)
      report(manifest)
  except OSError as error:  # What cannot be read is broken, and no exception.
    raise config_lib.ConfigError(
      f"--out={folder} cannot be written ({error.strerror}): make room there, "
      "and run the same command again; what is converted counts"
    ) from error
  try:
    _check_broken(manifest, max_broken)
  except config_lib.ConfigError:
    if not manifest["records"]:  # Nothing that another run could go on from.
      (folder / UNFINISHED).unlink(missing_ok=True)
      shard_files.remove_left_overs(folder)
      with contextlib.suppress(OSError):  # It holds something after all.
        folder.rmdir()
    raise
  shard_files.write_json(folder / MANIFEST, manifest)
  (folder / UNFINISHED).unlink(missing_ok=True)
  shard_files.remove_left_overs(folder)
  return manifest


def _begin(
  wanted: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[int] | None]:
  """Returns the manifest so far and the missing pieces; None if it is whole."""
  found = manifest_lib.read_manifest(folder) if folder.is_dir() else None
  if found is None:
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = wanted
  else:
    manifest_lib.check_same(folder, found, wanted)
    for number, piece in enumerate(found["pieces"]):
      if piece and any(
        manifest_lib.damage(folder, shard) for shard in piece["shards"]
      ):
        found["pieces"][number] = None
  missing = [i for i, piece in enumerate(found["pieces"]) if piece is None]
  finished = (folder / MANIFEST).is_file()
  if finished and not missing:
    (folder / UNFINISHED).unlink(missing_ok=True)
    return found, None
  shard_files.write_json(folder / UNFINISHED, found)
  (folder / MANIFEST).unlink(missing_ok=True)
  return found, missing


def _check_free(folder: Path) -> None:
  """Raises ConfigError where a folder holds anything of somebody else."""
  if folder.exists() and not folder.is_dir():
    raise config_lib.ConfigError(f"--out={folder} is a file: choose another")
  ours = shard_files.begun(folder / UNFINISHED).name
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.name != ours and not shard_files.is_left_over(path):
      raise config_lib.ConfigError(
        f"--out={folder} holds other files, such as {path.name}: choose a new "
        "folder"
      )


def _check_broken(manifest: dict[str, Any], max_broken: float) -> None:
  """Raises ConfigError where too many inputs are broken, or all."""
  broken = manifest_lib.broken(manifest)
  total = manifest["records"] + len(broken)
  allowed = max_skipped(max_broken, total)
  if manifest["records"] and len(broken) <= allowed:
    return
  shown = "\n  ".join(f"{name}: {reason}" for name, reason in broken[:10])
  if not manifest["records"]:
    raise config_lib.ConfigError(
      f"{manifest['path']} holds no image that can be read: name another "
      f"--path{shown and ':'}\n  {shown}".rstrip()
    )
  raise config_lib.ConfigError(
    f"{len(broken)} of {total} inputs are broken, more than the {allowed} that "
    "are left out: repair them and choose another --out, or give a larger "
    f"--max_broken, and what is converted counts:\n  {shown}"
  )


def _written(
  pieces: Sequence[Piece],
  numbers: Sequence[int],
  folder: Path,
  settings: Settings,
  workers: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields pieces as they are done: number, and what the manifest says."""
  # None are missing where only the manifest had not its name yet.
  if workers == 1 or len(numbers) <= 1:
    for number in numbers:
      yield number, write_piece(number, pieces[number], folder, settings)
    return
  others = set(multiprocessing.active_children())
  executor = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(numbers)),
    # A copy of this process might hold locks of its threads.
    multiprocessing.get_context("spawn"),
    initializer=interruption.end_with_parent,
  )
  try:
    futures = {
      executor.submit(write_piece, n, pieces[n], folder, settings): n
      for n in numbers
    }
    for future in concurrent.futures.as_completed(futures):
      yield futures[future], future.result()
  except BrokenProcessPool as error:
    raise config_lib.RunError(
      "a worker process was killed, perhaps because memory was short: run the "
      "same command again, with fewer --workers; what is converted counts"
    ) from error
  finally:
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in set(multiprocessing.active_children()) - others:
      worker.terminate()
