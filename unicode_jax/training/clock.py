"""The time that steps take, by phase."""

import collections
import time

import jax

from unicode_jax.training import goodput as goodput_lib, phase as phase_lib


class Clock:
  """Time by phase, without waiting for the device at every step.

  A phase's first step in this process compiles; it is timed apart.
  """

  def __init__(self, goodput: goodput_lib.Goodput):
    """Starts with nothing; all time is told to `goodput`, too."""
    self.goodput = goodput
    self.compile_seconds = 0.0
    self._seen: set[phase_lib.Phase] = set()
    self._phase: phase_lib.Phase | None = None
    self._pending = None
    self._clear()

  def _clear(self):
    self._seconds = collections.Counter()
    self._steps = collections.Counter()

  def read(self, iterator):
    """Takes a batch; time that the device waits for it is told apart."""
    before = self.goodput.spend("data")
    start = time.monotonic()
    batch = next(iterator)
    self.goodput.spend(before)
    if self._phase is not None and not _is_ready(self._pending):
      self.goodput.move("data", before, time.monotonic() - start)
    return batch

  def run(
    self, programs: phase_lib.Programs, phase: phase_lib.Phase, state, batch
  ):
    """Runs one step, and counts it."""
    if phase not in self._seen:
      self.pause("compile")
      self._seen.add(phase)
      start = time.monotonic()
      result = jax.block_until_ready(programs.step(phase, state, batch))
      self.compile_seconds += time.monotonic() - start
      return result
    if phase != self._phase:
      self.pause(goodput_lib.STEP)
      self._phase, self._start = phase, time.monotonic()
    state, step_metrics = programs.step(phase, state, batch)
    self._pending = step_metrics
    self._steps[phase] += 1
    return state, step_metrics

  def pause(self, cause: str) -> None:
    """Waits for the device and closes the running interval.

    Args:
      cause: What time is spent on from here.
    """
    if self._phase is not None:
      jax.block_until_ready(self._pending)
      self._seconds[self._phase] += time.monotonic() - self._start
      self._phase = None
    self.goodput.spend(cause)

  def flush(self) -> dict[str, float]:
    """Returns seconds per step and items per second, by phase."""
    self.pause("evaluation")
    result = {"time/compile_seconds": self.compile_seconds}
    for phase, seconds in self._seconds.items():
      per_step = seconds / self._steps[phase]
      result[f"time/{phase.name}_step_seconds"] = per_step
      result[f"time/{phase.name}_{phase.unit}_per_second"] = (
        phase.items / per_step
      )
    self._clear()
    return result


def _is_ready(tree) -> bool:
  """Says whether the device has computed something."""
  return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))
