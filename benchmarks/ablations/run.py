r"""Fills the grid of the ablations: trains, evaluates and keeps what came out.

  python benchmarks/ablations/run.py --hours=10

The runs go to --workdir; runs that rows have in common are trained once. Each
row and seed leaves one small file in --results, which is all that
benchmarks/ablations/page.py reads. What is there already is not done again, and
a run that was interrupted goes on, so the same command may be given again and
again, on this machine or, with the results copied, on another. No run is
started that is not expected to end within --hours, judged by earlier ones.
Every run has a core of its own, and as many go on at a time as there are cores.

Some rows, or seeds, only:
  python benchmarks/ablations/run.py --rows base frozen --seeds 0 1

The row that starts from SmolLM2 needs it imported (README.md):
  python benchmarks/ablations/run.py --rows smollm2 --smollm2=runs/smollm2-135m
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import collect
import grid

from unicode_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUITES = "reconstruction,generation,vqa,pope,text,decompression"
# Pictures of the test set that are evaluated: about ten questions each.
PICTURES = 250
# What a task is thought to take before one of its kind has ended, seconds.
_GUESS = {"llm": 90.0, "evaluation": 90.0, "stage1": 150.0}
_LONGEST = 700.0


@dataclasses.dataclass
class Task:
  """One process: a link of a chain, or the evaluation of a row.

  Attributes:
    key: names it, and its folder.
    kind: row and link, for estimates of time.
    command: arguments of Python.
    needs: keys of the tasks whose folders it reads.
    row: whose result it makes, None for a link.
    seed: of the row.
  """

  key: str
  kind: str
  command: list[str]
  needs: list[str]
  row: str | None = None
  seed: int = 0


def flags(values) -> list[str]:
  """Returns config values as flags of the commands."""
  return [f"--config.{key}={value}" for key, value in values.items()]


def plan(rows, seeds, args) -> dict[str, Task]:
  """Lists what has to be done for rows that have no result yet, in order.

  Args:
    rows: names of rows.
    seeds: the first one of all rows comes before the second.
    args: of the command line.
  """
  tasks: dict[str, Task] = {}
  for seed in seeds:
    for name in rows:
      row = grid.ROWS[name]
      if collect.is_there(args.results, name, seed):
        continue
      before = None
      for count, link in enumerate(row.links, 1):
        key = f"{link.name}_{row.key(seed, count)}"
        start = {}
        if before is not None:
          start = {link.start: args.workdir / before}
        elif row.llm is not None:
          start = {link.start: args.llm[row.llm]}
        tasks.setdefault(
          key,
          Task(
            key,
            f"{name} {link.name}",
            [
              *("-m", "unicode_jax.main"),
              f"--config={link.file}:{link.preset}".rstrip(":"),
              f"--workdir={args.workdir / key}",
              *flags({**link.values, **start, "seed": seed}),
            ],
            [before] if before else [],
          ),
        )
        before = key
      size = {} if row.image_size is None else {"image_size": row.image_size}
      key = f"measured_{row.key(seed)}"
      tasks[key] = Task(
        key,
        f"{name} evaluation",
        [
          *("-m", "unicode_jax.evaluate"),
          f"--workdir={args.workdir / before}",
          f"--out={args.workdir / key}",
          # To be looked at.
          f"--suites={SUITES}" + (",pictures" if seed == grid.SEEDS[0] else ""),
          f"--max_images={PICTURES}",
          f"--seed={seed}",
          "--noperceptual",
          *flags(size),
        ],
        [before],
        name,
        seed,
      )
  return tasks


@contextlib.contextmanager
def on_cores(cores):
  """Lets processes that are started inside run on these cores alone."""
  if not hasattr(os, "sched_setaffinity"):  # Not on Linux.
    yield
    return
  mine = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, mine)


class Running:
  """A process that does a task, on cores of its own."""

  def __init__(self, task: Task, core: int, workdir: pathlib.Path, about: dict):
    """Starts it; what it says goes to a file beside its folder."""
    self.task, self.core, self._about = task, core, about
    self._spent = workdir / f"{task.key}.json"
    self._start = time.perf_counter()
    env = os.environ | {
      "PYTHONPATH": str(ROOT),
      # Rows and seeds have many programs in common.
      "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").resolve()),
    }
    with on_cores({core}), (workdir / f"{task.key}.log").open("ab") as log:
      self._process = subprocess.Popen(
        [sys.executable, *task.command],
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def ended(self) -> int | None:
    """Returns its exit status, None while it runs; keeps what it took."""
    if self._process.returncode is not None:
      return self._process.returncode
    pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
    if not pid:
      return None
    self._process.returncode = code = os.waitstatus_to_exitcode(status)
    spent = collect.spent(self._spent)
    spent["wall"] += time.perf_counter() - self._start
    spent["cpu"] += usage.ru_utime + usage.ru_stime
    spent["done"] = code == 0
    revision = self._about["revision"]
    spent["revisions"] = sorted({*spent["revisions"], revision})
    self._spent.write_text(json.dumps(spent), encoding="utf-8")
    return code

  def stop(self) -> None:
    """Asks it to save and end."""
    self._process.terminate()


def facts() -> dict:
  """Returns what ran the rows."""

  def git(*arguments):
    return subprocess.run(
      ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()

  changed = git("status", "--porcelain", "unicode_jax", "configs")
  return {
    "revision": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    "machine": f"{platform.machine()}, one core a run",
    "cores": os.cpu_count(),
    "date": time.strftime("%Y-%m-%d"),
  }


def run(tasks: dict[str, Task], args) -> list[str]:
  """Does tasks, as many at a time as there are cores.

  Args:
    tasks: of `plan`.
    args: of the command line.

  Returns:
    What failed, a line each.
  """
  about = facts()
  deadline = time.monotonic() + 3600 * args.hours
  waiting, running, failed = dict(tasks), [], []
  free = list(range(os.cpu_count() or 1))
  if hasattr(os, "sched_getaffinity"):
    free = sorted(os.sched_getaffinity(0))
  free = free[: args.jobs]
  done = {
    key
    for key in tasks
    if collect.spent(args.workdir / f"{key}.json")["done"]
    and tasks[key].row is None
  }
  took: dict[str, list[float]] = {}

  def learn(task):
    seconds = collect.spent(args.workdir / f"{task.key}.json")["wall"]
    for kind in (task.kind, task.kind.split()[-1]):
      took.setdefault(kind, []).append(seconds)

  def expected(task):
    link = task.kind.split()[-1]
    known = took.get(task.kind) or took.get(link)
    return statistics.median(known) if known else _GUESS.get(link, _LONGEST)

  for key in done:
    learn(waiting.pop(key))

  try:
    while waiting or running:
      for task in list(waiting.values()):
        broken = [n for n in task.needs if n not in waiting and n not in done]
        if any(n not in [r.task.key for r in running] for n in broken):
          failed.append(f"{task.key}: what it starts from is not there")
          del waiting[task.key]
        elif free and done.issuperset(task.needs):
          if time.monotonic() + expected(task) > deadline:
            continue
          running.append(Running(task, free.pop(0), args.workdir, about))
          del waiting[task.key]
          print(f"{time.strftime('%H:%M:%S')} {task.key} starts", flush=True)
      if not running:
        break  # What is left would take too long.
      time.sleep(0.5)
      for job in list(running):
        if (code := job.ended()) is None:
          continue
        running.remove(job)
        free.append(job.core)
        key = job.task.key
        spent = collect.spent(args.workdir / f"{key}.json")
        print(
          f"{time.strftime('%H:%M:%S')} {key} ({job.task.kind}): status "
          f"{code}, {spent['wall']:.0f} s",
          flush=True,
        )
        if code:
          failed.append(f"{key}: status {code}, {args.workdir / key}.log")
          continue
        done.add(key)
        learn(job.task)
        if job.task.row is not None:
          try:
            collect.keep(
              args.workdir, args.results, job.task.row, job.task.seed, about
            )
          except (KeyError, TypeError, ValueError, OSError) as error:
            failed.append(f"{key}: nothing kept, {error!r}")
  finally:
    for job in running:
      job.stop()
    while any(job.ended() is None for job in running):
      time.sleep(0.1)
  if waiting:
    print(
      f"{len(waiting)} tasks did not fit into {args.hours:g} hours: the same "
      "command goes on, or give more --hours"
    )
  return failed


def check(parser: argparse.ArgumentParser, args) -> None:
  """Refuses what no run could start with; makes --workdir and --results."""
  if not 0 < args.hours < math.inf:
    parser.error(f"--hours={args.hours:g}: give a number above 0")
  if args.jobs < 1:
    parser.error(f"--jobs={args.jobs}: give 1 or more")
  for seed in args.seeds:
    if seed < 0:
      parser.error(f"--seeds {seed}: give 0 or more")
  if args.smollm2:
    try:
      config_lib.read_run(
        args.smollm2,
        "import SmolLM2 with python -m unicode_jax.convert (README.md) and "
        "name its --out",
      )
    except config_lib.ConfigError as error:
      parser.error(f"--smollm2={args.smollm2}: {error}")
  for name in "workdir", "results":
    folder = getattr(args, name)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder):
        pass
    except OSError as error:
      parser.error(
        f"--{name}={folder}: {error.strerror}; name a folder to write to"
      )


def main() -> None:
  """Fills what is missing."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/ablations")
  parser.add_argument("--results", type=pathlib.Path, default=collect.RESULTS)
  parser.add_argument("--rows", nargs="+", choices=grid.ROWS, metavar="ROW")
  parser.add_argument("--seeds", nargs="+", type=int, default=grid.SEEDS)
  parser.add_argument("--hours", type=float, default=10.0)
  parser.add_argument("--jobs", type=int, default=os.cpu_count())
  parser.add_argument("--smollm2", type=pathlib.Path)
  args = parser.parse_args()
  check(parser, args)
  args.workdir = args.workdir.resolve()
  args.llm = {grid.SMOLLM2: args.smollm2 and args.smollm2.resolve()}
  rows = args.rows or list(grid.ROWS)
  without = [name for name in rows if grid.ROWS[name].llm == grid.SMOLLM2]
  if without and args.smollm2 is None:
    print(f"left out for want of --smollm2: {', '.join(without)}")
    rows = [name for name in rows if name not in without]
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # Tasks end first.
  try:
    failed = run(plan(rows, args.seeds, args), args)
  except KeyboardInterrupt:
    sys.exit("stopped: the same command goes on")
  if failed:
    sys.exit("\n".join(failed))


if __name__ == "__main__":
  main()
