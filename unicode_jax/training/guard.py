"""What keeps numbers that are not finite out of a run.

A step whose loss or gradient is not finite changes nothing (`guarded`). One
such batch does no harm; many in a row mean that the parameters themselves went
bad, and that the run should go back to where they were good (`Guard`, and the
loop; Chowdhery et al. 2022, PaLM, section 5.1, go back before a spike of the
loss and leave out the batches that led to it).
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import statistics

import jax
import jax.numpy as jnp

# Metrics of a step by which it is judged.
JUDGED = ("loss", "gradient_norm")
SKIPPED = "skipped"
# Norms that a spike is compared with: the latest, and how many are needed.
_KEPT, _NEEDED = 200, 20


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
  """What a run does about trouble.

  Attributes:
    skip_limit: Steps in a row that may be skipped.
    rewind_limit: Times that a process may go back after more of them.
    spike_factor: A gradient norm of so many times the median is written down.
    grace_seconds: Time to save a checkpoint and end when asked to.
    stall_seconds: Without a sign of progress for so long, all stacks are
      written down.
  """

  skip_limit: int
  rewind_limit: int
  spike_factor: float
  grace_seconds: float
  stall_seconds: float


def guarded(step: Callable) -> Callable:
  """Makes a step change nothing where its loss or gradient is not finite.

  Args:
    step: (state, batch, constants) -> (state, metrics), as of `phase.Phase`.

  Returns:
    The same with the metric "skipped", float32[], 0 or 1. A skipped step counts
    as a step, so that the next one reads other data; its histograms are zero.
  """

  def run(state, batch, constants):
    new, metrics = step(state, batch, constants)
    finite = jnp.all(
      jnp.stack(
        [
          jnp.isfinite(value)
          for name, value in metrics.items()
          if name.endswith(JUDGED)
        ]
      )
    )

    def choose(new_leaf, old_leaf):
      if new_leaf is old_leaf:  # Nothing to choose, nothing to compute.
        return old_leaf
      return jnp.where(finite, new_leaf, old_leaf)

    kept = jax.tree.map(choose, new, state).replace(step=new.step)
    metrics = {
      name: jnp.where(finite, value, 0) if value.ndim else value
      for name, value in metrics.items()
    }
    return kept, metrics | {SKIPPED: 1.0 - finite.astype(jnp.float32)}

  return run


@dataclasses.dataclass(frozen=True)
class Spike:
  """A gradient norm far above the others.

  Attributes:
    step: Steps done, this one included.
    name: Of the metric.
    norm: Its value.
    median: Of the norms before it.
  """

  step: int
  name: str
  norm: float
  median: float


class Guard:
  """Watches skipped steps and gradient norms from one log line to the next."""

  def __init__(
    self,
    config: RecoveryConfig,
    in_a_row: Mapping[str, Sequence[int]] | None = None,
  ):
    """Starts the watch.

    Args:
      config: Limits.
      in_a_row: Steps that were skipped, and the latest of their phase, when a
        checkpoint was saved: numbers by phase.
    """
    self._config = config
    self.in_a_row = {k: list(v) for k, v in (in_a_row or {}).items()}
    self._norms: dict[str, collections.deque[float]] = {}

  def look(self, phase: str, step: int, skipped: bool) -> None:
    """Looks at a step; all of them in order.

    Args:
      phase: Name of its kind: one may be well while another is not.
      step: Its number.
      skipped: Whether it was.
    """
    if skipped:
      self.in_a_row.setdefault(phase, []).append(step)
    else:
      self.in_a_row.pop(phase, None)

  def poisoned_since(self) -> int | None:
    """Returns the first of too many skipped steps in a row, None without.

    Only steps of one phase count as a row.
    """
    first = [
      steps[0]
      for steps in self.in_a_row.values()
      if len(steps) > self._config.skip_limit
    ]
    return min(first, default=None)

  def spikes(
    self, norms: Mapping[str, Sequence[tuple[int, float]]]
  ) -> list[Spike]:
    """Finds gradient norms far above the median of those before.

    Args:
      norms: (step, norm) of the steps that were not skipped, by metric.
    """
    found = []
    for name, values in norms.items():
      kept = self._norms.setdefault(name, collections.deque(maxlen=_KEPT))
      for step, norm in values:
        if len(kept) >= _NEEDED:
          median = statistics.median(kept)
          if norm > self._config.spike_factor * median:
            found.append(Spike(step, name, norm, median))
        kept.append(norm)
    return found
