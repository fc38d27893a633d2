"""Processes that were given different things end, and leave nothing."""

import pathlib
import socket
import subprocess
import sys

from PIL import Image
import pytest

from unicode_jax import files

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py:debug"


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _place(address: str, number: int) -> dict[str, str]:
  """Returns what says which of two processes one is."""
  return {
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(number),
  }


@pytest.fixture
def start(host_devices):
  """Returns a function: starts the command twice, with flags of each.

  It returns both exit statuses, and what both say. `folders` are where they
  start.
  """

  def run(*flags, folders=(None, None)):
    address = f"127.0.0.1:{_free_port()}"
    running = [
      subprocess.Popen(
        [
          *(sys.executable, "-m", "unicode_jax.main"),
          *(f"--config={CONFIG}", "--config.distributed=True"),
          *of,
        ],
        cwd=folders[number],
        env=host_devices(1) | _place(address, number),
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


def test_one_refuses(start, tmp_path):
  """What process 0 alone can see: the folder is in use, or of another run."""
  workdir = f"--workdir={tmp_path / 'run'}"
  with files.held(tmp_path / "run"):
    codes, texts = start([workdir], [workdir])
  assert codes == [75, 75], texts
  assert f"{tmp_path / 'run'} is in use by process" in texts[0]
  assert f"process 0 ends: {tmp_path / 'run'} is in use by" in texts[1]


def test_data_that_one_host_lacks(start, tmp_path):
  """The same name, which is a folder of images on one host alone."""
  here, there = tmp_path / "here", tmp_path / "there"
  for folder in (here, there):
    (folder / "images").mkdir(parents=True)
  for number in range(20):
    image = Image.new("RGB", (32, 32), (number, 0, 0))
    image.save(here / "images" / f"{number}.png")
  flags = [
    f"--workdir={tmp_path / 'run'}",
    "--config.data.source=folder",
    "--config.data.path=images",
  ]
  codes, texts = start(flags, flags, folders=[here, there])
  assert codes == [2, 2], texts
  assert "no image in images" in texts[1]
  assert "process 1 ends: no image in images" in texts[0]
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_who_is_alone_says_so(host_devices, number):
  """Instead of JAX's abort; with less patience than the command has."""
  address = f"127.0.0.1:{_free_port()}"
  code = (
    "from unicode_jax import processes\n"
    "processes._PATIENCE, processes._SILENCE = 4, 1.5\n"
    "processes.join()"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=host_devices(1) | _place(address, number),
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 75, done.stderr
  said = f"waiting for the other processes, at {address}\n"
  assert done.stdout == said * 2
  assert f"after 4 s not all processes have met at {address}" in done.stderr


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
