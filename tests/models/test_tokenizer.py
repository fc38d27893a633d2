"""Tests of the visual tokenizer's encoder and decoder."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unicode_jax.models import tokenizer

SMALL = {
  "image_size": 16,
  "code_dim": 5,
  "channels": 8,
  "channel_multipliers": (1, 2),
  "num_res_blocks": 1,
  "stem_patch": 2,
}


def _config(**changes):
  return tokenizer.TokenizerConfig(**{**SMALL, **changes})


def _shapes(config):
  size, grid = config.image_size, config.grid_size
  key = jax.random.key(0)
  return (
    jax.eval_shape(
      tokenizer.Encoder(config).init, key, jnp.zeros((1, size, size, 3))
    ),
    jax.eval_shape(
      tokenizer.Decoder(config).init,
      key,
      jnp.zeros((1, grid, grid, config.code_dim)),
    ),
  )


@pytest.mark.parametrize("stem_patch", [1, 2, 4])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 3)])
def test_shapes(stem_patch, multipliers):
  config = _config(channel_multipliers=multipliers, stem_patch=stem_patch)
  assert config.downsampling == stem_patch * 2 ** (len(multipliers) - 1)
  image = jnp.zeros((3, 16, 16, 3))
  key = jax.random.key(0)
  features, _ = jax.eval_shape(
    tokenizer.Encoder(config).init_with_output, key, image
  )
  assert features.shape == (3, config.grid_size, config.grid_size, 5)
  assert features.dtype == jnp.float32
  decoded, _ = jax.eval_shape(
    tokenizer.Decoder(config).init_with_output, key, features
  )
  assert decoded.shape == image.shape and decoded.dtype == jnp.float32


def test_works_at_another_size_than_configured():
  config = _config()
  image = jax.random.normal(jax.random.key(0), (1, 24, 32, 3))
  encoder = tokenizer.Encoder(config)
  features, _ = jax.eval_shape(
    encoder.init_with_output, jax.random.key(0), image
  )
  assert features.shape == (1, 6, 8, 5)


@pytest.mark.parametrize("attention", [False, True])
def test_equals_pytorch(attention):
  torch = pytest.importorskip("torch")
  from benchmarks import jax_steps, torch_twins

  config = _config(
    channel_multipliers=(1, 2, 3), num_res_blocks=2, attention=attention
  )
  params = jax_steps.random_parameters(config)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
  image = image.astype(np.float32)
  twin = torch_twins.autoencoder(config, params)
  theirs = twin(torch.tensor(image.transpose(0, 3, 1, 2))).detach().numpy()
  features = tokenizer.Encoder(config).apply(
    {"params": params["encoder"]}, image
  )
  ours = tokenizer.Decoder(config).apply(
    {"params": params["decoder"]}, features
  )
  assert np.std(ours) > 0.1
  np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-4)


def test_bfloat16_stays_close_and_keeps_float32_outside():
  image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3)) * 2 - 1
  encoder = tokenizer.Encoder(_config())
  full, variables = jax.jit(encoder.init_with_output)(jax.random.key(0), image)
  half_encoder = tokenizer.Encoder(_config(dtype="bfloat16"))
  half = jax.jit(half_encoder.apply)(variables, image)
  assert half.dtype == jnp.float32
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert 0 < jnp.abs(full - half).max() < 0.1


def test_last_layer_is_what_draws_the_pixels():
  config = _config()
  features = jax.random.normal(jax.random.key(1), (1, 4, 4, 5))
  decoder = tokenizer.Decoder(config)
  params = jax.jit(decoder.init)(jax.random.key(0), features)["params"]
  kernel = tokenizer.last_layer(params)
  assert kernel.shape == (8, 3 * config.stem_patch**2)
  head = {"proj": {**params["head"]["proj"], "kernel": jnp.zeros_like(kernel)}}
  decoded = jax.jit(decoder.apply)(
    {"params": {**params, "head": head}}, features
  )
  np.testing.assert_array_equal(decoded, 0.0)


def test_learns_to_reconstruct():
  config = _config(channel_multipliers=(1,), stem_patch=4)
  image = jnp.sign(jax.random.normal(jax.random.key(1), (8, 2, 2, 3)))
  image = jnp.repeat(jnp.repeat(image, 8, axis=1), 8, axis=2)
  encoder, decoder = tokenizer.Encoder(config), tokenizer.Decoder(config)
  features, encoder_params = jax.jit(encoder.init_with_output)(
    jax.random.key(2), image
  )
  decoder_params = jax.jit(decoder.init)(jax.random.key(3), features)
  params = (encoder_params, decoder_params)
  optimizer = optax.adam(1e-2)

  def loss_fn(params):
    decoded = decoder.apply(params[1], encoder.apply(params[0], image))
    return jnp.mean(jnp.square(decoded - image))

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for _ in range(100):
    params, state, loss = step(params, state)
  assert loss < 0.1  # The pictures' variance is 1.


def test_size_of_the_paper():
  """104 M parameters (UniCode, section 4.1), HQ's bottom grid 16x16."""
  config = tokenizer.TokenizerConfig(
    image_size=256,
    code_dim=256,
    channels=128,
    channel_multipliers=(1, 2, 4, 4),
    num_res_blocks=4,
    stem_patch=2,
    attention=True,
    dtype="bfloat16",
  )
  count = sum(math.prod(a.shape) for a in jax.tree.leaves(_shapes(config)))
  assert config.grid_size == 16
  assert 0.9 < count / 104e6 < 1.1


def test_image_size_must_fit():
  with pytest.raises(ValueError, match="multiple of the downsampling 4"):
    _config(image_size=18)
