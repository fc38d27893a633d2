"""Orbax checkpoints of everything that a run needs to go on exactly.

One checkpoint holds the whole `TrainState` and a small JSON record (resolved
config, alarm, seconds trained). It holds no position in the data: that follows
from the step (`loop`). It can be restored on another mesh, by another number of
processes.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import orbax.checkpoint as ocp


class Checkpointer:
  """Saves and restores runs; a thin layer over `ocp.CheckpointManager`."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens a folder of checkpoints.

    Args:
      directory: Folder, made if missing.
      keep: How many of the newest checkpoints to keep.
    """
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self) -> int | None:
    """Returns the newest whole checkpoint's step, None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    record: Mapping[str, Any],
  ) -> None:
    """Saves asynchronously; returns when the state has been copied.

    Args:
      step: Steps done.
      state: Tree of jax.Array.
      record: JSON-able facts.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(dict(record)),
      ),
    )

  def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    """Restores a checkpoint.

    Args:
      step: Which checkpoint.
      state: Tree of `jax.ShapeDtypeStruct` with shardings: structure, shapes
        and placement of what comes back.

    Returns:
      The state and the JSON record.
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(state),
        record=ocp.args.JsonRestore(),
      ),
    )
    return restored["state"], restored["record"]

  def close(self) -> None:
    """Waits for the last save to be whole."""
    self._manager.wait_until_finished()
    self._manager.close()
