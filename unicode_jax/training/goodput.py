"""Where a run's time goes: goodput and what was lost, by cause.

Every second since a process began belongs to one cause. Sums travel in the
checkpoints; what a process did after its last one is lost when it is killed,
and the heartbeat says how much that was.
"""

from collections.abc import Mapping
import threading
import time

STEP = "step"
LOST = "lost"
DOWN = "down"
CAUSES = (
  STEP,
  "start",
  "compile",
  "data",
  "evaluation",
  "checkpoint",
  "skipped",
  LOST,
  DOWN,
)


class Goodput:
  """Adds time up, by cause."""

  def __init__(self, began: float | None = None):
    """Starts with nothing.

    Args:
      began: `time.time()` at which this process began; None for now.
    """
    self._seconds = dict.fromkeys(CAUSES, 0.0)
    self._cause, self._lock = "start", threading.Lock()
    self._since = time.monotonic()
    if began is not None:
      self._since -= time.time() - began

  def spend(self, cause: str) -> str:
    """Says what time is spent on from now.

    Args:
      cause: One of CAUSES.

    Returns:
      What it was spent on until now.
    """
    now = time.monotonic()
    with self._lock:
      before = self._cause
      self._seconds[before] += now - self._since
      self._cause, self._since = cause, now
    return before

  def move(self, source: str, target: str, seconds: float) -> None:
    """Counts time under another cause than that under which it was spent."""
    with self._lock:
      seconds = min(seconds, max(0.0, self._seconds[source]))
      self._seconds[source] -= seconds
      self._seconds[target] += seconds

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds what earlier processes spent, by cause."""
    with self._lock:
      for cause, value in seconds.items():
        self._seconds[cause] = self._seconds.get(cause, 0.0) + value

  def go_back(self, seconds: Mapping[str, float]) -> None:
    """Counts all time since a checkpoint as lost.

    Args:
      seconds: What `seconds()` was then.
    """
    self.spend("start")
    with self._lock:
      total = sum(self._seconds.values())
      self._seconds = dict.fromkeys(CAUSES, 0.0) | dict(seconds)
      self._seconds[LOST] += total - sum(self._seconds.values())

  def seconds(self) -> dict[str, float]:
    """Returns the time up to now, by cause."""
    with self._lock:
      found = dict(self._seconds)
      found[self._cause] += time.monotonic() - self._since
    return found

  def metrics(self) -> dict[str, float]:
    """Returns the share of useful steps, and seconds by cause, for the log."""
    seconds = self.seconds()
    total = sum(seconds.values())
    return {"goodput/share": seconds[STEP] / total if total else 0.0} | {
      f"goodput/{cause}_seconds": value for cause, value in seconds.items()
    }
