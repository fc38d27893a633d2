"""The TPU's kernel, interpreted, against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import attention, fused_attention

B, H, G, T, A = 2, 4, 2, 256, 64


@pytest.fixture(scope="module")
def tensors():
  rng = np.random.default_rng(0)
  made = [
    jnp.asarray(rng.normal(size=(B, heads, T, A)), jnp.float32)
    for heads in (H, G, G, H)
  ]
  # Three packed segments, and padding in front.
  segments = np.sort(rng.integers(0, 4, (B, T)), axis=1)
  return made, jnp.asarray(segments, jnp.int32)


@pytest.mark.parametrize("window", [None, 100])
def test_splash_is_attention(tensors, window):
  """Values and gradients, with grouped heads and packed segments."""
  (*qkv, weight), segments = tensors
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))

  def plain(q, k, v):
    tokens = attention.Tokens(positions, segments)
    out = attention.attend(
      q.swapaxes(1, 2), k, v, tokens, window=window, kernel="xla"
    )
    return jnp.sum(weight * out.swapaxes(1, 2))

  def fused(q, k, v):
    out = fused_attention.splash(q, k, v, segments, window, interpret=True)
    return jnp.sum(weight * out)

  expected, found = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*qkv)
    for f in (plain, fused)
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for one, other in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


def test_who_gets_a_kernel():
  choose = fused_attention.choose
  assert choose("auto", 256) is None  # Not on a processor.
  assert choose("xla", 256) is None
  assert choose("splash", 256) is fused_attention.splash
  assert choose("cudnn", 100) is fused_attention.cudnn
  with pytest.raises(ValueError, match="multiples of 128, not 100"):
    choose("splash", 100)
