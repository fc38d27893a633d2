"""Every shipped preset trains, shrunk in size and steps but not in kind."""

import json
import math

import pytest

from configs import (
  instruct as instruct_config,
  pretrain as pretrain_config,
  tokenizer as tokenizer_config,
)
from unicode_jax import config as config_lib
from unicode_jax.stages import instruct, pretrain, tokenizer

SHRUNK = {
  "image_size": 16,
  "num_steps": 4,
  "log_every": 2,
  "eval_every": 100,
  "picture_every": 100,
  "checkpoint_every": 4,
  "data.global_batch_size": 4,
  "data.num_workers": 0,
  "data.source": "embedded",
  "text.vocab_size": 384,
  "text.sequence_length": 16,
  "text.global_batch_size": 2,
  "text.image_start": "<image>",
  "text.image_end": "</image>",
  "tokenizer.channels": 8,
  "tokenizer.loss.disc_channels": 8,
  "tokenizer.loss.disc_start": 1,
  "codebook.code_dim": 8,
  "codebook.sync_every": 2,
  "llm.embed_dim": 24,
  "llm.num_layers": 2,
  "llm.num_heads": 3,
  "llm.num_kv_heads": 3,
  "llm.head_dim": 8,
  "llm.mlp_dim": 32,
  "schedule.tokenizer_steps": 2,
  "schedule.llm_steps": 1,
  "schedule.finetune_steps": 1,
  "alarm.perplexity_floor": 1.0,
  "platform": "cpu",
  "mesh.fsdp": 1,
  "mesh.tensor": 1,
}


def shrink(config):
  overrides = dict(SHRUNK)
  if config.tokenizer.quantizer == "hq":
    # The bottom grid must stay even: keep two of the paper's five levels.
    overrides["tokenizer.channel_multipliers"] = (1, 2)
    overrides["tokenizer.stem_patch"] = 2
  elif len(config.tokenizer.channel_multipliers) > 2:
    overrides["tokenizer.channel_multipliers"] = (1, 2)
  return config_lib.validate(config_lib.apply_overrides(config, overrides))


def check(workdir, *names):
  rows = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  assert (workdir / "report.md").exists()
  for name in names:
    values = [row[name] for row in rows if name in row]
    assert values, name
    assert all(math.isfinite(value) for value in values), name


@pytest.mark.parametrize("preset", sorted(pretrain_config.PRESETS))
def test_pretrain_preset_trains(tmp_path, preset):
  config = shrink(pretrain_config.get_config(preset))
  pretrain.run(config, tmp_path)
  expected = ["tokenizer/loss", "text/loss", "drift", "eval/train/usage/depth1"]
  if config.tokenizer.loss.adversarial:
    expected += ["tokenizer/discriminator_loss", "tokenizer/perceptual_loss"]
  check(tmp_path, *expected)


@pytest.mark.parametrize(
  "preset",
  [  # Stage I has the tokenizer of "paper", too.
    pytest.param(name, marks=[pytest.mark.slow] * (name == "paper"))
    for name in sorted(pretrain_config.PRESETS)
  ],
)
def test_tokenizer_preset_trains(tmp_path, preset):
  config = shrink(tokenizer_config.get_config(preset))
  tokenizer.run(config, tmp_path)
  check(tmp_path, "tokenizer/loss", "usage/depth1")


@pytest.mark.parametrize(("quantizer", "depth"), [("vq", 1), ("hq", 5)])
def test_other_quantizers_train(tmp_path, quantizer, depth):
  config = pretrain_config.get_config("debug")
  config = config_lib.apply_overrides(
    config,
    {
      "tokenizer.quantizer": quantizer,
      "tokenizer.depth": depth,
      "codebook.paradigm": "projected",
    },
  )
  pretrain.run(config_lib.validate(config), tmp_path)
  check(tmp_path, "tokenizer/loss", f"residual_energy/depth{depth}")


# "debug" is what all other tests of stage II train.
@pytest.mark.parametrize(
  "preset", sorted({*instruct_config.PRESETS} - {"debug"})
)
def test_instruct_preset_trains(stage_one, tmp_path, preset):
  """From a tiny stage I; the mixture, template and tasks are the preset's."""
  config = instruct_config.get_config(preset)
  if config.instruct.template == "chatml":  # Whose tokens a tiny model lacks.
    config = config_lib.apply_overrides(config, {"instruct.template": "plain"})
  config = config_lib.apply_overrides(
    config,
    {
      "init_from": str(stage_one[0]),
      "num_steps": 2,
      "log_every": 1,
      "eval_every": 2,
      "checkpoint_every": 2,
      "data.source": "embedded",
      "data.codes": None,
      "data.num_workers": 0,
      "text.sequence_length": 320,
      "instruct.global_batch_size": 2,
      "platform": "cpu",
      "mesh.fsdp": 1,
      "mesh.tensor": 1,
    },
  )
  config = config_lib.validate(config_lib.inherit(config))
  instruct.run(config, tmp_path)
  task = "decompression" if preset == "decompress" else "text_to_image"
  check(tmp_path, "loss", f"eval/image_loss/{task}")
