"""Dropping depths keeps the straight-through gradient and the right prefix."""

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax.training import steps


def test_drop_depth_cuts_to_a_prefix():
  rng = np.random.default_rng(0)
  partial = jnp.asarray(rng.normal(size=(4, 64, 2, 2, 3)), jnp.float32)
  out = steps.drop_depth(jax.random.key(0), partial[-1], partial, 0.5)
  matches = np.stack(
    [
      np.isclose(out, prefix, atol=1e-5).all(axis=(1, 2, 3))
      for prefix in partial
    ]
  )
  assert (matches.sum(axis=0) == 1).all()
  whole = matches[-1].mean()
  assert 0.3 < whole < 0.7
  assert (matches[:-1].sum(axis=1) > 0).all()


def test_drop_depth_passes_the_gradient_unchanged():
  partial = jnp.ones((3, 8, 1, 1, 2))
  weight = jnp.arange(16.0).reshape(8, 1, 1, 2)
  gradient = jax.grad(
    lambda q: jnp.sum(
      weight * steps.drop_depth(jax.random.key(1), q, partial, 1.0)
    )
  )(partial[-1])
  np.testing.assert_array_equal(gradient, weight)


def test_one_depth_has_nothing_to_drop():
  partial = jnp.ones((1, 8, 1, 1, 2))
  dropped = steps.drop_depth(jax.random.key(0), partial[0], partial, 1.0)
  np.testing.assert_array_equal(dropped, partial[0])
