"""Rotary position embedding, in the half-split layout of LLaMA checkpoints.

Source: Su et al., "RoFormer" (arXiv 2104.09864); the frequency scaling is the
one of Llama 3.1. METHOD.md only asks that plain LLaMA checkpoints load.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretch of the low frequencies to a longer context.

  Attributes:
    factor: how many times slower the lowest frequencies turn.
    low_freq_factor: wavelengths above `original_max_position` over this are
      slowed by the whole factor.
    high_freq_factor: wavelengths below `original_max_position` over this are
      left alone; between the two bounds the change is blended.
    original_max_position: tokens of context before the stretch.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Returns the angular frequency of every pair of channels.

  Args:
    head_dim: size of an attention head, even.
    theta: base of the geometric series of wavelengths.
    scaling: long-context stretch, or None.

  Returns:
    float32[head_dim / 2], radians per position.

  Raises:
    ValueError: `head_dim` is odd.
  """
  if head_dim % 2:
    raise ValueError(f"head_dim={head_dim} is odd: RoPE turns channel pairs")
  freq = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  if scaling is not None:
    turns = scaling.original_max_position * freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    freq *= keep + (1 - keep) / scaling.factor
  return freq.astype(np.float32)


def rope_table(
  positions: jax.Array, frequencies: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Computes the rotation of every position, once for all layers.

  Args:
    positions: int32[B, T].
    frequencies: float32[A / 2] from `rope_frequencies`.

  Returns:
    cos and sin, float32[B, T, 1, A / 2]; the 1 stands for the heads.
  """
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates channel i together with channel i + A / 2 by the position's angle.

  Args:
    x: [B, T, H, A] queries or keys, any float dtype.
    table: the pair from `rope_table`.

  Returns:
    An array like `x`; computed in float32.
  """
  cos, sin = table
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)
