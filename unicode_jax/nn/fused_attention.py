"""Attention kernels of accelerators, for whole sequences without a cache.

They compute what `attention.attend` does and never hold the scores: JAX's
splash attention for TPUs (Pallas), and cuDNN's for GPUs. A row may hold packed
segments. A kernel cannot be split by the compiler, so each device runs it on
its own rows and heads of the mesh that is set (`sharding`).
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from unicode_jax import sharding

# Of what attention gives, for policies that keep it for the backward pass.
NAME = "attention"
_LANES = 128  # Sequences must be a multiple of it.
# Queries, and keys and values, at a time.
_BLOCK = 512


def choose(kernel: str, length: int) -> Callable | None:
  """Chooses the kernel for a platform.

  Args:
    kernel: "auto", "xla", "splash" or "cudnn".
    length: T.

  Returns:
    `splash` or `cudnn`; None for plain XLA.

  Raises:
    ValueError: If `splash` is asked for and T is no multiple of 128.
  """
  if kernel == "splash" and length % _LANES:
    raise ValueError(
      f"attention='splash' takes lengths that are multiples of {_LANES}, not "
      f"{length}: change the length, or set llm.attention='auto'"
    )
  fits = sharding.platform() == "tpu" and length % _LANES == 0
  if kernel == "splash" or (kernel == "auto" and fits):
    return splash
  return cudnn if kernel == "cudnn" else None


def splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  interpret: bool = False,
) -> jax.Array:
  """Runs splash attention; see `cudnn` for what goes in and out.

  Raises:
    ValueError: As `choose`.
  """
  # At the first use: importing it takes half a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  H, T = q.shape[1:3]
  mask = library.CausalMask((T, T))
  if window is not None:
    mask = library.LocalMask((T, T), (window - 1, 0), 0)
  block = next(b for b in (_BLOCK, 256, _LANES) if T % b == 0)
  sizes = library.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    use_fused_bwd_kernel=True,
  )

  def local(q_BHTA, k_BGTA, v_BGTA, segments_BT):
    attend = library.make_splash_mha(
      library.MultiHeadMask([mask] * q_BHTA.shape[1]),
      head_shards=1,
      q_seq_shards=1,
      block_sizes=sizes,
      residual_checkpoint_name=NAME,
      interpret=interpret,
    )
    ids = library.SegmentIds(segments_BT, segments_BT)
    return jax.vmap(attend)(q_BHTA, k_BGTA, v_BGTA, ids)

  scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
  mesh = sharding.active_mesh()
  if mesh is None:
    return local(scaled, k, v, segment_ids)
  spec = functools.partial(sharding.RULES.spec, mesh=mesh)
  heads = spec(("batch", "heads", None, None), q.shape)
  keys = spec(("batch", "kv_heads", None, None), k.shape)
  if keys[1] != heads[1]:  # Each device needs the keys of its own queries.
    k, v = (jnp.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(heads, heads, heads, spec(("batch", None), segment_ids.shape)),
    out_specs=heads,
    check_vma=False,
  )(scaled, k, v, segment_ids)


def cudnn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
) -> jax.Array:
  """Runs cuDNN's attention, which splits over batch and heads by itself.

  Args:
    q: dtype[B, H, T, A]; bfloat16 or float16.
    k: dtype[B, G, T, A], G a divisor of H.
    v: dtype[B, G, T, A].
    segment_ids: int32[B, T]; a token sees its own segment.
    window: tokens that a token sees, itself included; None for all before it.
      Positions are those in the row.

  Returns:
    dtype[B, H, T, A].
  """
  same_BTS = segment_ids[:, :, None] == segment_ids[:, None, :]
  out_BTHA = jax.nn.dot_product_attention(
    *(x.swapaxes(1, 2) for x in (q, k, v)),
    mask=same_BTS[:, None],
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )
  return out_BTHA.swapaxes(1, 2)
