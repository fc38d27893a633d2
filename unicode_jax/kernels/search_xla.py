"""Nearest-code search in plain XLA, in tiles: the path of CPUs.

XLA's argmin is a variadic reduction, which does not vectorise on a CPU. So
each lane of a tile keeps its own best value and the number of the block that
it came from, by elementwise selects, and the lanes are compared once at the
end. Memory is that of a tile, not of all N x K distances.

It computes METHOD.md section 2's choice; the rules that all backends share are
`nearest_code`'s.
"""

from jax import lax
import jax.numpy as jnp

# Queries and codes in a tile, so that its products and its running best, half a
# MiB each, stay in a CPU's cache.
_QUERY_BLOCK = 512
_CODE_BLOCK = 256


def search(z_NC, codebook_KC, bias_K, fast: bool):
  """Ranks codes, as a backend of `nearest_code`.

  Blocks are strided (lane l of block i is row l * blocks + i), so that rows
  that are sharded over devices stay where they are.

  Args:
    z_NC: float32 or bfloat16.
    codebook_KC: float32 or bfloat16, zeros where the bias is infinite.
    bias_K: float32.
    fast: whether only bfloat16 products are made.

  Returns:
    The least bias - z.c, float32[N], and the lowest row that has it, int32[N].
  """
  num_queries, num_codes = z_NC.shape[0], codebook_KC.shape[0]
  if not num_queries:
    return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)
  dtype = jnp.bfloat16 if fast else jnp.float32
  z_bnC = _strided_blocks(z_NC.astype(dtype), _QUERY_BLOCK)
  codebook_bkC = _strided_blocks(codebook_KC.astype(dtype), _CODE_BLOCK)
  bias_bk = _strided_blocks(bias_K, _CODE_BLOCK, fill=jnp.inf)
  num_blocks, num_lanes = bias_bk.shape
  lane_k = jnp.arange(num_lanes, dtype=jnp.int32)

  def search_block(z_nC):
    def step(carry, block):
      best_nk, block_nk = carry
      codebook_kC, bias_k, number = block
      product_nk = jnp.einsum(
        "nC,kC->nk",
        z_nC,
        codebook_kC,
        precision=lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )
      value_nk = bias_k - product_nk
      better_nk = value_nk < best_nk
      return (
        jnp.where(better_nk, value_nk, best_nk),
        jnp.where(better_nk, number, block_nk),
      ), None

    shape = (z_nC.shape[0], num_lanes)
    (best_nk, block_nk), _ = lax.scan(
      step,
      (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)),
      (codebook_bkC, bias_bk, jnp.arange(num_blocks, dtype=jnp.int32)),
    )
    best_n = jnp.min(best_nk, axis=1)
    index_nk = lane_k * num_blocks + block_nk
    ties_nk = best_nk == best_n[:, None]
    index_n = jnp.min(jnp.where(ties_nk, index_nk, num_codes), axis=1)
    return best_n, index_n

  value_bn, index_bn = lax.map(search_block, z_bnC)
  index_N = index_bn.T.reshape(-1)[:num_queries]
  return value_bn.T.reshape(-1)[:num_queries], jnp.minimum(
    index_N, num_codes - 1
  )


def _strided_blocks(x, block: int, fill=0.0):
  """Cuts the leading axis: [N, ...] -> [b, n, ...], row l*b + i at [i, l].

  Takes the fewest blocks of at most `block` rows, or up to twice as many if
  that divides N; else pads the end with `fill`.
  """
  size = x.shape[0]
  fewest = -(-size // block)
  count = next((n for n in range(fewest, 2 * fewest) if size % n == 0), fewest)
  length = -(-size // count)
  pad = [(0, length * count - size)] + [(0, 0)] * (x.ndim - 1)
  x = jnp.pad(x, pad, constant_values=fill)
  return x.reshape(length, count, *x.shape[1:]).swapaxes(0, 1)
