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


def test_first_layer_is_a_strided_convolution():
  torch = pytest.importorskip("torch")
  image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5))
  kernel = kernel.astype(np.float32)
  expected = torch.nn.functional.conv2d(
    torch.tensor(np.asarray(image).transpose(0, 3, 1, 2)),
    torch.tensor(kernel.transpose(3, 2, 0, 1)),
    stride=2,
    padding=1,
  )
  # What `Discriminator` computes: pad, fold 2x2 squares, convolve 2x2.
  folded = discriminator.conv.space_to_depth(
    jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))), 2
  )
  ours = jax.lax.conv_general_dilated(
    folded,
    kernel.reshape(2, 2, 2, 2, 3, 5)
    .transpose(0, 2, 1, 3, 4, 5)
    .reshape(2, 2, 12, 5),
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  np.testing.assert_allclose(
    ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5
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
