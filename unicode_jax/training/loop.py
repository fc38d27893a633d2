"""The training loop. It never imports a stage: it is given one."""

import collections
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from unicode_jax import config as config_lib, files, interruption, sharding
from unicode_jax.training import (
  alarm as alarm_lib,
  checkpoint as checkpoint_lib,
  clock as clock_lib,
  goodput as goodput_lib,
  guard as guard_lib,
  heartbeat as heartbeat_lib,
  metrics as metrics_lib,
  phase as phase_lib,
  pictures,
  state as state_lib,
)

# For what runs once: its optimization costs more than it saves.
_COMPILE_FAST = {"xla_backend_optimization_level": 0}
_SIGNALS_ARRIVE = 0.5  # Seconds.
# What went wrong and was dealt with, one JSON object a line.
INCIDENTS = "incidents.jsonl"
_REWOUND = "rewound.json"


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
    recovery: What to do about trouble.
    began: `time.time()` at which this process began; None for the loop's own.
  """

  seed: int
  log_every: int
  eval_every: int
  picture_every: int
  checkpoint_every: int
  keep_checkpoints: int
  record: Mapping[str, Any]
  recovery: guard_lib.RecoveryConfig
  began: float | None = None


class DivergenceError(config_lib.RunError):
  """Raised when losses stay not finite."""


def train(
  stage: phase_lib.Stage,
  workdir: pathlib.Path,
  config: LoopConfig,
  mesh: jax.sharding.Mesh,
  until_step: int | None = None,
) -> state_lib.TrainState:
  """Trains a stage in a run folder, resuming from its newest checkpoint.

  SIGTERM and Ctrl-C wait for the end of a step and its checkpoint. Of several
  processes only SIGTERM does, from the first step on.

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
    DivergenceError: If losses stay not finite.
    interruption.Preempted: After SIGTERM, with a checkpoint.
    KeyboardInterrupt: After Ctrl-C, with a checkpoint.
    ConfigError: If there are checkpoints, but none is whole.
    OSError: If a checkpoint cannot be written; older ones are whole.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  # JAX's own service answers SIGTERM where there are several processes.
  signals = () if jax.process_count() > 1 else interruption.SIGNALS
  with (
    # Set, so that kernels that XLA cannot split know the devices too.
    jax.set_mesh(mesh),
    interruption.deferred(config.recovery.grace_seconds, signals) as request,
    checkpoint_lib.Checkpointer(
      workdir / "checkpoints", config.keep_checkpoints
    ) as checkpointer,
    contextlib.ExitStack() as stack,
  ):
    run = _Run(stage, workdir, config, mesh, checkpointer, request)
    stack.callback(run.close)
    run.begin()
    stop_at = stage.total_steps
    if until_step is not None:
      stop_at = min(stop_at, until_step)
    while True:
      try:
        return run.advance(stop_at)
      except _Poisoned:
        run.go_back()


class _Poisoned(Exception):
  """Raised within a run where it should go back."""


class _Run:
  """A run in one process: where it stands, and what it has open."""

  def __init__(self, stage, workdir, config, mesh, checkpointer, request):
    self.stage, self.workdir, self.config = stage, workdir, config
    self.mesh, self.checkpointer, self.request = mesh, checkpointer, request
    self.is_main = jax.process_index() == 0
    # What the last process said, before this one says anything.
    self.before = heartbeat_lib.last(workdir)
    self.step, self.saved = 0, None
    self.clock = clock_lib.Clock(goodput_lib.Goodput(config.began))
    self.heartbeat = heartbeat_lib.Heartbeat(
      workdir,
      lambda: {
        "step": self.step,
        "total_steps": stage.total_steps,
        "seconds": self.goodput.seconds(),
      },
      config.recovery.stall_seconds,
      jax.process_index(),
    )
    self.progress = self.writer = None
    self.iterators = {}
    self.state = None
    self.energy_warning = None

  @property
  def goodput(self) -> goodput_lib.Goodput:
    """Where the time goes."""
    return self.clock.goodput

  def begin(self) -> None:
    """Restores the newest checkpoint, or draws the first state."""
    stage = self.stage
    key = jax.random.key(self.config.seed)
    start = stage.start(self.mesh)
    shapes = jax.eval_shape(stage.init, key, start)
    self.shardings = sharding.state_shardings(shapes, self.mesh)
    self.target = sharding.placed_shapes(shapes, self.shardings)
    self.programs = phase_lib.Programs(self.shardings, self.mesh)
    found = self.checkpointer.restore(self.target)
    if found is None:
      self._account(None, {})
    else:
      self._account(found[0], found[2].get("seconds", {}))
    if found is not None:
      *position, damaged = found
      step, _, record = position
      then = record.get("text_tokenizer")
      now = self.config.record.get("text_tokenizer")
      if None not in (then, now) and then != now:
        raise config_lib.ConfigError(
          f"{self.workdir} was trained with another text tokenizer than the "
          "data and text.tokenizer_path give now: its ids would mean something "
          "else; bring that one back, or train into another --workdir"
        )
      note = self.workdir / _REWOUND
      if note.exists():
        rewound = json.loads(note.read_text(encoding="utf-8"))
        if rewound["rewinds"][2] == step:
          record |= rewound
      self._stand_at(*position)
      self._say_damaged(damaged)
      self.progress.say(f"resumed from step {self.step} in {self.workdir}")
      return
    self.state = jax.jit(
      stage.init, out_shardings=self.shardings, compiler_options=_COMPILE_FAST
    )(key, start)
    self._stand_at(0, self.state, {})

  def _say_damaged(self, damaged: Mapping[int, str]) -> None:
    for step, problem in damaged.items():
      self._incident("damaged", step=step, problem=problem)
      self.progress.say(
        f"WARNING: the checkpoint of step {step} is damaged ({problem}); it is "
        f"in {self.workdir / checkpoint_lib.SET_ASIDE} now"
      )

  def _account(self, step: int | None, spent: Mapping[str, float]) -> None:
    """Adds what earlier processes spent and lost, and the time in between.

    Args:
      step: Of the checkpoint; None without one.
      spent: Seconds by cause, up to the checkpoint.
    """
    carried = collections.Counter(spent)
    if self.before is not None:
      since = self.before["seconds"]
      if step is not None and self.before.get("step") == step:
        # Nothing was done after it that is to be done again.
        carried = collections.Counter(since)
      lost = sum(since.values()) - sum(carried.values())
      carried[goodput_lib.LOST] += max(0.0, lost)
      began = time.time() - sum(self.goodput.seconds().values())
      down = began - self.before["time"]
      carried[goodput_lib.DOWN] += max(0.0, down)
    self.goodput.add(carried)

  def _stand_at(self, step: int, state, record) -> None:
    """Takes a position: of a checkpoint, or the first."""
    config, stage = self.config, self.stage
    self.step, self.state = step, state
    self.saved = step if record else None
    self.left_out = collections.Counter(record.get("left_out", {}))
    # How often it went back, from where at last, and where to.
    self.rewinds, self.failed_at, self.rewound_to = record.get(
      "rewinds", (0, 0, 0)
    )
    self.alarm = alarm_lib.CollapseAlarm(
      stage.alarm_config, record.get("alarm_below_since")
    )
    self.guard = guard_lib.Guard(
      config.recovery, record.get("skipped_in_a_row")
    )
    self.started = time.monotonic() - record.get("train_seconds", 0.0)
    self._close_iterators()
    self.iterators = stage.make_iterators(
      self._batches(step), sharding.batch_share(self.mesh)
    )
    self.window, self.image_batch = metrics_lib.Window(), None
    self._close_files()
    if self.is_main:
      self.writer = metrics_lib.MetricWriter(self.workdir, self.saved)
    self.progress = metrics_lib.Progress(
      stage.total_steps, step, silent=not self.is_main
    )

  def _batches(self, step: int) -> collections.Counter:
    """Says how many batches of each stream were read before a step."""
    streams = (self.stage.phase(s).stream for s in range(step))
    return collections.Counter(streams) + self.left_out

  def close(self) -> None:
    """Closes what is open, but for the checkpoints."""
    self._close_files()
    self._close_iterators()
    self.heartbeat.close()

  def _close_iterators(self) -> None:
    for iterator in self.iterators.values():
      iterator.close()
    self.iterators = {}

  def _close_files(self) -> None:
    if self.progress is not None:
      self.progress.end()
    if self.writer is not None:
      self.writer.close()

  def advance(self, stop_at: int) -> state_lib.TrainState:
    """Trains up to a step, and returns the state.

    Raises:
      _Poisoned: Where the run should go back.
    """
    try:
      self._look(again=self.saved is not None)
      self._leave_if_asked()
      while self.step < stop_at:
        self._train_step()
        last = self.step == stop_at
        saves = self._every(self.config.checkpoint_every) or last
        if self._every(self.config.log_every) or saves:
          self._log()
        # While steps are skipped the state is what it was, and older
        # checkpoints, which may be better, would make room.
        if saves and (last or not self.guard.in_a_row):
          self._save()
        self._look()
        self._leave_if_asked()
    except (interruption.Preempted, KeyboardInterrupt):
      asked = self.request.number is not None  # Else the state may be torn.
      if asked and self.step not in (0, self.saved):
        self._log()
        self._save()
        self.checkpointer.wait()
        self.progress.say(f"saved step {self.step}")
      raise
    return self.state

  def _leave_if_asked(self) -> None:
    if self.checkpointer.reached_preemption(self.step):
      self.request.make(interruption.SIGTERM)
    if self.request.number is not None:
      self.request.raise_it()

  def _every(self, interval: int) -> bool:
    return self.step % interval == 0 or self.step == self.stage.total_steps

  def _train_step(self) -> None:
    phase = self.stage.phase(self.step)
    try:
      batch = self.clock.read(self.iterators[phase.stream])
    except Exception:
      # A signal to all processes of the job ends those that read data, too.
      time.sleep(_SIGNALS_ARRIVE)
      self._leave_if_asked()
      raise
    batch = sharding.put_batch(batch, self.mesh)
    if "image" in batch:
      self.image_batch = batch
    self.state, step_metrics = self.clock.run(
      self.programs, phase, self.state, batch
    )
    self.step += 1
    self.window.add(self.step, step_metrics)
    transition = self.stage.transition(self.step)
    if transition is not None:
      self.state = self.programs.move(transition, self.state)
    self.heartbeat.beat()

  def _look(self, again: bool = False) -> None:
    """Evaluates and draws where it is time to.

    Args:
      again: After a restart, which may have been killed here: whether to do
        only what is not there yet.
    """
    final = self.step == self.stage.total_steps
    evaluates = self._every(self.config.eval_every)
    draws = self._every(self.config.picture_every) and self.step > 0
    if again:
      evaluates = evaluates and not self._is_evaluated()
    elif self.step == 0:
      evaluates = True
    if not evaluates and not draws:
      return
    self.clock.pause("evaluation")
    with self.request.at_once():
      if evaluates:
        self._write(self.stage.evaluate(self.state, final=final))
      for name, sheet in (
        self.stage.pictures(self.state).items() if draws else ()
      ):
        if self.is_main:
          pictures.save_grid(
            self.workdir / "pictures" / f"{name}_{self.step:06d}.png", *sheet
          )
    self.heartbeat.beat()

  def _is_evaluated(self) -> bool:
    """Says whether the log has held-out numbers of this step already."""
    rows = metrics_lib.read_jsonl(self.workdir / metrics_lib.NAME)
    found = any(
      row["step"] == self.step and any(n.startswith("eval/") for n in row)
      for row in rows
    )
    if jax.process_count() > 1:  # Lest they disagree.
      found = multihost_utils.broadcast_one_to_all(np.int32(found))
    return bool(found)

  def _log(self) -> None:
    """Writes what the steps since the last line did.

    Raises:
      _Poisoned: Where the run should go back.
      alarm_lib.CollapseError: If the alarm is configured to stop.
    """
    if not self.window:
      return
    timing = self.clock.flush()
    window = self.window.flush()
    for step, skipped in zip(window.steps, window.skipped, strict=True):
      phase = self.stage.phase(step - 1)
      self.guard.look(phase.name, step, bool(skipped))
      if skipped:
        self._note_skipped(step, phase, timing)
    for spike in self.guard.spikes(window.norms):
      self._incident("spike", **dataclasses.asdict(spike))
      self.progress.say(
        f"WARNING at step {spike.step}: {spike.name} {spike.norm:.3g}, where "
        f"{spike.median:.3g} is usual"
      )
    timing["time/train_seconds"] = time.monotonic() - self.started
    values = self.stage.summarize(self.state, window.means, self.image_batch)
    self.image_batch = None
    values["skipped_steps"] = sum(window.skipped)
    for name, norms in window.norms.items():
      values[f"{name}_max"] = max(norm for _, norm in norms)
    self._write(values | timing | self.goodput.metrics())
    self.progress.show(self.step, self.stage.headline(values))
    if self.guard.poisoned_since() is not None:
      raise _Poisoned
    if "usage/depth1" in values:
      self._sound(values)

  def _note_skipped(
    self, step: int, phase: phase_lib.Phase, timing: Mapping[str, float]
  ) -> None:
    """Writes down what a skipped step had read."""
    batch = self._batches(step - 1)[phase.stream]
    self.goodput.move(
      goodput_lib.STEP,
      "skipped",
      timing.get(f"time/{phase.name}_step_seconds", 0.0),
    )
    self._incident(
      "skipped",
      step=step,
      stream=phase.stream,
      batch=batch,
      examples=(
        self.stage.batch_names(phase.stream, batch) if self.is_main else []
      ),
    )
    self.progress.say(
      f"WARNING: step {step} skipped, its loss or gradient is not finite; "
      f"{self.workdir / INCIDENTS} names what it read"
    )

  def _incident(self, kind: str, **facts) -> None:
    """Adds a line to the run's incidents."""
    if self.is_main:
      line = json.dumps({"kind": kind, "time": time.time()} | facts)
      files.append(self.workdir / INCIDENTS, line + "\n")

  def _write(self, values: Mapping[str, float]) -> None:
    if self.writer is not None:
      self.writer.write(self.step, values)

  def _sound(self, values: Mapping[str, float]) -> None:
    """Raises the alarm where the codebook is no longer used."""
    growth = self.stage.growing_energy(values)
    if growth is not None and growth != self.energy_warning:
      self.progress.say(f"WARNING at step {self.step}: {growth}")
    self.energy_warning = growth
    cause = self.stage.likely_cause(values)
    text = self.alarm.update(self.step, values, cause)
    if text is None:
      return
    self.progress.say(text)
    if self.is_main:
      files.append(self.workdir / "ALARM.txt", text + "\n")
    if self.alarm.config.stop:
      self._save()
      self.checkpointer.wait()
      raise alarm_lib.CollapseError(
        text + " The run stopped, with a checkpoint; "
        "--config.alarm.stop=False goes on."
      )

  def _save(self) -> None:
    """Begins to write a checkpoint, unless it is there."""
    if self.saved == self.step:
      return
    self.clock.pause("checkpoint")
    record = {
      "alarm_below_since": self.alarm.below_since,
      "skipped_in_a_row": self.guard.in_a_row,
      "left_out": dict(self.left_out),
      "rewinds": [self.rewinds, self.failed_at, self.rewound_to],
      "train_seconds": time.monotonic() - self.started,
      "seconds": self.goodput.seconds(),
    }
    self.checkpointer.save(
      self.step, self.state, dict(self.config.record) | record
    )
    self.saved = self.step
    self.goodput.spend("evaluation")

  def go_back(self) -> None:
    """Goes back before the steps that were skipped, and past their batches.

    Where that has led to the same end before, it goes back further.

    Raises:
      DivergenceError: If there is nowhere to go, or it was tried often enough.
    """
    self.checkpointer.wait()
    since = self.guard.poisoned_since()
    before = since
    if since <= self.failed_at:  # Going back has led here again.
      before = min(since, self.rewound_to)
    steps = [step for step in self.checkpointer.steps() if step < before]
    limit = self.config.recovery.rewind_limit
    if not steps or self.rewinds >= limit:
      reason = f"recovery.rewind_limit={limit}" if steps else "none is older"
      raise DivergenceError(
        f"loss or gradient not finite at every step since {since}, after going "
        f"back to a checkpoint {self.rewinds} times ({reason}): start again in "
        "another --workdir with a lower optimizer.*.learning_rate; the newest "
        f"checkpoint here is step {self.saved}"
      )
    read = self._batches(self.step)
    self.state = None
    found = self.checkpointer.restore(self.target, steps[0])
    step, state, record, damaged = found
    self.left_out.clear()
    record |= {
      "left_out": read - self._batches(step),
      "skipped_in_a_row": {},
      "rewinds": [self.rewinds + 1, self.step, step],
    }
    if self.is_main:  # For a process that is killed before it saves.
      note = {name: record[name] for name in ("left_out", "rewinds")}
      files.write_whole(self.workdir / _REWOUND, json.dumps(note))
    self.goodput.go_back(record.get("seconds", {}))
    self._stand_at(step, state, record)
    self._say_damaged(damaged)
    self._incident("rewound", step=self.failed_at, to=step, since=since)
    self.progress.say(
      f"WARNING: steps {since} to {self.failed_at} were skipped: the run goes "
      f"on from step {step}, with the data that comes after them; later "
      f"checkpoints, if any, are in {self.workdir / checkpoint_lib.SET_ASIDE}"
    )
