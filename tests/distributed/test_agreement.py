"""Processes that were given different things end, and leave nothing."""

import pathlib
import signal
import socket
import subprocess
import sys

from PIL import Image
import pytest

from unicode_jax import files

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py:debug"
COMMAND = (f"--config={CONFIG}", "--config.distributed=True")
# Joins, and fails or outlives the time that the others have to come.
FAILING = """
import sys, time
import jax
from unicode_jax import command, config, processes
from unicode_jax.stages import agreement

processes._PATIENCE = 20

def main():
  processes.join()
  if not error:
    time.sleep(max(0, 21 + began - time.monotonic()))
  with agreement.together():
    if jax.process_index() == 1 and error:
      raise eval(error)

(error,), sys.argv[1:] = sys.argv[1:], []
began = time.monotonic()
command.run(main, "nothing is left")
"""
# The command, with less patience than it has.
IMPATIENT = """
import runpy
from unicode_jax import processes
from unicode_jax.stages import agreement

agreement._PATIENCE, processes._SILENCE = 3, 1
runpy.run_module("unicode_jax.main", run_name="__main__")
"""


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
  """Returns a function: starts a command twice, with flags of each.

  It returns both exit statuses, and what both say. `folders` are where they
  start, `devices` how many they have, and `code` is what they run in place of
  training.
  """

  def run(*flags, folders=(None, None), devices=(1, 1), code=None):
    what = ["-c", code] if code else ["-m", "unicode_jax.main", *COMMAND]
    address = f"127.0.0.1:{_free_port()}"
    running = [
      subprocess.Popen(
        [sys.executable, *what, *of],
        cwd=folders[number],
        env=host_devices(devices[number]) | _place(address, number),
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
  flags = ([*COMMAND, f"--workdir={folder}"] for folder in folders)
  codes, texts = start(*flags, code=IMPATIENT)
  assert codes == [2, 2], texts
  for text in texts:
    assert "process 1 does not see what process 0 writes" in text
    assert str(folders[0]) in text and str(folders[1]) in text
  assert not folders[0].exists() and not folders[1].exists()


def test_one_refuses(start, tmp_path):
  """What process 0 alone can see: the folder is in use."""
  workdir = f"--workdir={tmp_path / 'run'}"
  with files.held(tmp_path / "run"):
    codes, texts = start([workdir], [workdir])
  assert codes == [75, 75], texts
  assert f"{tmp_path / 'run'} is in use by process" in texts[0]
  said = f"process 0 of the run ends: {tmp_path / 'run'} is in use by"
  assert said in texts[1]


@pytest.mark.parametrize(
  "error,status,said",
  [
    ("", 0, ""),
    ("OSError(5, 'Input/output error', 'some')", 74, "Input/output error"),
    ("FileNotFoundError(2, 'No such file', 'some')", 2, "No such file: 'some'"),
    ("config.RunError('no memory')", 3, "stopped: {}no memory"),
    ("ValueError('a mistake')", 1, "ValueError: a mistake"),
  ],
)
def test_all_end_as_one_does(start, error, status, said):
  codes, texts = start([error], [error], code=FAILING)
  assert codes == [status, status], texts
  who = "process 1 of the run ends: "
  assert said.format(who) in texts[0] and said.format("") in texts[1]
  assert (who in texts[0]) == bool(error)
  assert who not in texts[1]


def test_a_host_with_fewer_devices(start, tmp_path):
  """As where a chip is broken."""
  flags = [f"--workdir={tmp_path / 'run'}"]
  codes, texts = start(flags, flags, devices=(2, 1))
  assert codes == [2, 2], texts
  for text in texts:
    assert "processes 0 to 1 have 2, 1 devices" in text
    assert "Traceback" not in text
  assert not (tmp_path / "run").exists()


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
  assert "process 1 of the run ends: no image in images" in texts[0]
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
  "number,status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_ends_who_waits(host_devices, tmp_path, number, status):
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", IMPATIENT, *COMMAND),
      f"--workdir={tmp_path / 'run'}",
    ],
    env=host_devices(1) | _place(f"127.0.0.1:{_free_port()}", 0),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline().startswith("waiting for the other")
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
  finally:
    process.kill()
  assert process.returncode == status
  assert f"stopped by {number.name}: the other processes had not come" in said


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
