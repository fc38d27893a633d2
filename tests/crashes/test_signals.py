"""What a run does when it is asked to end, crowded out or out of room."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

from tests.crashes import harness


def record_of(workdir, step):
  path = workdir / f"checkpoints/{step}/record/metadata"
  return json.loads(path.read_text())


def test_sigterm_and_ctrl_c_save(stage_one, straight, tmp_path):
  workdir = tmp_path / "run"
  command = stage_one(workdir)
  began = time.time()
  for number, status, words in (
    (signal.SIGTERM, 75, "stopped by SIGTERM"),
    (signal.SIGINT, 130, "interrupted"),
  ):
    more = len(harness.checkpoints(workdir)) + 1
    process = command.start()
    harness.wait_for(
      lambda more=more: len(harness.checkpoints(workdir)) >= more, process
    )
    if number == signal.SIGTERM:  # While it lives, the folder is its own.
      harness.kill(process, signal.SIGSTOP)  # Lest it ends first.
      second = stage_one(workdir)
      second.log = tmp_path / "second.log"
      assert second.finish() == 75
      (line,) = second.said().splitlines()
      assert f"in use by process {process.pid} on" in line
      harness.kill(process, signal.SIGCONT)
    harness.kill(process, number)
    assert process.wait(60) == status
    said = command.said()
    assert f"{words}: the same command goes on" in said
    assert "Traceback" not in said
    step = int(json.loads((workdir / "heartbeat.json").read_text())["step"])
    assert harness.checkpoints(workdir)[-1] == step
  assert command.finish() == 0
  assert f"resumed from step {step}" in command.said()
  found, expected = harness.result(workdir), harness.result(straight)
  # A checkpoint ends a window of the log, so the lines may differ.
  assert found["checksums"] == expected["checksums"]
  assert found["pictures"] == expected["pictures"]
  assert found["metrics"][-1] == expected["metrics"][-1]
  # Where the time went, of all processes.
  report = (workdir / "report.md").read_text()
  assert "| step |" in report and "| down |" in report
  spent = record_of(workdir, harness.checkpoints(workdir)[-1])["seconds"]
  assert spent["down"] > 0 and spent["step"] > 0
  taken = time.time() - began
  assert 0.5 * taken < sum(spent.values()) < taken


def test_before_the_first_step_nothing_is_saved(stage_one, tmp_path):
  workdir = tmp_path / "run"
  command = stage_one(workdir)
  process = command.start()
  harness.wait_for((workdir / "heartbeat.json").exists, process)
  harness.kill(process, signal.SIGTERM)
  assert process.wait(60) == 75
  assert "stopped by SIGTERM" in command.said()
  assert "Traceback" not in command.said()
  assert not harness.checkpoints(workdir)


def test_processes_that_read_end_with_their_run(stage_one, tmp_path):
  workdir = tmp_path / "run"
  command = stage_one(
    workdir, "--config.data.num_workers=1", "--config.num_steps=3000"
  )
  process = command.start()
  try:
    harness.wait_for(lambda: harness.checkpoints(workdir), process)
    readers = harness.children(process)
    assert len(readers) >= 2  # One for pictures, one for text.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while readers & harness.processes().keys():
      assert time.monotonic() < deadline
      time.sleep(0.1)
  finally:
    harness.kill(process)


def test_time_to_end_is_limited(stage_one, tmp_path):
  """Compiling takes longer than this leaves, and no Python runs meanwhile."""
  workdir = tmp_path / "run"
  command = stage_one(workdir, "--config.recovery.grace_seconds=0.2")
  command.environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  process = command.start()
  metrics = workdir / "metrics.jsonl"
  harness.wait_for(lambda: metrics.exists() and metrics.read_text(), process)
  time.sleep(0.5)  # The first evaluation is done: now the step is compiled.
  harness.kill(process, signal.SIGTERM)
  assert process.wait(60) == 75
  assert "no time for a checkpoint within" in command.said()


def test_a_full_disk_ends_the_run_and_harms_nothing(
  stage_one, straight, small_disk
):
  disk = small_disk(4_000_000)
  workdir = disk / "run"
  command = stage_one(workdir)
  command.log = disk.with_suffix(".log")
  assert command.finish() == 74
  # The storage library prints traces of its own above.
  *_, line = command.said().splitlines()
  assert re.match(r"error: .*: .*has room; the same command goes on", line)
  had = harness.checkpoints(workdir)
  assert had
  options = "remount,size=200000000"
  subprocess.run(["mount", "-o", options, disk], check=True)
  assert command.finish() == 0
  assert f"resumed from step {had[-1]}" in command.said()
  assert harness.result(workdir) == harness.result(straight)


def test_a_disk_that_cannot_be_written_is_one_line(stage_one, small_disk):
  disk = small_disk(1_000_000)
  subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
  command = stage_one(disk / "run")
  command.log = disk.with_suffix(".log")
  assert command.finish() == 2
  (line,) = command.said().splitlines()
  assert f"'{disk}/run'" in line and "name a file or folder" in line


def test_a_damaged_checkpoint_costs_its_steps_alone(
  stage_one, straight, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  *_, before, last = harness.checkpoints(workdir)
  files = (workdir / f"checkpoints/{last}/state/d").iterdir()
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 16
  largest.write_bytes(content)
  command = stage_one(workdir)
  assert command.finish() == 0
  said = command.said()
  assert f"WARNING: the checkpoint of step {last} is damaged" in said
  assert f"resumed from step {before}" in said
  assert (workdir / f"set_aside/{last}").is_dir()
  incidents = (workdir / "incidents.jsonl").read_text().splitlines()
  assert json.loads(incidents[0])["kind"] == "damaged"
  assert harness.result(workdir) == harness.result(straight)
