"""Normalisation over the channel axis."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
  """Divides by the root mean square of the last axis, times a learned scale.

  Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
  The statistics are float32 whatever the compute dtype.

  Attributes:
    epsilon: added to the mean square.
    dtype: of the output.
  """

  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [..., E]; the scale is float32[E]."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(
      self.dtype
    )
