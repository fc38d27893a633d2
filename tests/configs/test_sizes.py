"""The real-size presets have the sizes that are published."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import pretrain as pretrain_config
from unicode_jax import loading


def count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def abstract_variables(preset):
  config = pretrain_config.get_config(preset)
  model = loading.build_model(config)
  valid = jnp.ones(config.text.vocab_size, bool)
  return jax.eval_shape(model.init, jax.random.key(0), valid)


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    # LLaMA-7B (Touvron et al. 2023) and SmolLM2-135M (Allal et al. 2025).
    ("paper", 6_738_415_616),
    ("smollm2", 134_515_008),
  ],
)
def test_llm_size(preset, parameters):
  assert count(abstract_variables(preset).params["llm"]) == parameters


def test_paper_tokenizer_has_104_million_parameters():
  params = abstract_variables("paper").params
  assert count([params["encoder"], params["decoder"]]) == pytest.approx(
    104e6, rel=0.1
  )


def test_paper_codes_fit_the_llm():
  variables = abstract_variables("paper")
  assert variables.params["llm"]["embed_tokens"]["embedding"].shape == (
    32000,
    4096,
  )
  assert variables.params["codebook"]["table"].shape[0] == 32000
  assert variables.codebook_state["gain"].shape == (5,)
