"""The critic waits for its start, then balances and learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unicode_jax.models import tokenizer
from unicode_jax.training import adversarial


@pytest.fixture(scope="module")
def critic():
  return adversarial.Critic(
    channels=8, image_size=16, weight=0.5, start=10, optimizer=optax.adam(1e-2)
  )


def pictures(key):
  """Real pictures are bright, decoded ones dark."""
  noise = 0.1 * jax.random.normal(key, (8, 16, 16, 3))
  return 0.5 + noise, -0.5 + noise


def test_nothing_moves_before_the_start(critic):
  params = critic.init(jax.random.key(0))
  opt_state = critic.optimizer.init(params)
  real, fake = pictures(jax.random.key(1))
  after = critic.update(params, opt_state, real, fake, jnp.int32(9))
  chex.assert_trees_all_equal(after[:2], (params, opt_state))
  after = critic.update(params, opt_state, real, fake, jnp.int32(10))
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(after[0], params)


def test_learns_to_tell_real_from_decoded(critic):
  params = critic.init(jax.random.key(0))
  opt_state = critic.optimizer.init(params)
  update = jax.jit(critic.update)
  losses = []
  for i in range(30):
    real, fake = pictures(jax.random.key(i))
    params, opt_state, metrics = update(
      params, opt_state, real, fake, jnp.int32(20)
    )
    losses.append(float(metrics["discriminator_loss"]))
  assert losses[-1] < 0.3 * losses[0]


def test_the_term_is_balanced_at_the_last_layer(critic):
  params = critic.init(jax.random.key(0))
  _, image = pictures(jax.random.key(1))
  kernel = jnp.ones((1, 1, 3, 3))
  direction = 100.0 * jax.random.normal(jax.random.key(2), image.shape)

  others = direction / jnp.sum(jnp.square(direction))

  def pullback(cotangent):
    """That of kernel -> 21 direction * kernel[0, 0, 0, 0]."""
    given = 21.0 * jnp.sum(direction * cotangent)
    given = jnp.zeros_like(kernel).at[0, 0, 0, 0].set(given)
    return {"decoder": {"head": {"proj": {"kernel": given}}}}

  def added(step):
    cotangent, metrics = critic.cotangent(
      params, pullback, others, image, jnp.int32(step)
    )
    total = pullback(others + cotangent)
    difference = tokenizer.last_layer(total["decoder"]) - tokenizer.last_layer(
      pullback(others)["decoder"]
    )
    return np.linalg.norm(difference), float(metrics["adversarial_weight"])

  assert added(9) == (0.0, 0.0)
  norm, weight = added(10)
  assert weight > 0
  # The adaptive weight gives the term `weight` times the others' norm.
  np.testing.assert_allclose(norm, 0.5 * 21.0, rtol=1e-3)


def test_one_backward_pass_is_the_gradient_of_both_losses(critic):
  config = tokenizer.TokenizerConfig(
    image_size=16,
    code_dim=4,
    channels=8,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    stem_patch=4,
  )
  decoder = tokenizer.Decoder(config)
  features = jax.random.normal(jax.random.key(3), (4, 2, 2, 4))
  decoder_params = decoder.init(jax.random.key(4), features)["params"]
  real, _ = pictures(jax.random.key(1))
  params = critic.init(jax.random.key(0))

  def decode(decoder_params):
    return decoder.apply({"params": decoder_params}, features)

  def difference(image):
    return jnp.mean(jnp.abs(image - real[:4]))

  def cotangents(decoder_params):
    image, pullback = jax.vjp(decode, decoder_params)
    others = jax.grad(difference)(image)
    added, metrics = critic.cotangent(
      params,
      lambda cotangent: {"decoder": pullback(cotangent)[0]},
      others,
      image,
      jnp.int32(10),
    )
    return pullback, others, added, metrics["adversarial_weight"], image

  pullback, others, added, weight, image = cotangents(decoder_params)
  assert weight > 0

  def total(decoder_params):
    image = decode(decoder_params)
    score = critic.module.apply({"params": params}, image)
    return difference(image) - weight * jnp.mean(score)

  def step(decoder_params, passes):
    pullback, others, added, _, _ = cotangents(decoder_params)
    if passes == 1:
      return pullback(others + added)
    return pullback(others), pullback(added)

  def cost(passes):
    lowered = jax.jit(step, static_argnums=1).lower(decoder_params, passes)
    return lowered.compile().cost_analysis()["flops"]

  # That the last layer balances both costs no pass of its own.
  backward = jax.jit(lambda p, c: jax.vjp(decode, p)[1](c))
  whole = backward.lower(decoder_params, image).compile().cost_analysis()
  forward = jax.jit(decode).lower(decoder_params).compile().cost_analysis()
  one_pass = whole["flops"] - forward["flops"]
  assert cost(2) - cost(1) > 0.8 * one_pass

  chex.assert_trees_all_close(
    pullback(others + added)[0],
    jax.grad(total)(decoder_params),
    rtol=1e-4,
    atol=1e-6,
  )
