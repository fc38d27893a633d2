"""Runs of several processes against runs of one: numbers, files, data."""

import json

import pytest

# Sums over devices are made in another order. A tiny model's losses are of size
# 1 to 10, in float32; after ten steps they differ by 5e-6 of themselves.
TOLERANCE = 1e-4


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  for step, row in expected.items():
    assert found[step] == pytest.approx(row, rel=TOLERANCE, abs=1e-6), step


@pytest.mark.slow
def test_processes_that_share_rows(launch, logged, tmp_path):
  """One device each: both read the whole batch, and split the tensors."""
  launch(1, 1, "pretrain", tmp_path / "one")
  launch(2, 1, "pretrain", tmp_path / "two", mesh__tensor=2)
  assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"))


@pytest.mark.slow
def test_stage_one_by_two_processes(launch, logged, tmp_path):
  """Data, parameters and tensors split: four devices each."""
  launch(1, 1, "pretrain", tmp_path / "one")
  mesh = {"mesh__fsdp": 2, "mesh__tensor": 2}
  first, second = launch(2, 4, "pretrain", tmp_path / "two", **mesh)
  assert "data 2 x fsdp 2 x tensor 2" in first
  assert "report:" in first and "report:" not in second
  assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"))
  pictures = [p.name for p in (tmp_path / "one/pictures").iterdir()]
  assert pictures
  assert {p.name for p in (tmp_path / "two/pictures").iterdir()} == {*pictures}


@pytest.mark.slow
def test_stage_two_by_two_processes(launch, logged, stage_one, tmp_path):
  """They share the encoding of the images, too."""
  start = {"init_from": stage_one[0], "data__codes": "auto"}
  launch(1, 1, "instruct", tmp_path / "one", **start)
  launch(2, 2, "instruct", tmp_path / "two", mesh__fsdp=2, **start)
  assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"))
  texts = [
    (tmp_path / name / "start.txt").read_text() for name in ("one", "two")
  ]
  assert texts[0] == texts[1]
  for path in (tmp_path / "one/codes").glob("*.array_record"):
    other = tmp_path / "two/codes" / path.name
    assert other.read_bytes() == path.read_bytes()


def test_any_number_of_processes_goes_on(launch, logged, tmp_path):
  """A checkpoint by four is restored by two and by one, bit for bit."""
  workdir = tmp_path / "run"

  def results(step, count):
    return [
      json.loads((workdir / f"{step}-{i}-of-{count}.json").read_text())
      for i in range(count)
    ]

  launch(4, 2, "pretrain", workdir, 4, mesh__fsdp=4)
  written = results(4, 4)
  assert all(r["digests"] == written[0]["digests"] for r in written)
  # On other meshes: restored, and not a step further.
  launch(2, 2, "pretrain", workdir, 4, mesh__fsdp=2, mesh__tensor=2)
  launch(1, 1, "pretrain", workdir, 4)
  for count in (2, 1):
    for result in results(4, count):
      assert result["digests"] == written[0]["digests"]
  # Two more steps by two processes, the rest by one.
  launch(2, 2, "pretrain", workdir, 6, mesh__tensor=2)
  launch(1, 1, "pretrain", workdir, 8)
  started = results(6, 2)[0]["start"]
  assert sum(started.values()) == 4

  straight = tmp_path / "straight"
  launch(1, 1, "pretrain", straight, 8)
  found, expected = logged(workdir), logged(straight)
  for step, row in expected.items():
    # What is said of the latest images needs some since the start.
    common = found[step].keys() & row.keys()
    assert {k for k in row if "loss" in k} <= common
    for key in common:
      assert found[step][key] == pytest.approx(
        row[key], rel=TOLERANCE, abs=1e-6
      ), (step, key)
  # Each of four processes has read a quarter, and what lies ahead.
  (whole,) = [json.loads(p.read_text()) for p in straight.glob("8-0-of-1.json")]
  for result in written:
    # A quarter of each batch, of which a few lie ahead.
    assert 0 < result["reads"] <= (4 + 4) * 8 / 4 < whole["reads"]
