"""PatchGAN critic of the adversarial loss (METHOD section 2).

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks"
(arXiv 1611.07004), as in VQ-GAN. Differs from both: GroupNorm in place of batch
norm, so that a picture's score depends on no other picture of the batch and the
critic carries no running statistics.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from unicode_jax.nn import conv


class Discriminator(nn.Module):
  """Scores overlapping patches of a picture as real (high) or decoded (low).

  Attributes:
    channels: width of the first layer; doubles at every halving, at most 8x.
    num_layers: halvings of the resolution. 3 sees patches of 70 pixels (for
      256 pixel pictures); 2 sees 34, 1 sees 16.
    dtype: of the computation; parameters and scores are float32.
  """

  channels: int = 64
  num_layers: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Scores pictures.

    Args:
      image: float32[B, H, W, 3], pixels in [-1, 1]; H and W multiples of
        2**num_layers.

    Returns:
      float32[B, H / 2**num_layers, W / 2**num_layers], one score per patch.

    Raises:
      ValueError: the picture's sides are not such multiples.
    """
    block = 2**self.num_layers
    if image.shape[1] % block or image.shape[2] % block:
      raise ValueError(
        f"image of shape {image.shape} cannot be halved "
        f"{self.num_layers} times: use fewer num_layers or a size that is a "
        f"multiple of {block}"
      )
    x = image.astype(self.dtype)
    for layer in range(self.num_layers + 1):
      features = self.channels * min(2**layer, 8)
      if layer < self.num_layers:
        layer_type = conv.HalvingConv
      else:
        layer_type = functools.partial(nn.Conv, kernel_size=(4, 4))
      x = layer_type(features, dtype=self.dtype, name=f"conv{layer}")(x)
      if layer:
        x = conv.GroupNorm(self.dtype, name=f"norm{layer}")(x)
      x = nn.leaky_relu(x, 0.2)
    score = nn.Conv(1, (4, 4), name="score")(x.astype(jnp.float32))
    return score[..., 0]
