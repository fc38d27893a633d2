"""What every command has around its own work.

Flags are parsed, libraries kept quiet, and errors that a user can mend are said
in one line. Exit statuses: 0; 2 for a flag, config or file that cannot be used;
3 for a run that should not go on (collapse, divergence); 74 where a disk is
full or fails; 75 for SIGTERM, a folder in use, or processes of the run that do
not come, after which the same command may be started again; 130 for Ctrl-C.
"""

from collections.abc import Callable
import contextlib
import errno
import functools
import os
import re
import signal
import sys
import time

from absl import app, flags, logging

from unicode_jax import config as config_lib, files, interruption

# EX_IOERR of sysexits.h.
DISK_STATUS = 74
# Flags of commands that name files or folders.
_PATHS = ("workdir", "out", "out_dir", "path", "captions", "cache", "json")
# What a user can mend by naming something else; others may pass by themselves.
_WRONG_PATH = {
  errno.EACCES,
  errno.EEXIST,
  errno.EISDIR,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
}
_ALSO_RAISED = re.compile(r"[/\\](orbax|asyncio)[/\\]")
_began: float | None = None


def run(main: Callable, interrupted: str, *, overrides: bool = False) -> None:
  """Runs a command; does not return.

  Args:
    main: its work; called without arguments, or with the overrides.
    interrupted: what Ctrl-C or SIGTERM leaves behind, for the user.
    overrides: whether the command takes --config.KEY=VALUE.
  """
  global _began
  _began = time.time()
  argv = sys.argv
  interruption.handle()
  sys.unraisablehook = _said_aside
  try:
    if overrides:
      argv, values = config_lib.split_overrides(argv)
      main = functools.partial(main, values)
    app.run(functools.partial(_checked, main), argv=argv, flags_parser=_parsed)
  except config_lib.ConfigError as error:
    end(2, f"error: {error}")
  except BrokenPipeError:
    leave_at_once()  # There is nowhere to flush to.
    end(
      DISK_STATUS,
      "error: what read the output of this command has ended: let it go to a "
      f"file; {interrupted}",
    )
  except OSError as error:
    if error.errno is None or error.errno in _WRONG_PATH:
      if error.filename is None:
        raise
      end(
        2,
        f"error: {error.strerror}: {str(error.filename)!r}: name a file or "
        "folder that can be used",
      )
    leave_at_once()  # Libraries would fail to clean up on the same disk.
    where = "" if error.filename is None else f": {str(error.filename)!r}"
    end(
      DISK_STATUS,
      f"error: {error.strerror}{where}: see that the disk has room; "
      + interrupted,
    )
  except files.InUseError as error:
    end(interruption.PREEMPTED_STATUS, f"error: {error}")
  except config_lib.RunError as error:
    end(3, f"stopped: {error}")
  except KeyboardInterrupt:
    end(interruption.CTRL_C_STATUS, f"interrupted: {interrupted}")
  except interruption.Preempted:
    end(interruption.PREEMPTED_STATUS, f"stopped by SIGTERM: {interrupted}")
  except Exception:  # What a library made of the exception.
    if (number := interruption.asked()) is None:
      raise
    name = signal.Signals(number).name
    end(interruption.status(number), f"stopped by {name}: {interrupted}")


def _said_aside(report) -> None:
  """Says what failed where nothing could be raised.

  Where one file of a checkpoint cannot be read, those that read the others find
  that nobody waits for them any more, and would say so a thousand times.
  """
  if str(report.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(report)


def began() -> float | None:
  """Returns when the command began, `time.time()`; None when asked again.

  What follows in the same process begins later.
  """
  global _began
  found, _began = _began, None
  return found


def _parsed(argv: list[str]) -> list[str]:
  """Returns what is not a flag."""
  for argument in argv:
    try:
      argument.encode()
    except UnicodeEncodeError:
      raise config_lib.ConfigError(f"{argument!r} is not UTF-8") from None
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError) as error:  # The latter of --noFLAG=1.
    raise config_lib.ConfigError(
      f"{_said(str(error))} (--help lists the flags)"
    ) from None
  except SystemExit:  # absl takes --help for a mistake.
    sys.exit(0)


# How absl says what is wrong with a flag's value, and what we say.
_REASONS = tuple(
  (re.compile(rf"flag --(\w+)=(.*): {reason}", re.DOTALL), wanted)
  for reason, wanted in (
    (r"\S+ is not (an? .*)", r"\3"),
    (r"value should be (one of .*)", r"\3"),
    (r"invalid literal for int\(\) .*", "a whole number"),
    (r"(?:Exceeds the limit|Value too large).*", "a whole number"),
    (r"could not convert string to float: .*", "a number"),
    (r"\('Non-boolean argument .*", "true or false"),
  )
)
_UNSET = re.compile(r"flag --(\w+)=None: Flag .* must have a value .*")


def _said(message: str) -> str:
  """Says once what absl says of a flag, and what is wanted."""
  if found := _UNSET.fullmatch(message):
    return f"--{found[1]} must have a value"
  for pattern, wanted in _REASONS:
    if found := pattern.fullmatch(message):
      value = found[2]
      if not value.isprintable() or len(value) > 100:
        value = f"{value[:99]!r}"
      return f"--{found[1]}={value} must be {found.expand(wanted)}"
  return message


def _checked(main: Callable, argv: list[str]):
  """Calls a command that takes flags alone."""
  if len(argv) > 1:
    raise config_lib.ConfigError(
      f"unexpected argument {argv[1]!r}: put values of several words in quotes"
    )
  for name in _PATHS:
    if name in flags.FLAGS:
      config_lib.check_folder(f"--{name}", flags.FLAGS[name].value or "")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # What libraries say is no progress.
    # Orbax logs the traces of errors that it raises as well, and asyncio those
    # of what orbax no longer waits for.
    logging.get_absl_handler().addFilter(
      lambda record: not _ALSO_RAISED.search(record.pathname)
    )
  return main()


_at_once = False


def leave_at_once() -> None:
  """Makes an error end this process without any cleaning up.

  Where there are several processes, JAX would wait for the others for minutes,
  and then give up with another status.
  """
  global _at_once
  _at_once = True


def end(status: int, message: str) -> None:
  """Ends this process; at once after `leave_at_once`, from whatever thread."""
  with contextlib.suppress(BrokenPipeError):
    print(message, file=sys.stderr, flush=True)
  if _at_once:
    with contextlib.suppress(BrokenPipeError):
      sys.stdout.flush()
    os._exit(status)
  sys.exit(status)
