"""Orbax checkpoints of everything that a run needs to go on exactly.

One checkpoint holds the whole `TrainState` and a small JSON record (resolved
config, alarm, seconds trained). Positions in the data follow from the step and
the record (`loop`). It can be restored on another mesh, by another number of
processes. Checksums of every array and of the record tell whether it came back
as it was; what did not is set aside, never removed.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import json
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from unicode_jax import config as config_lib, files, interruption
from unicode_jax.training import checksums as checksums_lib

_SUMS, _OWN_SUM = "checksums", "checksum"
SET_ASIDE = "set_aside"
# TensorStore names what it was doing from the outside to the inside.
_TENSORSTORE = re.compile(
  r'.*Error reading "(?P<array>[\w.]+)/[^"]*".*: (?P<reason>Error .*)'
)
# What orbax and TensorStore raise where files cannot be written.
_WRITE_ERRORS = (OSError, ValueError)
_NOT_THE_FILE = {
  errno.EACCES,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.ENOTCONN,
  errno.EPERM,
  errno.ESTALE,
  errno.ETIMEDOUT,
}
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_PAUSE = 0.5  # Seconds.
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
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
      ),
    )

  def __enter__(self) -> "Checkpointer":
    """Returns itself."""
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Waits for the last save; what failed before is not hidden by it."""
    own = kind is not None and not issubclass(kind, interruption.Preempted)
    if own and jax.process_count() > 1:
      return  # The others do not know, and a save waits for all of them.
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
      begun = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          record=ocp.args.JsonSave(record),
        ),
      )
    except _WRITE_ERRORS as error:
      raise self._failure(error) from error
    if not begun:
      raise self._failure(f"there are later ones: {self.steps()}")

  def wait(self) -> None:
    """Waits until the last save is whole.

    Raises:
      OSError: If it failed; older ones are whole.
    """
    try:
      self._manager.wait_until_finished()
    except _WRITE_ERRORS as error:
      raise self._failure(error) from error

  def _failure(self, reason: Exception | str) -> OSError:
    return OSError(
      errno.EIO,
      f"a checkpoint could not be written ({_first_line(reason)}); those of "
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
      ConfigError: If there are checkpoints, but none is whole, or one is of
        arrays of other shapes.
      OSError: If one of several processes alone finds one damaged. It is set
        aside then, if there is an older one, so that all may start again.
    """
    damaged: dict[int, str] = {}
    newer = []
    for step in self.steps():
      if newest is None or step <= newest:
        check_shapes(self._directory / str(step), state)
        try:
          found = _twice(lambda step=step: self._read(step, state))
        except DamagedError as error:
          damaged[step] = str(error)
        else:
          self._set_aside(newer)
          return step, *found, damaged
      newer.append(step)
    if damaged:
      raise config_lib.ConfigError(
        f"no checkpoint in {self._directory} can be restored ("
        + "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        + "): bring one back from a copy, or train into another --workdir"
      )
    return None

  def _read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(state),
          record=ocp.args.JsonRestore(),
        ),
      )
      record = opened(restored["record"])
    except Exception as error:
      if jax.process_count() == 1:
        raise _damage(error) from error
      # The others wait for this process, so there is no agreeing with them.
      problem, then = str(_damage(error)), "there is no older one"
      # Without any a run would begin anew, as if there never had been one.
      if any(older < step for older in self.steps()):
        self._rename(step)
        then = "it is set aside"
      raise OSError(
        errno.EIO,
        f"the checkpoint of step {step} is damaged for process "
        f"{jax.process_index()} ({problem}); {then}",
        str(self._directory),
      ) from error
    check_sums(restored["state"], record)
    return restored["state"], record

  def _set_aside(self, steps: list[int]) -> None:
    """Moves checkpoints out of the way, to a folder beside theirs."""
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        self._rename(step)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("set_aside")
    self._manager.reload()

  def _rename(self, step: int) -> None:
    folder = self._directory.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    place, number = folder / str(step), 1
    while place.exists():
      number += 1
      place = folder / f"{step}-{number}"
    with contextlib.suppress(FileNotFoundError):  # Another process was first.
      (self._directory / str(step)).rename(place)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record with a checksum of its own."""
  text = json.dumps(record, sort_keys=True)
  # A copy: it is written later, when what it was made of may have changed.
  return json.loads(text) | {_OWN_SUM: checksums_lib.record_checksum(text)}


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
    record = config_lib.parse_json(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise DamagedError(f"{path}: {_first_line(error)}") from error
  if not isinstance(record, dict):
    raise DamagedError(f"{path} holds no object")
  for name in ("config", _SUMS):
    if not isinstance(record.get(name, {}), dict):
      raise DamagedError(f"{path}: {name} is no object")
  return opened(record)


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
  except Exception as error:
    if jax.process_count() == 1:
      raise _damage(error) from error
    raise config_lib.ConfigError(
      f"{folder} is damaged for process {jax.process_index()} "
      f"({_damage(error)}): bring it back from a copy, or move it away"
    ) from error
  check_sums(restored, record)
  return restored["variables"]


def check_shapes(folder: pathlib.Path, state: Any) -> None:
  """Compares the shapes of a checkpoint's arrays with those that are wanted.

  They differ where another version of the package made it: no damage, and so
  nothing to go back for. What cannot be read is left for the restoring to find.

  Args:
    folder: Of the checkpoint.
    state: Tree of arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ConfigError: If one differs.
  """
  try:
    found = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
  except Exception:  # pylint: disable=broad-exception-caught
    return
  stored = {name: tuple(leaf.shape) for name, leaf in _named(found)}
  for name, leaf in _named(state):
    if stored.get(name, leaf.shape) != leaf.shape:
      raise config_lib.ConfigError(
        f"{folder}: {name} is {list(stored[name])}, and {list(leaf.shape)} in "
        "this version of unicode_jax with this config: go on with the version "
        "that began the run, or train into another --workdir"
      )


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields the leaves of a tree that have a shape, with their paths."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if hasattr(leaf, "shape"):
      yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


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


def _damage(error: Exception) -> DamagedError:
  """Takes what reading a checkpoint raised for damage, if it may be.

  Of a damaged file, anything may come. But what says that there is no memory,
  no permission or no connection says nothing about the file.

  Raises:
    Exception: The error, if it is of that kind.
  """
  passing = isinstance(error, OSError) and error.errno in _NOT_THE_FILE
  if passing or isinstance(error, MemoryError) or _NO_MEMORY in str(error):
    raise error
  if isinstance(error, DamagedError):
    return error
  return DamagedError(_first_line(error))


def _twice(read: Callable[[], Any]) -> Any:
  """Reads again where damage was found: it may have been the way here.

  Several processes find the same sums, and so read again together.
  """
  try:
    return read()
  except DamagedError:
    time.sleep(_PAUSE)
    return read()


def _first_line(error: Exception | str) -> str:
  text = str(error).strip() or type(error).__name__
  line = re.split(r" \[tensorstore_spec| See full TensorStore", text)[0]
  line = line.partition("\n")[0]
  if found := _TENSORSTORE.fullmatch(line):
    line = f"{found['array']}: {found['reason']}"
  return line[:300]
