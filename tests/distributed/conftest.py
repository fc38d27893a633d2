"""Starts the processes of a run, as several hosts would."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

TRAIN = pathlib.Path(__file__).parent / "train.py"
TIMEOUT = 600


@pytest.fixture
def together(host_devices):
  """Returns a function that runs a script in several processes at once.

  It gives the exit status and what was printed of each.
  """

  def run(processes, devices, *command):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for number in range(processes):
      environment = host_devices(devices)
      if processes > 1:
        environment |= {
          "JAX_COORDINATOR_ADDRESS": address,
          "JAX_NUM_PROCESSES": str(processes),
          "JAX_PROCESS_ID": str(number),
        }
      running.append(
        subprocess.Popen(
          [sys.executable, *map(str, command)],
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    try:
      texts = [process.communicate(timeout=TIMEOUT)[0] for process in running]
    finally:
      for process in running:
        process.kill()
    statuses = [process.returncode for process in running]
    return list(zip(statuses, texts, strict=True))

  return run


@pytest.fixture
def launch(together):
  """Returns a function that runs `train.py` in several processes at once."""

  def run(processes, devices, stage, workdir, until_step=0, **chosen):
    settings = {"data.num_workers": 0, "checkpoint_every": 4}
    settings |= {key.replace("__", "."): v for key, v in chosen.items()}
    flags = [f"{key}={value}" for key, value in settings.items()]
    ended = together(
      processes, devices, TRAIN, stage, workdir, until_step, *flags
    )
    for status, text in ended:
      assert status == 0, text[-4000:]
    return [text for _, text in ended]

  return run


@pytest.fixture
def logged():
  """Returns a function: the metrics of a run, by step, times left out."""

  def read(workdir):
    rows = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").open():
      row = json.loads(line)
      step = rows.setdefault(row.pop("step"), {})
      timing = ("time/", "goodput/")
      step |= {k: v for k, v in row.items() if not k.startswith(timing)}
    return rows

  return read


@pytest.fixture(scope="session")
def stage_one_of_eight_heads(tmp_path_factory, host_devices):
  """A tiny run of stage I whose heads split over eight devices."""
  workdir = tmp_path_factory.mktemp("eight_heads")
  command = [sys.executable, str(TRAIN), "pretrain", str(workdir), "0"]
  heads = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
  command += [f"llm.{key}={value}" for key, value in heads.items()]
  subprocess.run(
    [*command, "data.num_workers=0"], env=host_devices(1), check=True
  )
  return workdir
