"""Batches and parameters that are not finite, on real stages."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from configs import pretrain as pretrain_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.data import pipeline
from unicode_jax.stages import pretrain, runner
from unicode_jax.training import checkpoint, goodput, guard, heartbeat, loop


class Spoiling(pretrain.PretrainStage):
  """Stage I of which some batches of images are not numbers.

  Attributes:
    spoilt: their numbers.
  """

  spoilt = frozenset()

  def make_iterators(self, start, share):
    iterators = super().make_iterators(start, share)
    images = iterators["image"]

    def spoil():
      for number, batch in enumerate(images, start["image"]):
        if number in self.spoilt:
          batch = {"image": np.full_like(batch["image"], np.nan)}
        yield batch

    return iterators | {"image": spoil()}


def make(**overrides):
  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"),
    {
      "schedule.tokenizer_steps": 2,
      "schedule.llm_steps": 1,
      "schedule.finetune_steps": 1,
      "num_steps": 9,
      "log_every": 1,
      "eval_every": 1000,
      "picture_every": 1000,
      "checkpoint_every": 2,
      "keep_checkpoints": 100,
    }
    | overrides,
  )
  data = runner.load_data(config, with_text=True)
  valid = loading.valid_codes(config, data.text_tokenizer)
  return Spoiling(config, data, loading.build_model(config), valid)


def train(stage, workdir, until_step=None):
  # Evaluation is none of these tests' business, and takes longest.
  stage.evaluate = lambda state, final: {}
  stage.pictures = lambda state: {}
  return loop.train(
    stage,
    workdir,
    runner.loop_config(stage.config),
    sharding.make_mesh(),
    until_step,
  )


def incidents(workdir):
  lines = (workdir / "incidents.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_bad_batch_changes_nothing_and_is_named(tmp_path):
  stage = make()
  stage.spoilt = {1}  # That of the second step.
  before = train(stage, tmp_path / "before", until_step=1)
  after = train(stage, tmp_path / "run", until_step=2)
  assert int(after.step) == 2
  same = jax.tree.map(
    lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)),
    dataclasses.replace(before, step=0),
    dataclasses.replace(after, step=0),
  )
  assert all(jax.tree.leaves(same))

  (incident,) = incidents(tmp_path / "run")
  assert incident["kind"] == "skipped" and incident["step"] == 2
  # The names are those of the images that the step had.
  found = {}
  for source in stage.data.image_sources:
    for item, image in zip(source.items, source.images(), strict=True):
      name = f"{source.name}/{item['name']}"
      found.setdefault(pipeline.to_float(image).tobytes(), set()).add(name)
      mirrored = np.ascontiguousarray(pipeline.to_float(image)[:, ::-1])
      found.setdefault(mirrored.tobytes(), set()).add(name)
  stage.spoilt = frozenset()
  images = stage.make_iterators({"image": 1, "text": 0}, (0, 1))["image"]
  for name, image in zip(incident["examples"], next(images)["image"]):
    assert name in found[image.tobytes()]
  train(stage, tmp_path / "run")
  rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  losses = [json.loads(row).get("tokenizer/loss") for row in rows]
  assert np.isfinite([loss for loss in losses if loss is not None]).all()


def test_many_bad_batches_send_the_run_back_and_past_them(tmp_path):
  """As if those that led there had never been in the data."""
  limits = {
    "recovery.skip_limit": 1,
    "recovery.rewind_limit": 2,
    "keep_checkpoints": 1,
  }
  stage = make(**limits)
  # Steps 4 and 5: images 2 and 3; step 6 is text, which stays well.
  stage.spoilt = {2, 3}
  state = train(stage, tmp_path / "run")
  assert int(state.step) == stage.total_steps
  kinds = [i["kind"] for i in incidents(tmp_path / "run")]
  assert kinds == ["skipped", "skipped", "rewound"]
  back = incidents(tmp_path / "run")[-1]
  assert (back["since"], back["step"], back["to"]) == (4, 5, 2)
  # None was saved among bad steps, where it would push a better one out.
  assert not (tmp_path / "run/set_aside").exists()
  folder = tmp_path / f"run/checkpoints/{stage.total_steps}"
  assert checkpoint.read_record(folder)["left_out"] == {"image": 2, "text": 1}

  class Without(Spoiling):
    """The same, its streams without what was left out."""

    def make_iterators(self, start, share):
      later = {"image": 2, "text": 1}
      moved = {n: start[n] + (later[n] if self.later else 0) for n in later}
      return super().make_iterators(moved, share)

  stage = make(**limits)
  stage.__class__ = Without
  stage.later = False
  train(stage, tmp_path / "other", until_step=2)
  stage.later = True
  expected = train(stage, tmp_path / "other")
  assert all(
    np.array_equal(np.asarray(a), np.asarray(b))
    for a, b in zip(
      jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
    )
  )


def test_it_goes_further_back_and_then_gives_up(tmp_path):
  stage = make(
    **{
      "recovery.skip_limit": 1,
      "recovery.rewind_limit": 2,
      "checkpoint_every": 1,
    }
  )
  stage.spoilt = range(2, 1000)  # From step 4 on.
  with pytest.raises(loop.DivergenceError, match=r"recovery\.rewind_limit=2"):
    train(stage, tmp_path)
  went = [i["to"] for i in incidents(tmp_path) if i["kind"] == "rewound"]
  assert went == [3, 2]
  # It remembers, also where it was killed before the next checkpoint.
  with pytest.raises(loop.DivergenceError, match=r"recovery\.rewind_limit=2"):
    train(stage, tmp_path)
  later = [i["to"] for i in incidents(tmp_path) if i["kind"] == "rewound"]
  assert later == went
  with pytest.raises(loop.DivergenceError, match="none is older"):
    stage = make(
      **{
        "recovery.skip_limit": 1,
        "recovery.rewind_limit": 9,
        "checkpoint_every": 1,
      }
    )
    stage.spoilt = range(2, 1000)
    train(stage, tmp_path)


def test_spikes_are_told_from_noise():
  watch = guard.Guard(guard.RecoveryConfig(20, 3, 10.0, 1.0, 1.0))
  rng = np.random.default_rng(0)
  usual = [(step, float(rng.uniform(0.5, 2.0))) for step in range(50)]
  assert watch.spikes({"gradient_norm": usual}) == []
  (spike,) = watch.spikes({"gradient_norm": [(50, 1.9), (51, 40.0)]})
  assert (spike.step, spike.norm) == (51, 40.0)
  assert 0.5 < spike.median < 2.0


def test_skipped_steps_are_counted_in_a_row():
  watch = guard.Guard(guard.RecoveryConfig(2, 3, 10.0, 1.0, 1.0))
  for step, skipped in ((1, True), (2, False), (4, True), (5, True)):
    watch.look("images", step, skipped)
    watch.look("text", step, False)
  assert watch.poisoned_since() is None
  # A row goes on in the next process.
  watch = guard.Guard(
    guard.RecoveryConfig(2, 3, 10.0, 1.0, 1.0), watch.in_a_row
  )
  watch.look("text", 6, True)
  watch.look("images", 7, True)
  assert watch.poisoned_since() == 4
  watch.look("images", 8, False)
  assert watch.poisoned_since() is None


def test_every_second_has_one_cause():
  account = goodput.Goodput(began=time.time() - 2.0)
  start = time.monotonic()
  account.spend("step")
  time.sleep(0.2)
  account.spend("data")
  time.sleep(0.1)
  account.move("step", "skipped", 0.05)
  seconds = account.seconds()
  assert seconds["start"] == pytest.approx(2.0, abs=0.05)
  assert seconds["step"] == pytest.approx(0.15, abs=0.05)
  assert seconds["skipped"] == pytest.approx(0.05)
  total = 2.0 + time.monotonic() - start
  assert sum(account.seconds().values()) == pytest.approx(total, abs=0.05)
  account.go_back({"start": 2.0, "step": 0.05})
  seconds = account.seconds()
  assert seconds["lost"] == pytest.approx(total - 2.05, abs=0.05)
  share = account.metrics()["goodput/share"]
  assert share == pytest.approx(0.05 / total, abs=0.01)


def test_a_stalled_run_says_what_it_does(tmp_path, capfd):
  stop = threading.Event()

  def waits_for_ever():
    stop.wait(20)

  thread = threading.Thread(target=waits_for_ever)
  thread.start()
  beats = heartbeat.Heartbeat(tmp_path, lambda: {"seconds": {}}, 0.4)
  for _ in range(4):  # While there is progress, nothing is said.
    time.sleep(0.2)
    beats.beat()
  assert not (tmp_path / "stalls.txt").exists()
  time.sleep(1.0)
  stop.set()
  beats.close()
  text = (tmp_path / "stalls.txt").read_text()
  assert "waits_for_ever" in text and "nothing was finished for" in text
  assert "stalls.txt says what all threads do" in capfd.readouterr().err
  assert heartbeat.last(tmp_path)["time"] == pytest.approx(time.time(), abs=5)
