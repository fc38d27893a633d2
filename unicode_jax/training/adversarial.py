"""The adversarial half of the tokenizer step: a PatchGAN critic beside it.

METHOD section 2 after VQ-GAN (arXiv 2012.09841): hinge loss, adaptive weight,
nothing before `start` steps. The formulas are in `reconstruction_loss`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unicode_jax import sharding
from unicode_jax.models import (
  discriminator as discriminator_lib,
  tokenizer as tokenizer_lib,
)
from unicode_jax.training import reconstruction_loss

# From this many pixels on a patch may span 70 of them; below, 34.
_LARGE_IMAGE = 128


@dataclasses.dataclass(frozen=True)
class Critic:
  """A critic with its optimizer.

  Attributes:
    channels: Width of its first layer.
    image_size: Side of the pictures, pixels.
    weight: Weight of the decoder's adversarial term, times the adaptive one.
    start: Step of the run from which critic and term are active.
    optimizer: Updates the critic.
  """

  channels: int
  image_size: int
  weight: float
  start: int
  optimizer: optax.GradientTransformation

  @property
  def module(self) -> discriminator_lib.Discriminator:
    """The network."""
    num_layers = 3 if self.image_size >= _LARGE_IMAGE else 2
    return discriminator_lib.Discriminator(self.channels, num_layers)

  def init(self, key: jax.Array) -> Any:
    """Draws the critic's parameters."""
    image = jnp.zeros((1, self.image_size, self.image_size, 3))
    return self.module.init(key, image)["params"]

  def _score(self, params, image):
    params = sharding.whole_parameters(params)
    return self.module.apply({"params": params}, image)

  def cotangent(
    self,
    params,
    pullback: Callable,
    others: jax.Array,
    reconstruction: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the adversarial term adds to pictures' cotangent.

    One backward pass then serves it and the other losses; of the two that
    balance them the last layer alone is used, and XLA drops the rest.

    Args:
      params: The critic's.
      pullback: Cotangent of the reconstruction float32[B, H, W, 3] -> gradient,
        with a group "decoder".
      others: float32[B, H, W, 3], cotangent of the losses beside this one.
      reconstruction: float32[B, H, W, 3].
      step: int32[], step of the run.

    Returns:
      float32[B, H, W, 3], weight included, and metrics.
    """
    loss, cotangent = jax.value_and_grad(
      lambda image: reconstruction_loss.generator_loss(
        self._score(params, image)
      )
    )(reconstruction)
    balance = reconstruction_loss.adaptive_weight(
      *(
        tokenizer_lib.last_layer(pullback(image)["decoder"])
        for image in (others, cotangent)
      )
    )
    weight = (
      self.weight * balance * reconstruction_loss.disc_gate(step, self.start)
    )
    metrics = {"generator_loss": loss, "adversarial_weight": weight}
    return weight * cotangent, metrics

  def update(
    self, params, opt_state, image, reconstruction, step: jax.Array
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Trains the critic on one batch.

    Args:
      params: The critic's.
      opt_state: Its optimizer's.
      image: float32[B, H, W, 3], real pictures.
      reconstruction: float32[B, H, W, 3], decoded ones.
      step: int32[], step of the run; nothing moves before `start`.

    Returns:
      New parameters, optimizer state, and metrics.
    """
    loss, grads = jax.value_and_grad(
      lambda p: reconstruction_loss.discriminator_loss(
        self._score(p, image), self._score(p, reconstruction)
      )
    )(params)
    updates, new_opt_state = self.optimizer.update(grads, opt_state, params)
    moved = optax.apply_updates(params, updates)
    active = step >= self.start
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(active, new, old),
      (moved, new_opt_state),
      (params, opt_state),
    )
    terms = {
      "discriminator_loss": loss,
      "discriminator_gradient_norm": optax.tree.norm(grads),
    }
    return params, opt_state, terms
