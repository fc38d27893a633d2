"""What a stage hands to the loop: its steps, and all else that it knows.

A `Phase` is one kind of step, a `Stage` says which comes when. `Programs` are
what they compile to.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from unicode_jax import sharding
from unicode_jax.training import (
  alarm as alarm_lib,
  guard as guard_lib,
  state as state_lib,
)

Transition = Callable[[state_lib.TrainState], state_lib.TrainState]


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
  """One kind of step.

  Attributes:
    name: For metrics, e.g. "tokenizer".
    stream: Name of the data stream that it reads.
    step: Pure (state, batch, constants) -> (state, metrics).
    items: How much a step consumes, all processes together.
    unit: Of what, "images" or "tokens".
    constants: Tree of arrays that every step is given, e.g. fixed weights.
  """

  name: str
  stream: str
  step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
  items: int
  unit: str
  constants: Any = None


class Stage(Protocol):
  """What the loop needs to know about a training stage.

  All of it is called with the loop's mesh set (`jax.set_mesh`).
  """

  total_steps: int
  alarm_config: alarm_lib.AlarmConfig

  def start(self, mesh: jax.sharding.Mesh) -> Any:
    """Returns the tree of arrays that `init` begins from, None without one.

    They are spread over the mesh. It is called once: a stage may let go of
    what it hands over.
    """

  def init(self, key: jax.Array, start: Any) -> state_lib.TrainState:
    """Draws the initial state."""

  def make_iterators(
    self, start: Mapping[str, int], share: tuple[int, int]
  ) -> dict[str, Any]:
    """Opens the grain iterator of every stream.

    Args:
      start: Batches to leave out, by stream; a `collections.Counter`.
      share: The part of every batch to read, and of how many.
    """

  def batch_names(self, stream: str, batch: int) -> list[str]:
    """Names the examples of a batch, of all processes.

    Args:
      stream: One of those of `make_iterators`.
      batch: Its number, from 0.
    """

  def phase(self, step: int) -> Phase:
    """Returns what to do at a step (0-based)."""

  def transition(self, step: int) -> Transition | None:
    """Says how rows move between table and codebook after a step.

    Args:
      step: Steps done.

    Returns:
      A pure function of the state, None where nothing moves.
    """

  def summarize(
    self,
    state: state_lib.TrainState,
    window: Mapping[str, np.ndarray],
    batch: Mapping[str, jax.Array] | None,
  ) -> dict[str, float]:
    """Turns the sums of a log window into scalars to log.

    `batch` is the window's latest image batch, None without one.
    """

  def growing_energy(self, metrics: Mapping[str, float]) -> str | None:
    """Says which depth adds energy, if one does (H2)."""

  def likely_cause(self, metrics: Mapping[str, float]) -> str:
    """Says why the codebook would be collapsing, should it be."""

  def evaluate(
    self, state: state_lib.TrainState, *, final: bool
  ) -> dict[str, float]:
    """Measures held-out data; more of it at the end of the run."""

  def pictures(
    self, state: state_lib.TrainState
  ) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Returns columns and titles of a picture grid per held-out set."""

  def headline(self, metrics: Mapping[str, float]) -> str:
    """Says the metrics in a few words, for the progress line."""


def jit_step(phase: Phase, shardings, mesh: jax.sharding.Mesh) -> Callable:
  """Makes the program of a phase.

  Args:
    phase: What it does.
    shardings: Of the state.
    mesh: Device mesh.

  Returns:
    (state, batch, constants) -> (state, metrics), as of `guard.guarded`; the
    state is donated, and the metrics are whole on every device.
  """
  return jax.jit(
    guard_lib.guarded(phase.step),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )


class Programs:
  """Compiles every step and transition once, and keeps the state in place."""

  def __init__(self, shardings, mesh: jax.sharding.Mesh):
    self._shardings, self._mesh = shardings, mesh
    self._steps: dict[Phase, tuple[Callable, Any]] = {}
    self._moves: dict[Transition, Callable] = {}

  def step(self, phase: Phase, state, batch):
    """Runs a phase's step; the state is donated."""
    if phase not in self._steps:
      everywhere = sharding.replicated(self._mesh)
      self._steps[phase] = (
        jit_step(phase, self._shardings, self._mesh),
        jax.device_put(phase.constants, everywhere),
      )
    program, constants = self._steps[phase]
    return program(state, batch, constants)

  def move(self, transition: Transition, state):
    """Runs a transition; the state is donated."""
    if transition not in self._moves:
      self._moves[transition] = jax.jit(
        transition, donate_argnums=0, out_shardings=self._shardings
      )
    return self._moves[transition](state)
