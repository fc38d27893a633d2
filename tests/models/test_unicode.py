"""The model as a whole: codes are token ids, and codes are all it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import codebook as codebook_lib
from unicode_jax.models import llama, tokenizer, unicode

NUM_CODES, EMBED_DIM = 64, 24


def make_model(quantizer, depth, paradigm="projected"):
  return unicode.UniCode(
    tokenizer=tokenizer.TokenizerConfig(
      image_size=16,
      code_dim=8,
      channels=16,
      channel_multipliers=(1,),
      num_res_blocks=1,
      stem_patch=4,
    ),
    codebook=codebook_lib.CodebookConfig(
      paradigm=paradigm, code_dim=8, depth=depth
    ),
    quantizer=quantizer,
    llama=None
    if paradigm == "private"
    else llama.LlamaConfig(
      vocab_size=NUM_CODES,
      embed_dim=EMBED_DIM,
      num_layers=1,
      num_heads=2,
      num_kv_heads=1,
      mlp_dim=32,
    ),
  )


@pytest.mark.parametrize(
  ("quantizer", "depth", "grid"), [("vq", 1, 4), ("rq", 3, 4), ("hq", 5, 2)]
)
def test_codes_are_all_that_the_decoder_needs(quantizer, depth, grid):
  model = make_model(quantizer, depth)
  valid = jnp.arange(NUM_CODES) >= 10
  variables = model.init(jax.random.key(0), valid)
  image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
  first = model.encode(variables, image)
  state = codebook_lib.fit_gain(
    variables.codebook_state, first.gain_fit, model.codebook
  )
  variables = variables.replace(codebook_state=state)
  output = model.encode(variables, image)
  assert output.codes.shape == (2, grid, grid, depth)
  assert output.codes.dtype == jnp.int32
  assert np.asarray(valid)[output.codes].all()
  np.testing.assert_allclose(
    model.decode(variables, output.codes),
    model.decode_features(variables, output.quantized),
    atol=1e-5,
  )


def test_the_table_follows_the_llms_own_rows():
  """`projected`: a row of the token table is a row of the codebook."""
  model = make_model("rq", 2)
  valid = jnp.ones(NUM_CODES, bool)
  variables = model.init(jax.random.key(0), valid)
  before = model.table(variables)
  llm = variables.params["llm"]
  table = llm["embed_tokens"]["embedding"]
  order = jnp.arange(NUM_CODES)[::-1]
  swapped = variables.replace(
    params={
      **variables.params,
      "llm": {**llm, "embed_tokens": {"embedding": table[order]}},
    }
  )
  np.testing.assert_allclose(model.table(swapped), before[order], atol=1e-5)


def test_a_private_codebook_has_no_llm():
  model = make_model("rq", 2, "private")
  variables = model.init(jax.random.key(0), jnp.ones(NUM_CODES, bool))
  assert "llm" not in variables.params
  assert model.embedding(variables.params) is None
  assert model.table(variables).shape == (NUM_CODES, 8)
