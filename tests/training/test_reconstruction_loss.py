"""Tests of pixel losses, PSNR and the adversarial terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.training import reconstruction_loss as losses


def test_pixel_losses():
  image = jnp.zeros((1, 2, 2, 1))
  other = jnp.array([1.0, -1.0, 0.5, 0.0]).reshape(1, 2, 2, 1)
  assert losses.l1_loss(image, other) == pytest.approx(2.5 / 4)
  assert losses.l2_loss(image, other) == pytest.approx(2.25 / 4)


def test_psnr_is_per_picture_and_clips():
  image = jnp.stack([jnp.ones((4, 4, 3)), jnp.zeros((4, 4, 3))])
  reconstruction = jnp.stack(
    [jnp.full((4, 4, 3), 7.0), jnp.full((4, 4, 3), 0.2)]
  )
  # A range of 2 and an error of 0.2 are 20 dB; 7 is clipped to the right value.
  np.testing.assert_allclose(
    losses.psnr(image, reconstruction), [100.0, 20.0], rtol=1e-5
  )


def test_psnr_maps_over_a_leading_axis():
  image, many = jnp.zeros((2, 4, 4, 3)), jnp.full((5, 2, 4, 4, 3), 0.2)
  assert jax.vmap(losses.psnr, (None, 0))(image, many).shape == (5, 2)


def test_hinge_losses():
  real, fake = jnp.array([2.0, 0.0]), jnp.array([-3.0, 1.0])
  # Real: 0 and 1; fake: 0 and 2.
  assert losses.discriminator_loss(real, fake) == pytest.approx(0.75)
  assert losses.generator_loss(fake) == pytest.approx(1.0)
  d_real, d_fake = jax.grad(losses.discriminator_loss, (0, 1))(real, fake)
  np.testing.assert_allclose(d_real, [0.0, -0.25])
  np.testing.assert_allclose(d_fake, [0.0, 0.25])
  np.testing.assert_allclose(
    jax.grad(losses.generator_loss)(fake), [-0.5, -0.5]
  )


def test_adaptive_weight_balances_the_gradients_at_the_last_layer():
  kernel = jax.random.normal(jax.random.key(0), (4, 3))
  x = jax.random.normal(jax.random.key(1), (5, 4))
  reconstruction = jax.grad(lambda k: jnp.sum((x @ k) ** 2))(kernel)
  adversarial = jax.grad(lambda k: -jnp.mean(x @ k))(kernel)
  weight = losses.adaptive_weight(reconstruction, adversarial)
  assert jnp.linalg.norm(weight * adversarial) == pytest.approx(
    float(jnp.linalg.norm(reconstruction)), rel=1e-2
  )


def test_adaptive_weight_is_clipped_and_constant():
  one, none = jnp.ones((2, 2)), jnp.zeros((2, 2))
  assert losses.adaptive_weight(one, none) == 1e4
  assert losses.adaptive_weight(one, none, max_weight=3.0) == 3.0
  assert losses.adaptive_weight(none, one) == 0.0
  grad = jax.grad(lambda a: losses.adaptive_weight(a, one))(one)
  np.testing.assert_array_equal(grad, 0.0)


def test_disc_gate_opens_at_its_step():
  gates = [float(losses.disc_gate(jnp.int32(s), 10)) for s in (0, 9, 10, 11)]
  assert gates == [0.0, 0.0, 1.0, 1.0]
