"""New folders, whole or not at all."""

from collections.abc import Iterator
import contextlib
import glob
import os
import pathlib
import shutil
import socket

from unicode_jax import config as config_lib


def source(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path at which there may be a model.

  Raises:
    ConfigError: nothing is there, or a folder of something else.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if not path.exists():
    raise config_lib.ConfigError(
      f"--path={path} is not there: name a folder of a Hugging Face model, or "
      "a GGUF file"
    )
  if path.is_dir() and not (path / "config.json").is_file():
    raise config_lib.ConfigError(
      f"{path / 'config.json'} is not there: name the folder of a Hugging Face "
      "checkpoint"
    )
  return path


def new(out: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path that is still free.

  Raises:
    ConfigError: something is there.
  """
  out = pathlib.Path(os.path.expanduser(out))
  if out.exists():
    raise config_lib.ConfigError(f"--out={out} is there already: name another")
  # The nearest folder above that is there must take new ones.
  above = next(p for p in out.absolute().parents if p.exists())
  if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
    raise config_lib.ConfigError(
      f"--out={out} cannot be made: {above} is no folder that can be written "
      "to; name another"
    )
  return out


@contextlib.contextmanager
def filled(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder to fill, which becomes `out` unless an error is raised.

  What processes of this machine left there that were killed is removed.
  """
  prefix = f".{out.name}.{socket.gethostname()}."
  work = out.with_name(f"{prefix}{os.getpid()}")
  try:
    work.mkdir(parents=True)
    for other in out.parent.glob(f"{glob.escape(prefix)}*"):
      number = other.name.removeprefix(prefix)
      if number.isdigit() and not _runs(int(number)):
        shutil.rmtree(other, ignore_errors=True)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--out={out} cannot be made ({error.strerror}): name another"
    ) from None
  try:
    yield work
    work.rename(out)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _runs(process: int) -> bool:
  """Says whether there is a process of a number."""
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except (OSError, OverflowError):  # Another user's, or nobody's number.
    pass
  return True
