"""The command, as a user sees it, before anything is loaded."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command):
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--workdir=nowhere"], ["nowhere", "config.json"]),
    (["--workdir=.", "--suites=vqa,popee"], ["popee", "pope", "decompression"]),
    (["--workdir=.", "--suites="], ["name some of"]),
    (["--workdir=.", "more"], ["'more'"]),
    (["--workdir=.", "--config.data.path"], ["--config.data.path=VALUE"]),
    (["--workdir=.", "--config.image_size=big"], ["image_size", "'big'"]),
  ],
)
def test_a_mistake_is_one_line(arguments, fragments):
  result = run("-m", "unicode_jax.evaluate", *arguments)
  assert result.returncode == 2, result.stderr
  assert result.stderr.count("\n") == 1
  assert result.stderr.startswith("error: ")
  for fragment in fragments:
    assert fragment in result.stderr


def test_help_names_the_suites_and_needs_no_jax():
  result = run("-m", "unicode_jax.evaluate", "--help")
  assert "reconstruction" in result.stdout and "--guidance" in result.stdout
  code = "import sys, unicode_jax.evaluate; sys.exit('jax' in sys.modules)"
  assert run("-c", code).returncode == 0
