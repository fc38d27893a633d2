"""Losses of image reconstruction: pixels, PSNR and the adversarial terms.

Implements the reconstruction part of METHOD section 2. The adversarial terms
follow VQ-GAN (Esser et al., arXiv 2012.09841): hinge loss for the critic, and a
weight for the decoder's term that balances the two gradients at the decoder's
last layer. Plain functions of arrays; the commitment and codebook losses belong
to the quantizer, the LPIPS-like distance to `training.perceptual`.
"""

import jax
import jax.numpy as jnp


def l1_loss(image: jax.Array, reconstruction: jax.Array) -> jax.Array:
  """Returns the mean absolute error, float32[], pixels in [-1, 1]."""
  return jnp.mean(jnp.abs(reconstruction - image))


def l2_loss(image: jax.Array, reconstruction: jax.Array) -> jax.Array:
  """Returns the mean squared error, float32[], pixels in [-1, 1]."""
  return jnp.mean(jnp.square(reconstruction - image))


def psnr(image: jax.Array, reconstruction: jax.Array) -> jax.Array:
  """Returns each picture's peak signal-to-noise ratio.

  Args:
    image: float32[B, H, W, C], pixels in [-1, 1].
    reconstruction: float32[B, H, W, C], clipped to [-1, 1] first.

  Returns:
    float32[B] in dB, at most 100; average it over pictures.
  """
  error = jnp.clip(reconstruction, -1.0, 1.0) - image
  mean_square = jnp.mean(jnp.square(error), axis=(-3, -2, -1))
  return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_square, 4e-10))


def discriminator_loss(
  real_scores: jax.Array, fake_scores: jax.Array
) -> jax.Array:
  """Returns the critic's hinge loss (Lim and Ye, arXiv 1705.02894).

  Args:
    real_scores: float32[...], scores of real pictures' patches.
    fake_scores: float32[...], scores of decoded pictures' patches.

  Returns:
    float32[]; zero once real scores pass 1 and fake ones -1.
  """
  real = jnp.mean(jax.nn.relu(1.0 - real_scores))
  fake = jnp.mean(jax.nn.relu(1.0 + fake_scores))
  return 0.5 * (real + fake)


def generator_loss(fake_scores: jax.Array) -> jax.Array:
  """Returns the decoder's adversarial loss, minus the mean score: float32[]."""
  return -jnp.mean(fake_scores)


def adaptive_weight(
  reconstruction_grad: jax.Array,
  adversarial_grad: jax.Array,
  max_weight: float = 1e4,
) -> jax.Array:
  """Returns the weight that gives both terms one say at the last layer.

  VQ-GAN, equation 7: the ratio of the gradients' norms with respect to the
  decoder's last kernel (`models.tokenizer.last_layer`).

  Args:
    reconstruction_grad: float32[...], of the other losses.
    adversarial_grad: float32[...], of `generator_loss`.
    max_weight: upper clip.

  Returns:
    float32[] in [0, max_weight], without gradient.
  """
  ratio = jnp.linalg.norm(reconstruction_grad.ravel()) / (
    jnp.linalg.norm(adversarial_grad.ravel()) + 1e-4
  )
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, max_weight))


def disc_gate(step: jax.Array, disc_start: int) -> jax.Array:
  """Returns 1.0 from step `disc_start` on and 0.0 before, float32[].

  Multiply the adversarial terms by it, the critic's as well as the decoder's.
  """
  return (jnp.asarray(step) >= disc_start).astype(jnp.float32)
