"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
import time

import jax
import numpy as np


class Window:
  """Accumulates step metrics on the device between two log lines.

  Scalars are averaged over the steps that reported them; arrays (histograms of
  codes) are summed.
  """

  def __init__(self):
    """Starts empty."""
    self._scalars: dict[str, list[jax.Array]] = {}
    self._sums: dict[str, jax.Array] = {}

  def add(self, metrics: Mapping[str, jax.Array]) -> None:
    """Adds one step's metrics without waiting for the device."""
    for name, value in metrics.items():
      if value.ndim == 0:
        self._scalars.setdefault(name, []).append(value)
      elif name in self._sums:
        self._sums[name] = self._sums[name] + value
      else:
        self._sums[name] = value

  def flush(self) -> dict[str, np.ndarray]:
    """Returns means (scalars) and sums (arrays), and empties the window."""
    scalars, sums = jax.device_get((self._scalars, self._sums))
    self.__init__()
    return {
      name: np.mean(v, dtype=np.float64) for name, v in scalars.items()
    } | sums


def read_jsonl(path: pathlib.Path) -> list[dict[str, float]]:
  """Reads metrics.jsonl; a half-written last line is left out."""
  rows = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
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

    path = workdir / "metrics.jsonl"
    kept = -1 if resume_step is None else resume_step
    rows = [row for row in read_jsonl(path) if row["step"] <= kept]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
    self._file = path.open("a")
    self._events = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=kept + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; a value that is not finite becomes null."""
    row = {"step": step}
    for name, value in metrics.items():
      value = float(value)
      row[name] = value if math.isfinite(value) else None
      self._events.add_scalar(name, value, step)
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    os.fsync(self._file.fileno())  # A mounted bucket keeps it only then.

  def close(self) -> None:
    """Closes both files."""
    self._file.close()
    self._events.close()


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
