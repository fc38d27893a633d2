"""Signals outside of training: heeded, whatever a library makes of them."""

import subprocess
import sys
import textwrap
import time

import pytest


def run(main: str, patience: float = 10.0):
  """Runs a command whose work is `main`; returns the process and its time."""
  program = f"""
    import signal, sys, threading, time
    from unicode_jax import command, config, interruption

    interruption._PATIENCE = {patience}

    def main():
{textwrap.indent(textwrap.dedent(main), " " * 6)}
    sys.argv = ["command"]
    command.run(main, "what is left")
  """
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  return done, time.monotonic() - start


SIGNALS = pytest.mark.parametrize(
  ("name", "status", "words"),
  [("SIGTERM", 75, "stopped by SIGTERM"), ("SIGINT", 130, "interrupted")],
)


@SIGNALS
def test_a_signal_ends_a_command(name, status, words):
  done, _ = run(f"signal.raise_signal(signal.{name}); time.sleep(60)")
  assert done.returncode == status
  assert done.stderr == f"{words}: what is left\n"


@SIGNALS
def test_a_swallowed_signal_keeps_training_from_starting(name, status, words):
  """Python drops what is raised in a callback of the garbage collector."""
  done, seconds = run(
    f"""
    import gc
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.{name}))
    gc.collect()
    gc.callbacks.clear()
    with interruption.deferred(60.0):
      print("began")
    """
  )
  assert "Exception ignored" in done.stderr
  assert done.returncode == status and seconds < 30
  assert "began" not in done.stdout
  assert done.stderr.endswith(f"{words}: what is left\n")


@SIGNALS
def test_a_swallowed_signal_ends_what_goes_on(name, status, words):
  del words
  done, seconds = run(
    f"""
    try:
      signal.raise_signal(signal.{name})
    except BaseException:
      pass
    time.sleep(50)
    """,
    patience=0.5,
  )
  assert done.returncode == status and seconds < 40
  assert done.stderr == f"ended 0.5 s after {name}\n"


@SIGNALS
def test_what_a_library_makes_of_a_signal_is_no_error(name, status, words):
  del words
  done, _ = run(
    f"""
    try:
      signal.raise_signal(signal.{name})
    except BaseException as error:
      raise ImportError("while initializing the extension") from error
    """
  )
  assert done.returncode == status
  assert done.stderr == f"stopped by {name}: what is left\n"


def test_other_errors_are_errors():
  done, _ = run("raise ImportError('no such thing')")
  assert done.returncode == 1 and "no such thing" in done.stderr


def test_a_reader_that_has_gone_is_no_full_disk():
  program = (
    "import sys; from unicode_jax import command; sys.argv = ['c'];"
    "command.run(lambda: [print('x' * 9999) for _ in range(99)], 'left')"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  said = process.stderr.read()
  assert process.wait(60) == 74
  assert "what read the output of this command has ended" in said
  assert "Traceback" not in said
