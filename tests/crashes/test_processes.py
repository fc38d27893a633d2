"""A run of two processes of which one is killed, or told to end."""

import signal
import socket
import time

import pytest

from tests.crashes import harness


def start(stage_one, workdir, host_devices):
  """Starts the two processes of a run, of one device each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  started = []
  for number in range(2):
    command = stage_one(workdir, "--config.distributed=True")
    command.log = workdir.with_name(f"{workdir.name}-{number}.log")
    command.environment = host_devices(1) | {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(number),
    }
    started.append((command, command.start()))
  return started


def finish(started):
  for command, process in started:
    assert process.wait(harness.TIMEOUT) == 0, command.said()[-3000:]


@pytest.mark.slow
def test_one_of_two_is_killed_or_told_to_end(stage_one, host_devices, tmp_path):
  workdir, straight = tmp_path / "run", tmp_path / "straight"
  finish(start(stage_one, straight, host_devices))

  started = start(stage_one, workdir, host_devices)
  (_, first), (_, second) = started
  harness.wait_for(
    lambda: (
      len(harness.checkpoints(workdir)) > 1 and harness.being_written(workdir)
    ),
    first,
  )
  harness.kill(second)
  harness.kill(first)  # As launchers do: the other cannot go on.
  *_, whole, damaged = harness.checkpoints(workdir)

  # They cannot agree on what only some can read: it is moved, and they end.
  for path in (workdir / f"checkpoints/{damaged}/state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:-100])
  started = start(stage_one, workdir, host_devices)
  deadline = time.monotonic() + 120
  while all(process.poll() is None for _, process in started):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  assert 74 in [process.poll() for _, process in started]
  for _, process in started:
    harness.kill(process)
  assert (workdir / f"set_aside/{damaged}").is_dir()

  had = harness.checkpoints(workdir)
  assert had[-1] == whole
  started = start(stage_one, workdir, host_devices)
  (command, first), (_, second) = started
  harness.wait_for(
    lambda: len(harness.checkpoints(workdir)) > len(had) + 1, first
  )
  assert f"resumed from step {had[-1]}" in command.said()
  assert {*had} <= {*harness.checkpoints(workdir)}
  harness.kill(second, signal.SIGTERM)
  for command, process in started:
    assert process.wait(120) == 75, command.said()[-3000:]
    assert "stopped by SIGTERM" in command.said()

  finish(start(stage_one, workdir, host_devices))
  found, expected = harness.result(workdir), harness.result(straight)
  assert found["checksums"] == expected["checksums"]
  assert found["pictures"] == expected["pictures"]
