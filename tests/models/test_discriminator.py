"""Tests of the PatchGAN critic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.models import discriminator


def _init(size=32, **settings):
  model = discriminator.Discriminator(channels=8, **settings)
  image = jax.random.normal(jax.random.key(1), (2, size, size, 3))
  return model, jax.jit(model.init)(jax.random.key(0), image), image


@pytest.mark.parametrize("num_layers,side", [(1, 16), (2, 8), (3, 4)])
def test_one_score_per_patch(num_layers, side):
  model = discriminator.Discriminator(channels=8, num_layers=num_layers)
  scores, _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3))
  )
  assert scores.shape == (2, side, side)


def test_has_no_state_and_scores_pictures_independently():
  model, variables, image = _init(num_layers=2)
  assert set(variables) == {"params"}
  np.testing.assert_allclose(
    model.apply(variables, image)[:1],
    model.apply(variables, image[:1]),
    atol=1e-5,
  )


def test_gradient_reaches_the_picture():
  model, variables, image = _init(num_layers=2)
  grad = jax.grad(
    lambda x: jnp.vdot(model.apply(variables, x), 1.0 + x[..., 0][:, ::4, ::4])
  )(image)
  assert jnp.all(jnp.isfinite(grad)) and jnp.linalg.norm(grad) > 0


def test_size_that_cannot_be_halved_raises():
  with pytest.raises(ValueError, match="multiple of 8"):
    _init(size=20, num_layers=3)
