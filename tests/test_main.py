"""The command line, as a user sees it: in processes of their own."""

import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Stands in for a stage: prints what it was given.
FAKE_STAGE = """
import os, sys, types
from unicode_jax import config as config_lib
stage = types.ModuleType("stage")
stage.run = lambda config, workdir: print(
  config.stage, config.preset, config.seed, config.codebook.paradigm,
  workdir, os.environ.get("JAX_PLATFORMS"),
)
sys.modules["unicode_jax.stages.pretrain"] = stage
sys.modules["unicode_jax.stages.tokenizer"] = stage
from unicode_jax import main
main.run()
"""


def run(*command):
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"},
    capture_output=True,
    text=True,
    timeout=60,
  )


def train(*arguments):
  return run("-m", "unicode_jax.main", *arguments)


def train_fake(*arguments):
  return run("-c", FAKE_STAGE, *arguments)


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (
      ["--config.codebok.paradigm=x"],
      ["codebok.paradigm", "codebook.paradigm"],
    ),
    (["--config.codebook.paradigm=x"], ["'x'", "'frozen'"]),
    (["--config.seed=abc"], ["seed='abc'", "whole number"]),
    (["--config.seed"], ["--config.seed=VALUE"]),
    (["--config.codebook.sync_every=0"], ["sync_every=0", "at least 1"]),
    (["--config=configs/pretrain.py:debg"], ["'debg'", "'debug'"]),
    (["--config=configs/tokenizer.py:debg"], ["'debg'", "'debug'"]),
    (["--config=configs/missing.py"], ["configs/missing.py", "no file"]),
    (["stray"], ["'stray'"]),
  ],
)
def test_a_config_error_is_one_line(arguments, fragments):
  result = train("--config=configs/pretrain.py:debug", *arguments)
  assert result.returncode == 2
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
  ("arguments", "fragment"),
  [([], "--config"), (["--config=x", "--workdri=y"], "workdir")],
)
def test_a_flag_error_names_the_flag(arguments, fragment):
  result = train(*arguments)
  assert result.returncode == 2 and result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ") and fragment in line


def test_help_takes_less_than_a_second():
  def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

  before = cpu_seconds()
  result = train("--help")
  assert "--config" in result.stdout and "configs/pretrain.py" in result.stdout
  assert cpu_seconds() - before < 1


def test_a_wrong_config_is_refused_within_a_second():
  start = time.monotonic()
  train("--config=configs/pretrain.py", "--config.codebook.code_dim=999")
  # Wall time of a busy machine; idle it is a tenth of a second.
  assert time.monotonic() - start < 3


def test_nothing_heavy_is_imported_before_a_stage():
  result = run(
    "-c",
    "import sys\nfrom unicode_jax import config, main\n"
    "config.validate(config.load('configs/pretrain.py'))\n"
    "print({'jax', 'flax', 'numpy', 'torch', 'transformers'} & {*sys.modules})",
  )
  assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
  ("arguments", "printed"),
  [
    (
      ["--config=configs/pretrain.py"],
      "pretrain  0 language_driven runs/pretrain-default None",
    ),
    (
      ["--config=configs/pretrain.py:debug", "--config.seed=1"],
      "pretrain debug 1 language_driven runs/pretrain-debug None",
    ),
    (
      [
        "--config",
        "configs/tokenizer.py:debug",
        "--config.seed",
        "3",
        "--config.platform=cpu",
        "--workdir=w",
      ],
      "tokenizer debug 3 private w cpu",
    ),
  ],
)
def test_a_config_reaches_its_stage(arguments, printed):
  result = train_fake(*arguments)
  assert result.stdout.strip() == printed, result.stderr
  assert result.returncode == 0


def test_a_chain_whose_start_is_gone_is_refused(tmp_path):
  """Or what was trained from the old start would pass for the new one's."""
  (tmp_path / "stage2").mkdir()
  (tmp_path / "stage2" / "config.json").write_text("{}")
  result = train(
    "--config=configs/quickstart.py:debug", f"--workdir={tmp_path}"
  )
  assert result.returncode == 2 and result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert "stage2 started from" in line and "remove it too" in line


def test_a_saved_config_is_a_config(tmp_path):
  from unicode_jax import config as config_lib

  saved = tmp_path / "config.json"
  config = config_lib.load(str(ROOT / "configs/pretrain.py:debug"))
  saved.write_text(
    config_lib.to_json(config_lib.apply_overrides(config, {"seed": 7}))
  )
  result = train_fake(f"--config={saved}", "--config.codebook.paradigm=frozen")
  printed = "pretrain debug 7 frozen runs/pretrain-debug None"
  assert result.stdout.strip() == printed, result.stderr


def test_an_unexpected_error_keeps_its_trace(tmp_path):
  broken = tmp_path / "broken.py"
  broken.write_text("def get_config(preset):\n  return preset.nothing\n")
  result = train(f"--config={broken}")
  assert result.returncode == 1
  assert "Traceback" in result.stderr and "preset.nothing" in result.stderr
