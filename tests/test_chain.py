"""The quickstart's debug preset: every link for real, and then again."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(workdir, *arguments, config="quickstart"):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
  }
  return subprocess.run(
    [
      *(sys.executable, "-m", "unicode_jax.main"),
      f"--config=configs/{config}.py:debug",
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("chain")
  result = run(workdir)
  assert result.returncode == 0, result.stderr
  return workdir


def checkpoints(workdir):
  return {
    str(path): path.stat().st_mtime_ns
    for path in workdir.glob("*/checkpoints/*")
  }


def test_each_link_starts_from_the_one_before(chain):
  configs = {
    link: json.loads((chain / link / "config.json").read_text())
    for link in ("warmup", "stage1", "reading", "stage2")
  }
  assert [c["stage"] for c in configs.values()] == [
    "tokenizer",
    "pretrain",
    "instruct",
    "instruct",
  ]
  assert configs["stage1"]["init_from"] == str(chain / "warmup")
  assert configs["reading"]["init_from"] == str(chain / "stage1")
  assert configs["stage2"]["init_from"] == str(chain / "reading")
  # The tokenizer is the same, so the images are not encoded twice.
  assert (chain / "reading/codes/manifest.json").is_file()
  assert not (chain / "stage2/codes").exists()
  suites = json.loads((chain / "stage2/evaluation/results.json").read_text())
  assert suites["suites"].keys() == {"text"}


def test_the_same_command_trains_nothing_again(chain):
  before = checkpoints(chain)
  result = run(chain)
  assert result.returncode == 0, result.stderr
  assert result.stdout.count("trained already") == 4
  assert result.stdout.count("measured already") == 1
  assert checkpoints(chain) == before


def test_codes_of_a_start_with_other_views_are_made_anew(chain, tmp_path):
  result = run(
    tmp_path,
    f"--config.init_from={chain / 'reading'}",
    "--config.data.codes=auto",
    "--config.data.shift=1",
    "--config.num_steps=1",
    config="instruct",
  )
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "codes/manifest.json").is_file()


def test_another_start_is_refused(chain):
  (chain / "stage2/start.txt").write_text("another\n")
  (chain / "stage2/report.md").unlink()  # As if it had been stopped.
  result = run(chain)
  assert result.returncode == 2
  assert "another tokenizer" in result.stderr
