"""A tiny run of stage II on real data, for whatever evaluates a run."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from configs import instruct as instruct_config
from unicode_jax import (
  config as config_lib,
  data as data_lib,
  inference,
  loading,
  sharding,
)
from unicode_jax.models import llama as llama_lib
from unicode_jax.stages import instruct, run_folder, runner
from unicode_jax.training import loop

IMAGES = 120


class TinyRun(NamedTuple):
  """A run of stage II, and what it was made of.

  Attributes:
    pretrain: run folder of stage I.
    stage_one: its stage and state.
    instruct: run folder of stage II.
    data: what it was trained and evaluated on: few images.
    model: of its last step, 8; there is a checkpoint of step 4 too.
  """

  pretrain: pathlib.Path
  stage_one: tuple[Any, Any]
  instruct: pathlib.Path
  data: data_lib.Data
  model: inference.UniCodeModel

  def logits(self, token_ids):
    """Runs the LLM on int32[n, D] without any cache, float64[n, K]."""
    loaded, n = self.model.loaded, len(token_ids)
    padded = np.pad(token_ids, [(0, 160 - n), (0, 0)], constant_values=-1)
    logits = _logits(loaded.model, loaded.variables, padded[None])
    return np.asarray(logits[0, :n], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, token_ids):
  logits, _ = llama_lib.Llama(model.llama).apply(
    {"params": variables.params["llm"]},
    token_ids,
    depth_weights=model.depth_weights(variables),
  )
  return logits


@pytest.fixture(scope="session")
def tiny(stage_one, tmp_path_factory):
  pretrain, *stage_and_state = stage_one
  workdir = tmp_path_factory.mktemp("stage_two")
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"), {"init_from": str(pretrain)}
  )
  config = config_lib.validate(config_lib.inherit(config))
  data = runner.load_data(
    config,
    with_text=True,
    tokenizer_path=str(pretrain / loading.TEXT_TOKENIZER),
  )

  def few(sources):
    return tuple(
      dataclasses.replace(
        source,
        items=source.items[:IMAGES],
        annotations=source.annotations[:IMAGES],
      )
      for source in sources
    )

  data = dataclasses.replace(
    data,
    image_sources=(data.image_sources[0], few(data.image_sources)[1]),
    heldout_sources=few(data.heldout_sources),
    heldout_images={k: v[:IMAGES] for k, v in data.heldout_images.items()},
  )
  stage = instruct.InstructStage(config, data, loading.load(pretrain))
  run_folder.claim(workdir, config)
  data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  loop.train(stage, workdir, runner.loop_config(config), sharding.make_mesh())
  return TinyRun(
    pretrain, tuple(stage_and_state), workdir, data, inference.load(workdir)
  )
