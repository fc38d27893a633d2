"""Tests of the convolutional blocks, against PyTorch where it has the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import conv


def _normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_space_to_depth_keeps_squares_together():
  x = jnp.arange(16).reshape(1, 4, 4, 1)
  folded = conv.space_to_depth(x, 2)
  np.testing.assert_array_equal(folded[0, 0, 0], [0, 1, 4, 5])
  np.testing.assert_array_equal(folded[0, 1, 0], [8, 9, 12, 13])


def test_depth_to_space_inverts_space_to_depth():
  x = _normal(2, 6, 12, 5)
  folded = conv.space_to_depth(x, 3)
  assert folded.shape == (2, 2, 4, 45)
  np.testing.assert_array_equal(conv.depth_to_space(folded, 3), x)


def test_downsample_is_a_strided_convolution():
  x = _normal(2, 4, 6, 3)
  layer = conv.Downsample(5)
  params = layer.init(jax.random.key(0), x)
  kernel = params["params"]["proj"]["kernel"].reshape(2, 2, 3, 5)
  expected = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_halving_is_a_strided_convolution_everywhere(platform, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(conv.sharding, "platform", lambda: platform)
  x, bias = _normal(2, 8, 12, 3), _normal(5)
  kernel = _normal(4, 4, 3, 5)
  inputs, weights, offsets = (
    torch.tensor(array, requires_grad=True)
    for array in (x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), bias)
  )
  expected = torch.nn.functional.conv2d(
    inputs, weights, offsets, stride=2, padding=1
  )
  params = {"kernel": kernel, "bias": bias}
  traced = jax.jit(conv.HalvingConv(5).apply).trace({"params": params}, x)
  assert ("window_strides=(2, 2)" in str(traced.jaxpr)) == (platform == "tpu")
  np.testing.assert_allclose(
    conv.HalvingConv(5).apply({"params": params}, x),
    expected.detach().numpy().transpose(0, 2, 3, 1),
    atol=1e-5,
  )
  cotangent = _normal(2, 4, 6, 5)
  expected.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
  _, pullback = jax.vjp(
    lambda p, x: conv.HalvingConv(5).apply({"params": p}, x), params, x
  )
  of_params, of_x = pullback(jnp.asarray(cotangent))
  for ours, theirs in (
    (of_x, inputs.grad.permute(0, 2, 3, 1)),
    (of_params["kernel"], weights.grad.permute(2, 3, 1, 0)),
    (of_params["bias"], offsets.grad),
  ):
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_upsample_doubles_the_grid():
  x = _normal(2, 4, 6, 8)
  y, _ = conv.Upsample(5).init_with_output(jax.random.key(0), x)
  assert y.shape == (2, 8, 12, 5)


@pytest.mark.parametrize("channels,groups", [(8, 1), (16, 1), (48, 3)])
def test_group_norm_equals_torch(channels, groups):
  torch = pytest.importorskip("torch")
  x = _normal(2, 4, 4, channels) * 3 + 1
  layer = conv.GroupNorm()
  ours = layer.apply(layer.init(jax.random.key(0), x), x)
  theirs = torch.nn.GroupNorm(groups, channels, eps=1e-6)(
    torch.tensor(x.transpose(0, 3, 1, 2))
  )
  np.testing.assert_allclose(
    ours, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5
  )


@pytest.mark.parametrize(
  "block", [conv.ResidualBlock(8), conv.AttentionBlock()]
)
def test_new_block_is_the_identity_and_learns(block):
  x = _normal(2, 4, 4, 8)
  params = jax.jit(block.init)(jax.random.key(0), x)
  np.testing.assert_allclose(block.apply(params, x), x, atol=1e-6)
  grads = jax.jit(jax.grad(lambda p: jnp.vdot(block.apply(p, x), x[::-1])))(
    params
  )
  last = grads["params"]["conv2" if "conv2" in grads["params"] else "out"]
  assert jnp.linalg.norm(last["kernel"]) > 0


def test_residual_block_projects_to_another_width():
  x = _normal(1, 4, 4, 8)
  y, variables = jax.jit(conv.ResidualBlock(12).init_with_output)(
    jax.random.key(0), x
  )
  shortcut = variables["params"]["shortcut"]["kernel"]
  np.testing.assert_allclose(y, x @ shortcut, atol=1e-5)


def test_attention_equals_torch():
  torch = pytest.importorskip("torch")
  x = _normal(2, 3, 4, 8)
  block = conv.AttentionBlock()
  params = block.init(jax.random.key(0), x)["params"]
  kernel = jnp.asarray(_normal(8, 8))
  params = {**params, "out": {**params["out"], "kernel": kernel}}
  h = conv.GroupNorm().apply({"params": params["norm"]}, x).reshape(2, 12, 8)
  q, k, v = np.split(np.asarray(h @ params["qkv"]["kernel"]), 3, axis=-1)
  attended = torch.nn.functional.scaled_dot_product_attention(
    *map(torch.tensor, (q, k, v))
  ).numpy()
  np.testing.assert_allclose(
    block.apply({"params": params}, x),
    x + (attended @ kernel).reshape(x.shape),
    atol=1e-5,
  )


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  x = _normal(1, 4, 4, 8).astype(jnp.bfloat16)
  for block in (
    conv.ResidualBlock(16, jnp.bfloat16),
    conv.AttentionBlock(jnp.bfloat16),
    conv.HalvingConv(4, jnp.bfloat16),
    conv.Downsample(4, dtype=jnp.bfloat16),
    conv.Upsample(4, dtype=jnp.bfloat16),
  ):
    y, variables = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(variables)} == {
      jnp.dtype("float32")
    }
