"""Every flag of every command, given what nobody should give it.

A command's own process forks one child for each command line, so that thousands
of them take seconds; JAX is not imported in it, and no child may get that far.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from unicode_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = (
  *("main", "prepare", "convert.__main__", "export", "tokenize", "generate"),
  *("chat", "evaluate", "compile"),
)
# Runs a command line after the other, each in a child; says what came of it.
FORKS = r"""
import importlib, json, os, signal, sys, tempfile, traceback
import numpy, PIL.Image  # Which some need to say what is wrong.
from unicode_jax.data.prepared import from_parquet, making
module = importlib.import_module("unicode_jax." + sys.argv[1])
from unicode_jax import command

def describe():
  real, command.run = command.run, lambda *args, **kwargs: None
  module.run()
  command.run = real
  from absl import flags
  own = flags.FLAGS.flags_by_module_dict()
  return [
    [f.name, f.flag_type(), f.default] for name, fs in own.items()
    if name == module.__name__ or name == sys.argv[0] for f in fs
  ]

def child(work, number):
  pid = os.fork()
  if pid:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  signal.alarm(20)
  out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  error = os.open("error", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(out, 1), os.dup2(error, 2)
  os.chdir("empty")
  status = 1
  try:
    work()
    status = 0
  except SystemExit as exit:
    status = exit.code or 0
  except BaseException:
    traceback.print_exc()
  if "jax" in sys.modules:
    status = 99
  sys.stdout.flush(), sys.stderr.flush()
  os._exit(status)

os.chdir(tempfile.mkdtemp())
os.mkdir("empty")
def print_flags():
  print(json.dumps(describe()))
child(print_flags, 0)
described = json.loads(open("out").read())
print(json.dumps(described), flush=True)
for line in sys.stdin:
  arguments = json.loads(line)
  def work():
    sys.argv = [module.__name__, *arguments]
    module.run()
  status = child(work, 1)
  print(json.dumps({
    "arguments": arguments, "status": status, "made": os.listdir("empty"),
    "out": open("out", errors="replace").read(),
    "error": open("error", errors="replace").read(),
  }), flush=True)
"""

# What a flag of a kind cannot mean.
BAD = {
  "int": ("x", "1.5", "", "nan", "-1", "9" * 25, "1e3", "é", "0x", "--", "[]"),
  "float": ("x", "nan", "inf", "-inf", "-1", "1e400", "", "é", "1,5"),
  "bool": ("x", "2", "é"),
  "string enum": ("x", "", "../x", "é"),
}
# What text may be, and lead nowhere.
ODD = (
  *(
    "",
    " ",
    "/nowhere/é",
    "~nobody/x",
    "a" * 5000,
    "/dev/null/x",
    "../../nothing-of-this-name",
  ),
  *("*", "[", "%s", "{}", "-", "x\ty", "C:\\x", "http://x/y", "gs://x"),
)
# So that a command line ends at the latest where it asks for a run.
NEEDED = {
  "main": {"config": "nowhere.py"},
  "prepare": {"out": "out", "from": "folder", "path": "nowhere"},
  "convert.__main__": {"out": "out", "path": "nowhere"},
  "export": {"workdir": "nowhere", "out": "out"},
  "tokenize": {"workdir": "nowhere", "out": "out"},
  "generate": {"workdir": "nowhere"},
  "chat": {"workdir": "nowhere"},
  "evaluate": {"workdir": "nowhere"},
  "compile": {"config": "nowhere.py", "topology": "cpu:1"},
}


class Command:
  """A command in a process that forks for each command line."""

  def __init__(self, name):
    self.name = name
    self.process = subprocess.Popen(
      [sys.executable, "-c", FORKS, name],
      cwd=ROOT,
      env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.flags = json.loads(self.process.stdout.readline())

  def run(self, flags=(), **changes):
    """Runs a command line; returns what came of it."""
    values = NEEDED[self.name] | changes
    arguments = [f"--{key}={value}" for key, value in values.items()]
    return self.raw([*arguments, *flags])

  def raw(self, arguments):
    self.process.stdin.write(json.dumps(arguments) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())

  def close(self):
    self.process.communicate()


@pytest.fixture(scope="module", params=COMMANDS)
def command(request):
  command = Command(request.param)
  yield command
  command.close()


def refused(result):
  """Asserts that a command line was refused in one line, and nothing made."""
  assert result["status"] == 2, result
  assert result["out"] == "" and result["made"] == [], result
  (line,) = result["error"].splitlines()
  assert line.startswith("error: ") and 20 < len(line) < 11_000, result
  return line


def test_there_are_flags(command):
  names = {name for name, *_ in command.flags}
  assert names >= NEEDED[command.name].keys()
  assert {kind for _, kind, _ in command.flags} <= {
    *BAD,
    "string",
    "multi string",
  }


def test_values_of_no_meaning(command):
  """Whole numbers, fractions, choices: refused, and by the flag's name."""
  for name, kind, _ in command.flags:
    for value in BAD.get(kind, ()):
      line = refused(command.run(**{name: value}))
      if name != "step" or not value.isdigit():  # It may be there.
        assert line.count(f"{name}=") == 1, (name, value, line)


def test_texts_of_no_meaning(command):
  for name, kind, _ in command.flags:
    if "string" in kind and kind not in BAD:
      for value in ODD:
        refused(command.run(**{name: value}))


def test_flags_that_are_not_there(command):
  for flag in ("--nothing=1", "--é=1", "--", "stray", "-x", "--config.seed=x"):
    result = command.run([flag])
    if flag != "--":
      refused(result)
  for name in NEEDED[command.name]:
    values = NEEDED[command.name].copy()
    del values[name]
    line = refused(command.raw([f"--{k}={v}" for k, v in values.items()]))
    assert name in line
    assert name in refused(command.run([f"--{name}"], **values))


def test_an_argument_that_is_no_text(command):
  name = next(iter(NEEDED[command.name]))
  assert "UTF-8" in refused(command.run(**{name: "\udcff"}))


def test_topologies():
  """As they are written, before anything is imported."""
  from unicode_jax import compile as compile_lib

  for good in ("cpu:8", "v5e:4x4", "v5litepod:16x16", "v5p:2x2x2", "v6e:1x1"):
    compile_lib.check_topology(good)
  for bad in (
    *("", "cpu", "cpu:0", "cpu:-1", "cpu:²", "cpu:10000", "v5e", "v5e:16"),
    *("v5e:0x4", "v5e:4x4x4x4", "v5e:4x", "gpu:8", "tpu:8", "v5e:4X4", "é:1x1"),
  ):
    with pytest.raises(ConfigError, match="such as v5e:4x4"):
      compile_lib.check_topology(bad)


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "--helpshort"])
def test_help_is_no_mistake(command, flag):
  result = command.raw([flag])
  assert result["status"] == 0 and result["error"] == ""
  assert "--" in result["out"]


def test_overrides(command):
  """Those that take --config.KEY=VALUE name the key."""
  if command.name not in ("main", "tokenize", "evaluate", "compile"):
    return
  for value in ("x", "nan", "", "-1", "[", "(" * 3000, "{[]: 1}"):
    changes = {}
    if "config" in NEEDED[command.name]:
      changes["config"] = str(ROOT / "configs/pretrain.py:debug")
    result = command.run([f"--config.data.shift={value}"], **changes)
    line = refused(result)
    # The others ask for the run first, and then for what fits it.
    if value != "-1" or command.name in ("main", "compile"):
      assert "data.shift" in line, line
