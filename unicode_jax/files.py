"""Files that are there whole or not at all, and folders of one process."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import socket

from unicode_jax import config as config_lib

_LOCK = ".lock"


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file that others see whole, or as it was before.

  Args:
    path: File, in a folder that is there.
    content: Text, written as UTF-8, or bytes.

  Raises:
    OSError: If it cannot be written; a file that was there stays.
  """
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """Keeps a folder for this process while the block runs.

  The system lets go of it whatever becomes of the process. On a mounted bucket
  it holds among the processes of one machine.

  Args:
    folder: Made if missing; removed if nothing came to lie in it.

  Raises:
    ConfigError: If another process has it.
  """
  is_new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  lock = folder / _LOCK
  with lock.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip() or "another process"
      raise config_lib.ConfigError(
        f"{folder} is in use by {owner}: wait for it, stop it, or choose "
        "another folder"
      ) from None
    except OSError:  # A file system without locks.
      pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
      yield
    finally:
      if is_new and [path.name for path in folder.iterdir()] == [_LOCK]:
        lock.unlink()
        folder.rmdir()
