"""The training loop. It never imports a stage: it is given one."""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import math
import pathlib
import time
from typing import Any, Protocol

import jax
import numpy as np

from unicode_jax import config as config_lib, sharding
from unicode_jax.training import (
  alarm as alarm_lib,
  checkpoint as checkpoint_lib,
  metrics as metrics_lib,
  pictures,
  state as state_lib,
)

# For what runs once: its optimization costs more than it saves.
_COMPILE_FAST = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How often the loop does what; all in steps.

  Attributes:
    seed: Seed of parameters, data order and augmentation.
    log_every: Between two lines of metrics.
    eval_every: Between two evaluations on held-out data.
    picture_every: Between two picture grids.
    checkpoint_every: Between two checkpoints.
    keep_checkpoints: How many of the newest checkpoints stay.
    record: JSON-able facts that every checkpoint carries.
  """

  seed: int
  log_every: int
  eval_every: int
  picture_every: int
  checkpoint_every: int
  keep_checkpoints: int
  record: Mapping[str, Any]


Transition = Callable[[state_lib.TrainState], state_lib.TrainState]


class DivergenceError(config_lib.RunError):
  """Raised when a loss is not finite."""


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

    `batch` is the latest image batch, None before the first.
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
    (state, batch, constants) -> (state, metrics); the state is donated, and the
    metrics are whole on every device.
  """
  return jax.jit(
    phase.step,
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )


class _Programs:
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


class _Clock:
  """Time by phase, without waiting for the device at every step.

  A phase's first step in this process compiles; it is timed apart.
  """

  def __init__(self):
    self.compile_seconds = 0.0
    self._seen: set[Phase] = set()
    self._phase: Phase | None = None
    self._pending = None
    self._clear()

  def _clear(self):
    self._seconds = collections.Counter()
    self._steps = collections.Counter()

  def run(self, programs: _Programs, phase: Phase, state, batch):
    """Runs one step, and counts it."""
    if phase not in self._seen:
      self.pause()
      self._seen.add(phase)
      start = time.monotonic()
      result = jax.block_until_ready(programs.step(phase, state, batch))
      self.compile_seconds += time.monotonic() - start
      return result
    if phase != self._phase:
      self.pause()
      self._phase, self._start = phase, time.monotonic()
    state, step_metrics = programs.step(phase, state, batch)
    self._pending = step_metrics
    self._steps[phase] += 1
    return state, step_metrics

  def pause(self) -> None:
    """Waits for the device and closes the running interval."""
    if self._phase is not None:
      jax.block_until_ready(self._pending)
      self._seconds[self._phase] += time.monotonic() - self._start
      self._phase = None

  def flush(self) -> dict[str, float]:
    """Returns seconds per step and items per second, by phase."""
    self.pause()
    result = {"time/compile_seconds": self.compile_seconds}
    for phase, seconds in self._seconds.items():
      per_step = seconds / self._steps[phase]
      result[f"time/{phase.name}_step_seconds"] = per_step
      result[f"time/{phase.name}_{phase.unit}_per_second"] = (
        phase.items / per_step
      )
    self._clear()
    return result


def train(
  stage: Stage,
  workdir: pathlib.Path,
  config: LoopConfig,
  mesh: jax.sharding.Mesh,
  until_step: int | None = None,
) -> state_lib.TrainState:
  """Trains a stage in a run folder, resuming from its newest checkpoint.

  Args:
    stage: What to train.
    workdir: Run folder.
    config: Intervals.
    mesh: Device mesh.
    until_step: Stop after this many steps, with a checkpoint; None runs to the
      end.

  Returns:
    The state.

  Raises:
    alarm_lib.CollapseError: If the collapse alarm is configured to stop.
    DivergenceError: If a loss is not finite.
  """
  # Set, so that kernels that XLA cannot split know the devices too.
  with jax.set_mesh(mesh):
    return _train(stage, workdir, config, mesh, until_step)


def _train(stage, workdir, config, mesh, until_step):
  """As `train`, with the mesh set."""
  workdir.mkdir(parents=True, exist_ok=True)
  checkpointer = checkpoint_lib.Checkpointer(
    workdir / "checkpoints", config.keep_checkpoints
  )
  key = jax.random.key(config.seed)
  start = stage.start(mesh)
  shapes = jax.eval_shape(stage.init, key, start)
  shardings = sharding.state_shardings(shapes, mesh)
  latest = checkpointer.latest_step()
  if latest is None:
    state = jax.jit(
      stage.init, out_shardings=shardings, compiler_options=_COMPILE_FAST
    )(key, start)
    step, record = 0, {"alarm_below_since": None, "train_seconds": 0.0}
  else:
    target = sharding.placed_shapes(shapes, shardings)
    state, record = checkpointer.restore(latest, target)
    step = latest
  del start
  # Each step takes one batch of its phase's stream.
  iterators = stage.make_iterators(
    collections.Counter(stage.phase(s).stream for s in range(step)),
    sharding.batch_share(mesh),
  )
  stop_at = stage.total_steps
  if until_step is not None:
    stop_at = min(stop_at, until_step)

  is_main = jax.process_index() == 0
  writer = metrics_lib.MetricWriter(workdir, latest) if is_main else None
  progress = metrics_lib.Progress(stage.total_steps, step, silent=not is_main)
  alarm = alarm_lib.CollapseAlarm(
    stage.alarm_config, record["alarm_below_since"]
  )
  programs = _Programs(shardings, mesh)
  window, clock = metrics_lib.Window(), _Clock()
  image_batch = None
  energy_warning = None
  started = time.monotonic() - record["train_seconds"]
  if latest is not None:
    progress.say(f"resumed from step {step} in {workdir}")

  def every(interval: int) -> bool:
    return step % interval == 0 or step == stage.total_steps

  def write(values: Mapping[str, float]) -> None:
    if writer is not None:
      writer.write(step, values)

  def save() -> None:
    checkpointer.save(
      step,
      state,
      dict(config.record)
      | {
        "alarm_below_since": alarm.below_since,
        "train_seconds": time.monotonic() - started,
      },
    )

  def check(values: Mapping[str, float]) -> None:
    bad = [n for n, v in values.items() if not math.isfinite(v)]
    if any(name.endswith("loss") for name in bad):
      raise DivergenceError(
        f"{', '.join(bad)} not finite at step {step}: start again in another "
        "--workdir with a lower optimizer.*.learning_rate; the newest "
        f"checkpoint here is step {checkpointer.latest_step()}"
      )

  def sound(values: Mapping[str, float]) -> None:
    nonlocal energy_warning
    growth = stage.growing_energy(values)
    if growth is not None and growth != energy_warning:
      progress.say(f"WARNING at step {step}: {growth}")
    energy_warning = growth
    text = alarm.update(step, values, stage.likely_cause(values))
    if text is None:
      return
    progress.say(text)
    if is_main:
      with (workdir / "ALARM.txt").open("a") as file:
        file.write(text + "\n")
    if alarm.config.stop:
      save()
      raise alarm_lib.CollapseError(
        text + " The run stopped, with a checkpoint; "
        "--config.alarm.stop=False goes on."
      )

  try:
    if latest is None:
      write(stage.evaluate(state, final=False))
    while step < stop_at:
      phase = stage.phase(step)
      batch = sharding.put_batch(next(iterators[phase.stream]), mesh)
      if "image" in batch:
        image_batch = batch
      state, step_metrics = clock.run(programs, phase, state, batch)
      window.add(step_metrics)
      step += 1
      transition = stage.transition(step)
      if transition is not None:
        state = programs.move(transition, state)
      checkpoint_due = every(config.checkpoint_every) or step == stop_at
      if every(config.log_every) or checkpoint_due:
        timing = clock.flush()
        timing["time/train_seconds"] = time.monotonic() - started
        values = stage.summarize(state, window.flush(), image_batch)
        check(values)
        write(values | timing)
        progress.show(step, stage.headline(values))
        if "usage/depth1" in values:
          sound(values)
      if every(config.eval_every):
        clock.pause()
        write(stage.evaluate(state, final=step == stage.total_steps))
      if every(config.picture_every):
        clock.pause()
        for name, (columns, titles) in stage.pictures(state).items():
          if is_main:
            pictures.save_grid(
              workdir / "pictures" / f"{name}_{step:06d}.png", columns, titles
            )
      if checkpoint_due:
        save()
  finally:
    progress.end()
    if writer is not None:
      writer.close()
    checkpointer.close()
  return state
