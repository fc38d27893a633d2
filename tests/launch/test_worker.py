"""launch/worker.sh as it runs on a TPU's worker, with real processes.

Nothing here sends a signal: what plays the training ends when a file tells it
how, or by itself after some seconds.
"""

import pathlib
import shutil
import subprocess
import time

import pytest

TRAINING = ("python", "-m", "unicode_jax.main", '--config=it\'s a "config"')
# Plays the training: says that it began, and ends once it is told how. "lost"
# ends the shell that would write the status, and then itself.
PYTHON = """#!/usr/bin/env bash
echo "began: $(pwd): $*"
trap 'echo "saved"; exit 143' TERM
for _ in {1..400}; do
  sleep 0.05
  [[ -s ~/ends ]] || continue
  if [[ $(<~/ends) == lost ]]; then
    ((PPID > 1)) && kill -KILL "$PPID"
    exit 1
  fi
  echo "ended"
  exit "$(<~/ends)"
done
exit 9
"""


@pytest.fixture
def worker(place):
  """A worker's home folder, and how to run its script there."""
  home = place.bin.parent / "home"
  shutil.copytree(place.root, home / "code")
  (home / "venv").symlink_to(home)
  (home / "bin").mkdir()
  (home / "bin/python").write_text(PYTHON)
  (home / "bin/python").chmod(0o755)

  def run(*words):
    ended = subprocess.run(
      ["code/launch/worker.sh", *words],
      cwd=home,
      env={"PATH": str(place.bin), "HOME": str(home), "GRACE_SECONDS": "5"},
      capture_output=True,
      text=True,
      timeout=30,
      check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout

  run.home = home
  yield run
  (home / "ends").write_text("0")


def eventually(condition):
  for _ in range(400):
    if condition():
      return
    time.sleep(0.05)
  pytest.fail("did not happen")


def began(run, times=1):
  log = run.home / "train.log"
  eventually(lambda: log.exists() and log.read_text().count("began") == times)


def test_from_start_to_end(worker):
  assert worker("status") == "status=lost\n"
  assert worker("start", *TRAINING) == ""
  began(worker)
  assert worker("status") == "status=running\n"
  (worker.home / "ends").write_text("0")
  eventually(lambda: worker("status") == "status=0\n")
  log = worker("log").splitlines()
  code = worker.home / "code"
  assert log == [f"began: {code}: {' '.join(TRAINING[1:])}", "ended"]


def test_the_exit_status_is_kept(worker):
  (worker.home / "ends").write_text("2")
  worker("start", *TRAINING)
  eventually(lambda: worker("status") == "status=2\n")


def test_a_second_start_stops_the_first_with_sigterm(worker):
  worker("start", *TRAINING)
  began(worker)
  worker("start", *TRAINING)
  began(worker, 2)
  assert worker("status") == "status=running\n"
  assert worker("log").count("saved") == 1


def test_a_killed_run_is_lost(worker):
  worker("start", *TRAINING)
  began(worker)
  (worker.home / "ends").write_text("lost")
  eventually(lambda: worker("status") == "status=lost\n")


def test_a_process_number_of_another_is_not_the_training(worker):
  other = subprocess.Popen(["sleep", "30"])
  try:
    for number in (other.pid, 1, 0, -1, ""):
      (worker.home / "train.pid").write_text(f"{number}\n")
      assert worker("status") == "status=lost\n"
  finally:
    other.terminate()
    other.wait()


def test_what_is_installed(worker, place):
  for name in ("python3", "uv"):
    place.program(name, f'#!/usr/bin/env bash\necho "{name} $*" >&2\n')
  (place.bin / "uv").unlink()
  local = worker.home / ".local/bin"
  local.mkdir(parents=True)
  (local / "uv").write_text('#!/usr/bin/env bash\necho "$*" >>~/uv.log\n')
  (local / "uv").chmod(0o755)
  worker("install")
  made, installed = (worker.home / "uv.log").read_text().splitlines()
  assert made == "venv --quiet --python 3.11 venv"
  assert installed.endswith("--editable code[tpu]")
  assert not (worker.home / "venv").exists()
  assert pathlib.Path(worker.home / "code/launch").is_dir()
