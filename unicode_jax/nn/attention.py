"""Grouped-query causal attention with packed segments and a KV cache.

Ainslie et al., "GQA" (arXiv 2305.13245); the sliding window is Mistral's
(arXiv 2310.06825). What a query may see, for two packed sequences a and b:

    key     a0 a1 b0 b1
    query a0 x
          a1 x  x
          b0       x
          b1       x  x      key arrived no later, same segment, and
                             position gap < window where there is one

Padding is just one more segment (id 0): it sees itself, nobody else sees it,
and so no row is ever without a key. Whole sequences on accelerators go to the
kernels of `fused_attention`. There is no dropout.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from unicode_jax import sharding
from unicode_jax.nn import fused_attention, norm, rope
from unicode_jax.nn.blockwise import blockwise

_MASKED = -1e30  # finite, so that a masked score never makes a NaN


class Tokens(NamedTuple):
  """What decides, besides the order of arrival, what a token may see.

  Attributes:
    positions: int32[B, T], what RoPE and the sliding window count in.
    segment_ids: int32[B, T], or None if every row is one segment.
  """

  positions: jax.Array
  segment_ids: jax.Array | None

  def cut(self, start: int, stop: int) -> "Tokens":
    """Returns the tokens of one stretch."""
    return jax.tree.map(lambda a: a[..., start:stop], self)


def _sees(queries: Tokens, keys: Tokens, start, window) -> jax.Array:
  """Draws the module's picture for one row: bool[T, S]."""
  (T,), (S,) = queries.positions.shape, keys.positions.shape
  seen_TS = start + jnp.arange(T)[:, None] >= jnp.arange(S)
  if queries.segment_ids is not None:
    seen_TS &= queries.segment_ids[:, None] == keys.segment_ids
  if window is not None:
    seen_TS &= queries.positions[:, None] - keys.positions < window
  return seen_TS


def _attend(q_GRTA, k_GSA, v_GSA, seen_TS):
  """Softmax attention, divided by the sum last: fewer passes over [T, S]."""
  G, R, T, A = q_GRTA.shape
  scores_GRTS = jnp.einsum(
    "GNA,GSA->GNS",
    q_GRTA.reshape(G, R * T, A),
    k_GSA,
    preferred_element_type=jnp.float32,
  ).reshape(G, R, T, -1)
  scores_GRTS = jnp.where(seen_TS, scores_GRTS * A**-0.5, _MASKED)
  highest_GRT1 = scores_GRTS.max(axis=-1, keepdims=True)
  weights_GRTS = jnp.exp(scores_GRTS - jax.lax.stop_gradient(highest_GRT1))
  out_GRTA = jnp.einsum(
    "GNS,GSA->GNA",
    weights_GRTS.astype(v_GSA.dtype).reshape(G, R * T, -1),
    v_GSA,
    preferred_element_type=jnp.float32,
  ).reshape(G, R, T, A)
  total_GRT1 = weights_GRTS.sum(axis=-1, keepdims=True)
  return (out_GRTA / total_GRT1).astype(v_GSA.dtype)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  queries: Tokens,
  keys: Tokens | None = None,
  start: int | jax.Array = 0,
  *,
  window: int | None = None,
  block: int | None = None,
  kernel: str = "auto",
) -> jax.Array:
  """Attends in blocks of queries, or by a kernel of the device's own.

  Without a cache, a block reads only the keys up to its own end: half of the
  work of the whole square, in pieces that stay in the processor's cache. On CPU
  that makes a train step's attention about three times faster; accelerators
  prefer one large product.

  Args:
    q: [B, T, H, A] queries; head h reads key head h * G // H.
    k: [B, G, S, A] keys.
    v: [B, G, S, A] values.
    queries: the T tokens that ask.
    keys: the S tokens of a cache; None if they are the queries themselves.
    start: int32[], the queries' first slot among the keys.
    window: a query sees keys less than `window` positions back, or None.
    block: queries at a time, 0 for all of them, None for 64 (or T / 8 if that
      is more) on CPU and all elsewhere.
    kernel: see `fused_attention.choose`; with a cache it is not asked. Its
      window counts tokens of the row, so a segment's positions must be
      consecutive.

  Returns:
    [B, T, H, A], in the dtype of `v`; scores and their sum are float32.
  """
  (B, T, H, A), (_, G, S, _) = q.shape, k.shape
  fused = fused_attention.choose(kernel, T) if keys is None else None
  if fused is not None:
    segment_ids = queries.segment_ids
    if segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    out_BHTA = fused(q.swapaxes(1, 2), k, v, segment_ids, window)
    return out_BHTA.swapaxes(1, 2)
  if block is None:
    block = max(64, -(-T // 8)) if sharding.platform() == "cpu" else 0

  def one_row(inputs):
    q_GRTA, k_GSA, v_GSA, queries, keys = inputs
    outs = []
    for first in range(0, T, block or T):
      last = min(first + (block or T), T)
      end = last if keys is None else S
      seen_TS = _sees(
        queries.cut(first, last),
        (keys or queries).cut(0, end),
        start + first,
        window,
      )
      q_block = q_GRTA[:, :, first:last]
      outs.append(_attend(q_block, k_GSA[:, :end], v_GSA[:, :end], seen_TS))
    return jnp.concatenate(outs, axis=2)

  q_BGRTA = q.reshape(B, T, G, H // G, A).transpose(0, 2, 3, 1, 4)
  out_BGRTA = blockwise(
    one_row, (q_BGRTA, k, v, queries, keys), bytes_per_item=4 * H * T * S
  )
  out_BTHA = out_BGRTA.transpose(0, 3, 1, 2, 4).reshape(B, T, H, A)
  return checkpoint_name(out_BTHA, fused_attention.NAME)


class Attention(nn.Module):
  """Projections, optional q/k norm, RoPE and `attend`.

  Attributes:
    num_heads: H.
    num_kv_heads: G, a divisor of H.
    head_dim: A.
    qkv_bias: adds a bias to q, k and v (Qwen2).
    qk_norm: RMS-normalises every head of q and k before RoPE (Qwen3).
    norm_eps: of that norm.
    window: see `attend`.
    block: see `attend`.
    kernel: see `attend`.
    dtype: compute dtype; parameters are float32.
    out_init: initializer of the output projection.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool = False
  qk_norm: bool = False
  norm_eps: float = 1e-5
  window: int | None = None
  block: int | None = None
  kernel: str = "auto"
  dtype: jnp.dtype = jnp.float32
  out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rope_table: tuple[jax.Array, jax.Array],
    queries: Tokens,
    keys: Tokens | None = None,
    start: int | jax.Array = 0,
    cache: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Mixes tokens.

    Args:
      x: [B, T, E].
      rope_table: of the queries' positions, from `rope.rope_table`.
      queries: the T tokens of x.
      keys: the cache's tokens, these included; None without a cache.
      start: int32[], the first slot of the cache to write.
      cache: this layer's keys and values, [B, G, S, A] each, or None.

    Returns:
      [B, T, E] and the updated cache (None without one).
    """
    B, T, E = x.shape

    def project(name, heads):
      y = nn.Dense(
        heads * self.head_dim,
        use_bias=self.qkv_bias,
        dtype=self.dtype,
        name=f"{name}_proj",
      )(x).reshape(B, T, heads, self.head_dim)
      if self.qk_norm and name != "v":
        y = norm.RMSNorm(self.norm_eps, self.dtype, name=f"{name}_norm")(y)
      which = "heads" if name == "q" else "kv_heads"
      return sharding.constrain(y, "batch", "length", which, "head_dim")

    q_BTHA = rope.apply_rope(project("q", self.num_heads), rope_table)
    k_BTGA = rope.apply_rope(project("k", self.num_kv_heads), rope_table)
    v_BTGA = project("v", self.num_kv_heads)
    k_BGSA, v_BGSA = (y.transpose(0, 2, 1, 3) for y in (k_BTGA, v_BTGA))
    if cache is not None:
      cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(
          old, new.astype(old.dtype), start, axis=2
        )
        for old, new in zip(cache, (k_BGSA, v_BGSA))
      )
      k_BGSA, v_BGSA = (y.astype(self.dtype) for y in cache)
    out_BTHA = attend(
      q_BTHA,
      k_BGSA,
      v_BGSA,
      queries,
      keys,
      start,
      window=self.window,
      block=self.block,
      kernel=self.kernel,
    )
    out = nn.Dense(
      E,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=self.out_init,
      name="o_proj",
    )(out_BTHA.reshape(B, T, -1))
    return out, cache
