"""The projector of the LLaVA-like baseline (METHOD section 5).

Maps the visual encoder's continuous features to the LLM's width with two layers
and a GELU, as LLaVA 1.5 does (arXiv 2310.03744). UniCode itself has none: its
images are token ids. A model that reads images this way cannot draw.
"""

import flax.linen as nn
import jax


class Projector(nn.Module):
  """Two dense layers.

  Attributes:
    embed_dim: E, width of the LLM.
  """

  embed_dim: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps float32[..., C] to float32[..., E]."""
    hidden = nn.gelu(nn.Dense(self.embed_dim, name="in_proj")(features))
    # As large as the rows of a token table, which begin at 0.02.
    small = nn.initializers.variance_scaling(4e-4, "fan_in", "truncated_normal")
    return nn.Dense(self.embed_dim, kernel_init=small, name="out_proj")(hidden)
