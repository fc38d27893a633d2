import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import attention, blockwise as blockwise_lib


def reference(q, k, v, tokens, window):
  """Float64, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, H, A = q.shape
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(B, T, H):
    g = h * k.shape[1] // H
    seen = [
      s
      for s in range(t + 1)
      if tokens.segment_ids is None
      or tokens.segment_ids[b, s] == tokens.segment_ids[b, t]
      if window is None
      or tokens.positions[b, t] - tokens.positions[b, s] < window
    ]
    scores = k[b, g, seen] @ q[b, t, h] / np.sqrt(A)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ v[b, g, seen] / weights.sum()
  return out


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("packed, window", [(False, None), (True, 3)])
@pytest.mark.parametrize("block", [0, 4])
def test_against_reference(monkeypatch, block, packed, window, in_rows):
  if in_rows:
    monkeypatch.setattr(blockwise_lib, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(blockwise_lib, "_PIECE_BYTES", 2 * 4 * 6 * 11 * 11)
  B, T, H, G, A = 3, 11, 6, 2, 4
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.float32(rng.normal(0, 2, shape))

  q, k, v = draw(B, T, H, A), draw(B, G, T, A), draw(B, G, T, A)
  positions = jnp.asarray(np.tile(np.arange(T), (B, 1)))
  segments = jnp.asarray(rng.integers(0, 3, (B, T)).cumsum(1) % 4)
  tokens = attention.Tokens(positions, segments if packed else None)
  got = jax.jit(
    lambda *qkv: attention.attend(*qkv, tokens, window=window, block=block)
  )(q, k, v)
  want = reference(q, k, v, tokens, window)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_blocked_gradients_equal_whole():
  key = jax.random.key(0)
  B, T, H, G, A = 2, 10, 4, 2, 8
  q, c = jax.random.normal(key, (2, B, T, H, A))
  k, v = jax.random.normal(key, (2, B, G, T, A))
  tokens = attention.Tokens(jnp.tile(jnp.arange(T), (B, 1)), None)

  def grads(block):
    run = functools.partial(attention.attend, queries=tokens, block=block)
    return jax.jit(lambda *qkv: jax.vjp(run, *qkv)[1](c))(q, k, v)

  for got, want in zip(grads(3), grads(0)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_huge_scores_stay_finite():
  q = jnp.full((1, 4, 1, 2), 1e4)
  k = jnp.full((1, 1, 4, 2), 1e4).at[:, :, 1].set(-1e4)
  v = jnp.arange(8.0).reshape(1, 1, 4, 2)
  tokens = attention.Tokens(jnp.arange(4)[None], None)

  def total(q):
    return attention.attend(q, k, v, tokens).sum()

  value, grad = jax.value_and_grad(total)(q)
  assert np.isfinite(value) and np.isfinite(grad).all()
