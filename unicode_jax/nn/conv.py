"""Convolutional blocks of the visual tokenizer.

The residual and attention blocks are VQ-GAN's (Esser et al., arXiv 2012.09841,
appendix A). Differs from it: resolution changes by a space-to-depth or
depth-to-space rearrangement and a 1x1 convolution. Down, that is a 2x2
convolution of stride 2, written as one matrix product, which XLA runs far
faster on a CPU than a strided convolution; up, it is the sub-pixel convolution
of Shi et al. (arXiv 1609.05158).

Images and features are [batch, height, width, channels] throughout.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from unicode_jax import sharding


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
  """Folds every block x block square of positions into one position.

  Args:
    x: [B, X, Y, C].
    block: side of a square, in positions; divides X and Y.

  Returns:
    [B, X / block, Y / block, block * block * C], row by row within a square.
  """
  B, X, Y, C = x.shape
  x = x.reshape(B, X // block, block, Y // block, block, C).swapaxes(2, 3)
  return x.reshape(B, X // block, Y // block, block * block * C)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
  """Undoes `space_to_depth`: [B, X, Y, C] -> [B, X*b, Y*b, C / b**2]."""
  B, X, Y, C = x.shape
  x = x.reshape(B, X, Y, block, block, C // block**2).swapaxes(2, 3)
  return x.reshape(B, X * block, Y * block, C // block**2)


def halve(x: jax.Array, kernel: jax.Array, *, folded: bool) -> jax.Array:
  """Convolves 4x4 positions with stride 2 and padding 1.

  Args:
    x: [B, X, Y, C], X and Y even.
    kernel: [4, 4, C, E].
    folded: whether to fold squares of positions, and to convolve 2x2 of them
      without a stride.

  Returns:
    [B, X / 2, Y / 2, E].
  """
  stride, padding = 2, ((1, 1), (1, 1))
  if folded:
    x = space_to_depth(jnp.pad(x, ((0, 0), *padding, (0, 0))), 2)
    *_, C, E = kernel.shape
    kernel = kernel.reshape(2, 2, 2, 2, C, E).swapaxes(1, 2)
    kernel = kernel.reshape(2, 2, 4 * C, E)
    stride, padding = 1, "VALID"
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


class HalvingConv(nn.Module):
  """A 4x4 convolution of stride 2 and padding 1.

  CPUs, on which XLA convolves slowly with a stride, fold squares of positions
  into one; TPUs would spend more on that than on the products, and GPUs have
  kernels of their own for a stride.

  Attributes:
    features: channels of the output.
    dtype: of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, X, Y, C] to [B, X / 2, Y / 2, features]."""
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (4, 4, x.shape[-1], self.features),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    folded = sharding.platform() == "cpu"
    x = halve(x.astype(self.dtype), kernel.astype(self.dtype), folded=folded)
    return x + bias.astype(self.dtype)


class GroupNorm(nn.Module):
  """Group normalisation (Wu and He, arXiv 1803.08494), 16 channels a group.

  Statistics are float32 whatever the dtype; epsilon is 1e-6 as in VQ-GAN.
  Differs from it: VQ-GAN fixes 32 groups, which leaves one channel a group in
  narrow networks and then wipes out the mean colour of a picture.

  Attributes:
    dtype: of the output.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [B, X, Y, C] over positions and the channels of a group."""
    size = math.gcd(16, x.shape[-1])
    return nn.GroupNorm(
      num_groups=None, group_size=size, dtype=self.dtype, name="norm"
    )(x)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions, each after GroupNorm and SiLU, and a shortcut.

  The second convolution starts at zero, so that a new block is the identity
  (a 1x1 projection where the width changes) and deep stacks train fast.

  Attributes:
    features: channels of the output.
    dtype: of the computation; parameters are float32.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, X, Y, C] to [B, X, Y, features]."""
    h = nn.silu(GroupNorm(self.dtype, name="norm1")(x))
    h = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv1")(h)
    h = nn.silu(GroupNorm(self.dtype, name="norm2")(h))
    h = nn.Conv(
      self.features,
      (3, 3),
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name="conv2",
    )(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + h


class AttentionBlock(nn.Module):
  """Single-head self-attention over all positions, identity at the start.

  Attributes:
    dtype: of the computation; the softmax is float32.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, X, Y, C] to the same shape."""
    B, X, Y, C = x.shape
    h_BNC = GroupNorm(self.dtype, name="norm")(x).reshape(B, X * Y, C)
    qkv = nn.Dense(3 * C, dtype=self.dtype, name="qkv")(h_BNC)
    q_BNC, k_BNC, v_BNC = jnp.split(qkv, 3, axis=-1)
    scores_BNN = jnp.einsum(
      "BNC,BMC->BNM", q_BNC, k_BNC, preferred_element_type=jnp.float32
    )
    weights_BNN = jax.nn.softmax(scores_BNN * C**-0.5).astype(self.dtype)
    out = nn.Dense(
      C, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out"
    )
    return x + out(weights_BNN @ v_BNC).reshape(x.shape)


class Downsample(nn.Module):
  """Shrinks the grid: space to depth, then 1x1, a convolution of equal stride.

  Attributes:
    features: channels of the output.
    block: positions that become one, per side.
    dtype: of the computation.
  """

  features: int
  block: int = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, X, Y, C] to [B, X / block, Y / block, features]."""
    x = space_to_depth(x, self.block)
    return nn.Dense(self.features, dtype=self.dtype, name="proj")(x)


class Upsample(nn.Module):
  """Enlarges the grid: a sub-pixel convolution (1x1, then depth to space).

  Attributes:
    features: channels of the output.
    block: positions that come of one, per side.
    dtype: of the computation.
  """

  features: int
  block: int = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, X, Y, C] to [B, X * block, Y * block, features]."""
    features = self.features * self.block**2
    x = nn.Dense(features, dtype=self.dtype, name="proj")(x)
    return depth_to_space(x, self.block)
