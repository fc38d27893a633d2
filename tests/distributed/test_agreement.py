"""Processes that were given different things end, and leave nothing."""

import socket
import subprocess
import sys

import pytest


@pytest.fixture
def start(host_devices):
  """Returns a function: starts the command twice, with flags of each."""

  def run(*flags):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
      subprocess.Popen(
        [
          *(sys.executable, "-m", "unicode_jax.main"),
          *("--config=configs/pretrain.py:debug", "--config.distributed=True"),
          *of,
        ],
        env=host_devices(1)
        | {
          "JAX_COORDINATOR_ADDRESS": address,
          "JAX_NUM_PROCESSES": "2",
          "JAX_PROCESS_ID": str(number),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for number, of in enumerate(flags)
    ]
    try:
      texts = [process.communicate(timeout=300)[0] for process in running]
    finally:
      for process in running:
        process.kill()
    return [process.returncode for process in running], texts

  return run


@pytest.mark.parametrize("key", ["seed", "checkpoint_every"])
def test_other_configs(start, tmp_path, key):
  """One that decides the numbers, and one that only decides who waits."""
  workdir = f"--workdir={tmp_path / 'run'}"
  codes, texts = start([workdir], [workdir, f"--config.{key}=5"])
  assert codes == [2, 2], texts
  for text in texts:
    assert "processes 0 and 1 were given different configs" in text
    assert f"({key}: " in text and "and 5)" in text
  assert not (tmp_path / "run").exists()


def test_other_folders(start, tmp_path):
  """As where each host has a disk of its own."""
  folders = [tmp_path / "a", tmp_path / "b"]
  codes, texts = start(*([f"--workdir={folder}"] for folder in folders))
  assert codes == [2, 2], texts
  for text in texts:
    assert "process 1 does not see what process 0 writes" in text
    assert str(folders[0]) in text and str(folders[1]) in text
  assert not folders[0].exists() and not folders[1].exists()


@pytest.mark.parametrize(
  "environment,said",
  [
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "has no port"),
    (
      {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2"},
      "JAX_NUM_PROCESSES=2 and JAX_PROCESS_ID=None do not say",
    ),
    (
      {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
      "JAX_NUM_PROCESSES=two and JAX_PROCESS_ID=0 do not say",
    ),
    (
      {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      "JAX_PROCESS_ID=2 is none of JAX_NUM_PROCESSES=2",
    ),
  ],
)
def test_a_place_that_is_none(host_devices, tmp_path, environment, said):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "unicode_jax.main"),
      *("--config=configs/pretrain.py:debug", "--config.distributed=True"),
      f"--workdir={tmp_path / 'run'}",
    ],
    env=host_devices(1) | environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2
  assert said in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()
