"""Tiny real runs as processes that can be killed, and what they must give."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax

TIMEOUT = 300
ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPARED = ("time/", "goodput/")


@dataclasses.dataclass
class Command:
  """A command of the package that can be started again and again.

  Attributes:
    module: Of the package.
    flags: Its flags.
    log: File that all its processes write to.
    environment: Variables beside those of this process.
  """

  module: str
  flags: list[str]
  log: pathlib.Path
  environment: dict[str, str] = dataclasses.field(default_factory=dict)

  def start(self) -> subprocess.Popen:
    """Starts a process."""
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with self.log.open("a") as log:
      return subprocess.Popen(
        [sys.executable, "-m", f"unicode_jax.{self.module}", *self.flags],
        env=environment | self.environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # With its own processes it is one group.
      )

  def finish(self) -> int:
    """Runs to the end, and returns the exit status."""
    process = self.start()
    try:
      return process.wait(TIMEOUT)
    finally:
      kill(process)

  def said(self) -> str:
    """Returns what all processes printed."""
    return self.log.read_text()


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
  """Sends a signal to a process that was started here, and its own."""
  if process.poll() is None:
    os.killpg(process.pid, number)
    if number == signal.SIGKILL:
      process.wait()


def processes() -> dict[int, int]:
  """Returns the parent of every process, by its number."""
  listed = subprocess.run(
    ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
  ).stdout
  return dict(tuple(map(int, line.split())) for line in listed.splitlines())


def children(process: subprocess.Popen) -> set[int]:
  """Returns the processes that a process has started."""
  return {pid for pid, parent in processes().items() if parent == process.pid}


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of a run's checkpoints that are finished."""
  folder = workdir / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def result(workdir: pathlib.Path) -> dict:
  """Returns all that two equal runs must have in common.

  The last checkpoint is that of the last step: its checksums are of parameters,
  optimizer, codebook and random state.
  """
  step = checkpoints(workdir)[-1]
  path = workdir / f"checkpoints/{step}/record/metadata"
  record = json.loads(path.read_text())
  rows = [
    {
      k: v
      for k, v in json.loads(line).items()
      if not k.startswith(NOT_COMPARED)
    }
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  drawn = sorted((workdir / "pictures").glob("*.png"))
  return {
    "step": step,
    "checksums": record["checksums"],
    "left_out": record["left_out"],
    "metrics": rows,
    "pictures": {path.name: path.read_bytes() for path in drawn},
  }


def wait_for(condition, process: subprocess.Popen) -> None:
  """Waits until something holds, while a process runs."""
  deadline = time.monotonic() + TIMEOUT
  while not condition():
    assert process.poll() is None, "it ended before"
    assert time.monotonic() < deadline
    time.sleep(0.01)


def being_written(workdir: pathlib.Path) -> set[str]:
  """Returns the names of checkpoints that are not finished."""
  folder = workdir / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  return {name for name in names if not name.isdigit()}


def kill_at_moments(
  command: Command, workdir: pathlib.Path, kills: int, seed: int
) -> dict[str, int]:
  """Kills a training again and again, and lets it go on.

  Half of the kills come while a checkpoint is being written, the others at any
  time after the start of Python.

  Args:
    command: `unicode_jax.main` into `workdir`, with all checkpoints kept.
    workdir: Run folder.
    kills: How many.
    seed: Of the moments.

  Returns:
    Counts: kills by moment, attempts that ended before theirs, steps redone,
    checkpoints lost.
  """
  rng = random.Random(seed)
  counts = dict.fromkeys(("in_save", "any_time", "too_late", "lost"), 0)
  while counts["in_save"] + counts["any_time"] < kills:
    had = checkpoints(workdir)
    in_save = rng.random() < 0.5
    deadline = time.monotonic() + TIMEOUT
    if not in_save:
      deadline = time.monotonic() + rng.uniform(1.0, 12.0)
    left = being_written(workdir)  # By the process that was killed before.
    process = command.start()
    while process.poll() is None and time.monotonic() < deadline:
      # Not the first one, or the run would never get anywhere.
      further = checkpoints(workdir)[-1:] != had[-1:]
      if in_save and further and being_written(workdir) - left:
        time.sleep(rng.uniform(0.0, 0.1))
        break
      time.sleep(0.002)
    if process.poll() is None:
      counts["in_save" if in_save else "any_time"] += 1
      kill(process)
    else:
      assert process.returncode == 0, command.said()[-3000:]
      counts["too_late"] += 1
      break
    counts["lost"] += len({*had} - {*checkpoints(workdir)})
  return counts
