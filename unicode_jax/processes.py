"""Joining the other processes of a run, before JAX sees any device."""

from collections.abc import Iterator
import contextlib
import os
import re
import threading
import time

from unicode_jax import command, config as config_lib, interruption

# Seconds until somebody who looks on should know what is waited for.
_SILENCE = 20.0
# Seconds that the others have to come; more than hosts of a pod differ by.
_PATIENCE = 300


def join() -> None:
  """Makes this process one of several; from here on, errors end it at once.

  Where the others do not come in time the process ends, with the status of what
  may be started again.

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
  """Says what the block waits for, and ends the process if that is in vain."""
  where = os.environ.get("JAX_COORDINATOR_ADDRESS", "process 0")
  joined = threading.Event()

  def watch():
    until = time.monotonic() + _PATIENCE
    while not joined.wait(min(_SILENCE, until - time.monotonic())):
      if time.monotonic() >= until:
        command.end(
          interruption.PREEMPTED_STATUS,
          f"error: after {_PATIENCE} s not all processes have met at {where}: "
          "see that as many run as were announced, and that all of them reach "
          "process 0 by this name",
        )
      print(f"waiting for the other processes, at {where}", flush=True)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    joined.set()


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
