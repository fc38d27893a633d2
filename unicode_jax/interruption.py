"""How a process is asked to end: SIGTERM of a preemption, Ctrl-C.

Cloud machines that are taken away, and schedulers, send SIGTERM and some time
later SIGKILL. `handle` makes SIGTERM end a command like Ctrl-C does, by an
exception; what must not be torn in two runs within `deferred`, and ends when it
is ready to. Python drops an exception that happens to be raised in a callback
of a library, and libraries turn it into errors of their own, so the signal is
remembered: `asked` tells, `deferred` does not begin after one, and a process
that has not ended some seconds later is ended.
"""

from collections.abc import Iterator
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start again.
PREEMPTED_STATUS = 75
CTRL_C_STATUS = 130
_STATUSES = {
  signal.SIGTERM: PREEMPTED_STATUS,
  signal.SIGINT: CTRL_C_STATUS,
}
SIGNALS = tuple(_STATUSES)
_SAME = 1.0  # Seconds in which signals are of one event.
SIGTERM = signal.SIGTERM


class Preempted(BaseException):
  """Raised by SIGTERM, as KeyboardInterrupt is by Ctrl-C."""


# Seconds after which a process that was asked to end is ended.
_PATIENCE = 10.0
_asked: int | None = None


def asked() -> int | None:
  """Returns the signal that asked this process to end, None without one."""
  return _asked


def status(number: int) -> int:
  """Returns the exit status of a process that SIGTERM or SIGINT ended."""
  return _STATUSES[number]


def _raise(number: int) -> None:
  """Raises `Preempted` or KeyboardInterrupt."""
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise Preempted


def _handle(number, frame) -> None:
  """Remembers a signal, sees that it is heeded, and raises its exception."""
  global _asked
  del frame
  if _asked is None:
    _asked = number
    threading.Thread(target=_see_that_it_ends, daemon=True).start()
  _raise(number)


def _see_that_it_ends() -> None:
  time.sleep(_PATIENCE)
  name = signal.Signals(_asked).name
  print(f"ended {_PATIENCE:g} s after {name}", file=sys.stderr, flush=True)
  os._exit(_STATUSES[_asked])


def end_with_parent() -> None:
  """Ends this worker process as soon as its parent does, however that ended.

  Ctrl-C, which comes to all processes of a terminal, is the parent's matter.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  sentinel = multiprocessing.parent_process().sentinel

  def wait():
    multiprocessing.connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def handle() -> None:
  """Makes SIGTERM and Ctrl-C end this process by an exception."""
  for number in SIGNALS:
    signal.signal(number, _handle)


class Request:
  """What `deferred` yields: whether the process is to end, and why."""

  def __init__(self, seconds: float, waker: socket.socket):
    """Starts with no request; see `deferred`.

    Args:
      seconds: Time to end.
      waker: What is sent there, the thread of `count_down` receives.
    """
    self.number: int | None = None
    self._made = 0.0
    self._seconds, self._waker = seconds, waker
    self._at_once = False
    self._ended = threading.Event()

  def make(self, number: int) -> None:
    """Asks the process to end, for a signal's reason.

    Args:
      number: SIGTERM or SIGINT.
    """
    if self.number is None:
      self.number, self._made = number, time.monotonic()
      self._waker.send(bytes([number]))

  def raise_it(self) -> None:
    """Raises `Preempted` or KeyboardInterrupt."""
    _raise(self.number)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Lets a request end the block where it is, by an exception."""
    self._at_once = True
    try:
      if self.number is not None:
        self.raise_it()
      yield
    finally:
      self._at_once = False

  def handle(self, number, frame) -> None:
    """Handles a signal; a second Ctrl-C ends the process.

    Shells and schedulers pass one event on more than once.
    """
    del frame
    if self.number is not None:
      if number == signal.SIGINT and time.monotonic() > self._made + _SAME:
        os.write(2, b"Ctrl-C again: ended without a checkpoint\n")
        os._exit(_STATUSES[number])
      return
    self.make(number)
    if self._at_once:
      self.raise_it()

  def count_down(self, wakened: socket.socket) -> None:
    """Ends the process if it has not ended in time; a thread's work.

    Args:
      wakened: Receives the number of a signal the moment that it comes, even
        while a compiler runs and no Python does; is closed at the end.
    """
    number = 0
    while number not in _STATUSES:
      received = wakened.recv(1)
      if not received:
        return
      number = received[0]
    name = signal.Signals(number).name
    print(
      f"{name}: saving a checkpoint, in {self._seconds:g} s at the most",
      file=sys.stderr,
      flush=True,
    )
    if not self._ended.wait(self._seconds):
      print(
        f"stopped by {name}: there was no time for a checkpoint within "
        f"config.recovery.grace_seconds={self._seconds:g}; the same command "
        "goes on from the newest one",
        file=sys.stderr,
        flush=True,
      )
      os._exit(_STATUSES[number])

  def close(self) -> None:
    """Says that the process is ending."""
    self._ended.set()


@contextlib.contextmanager
def deferred(
  seconds: float, numbers: tuple[int, ...] = SIGNALS
) -> Iterator[Request]:
  """Lets signals wait until the block looks at its `Request`.

  Args:
    seconds: Time that it may take to end; then the process ends as it is.
    numbers: Signals that wait. Outside of the main thread, where Python knows
      no signals, none does.

  Yields:
    The request.

  Raises:
    Preempted: At the end of a block that did not look at its request, or
      before the block where the process was asked to end already.
    KeyboardInterrupt: Likewise.
  """
  if _asked is not None:
    _raise(_asked)
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  request = Request(seconds, writer)
  if threading.current_thread() is not threading.main_thread():
    numbers = ()
  thread = threading.Thread(
    target=request.count_down, args=(reader,), daemon=True
  )
  handlers = {n: signal.signal(n, request.handle) for n in numbers}
  if numbers:
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread.start()
  try:
    yield request
  finally:
    request.close()
    for number, handler in handlers.items():
      signal.signal(number, handler)
    if numbers:
      signal.set_wakeup_fd(before)
    writer.close()
    thread.join()
    reader.close()
  if request.number is not None:
    request.raise_it()
