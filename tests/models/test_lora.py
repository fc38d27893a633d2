"""Adapters against their formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.models import llama as llama_lib, lora

CONFIG = llama_lib.LlamaConfig(
  vocab_size=40,
  embed_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  mlp_dim=24,
  qkv_bias=True,
)


@pytest.fixture(scope="module")
def params():
  ids = jnp.zeros((1, 1, 1), jnp.int32)
  return llama_lib.Llama(CONFIG).init(jax.random.key(0), ids)["params"]


def test_new_adapters_change_nothing(params):
  adapters = lora.init_adapters(jax.random.key(1), params, 3)
  merged = lora.merge(params, adapters, 5.0)
  jax.tree.map(np.testing.assert_array_equal, merged, params)
  # Of the seven matrices of each layer, and nothing else.
  assert set(adapters) == {"layers_0", "layers_1"}
  assert len(jax.tree.leaves(adapters)) == 2 * 7 * 2
  a = adapters["layers_0"]["mlp"]["up_proj"]["a"]
  assert a.shape == (16, 3)
  assert not np.array_equal(a, adapters["layers_1"]["mlp"]["up_proj"]["a"])


@pytest.mark.parametrize("scanned", [False, True])
def test_the_sum(params, scanned):
  params = llama_lib.with_layers_as(params, scanned)
  adapters = lora.init_adapters(jax.random.key(1), params, 3)
  adapters = jax.tree.map(
    lambda x: x + jax.random.normal(jax.random.key(2), x.shape), adapters
  )
  merged = lora.merge(params, adapters, 0.5)
  layer = "layers" if scanned else "layers_1"
  for module in (("attention", "q_proj"), ("mlp", "down_proj")):
    block, name = module
    w = np.asarray(params[layer][block][name]["kernel"], np.float64)
    a, b = (
      np.asarray(adapters[layer][block][name][k], np.float64) for k in "ab"
    )
    np.testing.assert_allclose(
      merged[layer][block][name]["kernel"], w + 0.5 * (a @ b), atol=1e-5
    )
  for path in (("embed_tokens", "embedding"), ("final_norm", "scale")):
    np.testing.assert_array_equal(
      merged[path[0]][path[1]], params[path[0]][path[1]]
    )
  assert (
    merged[layer]["attention"]["q_proj"]["bias"]
    is (params[layer]["attention"]["q_proj"]["bias"])
  )
