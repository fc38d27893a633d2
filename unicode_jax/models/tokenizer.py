"""Encoder and decoder of the visual tokenizer.

Implements E and G of METHOD sections 1-2, after VQ-GAN (Esser et al., arXiv
2012.09841). Differs from it: pictures enter and leave in patches of
`stem_patch` pixels, resolution changes by rearrangement (see `nn.conv`), the
first and last convolutions are 1x1, and attention is at the last grid only. The
quantizer sits between the two and knows nothing of either.

With `stem_patch=4` and `channel_multipliers=(1, 2)`, of a 32 pixel picture:

    image 32x32x3 -> stem 8x8xM -> blocks -> 4x4x2M -> blocks -> 4x4xC
    image 32x32x3 <- head 8x8xM <- blocks <- 4x4x2M <- blocks <- 4x4xC
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from unicode_jax.nn import conv


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Architecture of the encoder and its mirror image, the decoder.

  Attributes:
    image_size: side of the square picture, pixels.
    code_dim: channels of a feature, C.
    channels: width, times a multiplier at every resolution.
    channel_multipliers: one per resolution, highest first; each but the first
      halves the grid.
    num_res_blocks: residual blocks per resolution in the encoder; the decoder
      has one more, as in VQ-GAN.
    stem_patch: side of the patch that becomes one position of the first level,
      pixels. 4 is fast on a CPU, 1 is VQ-GAN's.
    attention: whether a self-attention block works at the last grid.
    dtype: of the computation, "float32" or "bfloat16"; parameters and outputs
      are float32.

  Raises:
    ValueError: `image_size` is not a multiple of the downsampling.
  """

  image_size: int
  code_dim: int
  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  stem_patch: int = 1
  attention: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    if self.image_size % self.downsampling:
      raise ValueError(
        f"image_size={self.image_size} is not a multiple of the downsampling "
        f"{self.downsampling} (stem_patch={self.stem_patch} times 2 for each "
        "but the first of channel_multipliers="
        f"{self.channel_multipliers}): set image_size to a multiple of it"
      )

  @property
  def downsampling(self) -> int:
    """Pixels per side of one position of the grid."""
    return self.stem_patch * 2 ** (len(self.channel_multipliers) - 1)

  @property
  def grid_size(self) -> int:
    """Positions per side of the feature grid."""
    return self.image_size // self.downsampling

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels at each resolution, highest resolution first."""
    return tuple(self.channels * m for m in self.channel_multipliers)


class _Blocks(nn.Module):
  """Residual blocks at one resolution, with attention after the first."""

  features: int
  num_blocks: int
  attention: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.num_blocks):
      x = conv.ResidualBlock(self.features, self.dtype, name=f"block{i}")(x)
      if self.attention and i == 0:
        x = conv.AttentionBlock(self.dtype, name="attention")(x)
    return x


class Encoder(nn.Module):
  """Maps pictures to features, one per position of the grid."""

  config: TokenizerConfig

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Encodes pictures.

    Args:
      image: float32[B, H, W, 3], pixels in [-1, 1].

    Returns:
      float32[B, h, w, code_dim], not normalised.
    """
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    last = len(config.widths) - 1
    x = image.astype(dtype)
    for level, width in enumerate(config.widths):
      block, name = (
        (2, f"down{level}") if level else (config.stem_patch, "stem")
      )
      x = conv.Downsample(width, block, dtype, name=name)(x)
      x = _Blocks(
        width,
        config.num_res_blocks,
        config.attention and level == last,
        dtype,
        name=f"level{level}",
      )(x)
    x = nn.silu(conv.GroupNorm(dtype, name="norm")(x))
    return nn.Dense(config.code_dim, name="head")(x.astype(jnp.float32))


class Decoder(nn.Module):
  """Maps quantized features back to pictures."""

  config: TokenizerConfig

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Decodes features.

    Args:
      features: float32[B, h, w, code_dim].

    Returns:
      float32[B, H, W, 3]; linear, so pixels may leave [-1, 1].
    """
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    last = len(config.widths) - 1
    x = features.astype(dtype)
    x = nn.Dense(config.widths[last], dtype=dtype, name="stem")(x)
    for level in range(last, -1, -1):
      x = _Blocks(
        config.widths[level],
        config.num_res_blocks + 1,
        config.attention and level == last,
        dtype,
        name=f"level{level}",
      )(x)
      if level:
        width = config.widths[level - 1]
        x = conv.Upsample(width, dtype=dtype, name=f"up{level}")(x)
    x = nn.silu(conv.GroupNorm(dtype, name="norm")(x))
    return conv.Upsample(3, config.stem_patch, name="head")(
      x.astype(jnp.float32)
    )


def last_layer(decoder_params) -> jax.Array:
  """Returns the decoder's last kernel, float32[M, 3 * stem_patch**2].

  Where the adaptive adversarial weight compares gradients; works on the
  decoder's parameters as on their gradients.
  """
  return decoder_params["head"]["proj"]["kernel"]
