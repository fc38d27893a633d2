"""A sign of life, and what all threads do when there is none.

A thread writes `heartbeat.json` for whoever watches the run from outside, and
for the next process, which learns from it how much time was lost. Where nothing
is finished for a long time, neither a step nor an evaluation, it writes the
stacks of all threads to `stalls.txt`.
"""

from collections.abc import Callable
import datetime
import faulthandler
import json
import pathlib
import sys
import threading
import time
from typing import Any

from unicode_jax import files

_SECONDS = 10.0
NAME = "heartbeat.json"
STALLS = "stalls.txt"


class Heartbeat:
  """Writes the files, from a thread of its own."""

  def __init__(
    self,
    workdir: pathlib.Path,
    facts: Callable[[], dict[str, Any]],
    stall_seconds: float,
    process: int = 0,
    seconds: float = _SECONDS,
  ):
    """Starts the thread.

    Args:
      workdir: Run folder.
      facts: Returns what the heartbeat says beside the time, JSON-able.
      stall_seconds: Without a `beat` for so long, the run has stalled.
      process: Number of this process; all but the first write to files of
        their own.
      seconds: Between two heartbeats.
    """
    self._facts, self._stall_seconds = facts, stall_seconds
    self._seconds = min(seconds, stall_seconds / 4)
    prefix = f"{process}." if process else ""
    self._path = workdir / f"{prefix}{NAME}"
    self._stalls = workdir / f"{prefix}{STALLS}"
    self._progress = time.monotonic()
    self._ended = threading.Event()
    self._write()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def beat(self) -> None:
    """Says that something was finished."""
    self._progress = time.monotonic()

  def close(self) -> None:
    """Writes for the last time, and ends the thread."""
    self._ended.set()
    self._thread.join()
    self._write()

  def _run(self) -> None:
    reported = self._progress
    while not self._ended.wait(self._seconds):
      self._write()
      quiet = time.monotonic() - max(self._progress, reported)
      if quiet >= self._stall_seconds:
        reported = time.monotonic()
        self._dump(reported - self._progress)

  def _write(self) -> None:
    text = json.dumps({"time": time.time()} | self._facts())
    try:
      files.write_whole(self._path, text + "\n")
    except OSError as error:  # A full disk ends the run elsewhere, if it must.
      print(f"no heartbeat: {error}", file=sys.stderr, flush=True)

  def _dump(self, quiet: float) -> None:
    now = datetime.datetime.now().isoformat(timespec="seconds")
    print(
      f"WARNING: nothing was finished for {quiet:.0f} s; {self._stalls} says "
      "what all threads do",
      file=sys.stderr,
      flush=True,
    )
    try:
      with self._stalls.open("a") as file:
        file.write(f"{now}: nothing was finished for {quiet:.0f} s\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
    except OSError as error:
      print(f"no {self._stalls}: {error}", file=sys.stderr, flush=True)


def last(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns what the last process of a run said, None without one.

  Args:
    workdir: Run folder.
  """
  try:
    found = json.loads((workdir / NAME).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  match found:
    case {"time": int() | float(), "seconds": dict(seconds)}:
      numbers = all(isinstance(v, int | float) for v in seconds.values())
      return found if numbers else None
  return None
