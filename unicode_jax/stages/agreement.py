"""What the processes of a run agree on before they train.

They were given the same config and folder, and none of them refuses what it
sees. Who ends alone is missed by the others after a minute, with a trace of JAX
that does not say why.
"""

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


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends all processes where one of them refuses what is in the block.

  Every process has to run the block, and to do nothing in it that waits for
  another one.

  Raises:
    ConfigError, InUseError, OSError: As the block does in this process.
    ConfigError, InUseError: If it does in another one; names the process.
  """
  refused = None
  try:
    yield
  except (config_lib.ConfigError, files.InUseError, OSError) as error:
    refused = error
  if jax.process_count() > 1:
    said = None if refused is None else str(refused)
    ends = _gather([said, isinstance(refused, files.InUseError)])
    for number, (said, in_use) in enumerate(ends):
      if said is not None and refused is None:
        kind = files.InUseError if in_use else config_lib.ConfigError
        raise kind(f"process {number} ends: {said}")
  if refused is not None:
    raise refused


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
      raise config_lib.ConfigError(
        f"processes 0 and {number} were given different configs "
        f"({'; '.join(differing)}): start all of them by the same command"
      )
  marker = workdir / _MARKER
  if jax.process_index() == 0:
    files.write_whole(marker, first["token"])
  _gather(None)  # It is written.
  seen = _gather(_sees(marker, first["token"]))
  if jax.process_index() == 0:
    marker.unlink()
  if not all(seen):
    number = seen.index(False)
    raise config_lib.ConfigError(
      f"process {number} does not see what process 0 writes: --workdir is "
      f"{given[number]['workdir']} there and {first['workdir']} here; give all "
      "processes one folder that every host has, such as a mounted bucket"
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
