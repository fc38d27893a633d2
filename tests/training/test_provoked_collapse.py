"""Every collapse that the alarm knows, provoked by training into it."""

import dataclasses

import pytest

from configs import pretrain as pretrain_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.stages import pretrain, runner
from unicode_jax.training import alarm, loop

ALWAYS = {
  "num_steps": 40,
  "schedule.finetune_steps": 0,
  "schedule.tokenizer_steps": 40,
  "schedule.llm_steps": 1,
  "log_every": 5,
  "eval_every": 1000,
  "picture_every": 1000,
  "checkpoint_every": 1000,
  "optimizer.tokenizer.warmup_steps": 0,
  "optimizer.tokenizer.learning_rate": 2e-4,
  "alarm.patience": 20,
  "alarm.usage_floor": 0.08,
  "alarm.perplexity_floor": 3.0,
  "alarm.stop": True,
}


def train(workdir, overrides, one_image=False):
  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"), ALWAYS | overrides
  )
  data = runner.load_data(config, with_text=True)
  if one_image:
    data = dataclasses.replace(
      data, image_sources=tuple(s.take([0]) for s in data.image_sources)
    )
  valid = loading.valid_codes(config, data.text_tokenizer)
  model = loading.build_model(config)
  stage = pretrain.PretrainStage(config, data, model, valid)
  stage.evaluate = lambda state, final: {}
  stage.pictures = lambda state: {}
  loop.train(stage, workdir, runner.loop_config(config), sharding.make_mesh())


# What is done to a run that is well, and what the alarm says of it.
PROVOKED = {
  "the encoder's weights decay at once": (
    {
      "optimizer.tokenizer.learning_rate": 1e-4,
      "optimizer.tokenizer.weight_decay": 1e4,
    },
    "the encoder's output is constant",
  ),
  "a search in many dimensions": (
    {
      "optimizer.tokenizer.learning_rate": 1e-2,
      "codebook.code_dim": 32,
      "codebook.l2_normalize": False,
    },
    "codebook.l2_normalize=True",
  ),
  "a codebook that never follows the table": (
    {
      "optimizer.tokenizer.learning_rate": 1.0,
      "codebook.sync_decay": 1.0,
    },
    "left the LLM's table",
  ),
  "an encoder that outruns the gains": (
    {
      "optimizer.tokenizer.learning_rate": 5e-3,
      "codebook.sync_decay": 1.0,
    },
    "moves faster than the gains follow",
  ),
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_the_alarm_names_it(kind, tmp_path):
  overrides, words = PROVOKED[kind]
  with pytest.raises(alarm.CollapseError, match=words):
    train(tmp_path, overrides)
  assert words in (tmp_path / "ALARM.txt").read_text()


def test_images_that_do_not_differ(tmp_path):
  with pytest.raises(alarm.CollapseError, match="check that the images differ"):
    train(tmp_path, {"data.flip": False}, one_image=True)


def test_a_run_that_is_well_is_quiet(tmp_path):
  train(tmp_path, {})
  assert not (tmp_path / "ALARM.txt").exists()
