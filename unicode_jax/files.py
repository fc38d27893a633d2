"""Files that are there whole or not at all, and folders of one process."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import secrets
import socket
import time

_LOCK = ".lock"
_PATIENCE = 5.0  # Seconds.


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file that others see whole, or as it was before.

  Args:
    path: File, in a folder that is there.
    content: Text, written as UTF-8, or bytes.

  Raises:
    OSError: If it cannot be written; a file that was there stays.
  """
  data = content.encode() if isinstance(content, str) else content
  # Processes of other machines may have the same number.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from error


def append(path: pathlib.Path, text: str) -> None:
  """Adds text to a file, which is made if missing.

  Raises:
    OSError: If it cannot be written.
  """
  try:
    with path.open("a", encoding="utf-8") as file:
      file.write(text)
  except OSError as error:  # What fails late does not say where.
    raise OSError(error.errno, error.strerror, str(path)) from error


class InUseError(Exception):
  """Raised where another process has a folder; it may be free later."""


def _locked(file) -> bool:
  """Locks a file, and says whether that worked; who just ends is waited for."""
  deadline = time.monotonic() + _PATIENCE
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if time.monotonic() > deadline:
        return False
      time.sleep(0.1)
    except OSError:  # A file system without locks.
      return True


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """Keeps a folder for this process while the block runs.

  The system lets go of it whatever becomes of the process. On a mounted bucket
  it holds among the processes of one machine.

  Args:
    folder: Made if missing; removed if nothing came to lie in it.

  Raises:
    InUseError: If another process has it.
  """
  is_new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  lock = folder / _LOCK
  with lock.open("a+") as file:
    if not _locked(file):
      file.seek(0)
      owner = file.read().strip() or "another process"
      raise InUseError(
        f"{folder} is in use by {owner}: wait for it, stop it, or choose "
        "another folder"
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
      yield
    finally:
      if is_new and [path.name for path in folder.iterdir()] == [_LOCK]:
        lock.unlink()
        folder.rmdir()
