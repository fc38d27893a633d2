import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unicode_jax.models import llama
from unicode_jax.nn import rope
from unicode_jax.training import losses

TINY = llama.LlamaConfig(
  vocab_size=37,
  embed_dim=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=40,
)


def make(config=TINY, seed=0, spread=True):
  """Returns the model, its parameters and a function of both."""
  model = llama.Llama(config)
  ids = jnp.zeros((1, 1, 1), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
  if spread:  # away from the tame values of the initialisation
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [
      np.asarray(w) + rng.normal(0, 0.2, w.shape).astype(np.float32)
      for w in leaves
    ]
    params = jax.tree.unflatten(tree, leaves)
  run = jax.jit(
    lambda params, *a, **k: model.apply({"params": params}, *a, **k),
    static_argnames="return_hidden",
  )
  return model, params, run


def draw_ids(shape, seed=0, vocab=TINY.vocab_size, low=0):
  return np.random.default_rng(seed).integers(low, vocab, shape, np.int32)


def copy_from_torch(model, config):
  """Turns a Hugging Face state dict into unrolled parameters."""
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  params = {
    "embed_tokens": {"embedding": state["model.embed_tokens.weight"]},
    "final_norm": {"scale": state["model.norm.weight"]},
  }
  if not config.tie_embeddings:
    params["lm_head"] = {"kernel": state["lm_head.weight"].T}
  for i in range(config.num_layers):
    at = f"model.layers.{i}."
    here = {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}
    layer = {
      "attention_norm": {"scale": here.pop("input_layernorm.weight")},
      "mlp_norm": {"scale": here.pop("post_attention_layernorm.weight")},
      "attention": {},
      "mlp": {},
    }
    for name, value in here.items():  # self_attn.q_proj.weight, mlp. ...
      group, module, leaf = name.split(".")
      if leaf == "weight":
        leaf = "scale" if "norm" in module else "kernel"
      group = layer["attention" if group == "self_attn" else group]
      group.setdefault(module, {})[leaf] = value.T
    params[f"layers_{i}"] = layer
  return params


HF = dict(
  vocab_size=37,
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=40,
  rms_norm_eps=1e-5,
  max_position_embeddings=64,
  pad_token_id=None,
  bos_token_id=None,
  eos_token_id=None,
)
FAMILIES = {
  "llama": ("Llama", {}, {}),
  "llama3_scaling": (
    "Llama",
    {
      "head_dim": 10,
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
      },
    },
    {
      "rope_theta": 100.0,
      "rope_scaling": rope.RopeScaling(4.0, 1.0, 3.0, 32),
      "head_dim": 10,
    },
  ),
  "mistral_window": ("Mistral", {"sliding_window": 5}, {"sliding_window": 5}),
  "qwen2": (
    "Qwen2",
    {"tie_word_embeddings": True},
    {"qkv_bias": True, "tie_embeddings": True},
  ),
  "qwen3": ("Qwen3", {"head_dim": 8}, {"qk_norm": True, "head_dim": 8}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name):
  family, theirs, ours = FAMILIES[name]
  torch.manual_seed(0)
  # Eager attention: sdpa may drop the window's mask.
  torch_config = getattr(transformers, family + "Config")(
    **(HF | theirs), attn_implementation="eager"
  )
  torch_model = getattr(transformers, family + "ForCausalLM")(torch_config)
  with torch.no_grad():
    for weight in torch_model.parameters():
      weight += 0.2 * torch.randn_like(weight)
  config = dataclasses.replace(TINY, **({"head_dim": None} | ours))
  params = copy_from_torch(torch_model, config)
  _, template, run = make(config)
  jax.tree.map(
    np.testing.assert_equal,
    *(jax.tree.map(np.shape, tree) for tree in (template, params)),
  )

  ids = draw_ids((2, 40))
  with torch.no_grad():
    want = torch_model(torch.tensor(ids).long()).logits.numpy()
  got, _ = run(params, ids[..., None])
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("scan, window", [(False, 4), (True, None)])
def test_cached_decoding_equals_the_whole(scan, window):
  config = dataclasses.replace(TINY, scan_layers=scan, sliding_window=window)
  _, params, run = make(config)
  ids = draw_ids((2, 12, 2), low=-1)
  want, none = run(params, ids)
  assert none is None
  cache = llama.init_cache(config, 2, 15)
  assert len(cache.layers) == config.num_layers
  pieces = []
  for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
    logits, cache = run(params, ids[:, start:stop], cache=cache)
    pieces.append(logits)
  np.testing.assert_allclose(np.concatenate(pieces, 1), want, atol=2e-5)
  assert cache.length == 12


def test_cached_prompts_of_different_lengths():
  """The shorter prompt is padded on the right with segment 0."""
  _, params, run = make()
  ids = draw_ids((2, 9, 1))
  lengths = np.array([5, 3])
  cache = llama.init_cache(TINY, 2, 16)
  segments = (np.arange(5) < lengths[:, None]).astype(np.int32)
  _, cache = run(params, ids[:, :5], segment_ids=segments, cache=cache)
  for step in range(3):
    at = lengths + step
    logits, cache = run(
      params, ids[[0, 1], at][:, None], positions=at[:, None], cache=cache
    )
    for row in range(2):
      want, _ = run(params, ids[row : row + 1, : at[row] + 1])
      np.testing.assert_allclose(logits[row, 0], want[0, -1], atol=2e-5)


def test_packing_leaks_nothing():
  config = dataclasses.replace(TINY, attention_block=4)
  _, params, run = make(config)
  a, b = draw_ids((1, 4, 1), 1), draw_ids((1, 5, 1), 2)
  pad = np.full((1, 2, 1), -1, np.int32)
  packed = np.concatenate([a, b, pad], axis=1)
  segments = np.array([[1] * 4 + [2] * 5 + [0] * 2])
  logits, _ = run(params, packed, segment_ids=segments)
  for ids, part in ((a, slice(0, 4)), (b, slice(4, 9))):
    np.testing.assert_allclose(logits[:, part], run(params, ids)[0], atol=2e-5)

  # Exactly no gradient from b's outputs to the rows that only a and the
  # padding use, and some to its own.
  table = params["embed_tokens"]["embedding"]
  own = np.arange(11)[None, :, None]  # every position its own row

  def b_outputs(table):
    changed = params | {"embed_tokens": {"embedding": table}}
    out, _ = run(changed, own, segment_ids=segments)
    return jnp.sum(out[:, 4:9] ** 2)

  grad = np.abs(jax.jit(jax.grad(b_outputs))(table)).sum(axis=1)
  np.testing.assert_array_equal(np.flatnonzero(grad), np.arange(4, 9))


def test_causal_by_gradient():
  _, params, run = make(dataclasses.replace(TINY, attention_block=3))
  ids = np.arange(10)[None, :, None]

  def outputs(table):
    changed = params | {"embed_tokens": {"embedding": table}}
    return jnp.sum(run(changed, ids)[0][:, 6] ** 2)

  grad = jax.jit(jax.grad(outputs))(params["embed_tokens"]["embedding"])
  used = np.flatnonzero(np.abs(grad).sum(axis=1))
  np.testing.assert_array_equal(used, np.arange(7))


def test_stacked_ids_are_summed():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
  ids = np.array([[[0, 3, 3], [6, -1, -1], [-1, 2, 1], [-1, -1, -1]]])
  want = [table[0] + 2 * table[3], table[6], table[1] + table[2], jnp.zeros(3)]
  np.testing.assert_allclose(llama.embed(table, ids)[0], want, rtol=1e-6)
  cotangent = np.random.default_rng(1).normal(size=(1, 4, 3))
  grad = jax.vjp(lambda t: llama.embed(t, ids), table)[1](
    jnp.float32(cotangent)
  )[0]
  dense = np.zeros((7, 3))
  for position, depth in zip(*np.nonzero(ids[0] >= 0)):
    dense[ids[0, position, depth]] += cotangent[0, position]
  np.testing.assert_allclose(grad, dense, atol=1e-6)


def test_model_reads_the_sum():
  """Padding D changes nothing; splitting a row into two halves neither."""
  _, params, run = make()
  ids = draw_ids((2, 6, 1))
  wide = np.concatenate([ids, np.full((2, 6, 3), -1)], axis=-1)
  want, _ = run(params, ids)
  np.testing.assert_allclose(run(params, wide)[0], want, atol=1e-6)
  table = params["embed_tokens"]["embedding"]
  halves = params | {"embed_tokens": {"embedding": table / 2}}
  twice = np.concatenate([ids, ids], axis=-1)
  np.testing.assert_allclose(run(halves, twice)[0], want, atol=2e-5)


def loss_and_grad(config, params, ids):
  model = llama.Llama(config)

  @jax.jit
  def f(params):
    hidden, _ = model.apply({"params": params}, ids, return_hidden=True)
    labels = jnp.roll(ids[..., 0], -1, axis=1)
    kernel = llama.head_kernel(params, config)
    return losses.next_token_loss(
      hidden, kernel, labels, jnp.ones(labels.shape), chunk=8
    )[0]

  return jax.value_and_grad(f)(params)


def assert_close_trees(got, want, **tolerance):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want
  )


@pytest.fixture(scope="module")
def plain():
  """Parameters, ids, loss and gradients, unrolled and without remat."""
  _, params, _ = make()
  ids = draw_ids((2, 9, 1))
  return params, ids, *loss_and_grad(TINY, params, ids)


@pytest.mark.parametrize(
  "scan, policy",
  [(True, "none"), (True, "dots"), (True, "full"), (False, "dots_no_batch")],
)
def test_scan_and_remat_change_nothing(plain, scan, policy):
  params, ids, want_loss, want = plain
  config = dataclasses.replace(TINY, scan_layers=scan, remat_policy=policy)
  if scan:
    params, want = llama.stack_layers(params), llama.stack_layers(want)
  loss, grads = loss_and_grad(config, params, ids)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  assert_close_trees(grads, want, rtol=1e-4, atol=1e-5)


def test_remat_saves_less():
  def saved(policy):
    config = dataclasses.replace(TINY, remat_policy=policy)
    _, params, _ = make(config)
    model = llama.Llama(config)
    kept = jax.eval_shape(
      lambda p: jax.vjp(lambda p: model.apply({"params": p}, ids)[0], p)[1],
      params,
    )
    return sum(leaf.size for leaf in jax.tree.leaves(kept))

  ids = draw_ids((2, 9, 1))
  assert saved("full") < saved("dots") < saved("none")


def test_stacking_is_inverted():
  _, params, _ = make()
  stacked = llama.stack_layers(params)
  _, template, _ = make(dataclasses.replace(TINY, scan_layers=True))
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, template)
  back = llama.unstack_layers(stacked)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_and_head_make_the_logits(tied):
  config = dataclasses.replace(TINY, tie_embeddings=tied)
  _, params, run = make(config)
  assert ("lm_head" in params) != tied
  ids = draw_ids((2, 5, 1))
  hidden, _ = run(params, ids, return_hidden=True)
  np.testing.assert_allclose(
    hidden @ llama.head_kernel(params, config), run(params, ids)[0], atol=1e-5
  )


def test_bfloat16_compute_with_float32_parameters():
  config = dataclasses.replace(TINY, dtype="bfloat16", num_layers=1)
  _, params, run = make(config, spread=False)
  assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  ids = draw_ids((2, 9, 1))
  hidden, _ = run(params, ids, return_hidden=True)
  logits, _ = run(params, ids)
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  full = dataclasses.replace(config, dtype="float32")
  want, _ = make(full)[2](params, ids)
  assert 0 < np.abs(logits - want).max() < 0.05 * np.abs(want).max()
  _, grads = loss_and_grad(config, params, ids)
  assert {w.dtype for w in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  assert all(np.abs(w).max() > 0 for w in jax.tree.leaves(grads))
  cache = llama.init_cache(config, 2, 9)
  assert cache.layers[0][0].dtype == jnp.bfloat16
  cached, _ = run(params, ids, cache=cache)
  np.testing.assert_allclose(cached, logits, atol=0.05)


def test_positions_are_relative():
  _, params, run = make()
  ids = draw_ids((1, 8, 1))
  shifted = np.arange(8)[None] + 20
  np.testing.assert_allclose(
    run(params, ids, positions=shifted)[0], run(params, ids)[0], atol=3e-5
  )


# Published counts (of the checkpoints, embeddings included).
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  "count, settings",
  [
    (  # LLaMA-7B
      6738415616,
      dict(
        vocab_size=32000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_dim=11008,
      ),
    ),
    (  # SmolLM2-135M
      134515008,
      dict(
        vocab_size=49152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        mlp_dim=1536,
        tie_embeddings=True,
      ),
    ),
    (  # Qwen2.5-0.5B
      494032768,
      dict(
        vocab_size=151936,
        embed_dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        mlp_dim=4864,
        tie_embeddings=True,
        qkv_bias=True,
      ),
    ),
  ],
)
def test_published_parameter_counts(count, settings, scan):
  config = llama.LlamaConfig(scan_layers=scan, **settings)
  assert llama.num_parameters(config) == count


def test_impossible_settings_are_refused():
  with pytest.raises(ValueError, match="num_kv_heads=3"):
    dataclasses.replace(TINY, num_kv_heads=3)
  with pytest.raises(ValueError, match="set head_dim"):
    dataclasses.replace(TINY, embed_dim=25, head_dim=None)
  with pytest.raises(ValueError, match=r"'everything'.*dots"):
    dataclasses.replace(TINY, remat_policy="everything")
  _, params, run = make()
  with pytest.raises(ValueError, match=r"token_ids\[..., None\]"):
    run(params, draw_ids((2, 5)))
  with pytest.raises(ValueError, match="cache of 4"):
    run(params, draw_ids((2, 5, 1)), cache=llama.init_cache(TINY, 2, 4))


def test_the_spread_of_a_fresh_table():
  config = dataclasses.replace(TINY, embedding_std=0.5, tie_embeddings=False)
  ids = jnp.zeros((1, 2, 1), jnp.int32)
  params = llama.Llama(config).init(jax.random.key(0), ids)["params"]
  table = params["embed_tokens"]["embedding"]
  assert np.std(table) == pytest.approx(0.5, rel=0.05)
  assert np.std(params["lm_head"]["kernel"]) == pytest.approx(0.02, rel=0.05)
