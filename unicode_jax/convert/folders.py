"""New folders, whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from unicode_jax import config as config_lib


def new(out: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path that is still free.

  Raises:
    ConfigError: something is there.
  """
  out = pathlib.Path(out).expanduser()
  if out.exists():
    raise config_lib.ConfigError(f"--out={out} is there already: name another")
  return out


@contextlib.contextmanager
def filled(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder to fill, which becomes `out` unless an error is raised."""
  work = out.with_name(f".{out.name}.{os.getpid()}")
  try:
    work.mkdir(parents=True)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--out={out} cannot be made ({error.strerror}): name another"
    ) from None
  try:
    yield work
    work.rename(out)
  finally:
    shutil.rmtree(work, ignore_errors=True)
