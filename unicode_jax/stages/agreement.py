"""What the processes of a run agree on before they train.

They were given the same config and folder, and none of them refuses what it
sees. Who ends alone is missed by the others after a minute, with a trace of JAX
that does not say why.
"""

import collections
from collections.abc import Iterator
import contextlib
import json
import pathlib
import secrets
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from unicode_jax import config as config_lib, files

_MARKER = ".seen-by-all"
# A file on a mounted bucket is seen by other hosts some seconds later.
_PATIENCE = 30.0
# JAX ends the other processes when process 0 is gone, before they say why.
_GRACE = 2.0


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends all processes where one of them fails in the block.

  Every process has to run the block, and to do nothing in it that waits for
  another one.

  Raises:
    Exception: As the block does in this process, or else of the same kind as it
      does in another one, which is named; RuntimeError for kinds that have no
      status of their own.
  """
  failed = None
  try:
    yield
  except Exception as error:
    failed = error
  if jax.process_count() > 1:
    for number, told in enumerate(_gather(_told(failed))):
      if told is not None and failed is None:
        failed = _of_another(number, *told)
  if failed is not None:
    _end(failed)


# What `command` has a status of its own for.
_KINDS = {
  kind.__name__: kind
  for kind in (config_lib.ConfigError, config_lib.RunError, files.InUseError)
}


def _told(error: Exception | None) -> list | None:
  """Returns what other processes are told: kind, text, number and file."""
  if error is None:
    return None
  if isinstance(error, OSError) and error.errno is not None:
    file = None if error.filename is None else str(error.filename)
    return ["OSError", error.strerror, error.errno, file]
  for name, kind in _KINDS.items():
    if isinstance(error, kind):
      return [name, str(error), None, None]
  return ["", f"{type(error).__name__}: {error}", None, None]


def _of_another(rank: int, kind: str, text: str, number, file) -> Exception:
  """Returns what ends this process where `_told` comes from another one."""
  text = f"process {rank} of the run ends: {text}"
  if kind == "OSError":
    return OSError(number, text, file)
  return _KINDS.get(kind, RuntimeError)(text)


def _end(error: Exception) -> None:
  """Raises what all processes raise; process 0 when the others have ended."""
  if jax.process_count() > 1 and jax.process_index() == 0:
    time.sleep(_GRACE)
  raise error


def check_devices() -> None:
  """Checks that all processes have as many devices; all of them see the same.

  Before anything is exchanged, which would fail.

  Raises:
    ConfigError: If they have not, in every process.
  """
  counts = collections.Counter(d.process_index for d in jax.devices())
  if len({*counts.values()}) > 1:
    numbers = ", ".join(str(counts[rank]) for rank in sorted(counts))
    _end(
      config_lib.ConfigError(
        f"processes 0 to {len(counts) - 1} have {numbers} devices: a mesh "
        "needs as many of each; see why some are missing, or leave those hosts "
        "out"
      )
    )


def check(config, workdir: pathlib.Path) -> None:
  """Compares configs and run folders of all processes, which all call it.

  Processes of other configs would train together, each by its own, and those of
  other folders wait for each other's part of the first checkpoint.

  Args:
    config: Resolved ConfigDict.
    workdir: Run folder; process 0 has made it.

  Raises:
    ConfigError: If one process has another config, or does not see the folder
      of process 0; in every process.
  """
  if jax.process_count() == 1:
    return
  given = _gather(
    {
      "config": config_lib.flatten(config),
      "workdir": str(workdir),
      "token": secrets.token_hex(8),
    }
  )
  first = given[0]
  for number, other in enumerate(given):
    pairs = {
      key: (first["config"].get(key), other["config"].get(key))
      for key in first["config"] | other["config"]
    }
    # All keys: who saves or evaluates at other steps is waited for, too.
    differing = [
      f"{key}: {ours!r} and {theirs!r}"
      for key, (ours, theirs) in sorted(pairs.items())
      if ours != theirs
    ]
    if differing:
      _end(
        config_lib.ConfigError(
          f"processes 0 and {number} were given different configs "
          f"({'; '.join(differing)}): start all of them by the same command"
        )
      )
  marker = workdir / _MARKER
  with together():  # It is written once all have left this block.
    if jax.process_index() == 0:
      files.write_whole(marker, first["token"])
  seen = _gather(_sees(marker, first["token"]))
  if jax.process_index() == 0:
    marker.unlink()
  if not all(seen):
    number = seen.index(False)
    _end(
      config_lib.ConfigError(
        f"process {number} does not see what process 0 writes: --workdir is "
        f"{given[number]['workdir']} there and {first['workdir']} here; give "
        "all processes one folder that every host has, such as a mounted bucket"
      )
    )


def _sees(marker: pathlib.Path, token: str) -> bool:
  """Says whether a file holds a text, once it has had time to appear."""
  end = time.monotonic() + _PATIENCE
  while True:
    try:
      if marker.read_text(encoding="utf-8") == token:
        return True
    except OSError:
      pass
    if time.monotonic() > end:
      return False
    time.sleep(0.2)


def _gather(value) -> list:
  """Returns the values of all processes, in order; each can be JSON."""
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(mine.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: mine.size] = mine
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes)]
