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
START = ("start", "my-bucket", *TRAINING)
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
  (home / "mnt/my-bucket").mkdir(parents=True)

  def run(*words, status=0):
    ended = subprocess.run(
      ["code/launch/worker.sh", *words],
      cwd=home,
      env={
        "PATH": str(place.bin),
        "HOME": str(home),
        "MOUNTS": str(home / "mnt"),
        "GRACE_SECONDS": "5",
        "RETRY_SECONDS": "0",
      },
      capture_output=True,
      text=True,
      timeout=30,
      check=False,
    )
    assert ended.returncode == status, ended.stderr
    return ended.stdout if status == 0 else ended.stderr

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


def installing(worker, place):
  """Adds what plays pip and uv."""
  for name in ("python3", "uv"):
    place.program(name, "#!/usr/bin/env bash\n")
  (place.bin / "uv").unlink()
  local = worker.home / ".local/bin"
  local.mkdir(parents=True)
  (local / "uv").write_text('#!/usr/bin/env bash\necho "$*" >>~/uv.log\n')
  (local / "uv").chmod(0o755)


def test_from_start_to_end(worker):
  assert worker("status") == "status=lost\n"
  assert worker(*START) == ""
  began(worker)
  assert worker("status") == "status=running\n"
  (worker.home / "ends").write_text("0")
  eventually(lambda: worker("status") == "status=0\n")
  log = worker("log").splitlines()
  code = worker.home / "code"
  assert log == [f"began: {code}: {' '.join(TRAINING[1:])}", "ended"]


def test_the_exit_status_is_kept(worker):
  (worker.home / "ends").write_text("2")
  worker(*START)
  eventually(lambda: worker("status") == "status=2\n")


def test_a_second_start_stops_the_first_with_sigterm(worker):
  worker(*START)
  began(worker)
  worker(*START)
  began(worker, 2)
  assert worker("status") == "status=running\n"
  assert worker("log").count("saved") == 1


def test_a_killed_run_is_lost(worker):
  worker(*START)
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


def test_start_mounts_the_bucket(worker, place):
  place.answer({"mountpoint": [(1, "")]})
  worker(*START)
  began(worker)
  folder = str(worker.home / "mnt/my-bucket")
  calls = [words for words, _ in place.calls]
  assert calls[:2] == [
    ["mountpoint", "-q", folder],
    ["fusermount", "-uz", folder],
  ]
  assert calls[2] == ["sudo", "mkdir", "-p", folder]
  assert calls[3][:2] == ["sudo", "chown"]
  assert calls[3][3:] == [folder]
  [gcsfuse] = calls[4:]
  assert gcsfuse[:2] == ["gcsfuse", "--implicit-dirs"]
  assert gcsfuse[-2:] == ["my-bucket", folder]
  assert [*(worker.home / "mnt/my-bucket").iterdir()] == []


def test_a_mount_that_is_there_is_kept(worker, place):
  worker(*START)
  began(worker)
  assert [words[0] for words, _ in place.calls] == ["mountpoint"]


def test_a_mount_that_does_not_answer_is_replaced(worker, place):
  (worker.home / "mnt/my-bucket").rmdir()
  place.program("gcsfuse", '#!/usr/bin/env bash\nmkdir "${@: -1}"\n')
  place.answer({"mountpoint": [(0, ""), (1, "")]})
  worker(*START)
  began(worker)
  assert [" ".join(words[:2]) for words, _ in place.calls] == [
    *["mountpoint -q", "fusermount -uz"],
    *["mountpoint -q", "fusermount -uz", "sudo mkdir", "sudo chown"],
  ]


def test_a_bucket_that_cannot_be_mounted_is_one_line_and_final(worker, place):
  (worker.home / "train.status").write_text("1\n")
  place.answer({"mountpoint": [(1, "")], "gcsfuse": [(1, "x\nno such bucket")]})
  [line] = worker(*START, status=1).splitlines()
  folder = worker.home / "mnt/my-bucket"
  assert line == (
    f"error: gs://my-bucket cannot be mounted on {folder}: no such bucket"
  )
  assert worker("status") == "status=2\n"
  assert worker("log") == f"{line}\n"
  tries = [words for words, _ in place.calls if words[0] == "gcsfuse"]
  assert len(tries) == 12


def test_a_bucket_that_cannot_be_written_to(worker, place):
  (worker.home / "mnt/my-bucket").rmdir()
  line = worker(*START, status=1)
  assert line.startswith("error: gs://my-bucket cannot be mounted on ")
  assert "mktemp" in line
  assert worker("status") == "status=2\n"


def test_a_mount_that_works_at_the_second_try(worker, place):
  place.answer({"mountpoint": [(1, "")], "gcsfuse": [(1, "no token"), (0, "")]})
  worker(*START)
  began(worker)


@pytest.mark.parametrize(
  ("version", "there"),
  [
    ("gcsfuse version 3.4.0 (Go version go1.24.5)", True),
    ("gcsfuse version 12.0.1 (Go version go1.30)", True),
    ("gcsfuse version 2.11.2 (Go version go1.24.0)", False),
    ("gcsfuse version unknown", False),
  ],
)
def test_gcsfuse_is_installed_where_it_is_missing(
  worker, place, version, there
):
  place.answer(
    {"gcsfuse": [(0, version)], "lsb_release": [(0, "jammy")]}
    | {"apt-get -o DPkg::Lock::Timeout=600 update": [(100, "a broken source")]}
  )
  installing(worker, place)
  worker("install")
  calls = [
    (" ".join(words), stdin)
    for words, stdin in place.calls
    if words[0] not in ("gcsfuse", "lsb_release")
  ]
  if there:
    assert calls == []
    return
  commands = [call for call, _ in calls]
  # The two sides of a pipe begin in any order.
  assert {words.split()[0] for words in commands} == {"curl", "sudo"}
  [source] = [stdin for call, stdin in calls if call.endswith("gcsfuse.list")]
  [key] = [call.split()[-1] for call, _ in calls if call.endswith(".asc")]
  assert source == (
    f"deb [signed-by={key}] https://packages.cloud.google.com/apt "
    "gcsfuse-jammy main\n"
  )
  assert commands[-1].endswith("install --yes gcsfuse")


def test_gcsfuse_that_cannot_be_installed_is_one_line(worker, place):
  place.answer({"install --yes gcsfuse": [(100, "E: no such package")]})
  installing(worker, place)
  line = worker("install", status=1)
  assert line == "error: gcsfuse cannot be installed: E: no such package\n"


def test_what_is_installed(worker, place):
  installing(worker, place)
  worker("install")
  made, installed = (worker.home / "uv.log").read_text().splitlines()
  assert made == "venv --quiet --python 3.11 venv"
  assert installed.endswith("--editable code[tpu]")
  assert not (worker.home / "venv").exists()
  assert pathlib.Path(worker.home / "code/launch").is_dir()
