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

from unicode_jax import sharding
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


@dataclasses.dataclass(frozen=True)
class Phase:
  """One kind of step.

  Attributes:
    name: For metrics, e.g. "tokenizer".
    stream: Name of the data stream that it reads.
    step: Jitted (state, batch) -> (state, metrics); the state is donated.
    items: How much a step consumes, all processes together.
    unit: Of what, "images" or "tokens".
  """

  name: str
  stream: str
  step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
  items: int
  unit: str


class Stage(Protocol):
  """What the loop needs to know about a training stage."""

  total_steps: int
  alarm_config: alarm_lib.AlarmConfig

  def init(self, key: jax.Array) -> state_lib.TrainState:
    """Draws the initial state."""

  def make_iterators(self) -> dict[str, Any]:
    """Opens the grain iterator of every stream."""

  def phase(self, step: int) -> Phase:
    """Returns what to do at a step (0-based)."""

  def after_step(
    self, state: state_lib.TrainState, step: int
  ) -> state_lib.TrainState:
    """Moves rows between table and codebook where the schedule says so.

    `step` counts the steps done.
    """

  def summarize(
    self,
    state: state_lib.TrainState,
    window: Mapping[str, np.ndarray],
    batch: Mapping[str, jax.Array] | None,
  ) -> dict[str, float]:
    """Turns the sums of a log window into scalars to log.

    `batch` is the last image batch of the window, None if it had none.
    """

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

  def run(self, phase: Phase, state, batch):
    """Runs one step, and counts it."""
    if phase not in self._seen:
      self.pause()
      self._seen.add(phase)
      start = time.monotonic()
      result = jax.block_until_ready(phase.step(state, batch))
      self.compile_seconds += time.monotonic() - start
      return result
    if phase != self._phase:
      self.pause()
      self._phase, self._start = phase, time.monotonic()
    state, step_metrics = phase.step(state, batch)
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
    until_step: Stop after this many steps as a preempted run would, with a
      checkpoint; None runs to the end.

  Returns:
    The state.

  Raises:
    alarm_lib.CollapseError: If the collapse alarm is configured to stop.
    FloatingPointError: If a loss is not finite.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  checkpointer = checkpoint_lib.Checkpointer(
    workdir / "checkpoints", config.keep_checkpoints
  )
  iterators = stage.make_iterators()
  key = jax.random.key(config.seed)
  shardings = sharding.fsdp_shardings(jax.eval_shape(stage.init, key), mesh)
  step, alarm_since, seconds_before = 0, None, 0.0
  stop_at = stage.total_steps
  if until_step is not None:
    stop_at = min(stop_at, until_step)
  latest = checkpointer.latest_step()
  if latest is None:
    state = jax.jit(
      stage.init, out_shardings=shardings, compiler_options=_COMPILE_FAST
    )(key)
  else:
    target = checkpoint_lib.abstract(jax.eval_shape(stage.init, key), shardings)
    state, record = checkpointer.restore(latest, target, iterators)
    step = latest
    alarm_since = record["alarm_below_since"]
    seconds_before = record["train_seconds"]

  is_main = jax.process_index() == 0
  writer = metrics_lib.MetricWriter(workdir, step) if is_main else None
  progress = metrics_lib.Progress(stage.total_steps, step)
  alarm = alarm_lib.CollapseAlarm(stage.alarm_config, alarm_since)
  window, clock = metrics_lib.Window(), _Clock()
  image_batch = None
  started = time.monotonic()
  if latest is not None:
    progress.say(f"resumed from step {step} in {workdir}")

  def seconds() -> float:
    return seconds_before + time.monotonic() - started

  def every(interval: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == stage.total_steps)

  def write(values: Mapping[str, float]) -> None:
    if writer is not None:
      writer.write(step, values)

  def draw() -> None:
    for name, (columns, titles) in stage.pictures(state).items():
      if is_main:
        pictures.save_grid(
          workdir / "pictures" / f"{name}_{step:06d}.png", columns, titles
        )

  try:
    if latest is None:
      write(stage.evaluate(state, final=step == stage.total_steps))
    while step < stop_at:
      phase = stage.phase(step)
      batch = sharding.put_batch(next(iterators[phase.stream]), mesh)
      if "image" in batch:
        image_batch = batch
      state, step_metrics = clock.run(phase, state, batch)
      window.add(step_metrics)
      step += 1
      state = stage.after_step(state, step)
      checkpoint_due = every(config.checkpoint_every) or step == stop_at
      if every(config.log_every) or checkpoint_due:
        timing = clock.flush()
        values = stage.summarize(state, window.flush(), image_batch)
        image_batch = None
        bad = [n for n, v in values.items() if not math.isfinite(v)]
        if any(name.endswith("loss") for name in bad):
          raise FloatingPointError(
            f"{', '.join(bad)} not finite at step {step}: lower the learning "
            f"rate; the newest checkpoint is step {checkpointer.latest_step()}"
          )
        text = None
        if "usage/depth1" in values:
          text = alarm.update(step, values, stage.likely_cause(values))
        write(values | timing | {"time/train_seconds": seconds()})
        progress.show(step, stage.headline(values))
        if text is not None:
          progress.say(text)
          if is_main:
            with (workdir / "ALARM.txt").open("a") as file:
              file.write(text + "\n")
          if alarm.config.stop:
            raise alarm_lib.CollapseError(text)
      if every(config.eval_every):
        clock.pause()
        write(stage.evaluate(state, final=step == stage.total_steps))
      if every(config.picture_every):
        clock.pause()
        draw()
      if checkpoint_due:
        checkpointer.save(
          step,
          state,
          iterators,
          dict(config.record)
          | {
            "alarm_below_since": alarm.below_since,
            "train_seconds": seconds(),
          },
        )
  finally:
    if writer is not None:
      writer.close()
    checkpointer.close()
  return state
