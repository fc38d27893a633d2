"""Orbax checkpoints of everything that a run needs to go on exactly.

One checkpoint holds the whole `TrainState` and a small JSON record (resolved
config, alarm, seconds trained). Positions in the data follow from the step and
the record (`loop`). It can be restored on another mesh, by another number of
processes. Checksums of every array and of the record tell whether it came back
as it was; what did not is set aside, never removed.
"""

from collections.abc import Mapping
import errno
import json
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from unicode_jax import config as config_lib, files
from unicode_jax.training import checksums as checksums_lib

_SUMS, _OWN_SUM = "checksums", "checksum"
SET_ASIDE = "set_aside"
# Where orbax puts the JSON of the item "record".
_RECORD = pathlib.Path("record", "metadata")


class DamagedError(Exception):
  """Raised where a checkpoint is not what was saved; says what is wrong."""


class Checkpointer:
  """Saves and restores runs; a thin layer over `ocp.CheckpointManager`."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens a folder of checkpoints.

    Args:
      directory: Folder, made if missing.
      keep: How many of the newest checkpoints to keep.
    """
    self._directory = directory.absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def __enter__(self) -> "Checkpointer":
    """Returns itself."""
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Waits for the last save; what failed before is not hidden by it."""
    try:
      self.wait()
      self._manager.close()
    except Exception:  # pylint: disable=broad-exception-caught
      if kind is None:
        raise

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints that are there, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def reached_preemption(self, step: int) -> bool:
    """Says whether the processes of a run are to end after a step.

    JAX's service learns of a preemption in one process, and finds the next
    step that all of them will reach. A single process has no such service.

    Args:
      step: Steps done; every process asks after every step.
    """
    return self._manager.reached_preemption(step)

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Saves asynchronously; returns when the state has been copied.

    Args:
      step: Steps done.
      state: Tree of jax.Array.
      record: JSON-able facts.

    Raises:
      OSError: If this or the save before it failed; older ones are whole.
    """
    record = sealed(dict(record) | {_SUMS: checksums_lib.checksums(state)})
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          record=ocp.args.JsonSave(record),
        ),
      )
    except Exception as error:  # Orbax passes on what its storage raises.
      raise self._failure(error) from error

  def wait(self) -> None:
    """Waits until the last save is whole.

    Raises:
      OSError: If it failed; older ones are whole.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(error) from error

  def _failure(self, error: Exception) -> OSError:
    return OSError(
      errno.EIO,
      f"a checkpoint could not be written ({_first_line(error)}); those of "
      f"steps {self.steps()} are whole",
      str(self._directory),
    )

  def restore(
    self, state: Any, newest: int | None = None
  ) -> tuple[int, Any, dict[str, Any], dict[int, str]] | None:
    """Restores the newest checkpoint that is whole.

    Newer ones are set aside, lest the run meet them again.

    Args:
      state: Tree of `jax.ShapeDtypeStruct` with shardings: structure, shapes
        and placement of what comes back.
      newest: Leave out checkpoints of later steps; None takes all.

    Returns:
      Step, state, JSON record, and what is wrong with the damaged ones, by
      step. None without a checkpoint.

    Raises:
      ConfigError: If there are checkpoints, but none is whole.
    """
    damaged: dict[int, str] = {}
    newer = []
    for step in self.steps():
      if newest is None or step <= newest:
        found, problem = None, ""
        try:
          found = self._read(step, state)
        except Exception as error:  # Of a damaged file, anything may come.
          problem = _first_line(error)
        if _everywhere(found is not None):
          self._set_aside(newer)
          return step, *found, damaged
        damaged[step] = problem or "damaged for another process"
      newer.append(step)
    if damaged:
      raise config_lib.ConfigError(
        f"no checkpoint in {self._directory} can be restored ("
        + "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        + "): bring one back from a copy, or train into another --workdir"
      )
    return None

  def _read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(state),
        record=ocp.args.JsonRestore(),
      ),
    )
    record = opened(restored["record"])
    check_sums(restored["state"], record)
    return restored["state"], record

  def _set_aside(self, steps: list[int]) -> None:
    """Moves checkpoints out of the way, to a folder beside theirs."""
    if not steps:
      return
    if jax.process_index() == 0:
      folder = self._directory.parent / SET_ASIDE
      folder.mkdir(exist_ok=True)
      for step in steps:
        place, number = folder / str(step), 1
        while place.exists():
          number += 1
          place = folder / f"{step}-{number}"
        (self._directory / str(step)).rename(place)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("set_aside")
    self._manager.reload()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record with a checksum of its own."""
  text = json.dumps(record, sort_keys=True)
  return dict(record) | {_OWN_SUM: checksums_lib.record_checksum(text)}


def opened(record: Mapping[str, Any]) -> dict[str, Any]:
  """Checks a record that `sealed` made, and returns what it was made of.

  Raises:
    DamagedError: If it is another. Records of old runs have no checksum.
  """
  record = dict(record)
  expected = record.pop(_OWN_SUM, None)
  text = json.dumps(record, sort_keys=True)
  if expected not in (None, checksums_lib.record_checksum(text)):
    raise DamagedError("the record has another checksum than when it was saved")
  return record


def write_record(
  folder: pathlib.Path, state: Any, record: Mapping[str, Any]
) -> None:
  """Writes the record of a checkpoint whose state is written already.

  Args:
    folder: Of the checkpoint.
    state: Its arrays, by the paths under which they are read.
    record: JSON-able facts.
  """
  sums = {_SUMS: checksums_lib.checksums(state)}
  path = folder / _RECORD
  path.parent.mkdir()
  files.write_whole(path, json.dumps(sealed(dict(record) | sums)))


def read_record(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the record of a checkpoint.

  Args:
    folder: Of the checkpoint, named after its step.

  Returns:
    The record; {} where an old checkpoint has none.

  Raises:
    DamagedError: If it is not what was saved.
  """
  path = folder / _RECORD
  if not path.exists():
    return {}
  try:
    return opened(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise DamagedError(f"{path}: {_first_line(error)}") from error


def read_variables(folder: pathlib.Path, config, variables: Any) -> Any:
  """Reads variables of a checkpoint, and nothing else of its state.

  Args:
    folder: Of the checkpoint, named after its step.
    config: Of the run folder, which must be what the checkpoint was made with.
    variables: Tree of `jax.ShapeDtypeStruct` with shardings; perhaps a part of
      what there is.

  Returns:
    The variables.

  Raises:
    DamagedError: If they are not what was saved.
    ConfigError: If the config is another.
  """
  record = read_record(folder)
  then, now = record.get("config", {}), config_lib.flatten(config)
  differing = [
    f"{key}: {old!r} then, {new!r} now"
    for key, old, new in config_lib.differences(then, now)
    # Of another version of the package, or folders that were moved.
    if key in then and key in now and key not in config_lib.FOLDERS
  ]
  if differing:
    raise config_lib.ConfigError(
      f"{folder.parents[1] / 'config.json'} is not what the checkpoint of step "
      f"{folder.name} was trained with ({'; '.join(differing)}): it was edited "
      "or is damaged; set it right"
    )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        (folder / "state").absolute(),
        args=ocp.args.PyTreeRestore(
          item={"variables": variables},
          restore_args={
            "variables": ocp.checkpoint_utils.construct_restore_args(variables)
          },
          partial_restore=True,
        ),
      )
  except Exception as error:  # Of a damaged file, anything may come.
    raise DamagedError(_first_line(error)) from error
  check_sums(restored, record)
  return restored["variables"]


def check_sums(state: Any, record: Mapping[str, Any]) -> None:
  """Compares arrays with the checksums that a checkpoint's record has.

  Args:
    state: The state, or a part of it under the same paths.
    record: Of `opened`; one of an old run has no checksums.

  Raises:
    DamagedError: If an array is not what was saved.
  """
  if _SUMS not in record:
    return
  if names := checksums_lib.changed(state, record[_SUMS]):
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise DamagedError(
      f"{names[0]}{more} has another checksum than when it was saved"
    )


def _everywhere(value: bool) -> bool:
  """Says whether something holds in every process of the run."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.int32(value)).all())


def _first_line(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300]
