"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

import collections
from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from unicode_jax import files
from unicode_jax.training import guard

NAME = "metrics.jsonl"


class Flushed(NamedTuple):
  """What a window held.

  Attributes:
    means: Means of scalars and sums of arrays, by metric, over the steps that
      were not skipped.
    steps: Numbers of its steps.
    skipped: 0 or 1 for each of them.
    norms: (step, norm) of the steps that were not skipped, by gradient norm.
  """

  means: dict[str, np.ndarray]
  steps: list[int]
  skipped: list[float]
  norms: dict[str, list[tuple[int, float]]]


class Window:
  """Accumulates step metrics on the device between two log lines.

  Scalars are averaged over the steps that reported them; arrays (histograms of
  codes) are summed. Steps that the guard skipped (`guard.SKIPPED`) count for
  neither.
  """

  def __init__(self):
    """Starts empty."""
    self._steps: list[tuple[int, dict[str, jax.Array]]] = []
    self._sums: dict[str, jax.Array] = {}

  def __len__(self) -> int:
    return len(self._steps)

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Adds one step's metrics without waiting for the device."""
    self._steps.append((step, {n: v for n, v in metrics.items() if not v.ndim}))
    for name, value in metrics.items():
      if value.ndim:
        before = self._sums.get(name)
        self._sums[name] = value if before is None else before + value

  def flush(self) -> Flushed:
    """Returns what it holds, and empties it."""
    steps, sums = jax.device_get((self._steps, self._sums))
    self.__init__()
    skipped = [float(m.pop(guard.SKIPPED, 0.0)) for _, m in steps]
    means, norms = collections.defaultdict(list), {}
    for (step, metrics), bad in zip(steps, skipped, strict=True):
      for name, value in metrics.items() if not bad else ():
        means[name].append(value)
        if name.endswith("gradient_norm"):
          norms.setdefault(name, []).append((int(step), float(value)))
    return Flushed(
      {name: np.mean(v, dtype=np.float64) for name, v in means.items()}
      | {name: value for name, value in sums.items() if value.any()},
      [int(step) for step, _ in steps],
      skipped,
      norms,
    )


def read_jsonl(path: pathlib.Path) -> list[dict[str, float]]:
  """Reads metrics.jsonl; a line that is damaged is left out."""
  rows = []
  if path.exists():
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        row = None
      if isinstance(row, dict) and isinstance(row.get("step"), int):
        rows.append(row)
      elif number < len(lines):  # The last may be half written.
        logging.warning("%s: line %d is damaged, and left out", path, number)
  return rows


class MetricWriter:
  """Writes scalars to `metrics.jsonl` and to TensorBoard events."""

  def __init__(self, workdir: pathlib.Path, resume_step: int | None):
    """Opens the files and drops what lies after the step resumed from.

    Args:
      workdir: Run folder.
      resume_step: Step of the checkpoint resumed from, None if there is none;
        later lines, of a lost attempt, are removed.
    """
    from tensorboardX import SummaryWriter  # pylint: disable=g-import-not-at-top

    path = workdir / NAME
    kept = -1 if resume_step is None else resume_step
    rows = [row for row in read_jsonl(path) if row["step"] <= kept]
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    self._path, self._file = path, path.open("a")
    self._events = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=kept + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; a value that is not finite becomes null.

    Raises:
      OSError: If it cannot be written.
    """
    row = {"step": step}
    for name, value in metrics.items():
      value = float(value)
      row[name] = value if math.isfinite(value) else None
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)
    try:
      self._file.write(json.dumps(row) + "\n")
      self._file.flush()
      os.fsync(self._file.fileno())  # A mounted bucket keeps it only then.
    except OSError as error:  # It does not say where.
      raise OSError(error.errno, error.strerror, str(self._path)) from error

  def close(self) -> None:
    """Closes both files; TensorBoard's is no reason to fail."""
    self._file.close()
    try:
      self._events.close()
    except OSError as error:
      logging.warning("TensorBoard's events are not whole: %s", error)


class Progress:
  """One line with ETA that redraws itself in a terminal, else plain lines."""

  def __init__(
    self, total_steps: int, first_step: int, stream=None, silent: bool = False
  ):
    """Starts the clock.

    Args:
      total_steps: Steps of the whole run.
      first_step: Steps done before this process started.
      stream: Where to print; None is standard output.
      silent: Print nothing, as all but the first process.
    """
    self._total = total_steps
    self._first = first_step
    self._start = time.monotonic()
    self._stream = sys.stdout if stream is None else stream
    self._terminal = self._stream.isatty()
    self._silent = silent
    self._open_line = False

  def show(self, step: int, text: str) -> None:
    """Prints the step, the ETA and a short text."""
    elapsed = time.monotonic() - self._start
    left = elapsed / max(step - self._first, 1) * (self._total - step)
    line = f"step {step}/{self._total}  eta {left:.0f}s  {text}"
    self._print(line, stays=not self._terminal)

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._print(text, stays=True)

  def end(self) -> None:
    """Lets the last line stay."""
    if self._open_line:
      self._stream.write("\n")
      self._open_line = False

  def _print(self, text: str, stays: bool) -> None:
    if self._silent:
      return
    erase = "\r\x1b[2K" if self._open_line else ""
    self._stream.write(erase + text + ("\n" if stays else ""))
    self._open_line = not stays
    self._stream.flush()
