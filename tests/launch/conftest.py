"""Runs the launchers as processes, among programs that only record their calls.

Nothing here can reach a cloud: PATH holds the recording programs and links to a
few ordinary ones, and the scripts are those of a repository made for the test.
"""

import dataclasses
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RECORDED = (
  *("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "squeue"),
  *("curl", "fusermount", "gcsfuse", "lsb_release", "mountpoint", "sudo"),
)
ORDINARY = (
  *("bash", "cat", "chmod", "cut", "date", "dirname", "env", "git", "grep"),
  *("gzip", "id", "mkdir", "mktemp", "mv", "rm", "rmdir", "sed", "setsid"),
  *("sleep", "sort", "tail", "tar", "timeout", "tr"),
)

# Records its arguments, and what it reads where it is told to read. Answers are
# files: of a queue whose pattern is part of the call, the first is used up, and
# the last one stays.
RECORDER = """#!/usr/bin/env bash
here={here}
call="${{0##*/}} $*"
input=x
[[ $call != *--filename=-* && $call != "sudo tee"* ]] || input=$(cat; echo x)
printf -v words '%s\\037' "${{0##*/}}" "$@"
# At once: programs on both sides of a pipe do so.
printf '%s%s\\036' "$words" "${{input%x}}" >>"$here/calls"
for queue in "$here"/answers/*; do
  [[ -e $queue && $call == *"$(<"$queue/pattern")"* ]] || continue
  now=$(<"$queue/now")
  [[ ! -e $queue/$((now + 1)) ]] || echo $((now + 1)) >"$queue/now"
  status=$(<"$queue/$now.status")
  if ((status)); then exec >&2; fi
  echo "$(<"$queue/$now")"
  exit "$status"
done
exit {default}
"""


@dataclasses.dataclass
class Place:
  """A repository with launchers, and programs that record their calls.

  Attributes:
    root: the repository.
    bin: the only folder in PATH.
  """

  root: pathlib.Path
  bin: pathlib.Path

  def program(self, name, source):
    """Adds a program."""
    path = self.bin / name
    path.unlink(missing_ok=True)
    path.write_text(source)
    path.chmod(0o755)

  def record(self, default=0):
    """Adds the recording programs; they end with this status by default."""
    here = shlex.quote(str(self.bin.parent))
    for name in RECORDED:
      self.program(name, RECORDER.format(here=here, default=default))

  def answer(self, answers):
    """Says what calls are answered: {part of it: [(status, text), ...]}."""
    shutil.rmtree(self.bin.parent / "answers", ignore_errors=True)
    for number, (pattern, queue) in enumerate(answers.items()):
      folder = self.bin.parent / "answers" / str(number)
      folder.mkdir(parents=True)
      (folder / "pattern").write_text(pattern)
      (folder / "now").write_text("0")
      for place, (status, text) in enumerate(queue):
        (folder / str(place)).write_text(text)
        (folder / f"{place}.status").write_text(str(status))

  def run(self, script, *arguments, **environment):
    """Runs a launcher to its end."""
    return subprocess.run(
      [str(self.root / "launch" / script), *map(str, arguments)],
      cwd=self.bin.parent,
      env={"PATH": str(self.bin), "HOME": str(self.bin.parent), **environment},
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  @property
  def calls(self):
    """What was called, as lists of words, and the standard input of each."""
    path = self.bin.parent / "calls"
    if not path.exists():
      return []
    records = [r.split("\037") for r in path.read_text().split("\036")[:-1]]
    return [(words, stdin) for *words, stdin in records]


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
  """A repository with one commit, which no test changes: `place` copies it."""
  root = tmp_path_factory.mktemp("clone")
  for folder in ("launch", "configs"):
    shutil.copytree(ROOT / folder, root / folder)
  git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
  commands = (
    ["init", "-q", "--template="],
    ["add", "-A"],
    ["commit", "-qm", "x"],
  )
  for words in commands:
    subprocess.run([*git, *words], cwd=root, check=True)
  return root


@pytest.fixture
def place(clone, tmp_path):
  """Launchers, where everything that is called is recorded and succeeds."""
  root, programs = tmp_path / "a clone", tmp_path / "bin"
  shutil.copytree(clone, root)
  programs.mkdir()
  for name in ORDINARY:
    if found := shutil.which(name):
      (programs / name).symlink_to(found)
  (programs / "python3").symlink_to(sys.executable)
  made = Place(root, programs)
  made.record()
  return made


@pytest.fixture
def dry(place):
  """Runs a launcher dry, and returns the words of each command it printed."""

  def run(script, *arguments, **environment):
    place.record(default=99)
    before = sorted(place.root.rglob("*"))
    ended = place.run(
      script, *arguments[:1], "--dry_run", *arguments[1:], **environment
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert place.calls == []
    assert sorted(place.root.rglob("*")) == before
    lines = ended.stdout.splitlines()
    return [
      words for line in lines if (words := shlex.split(line, comments=True))
    ]

  return run
