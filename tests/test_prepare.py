"""The command that prepares data: killed, resumed, in parallel, misused."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from unicode_jax import prepare
from unicode_jax.data import sources

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 160


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A folder of noisy pictures, which take a while to convert."""
  folder = tmp_path_factory.mktemp("prepare") / "images"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(COUNT):
    pixels = rng.integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:03}.png", compress_level=1)
  (folder / "broken.png").write_bytes(b"no picture")
  return folder


def options(images, out, **more):
  values = {
    **{"from": "folder", "path": images, "out": out},
    **{"image_size": 64, "shard_size": 20, **more},
  }
  return [f"--{key}={value}" for key, value in values.items()]


def command(*arguments):
  return [sys.executable, "-m", "unicode_jax.prepare", *arguments]


def run(*arguments):
  return subprocess.run(
    command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
  """What one process writes that nobody disturbs."""
  out = tmp_path_factory.mktemp("straight") / "out"
  prepare.prepare(
    "folder", str(images), out, image_size=64, shard_size=20, workers=1
  )
  return contents(out)


def test_workers_change_nothing(images, straight, tmp_path):
  done = run(*options(images, tmp_path, workers=3))
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path) == straight
  assert "9 of 9 pieces, 160 images, 1 broken" in done.stdout
  assert "160 images in 8 shards, broken inputs left out: 1" in done.stdout
  assert "left out broken.png: not an image file" in done.stderr
  manifest = json.loads(straight["manifest.json"])
  assert manifest["records"] == COUNT
  train, heldout = sources.load_arrayrecord(tmp_path, 64)
  assert len(train) + len(heldout) == COUNT


def children(process):
  """Returns the ids of the processes that a process has started."""
  listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return [int(pid) for pid in listed.read_text().split()]


def wait_until_gone(pids):
  deadline = time.monotonic() + 20
  while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
    assert time.monotonic() < deadline, "workers outlive their parent"
    time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(seed, images, straight, tmp_path):
  rng = random.Random(seed)
  out = tmp_path / "out"
  arguments = options(images, out, workers=2)
  kept = {}
  for _ in range(2):
    process = subprocess.Popen(
      command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    # At the start, or when some pieces more are done.
    for _ in range(rng.randrange(5)):
      process.stdout.readline()
    time.sleep(rng.random() * 0.3)
    workers = children(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(workers)
    process.stdout.close()
    if not out.is_dir():
      continue
    whole = {
      name: content
      for name, content in contents_of_files(out).items()
      if name.endswith((".array_record", ".jsonl"))
    }
    # What bears its name is whole, and stays.
    assert whole == {name: straight[name] for name in whole}
    assert kept.items() <= whole.items()
    kept = whole
    if not (out / "manifest.json").exists():
      with pytest.raises(ValueError, match=r"not finished|no prepared data"):
        sources.load_arrayrecord(out, 64)
  done = run(*arguments)
  assert done.returncode == 0, done.stderr
  assert contents(out) == straight


def test_killed_before_the_manifest_bore_its_name(images, straight, tmp_path):
  for name, content in straight.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "manifest.json").rename(tmp_path / "unfinished.json")
  done = run(*options(images, tmp_path, workers=2))
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path) == straight


def contents_of_files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_and_what_is_said_of_it(images, straight, tmp_path):
  arguments = options(images, tmp_path / "out", workers=2)
  process = subprocess.Popen(
    command(*arguments),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.readline()
  for pid in children(process):
    line = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    if "spawn_main" in line:
      os.kill(pid, signal.SIGKILL)
      break
  _, error = process.communicate()
  assert process.returncode == 3
  assert "a worker process was killed" in error and "--workers" in error
  done = run(*arguments)
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path / "out") == straight


def test_again_and_with_other_flags(images, tmp_path):
  few = tmp_path / "few"
  few.mkdir()
  for name in ("000.png", "001.png"):
    (few / name).write_bytes((images / name).read_bytes())
  out = tmp_path / "out"
  prepare.prepare("folder", str(few), out, image_size=64, shard_size=20)
  before = contents(out)
  done = run(*options(few, out))
  assert done.returncode == 0 and "is finished" in done.stdout
  assert "pieces" not in done.stdout
  done = run(*options(few, out, image_size=32))
  assert done.returncode == 2
  assert "begun with image_size=64, not 32" in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert contents(out) == before
  shard = out / "00000-000.array_record"
  damaged = bytearray(shard.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  shard.write_bytes(damaged)
  done = run(f"--out={out}", "--check")
  assert done.returncode == 2 and f"{shard} is damaged" in done.stderr


FULL = """
import resource, sys
from unicode_jax import prepare

if __name__ == "__main__":
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
  try:
    prepare.prepare("folder", *sys.argv[1:3], workers=int(sys.argv[3]))
  except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(images, workers, tmp_path):
  (tmp_path / "full.py").write_text(FULL)
  out = tmp_path / "out"
  done = subprocess.run(
    [sys.executable, tmp_path / "full.py", images, out, str(workers)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert f"--out={out} cannot be written (" in done.stdout, done.stderr
  assert "File too large" in done.stdout and "make room" in done.stdout
  assert not list(out.glob("*.array_record"))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out=x"], "--from is not set"),
    (["--out=x", "--from=folder"], "--path is not set"),
    (["--out=x", "--from=zip", "--path=x"], "--from=zip"),
    (["--from=folder", "--path=x"], "--out must have a value"),
    (["--out=x", "--check"], "x holds no prepared data set"),
    (["--out=x", "--from=folder", "--path=x", "--workers=0"], "--workers=0"),
  ],
)
def test_flags_are_checked(arguments, message, tmp_path):
  done = run(*(a.replace("=x", f"={tmp_path}/x") for a in arguments))
  assert done.returncode == 2
  assert message.replace("x holds", f"{tmp_path}/x holds") in done.stderr


def test_a_folder_that_nothing_came_to_lie_in_is_gone(tmp_path):
  """So that the same --out is free for the right --path."""
  wrong = tmp_path / "wrong.tar"
  wrong.write_bytes(b"no archive")
  out = tmp_path / "new" / "out"
  done = run("--from=webdataset", f"--path={wrong}", f"--out={out}")
  assert done.returncode == 2 and "no image that can be read" in done.stderr
  assert not out.exists()
  (out.parent / "out").mkdir()
  (out / "of_somebody.txt").write_text("x")
  done = run("--from=webdataset", f"--path={wrong}", f"--out={out}")
  assert done.returncode == 2 and "holds other files" in done.stderr
  assert contents(out) == {"of_somebody.txt": b"x"}
