"""SIGKILL at any moment loses the steps since the last checkpoint, no more."""

import time

import pytest

from tests.crashes import harness


def check(command, workdir, straight, kills):
  """Kills a run, and compares it with one that was left alone."""
  counts = harness.kill_at_moments(command, workdir, kills, seed=0)
  print(counts)
  assert command.finish() == 0, command.said()[-3000:]
  assert counts["in_save"] + counts["any_time"] == kills
  assert counts["lost"] == 0
  assert harness.result(workdir) == harness.result(straight)
  assert (workdir / "report.md").exists()
  assert not (workdir / "set_aside").exists()
  assert not harness.being_written(workdir)  # What was left is cleaned up.


def test_stage_one(stage_one, straight, tmp_path):
  workdir = tmp_path / "run"
  check(stage_one(workdir), workdir, straight, kills=5)


@pytest.mark.slow
def test_stage_one_for_long(stage_one, tmp_path):
  folders = tmp_path / "killed", tmp_path / "straight"
  killed, straight = (
    stage_one(folder, "--config.num_steps=600") for folder in folders
  )
  assert straight.finish() == 0
  check(killed, *folders, kills=70)


def test_an_export_is_whole_or_not_there(straight, tmp_path):
  out = tmp_path / "out"
  flags = [f"--workdir={straight}", f"--out={out}"]
  command = harness.Command("export", flags, tmp_path / "log")
  for late in (0.0, 0.3):
    process = command.start()
    harness.wait_for(lambda: any(tmp_path.glob(".out.*")), process)
    time.sleep(late)
    harness.kill(process)
    assert not out.exists()
  assert command.finish() == 0, command.said()
  assert (out / "model.safetensors").is_file()
  assert not any(tmp_path.glob(".out.*"))  # Nor of those that were killed.


@pytest.fixture
def stage_two(data_flags, straight, tmp_path):
  """Returns a function: the command that trains stage II into a folder."""

  def make(name, steps):
    workdir = tmp_path / name
    flags = [
      "--config=configs/instruct.py:debug",
      f"--config.init_from={straight}",
      "--config.data.codes=auto",
      f"--config.num_steps={steps}",
      "--config.keep_checkpoints=1000",
      "--config.checkpoint_every=2",
      "--config.log_every=2",
      "--config.eval_every=20",
      f"--workdir={workdir}",
    ]
    log = tmp_path / f"{name}.log"
    return harness.Command("main", [*data_flags, *flags], log), workdir

  return make


@pytest.mark.parametrize(
  ("steps", "kills"), [(60, 1), pytest.param(900, 40, marks=pytest.mark.slow)]
)
def test_stage_two_and_its_codes(stage_two, steps, kills):
  """The first kills come while the images are encoded."""
  command, workdir = stage_two("killed", steps)
  codes = workdir / "codes"
  for _ in range(2):
    process = command.start()
    harness.wait_for(lambda: codes.is_dir() and any(codes.iterdir()), process)
    harness.kill(process)
    assert not (codes / "manifest.json").exists()
  other, straight = stage_two("straight", steps)
  assert other.finish() == 0, other.said()[-3000:]
  check(command, workdir, straight, kills)
  for path in (straight / "codes").iterdir():
    assert (workdir / "codes" / path.name).read_bytes() == path.read_bytes()
