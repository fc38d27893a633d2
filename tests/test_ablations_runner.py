"""The runner of the ablations, with processes that do little."""

import argparse
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks" / "ablations"
WAITS = "import time; time.sleep(60)"

pytestmark = pytest.mark.skipif(
  not hasattr(os, "wait4"), reason="the runner needs what a Unix has"
)


@pytest.fixture(name="run")
def run_fixture():
  """Returns the script, which imports its neighbours by their bare names."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")


@pytest.fixture(name="args")
def args_fixture(tmp_path):
  """Returns what the command line would say."""
  return argparse.Namespace(
    workdir=tmp_path, results=tmp_path / "results", hours=1.0, jobs=2
  )


def task(run, key, code, *needs):
  return run.Task(key, f"base {key}", ["-c", code], list(needs))


def wrote(path):
  return f"open({str(path)!r}, 'a').write('x')"


def test_what_others_need_comes_first_and_is_done_once(run, args, tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  tasks = [
    task(run, "b", f"open({str(first)!r}); {wrote(second)}", "a"),
    task(run, "a", f"import time; time.sleep(1); {wrote(first)}"),
  ]
  tasks = {t.key: t for t in tasks}
  assert not run.run(tasks, args)
  assert not run.run(tasks, args)
  assert (first.read_text(), second.read_text()) == ("x", "x")
  spent = json.loads((tmp_path / "a.json").read_text())
  assert spent["done"] and spent["wall"] >= 1 and 0 < spent["cpu"] < 1


def test_a_task_that_fails_stops_what_needs_it_alone(run, args, tmp_path):
  tasks = [
    task(run, "a", "raise SystemExit(3)"),
    task(run, "b", wrote(tmp_path / "never"), "a"),
    task(run, "c", wrote(tmp_path / "other")),
  ]
  failed = run.run({t.key: t for t in tasks}, args)
  assert len(failed) == 2
  assert failed[0].startswith("a: status 3") and "a.log" in failed[0]
  assert failed[1] == "b: what it starts from is not there"
  assert (tmp_path / "other").exists() and not (tmp_path / "never").exists()


def test_nothing_starts_that_would_take_too_long(run, args, tmp_path, capsys):
  """As judged by one of its kind that is done."""
  took = {"wall": 100.0, "cpu": 90.0, "done": True, "revisions": ["r"]}
  (tmp_path / "a.json").write_text(json.dumps(took))
  done = run.Task("a", "base stage1", ["-c", "raise SystemExit(3)"], [])
  other = run.Task("b", "dual stage1", ["-c", wrote(tmp_path / "b")], [])
  args.hours = 90 / 3600
  assert not run.run({"a": done, "b": other}, args)
  assert "1 tasks did not fit" in capsys.readouterr().out
  assert not (tmp_path / "b").exists()
  args.hours = 130 / 3600
  assert not run.run({"a": done, "b": other}, args)
  assert (tmp_path / "b").exists()


def test_who_stops_the_runner_stops_its_runs(tmp_path):
  """What they took until then is kept."""
  code = f"""
import argparse, pathlib, signal, sys
sys.path.insert(0, {str(FOLDER)!r})
import run
signal.signal(signal.SIGTERM, signal.default_int_handler)
workdir = pathlib.Path({str(tmp_path)!r})
args = argparse.Namespace(workdir=workdir, results=workdir, hours=1.0, jobs=2)
tasks = {{"a": run.Task("a", "base a", ["-c", {WAITS!r}], [])}}
run.run(tasks, args)
"""
  runner = subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  )
  assert runner.stdout.readline().endswith("a starts\n")
  children = pathlib.Path(f"/proc/{runner.pid}/task/{runner.pid}/children")
  (child,) = map(int, children.read_text().split())
  time.sleep(1)
  runner.send_signal(signal.SIGTERM)
  assert runner.wait(30) != 0
  runner.stdout.close()
  with pytest.raises(ProcessLookupError):
    os.kill(child, 0)
  spent = json.loads((tmp_path / "a.json").read_text())
  assert not spent["done"] and spent["wall"] >= 1
