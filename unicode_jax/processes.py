"""Joining the other processes of a run, before JAX sees any device."""

from collections.abc import Iterator
import contextlib
import os
import re
import select
import signal
import socket
import threading
import time

from unicode_jax import command, config as config_lib, interruption

# Seconds until somebody who looks on should know what is waited for.
_SILENCE = 20.0
# Seconds that the others have to come; more than hosts of a pod differ by.
_PATIENCE = 300


def join() -> None:
  """Makes this process one of several; from here on, errors end it at once.

  Where the others do not come in time, or a signal comes first, the process
  ends; with the status of what may be started again. Only the main thread may
  call this.

  Raises:
    ConfigError: If the environment does not say which process this is.
  """
  import jax  # pylint: disable=g-import-not-at-top

  command.leave_at_once()
  given = _place()
  try:
    with _not_for_ever():
      # Not JAX's own limit, at which it aborts.
      jax.distributed.initialize(initialization_timeout=2 * _PATIENCE, **given)
  except (ValueError, RuntimeError) as error:
    raise config_lib.ConfigError(
      f"distributed=True, but there is no cluster to be seen ({error}): start "
      "the command by Cloud TPU, GKE, Slurm or MPI, or set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from error


@contextlib.contextmanager
def _not_for_ever() -> Iterator[None]:
  """Says what the block waits for, and ends the process if that is in vain.

  Nothing else can: the block waits in C++, where Python runs no handlers.
  """
  where = os.environ.get("JAX_COORDINATOR_ADDRESS", "process 0")
  # Gets the number of every signal; its end says that the block has ended.
  reader, writer = socket.socketpair()
  writer.setblocking(False)

  def watch():
    until = time.monotonic() + _PATIENCE
    while (left := until - time.monotonic()) > 0:
      if not select.select([reader], [], [], min(_SILENCE, left))[0]:
        if left > _SILENCE:
          with contextlib.suppress(OSError):  # Nobody may read it any more.
            print(f"waiting for the other processes, at {where}", flush=True)
        continue
      if not (received := reader.recv(1)):
        return
      if received[0] in (signal.SIGINT, signal.SIGTERM):
        command.end(
          interruption.status(received[0]),
          f"stopped by {signal.Signals(received[0]).name}: the other processes "
          "had not come",
        )
    command.end(
      interruption.PREEMPTED_STATUS,
      f"error: after {_PATIENCE} s not all processes have met at {where}: see "
      "that as many run as were announced, and that all of them reach process "
      "0 by this name",
    )

  thread = threading.Thread(target=watch, daemon=True)
  before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    writer.close()
    thread.join()
    reader.close()


def _place() -> dict[str, int]:
  """Returns what the environment says of this process among the others."""
  address, count, number = (
    os.environ.get(name)
    for name in (
      "JAX_COORDINATOR_ADDRESS",
      "JAX_NUM_PROCESSES",
      "JAX_PROCESS_ID",
    )
  )
  if address is not None and not re.fullmatch(r".+:\d+", address):
    raise config_lib.ConfigError(
      f"JAX_COORDINATOR_ADDRESS={address} has no port: write HOST:PORT, such "
      "as 10.0.0.1:8476"
    )
  if count is None and number is None:
    return {}
  if not (count or "").isdecimal() or not (number or "").isdecimal():
    raise config_lib.ConfigError(
      f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={number} do not say which "
      "process of how many this is: set both, to numbers"
    )
  if not int(number) < int(count):
    raise config_lib.ConfigError(
      f"JAX_PROCESS_ID={number} is none of JAX_NUM_PROCESSES={count}: they "
      "count from 0"
    )
  return {"num_processes": int(count), "process_id": int(number)}
