"""A batch in parts is the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.training import accumulation


def loss_fn(params, batch):
  """A mean over tokens, which the parts of a batch have unequal numbers of."""
  values = jnp.tanh(batch["x"] @ params["w"]).sum(-1)
  total = jnp.sum(batch["mask"])
  mean = jnp.sum(values * batch["mask"]) / jnp.where(total > 0, total, 1.0)
  return mean, {"num_tokens": total, "values": values}


@pytest.fixture(scope="module")
def given():
  rng = np.random.default_rng(0)
  mask = (rng.random((8, 5)) < 0.4).astype(np.float32)
  mask[2:4] = 0  # A part of four has no token at all.
  batch = {"x": rng.normal(size=(8, 5, 3)).astype(np.float32), "mask": mask}
  return {"w": rng.normal(size=(3, 4)).astype(np.float32)}, batch


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_add_up_to_the_whole(given, parts):
  params, batch = given
  expected, found = (
    jax.jit(lambda p, b, n=n: accumulation.value_and_grad(loss_fn, p, b, n))(
      params, batch
    )
    for n in (1, parts)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )
  # Rows come back in their places.
  np.testing.assert_allclose(
    found[0][1]["values"], loss_fn(params, batch)[1]["values"], rtol=1e-5
  )


def test_a_batch_without_tokens_moves_nothing(given):
  params, batch = given
  batch = batch | {"mask": np.zeros_like(batch["mask"])}
  (loss, _), grads = accumulation.value_and_grad(loss_fn, params, batch, 4)
  assert loss == 0
  assert not np.any(grads["w"])
