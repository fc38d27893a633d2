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
  grads = {"decoder": {"head": {"proj": {"kernel": 7.0 * kernel}}}}

  def pullback(cotangent):
    direction = kernel.at[0, 0, 0, 0].set(jnp.sum(jnp.abs(cotangent)))
    return {"decoder": {"head": {"proj": {"kernel": direction}}}}

  def added(step):
    total, metrics = critic.add_to_gradient(
      params, grads, pullback, image, jnp.int32(step)
    )
    difference = tokenizer.last_layer(total["decoder"]) - 7.0 * kernel
    return np.linalg.norm(difference), float(metrics["adversarial_weight"])

  assert added(9) == (0.0, 0.0)
  norm, weight = added(10)
  assert weight > 0
  # The adaptive weight gives the term `weight` times the others' norm.
  np.testing.assert_allclose(norm, 0.5 * 7.0 * 3.0, rtol=1e-3)
