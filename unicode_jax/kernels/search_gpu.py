"""Nearest-code search as a Pallas kernel for GPUs, through Triton.

XLA's own path writes a tile of scores to memory and reads it again to find its
best. Here a program has a block of queries and walks over codes: tensor cores
multiply (`operands`, the codes' norms among the columns), and the scores meet
the running best of their lane in registers:

  best f32[queries, lanes]    the best score of each lane so far
  block i32[queries, lanes]   which block of codes it came from

The lanes are compared once, at the end. Where there are few queries the codes
are shared out among several programs, whose best are compared afterwards.
Blocks follow each other in the order of the codes, so that the lowest index
wins ties.

It was never run on a GPU: its lowering is tested, and its interpretation. It
computes METHOD.md section 2's choice; the rules that all backends share are
`nearest_code`'s.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from unicode_jax.kernels import operands

# Queries and codes of a tile.
_QUERIES, _CODES = 64, 64
# Columns that are multiplied at once; narrower operands take the next power of
# two, which Triton wants.
_COLUMNS, _MIN_COLUMNS = 64, 16
_WARPS, _STAGES = 4, 3
# Enough to keep a large GPU busy.
_PROGRAMS = 512


def search(z_NC, codebook_KC, bias_K, fast: bool, *, interpret: bool = False):
  """Ranks codes, as a backend of `nearest_code`.

  Args:
    z_NC: float32 or bfloat16.
    codebook_KC: float32 or bfloat16, zeros where the bias is infinite.
    bias_K: float32.
    fast: whether only bfloat16 products are made.
    interpret: runs the kernel without a GPU, for tests.

  Returns:
    The least bias - z.c, float32[N], and the lowest row that has it, int32[N].
  """
  num_queries, num_codes = z_NC.shape[0], codebook_KC.shape[0]
  if not num_queries:
    return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)
  codebook_KC = operands.filled(codebook_KC, _CODES)
  bias_K = operands.filled(bias_K, _CODES, value=jnp.inf)
  z_NW, codebook_KW = operands.ranking_operands(
    z_NC, codebook_KC, bias_K, fast=fast
  )
  columns = min(_COLUMNS, max(_MIN_COLUMNS, pl.next_power_of_2(z_NW.shape[1])))
  z_NW = operands.filled(operands.filled(z_NW, _QUERIES), columns, axis=1)
  codebook_KW = operands.filled(codebook_KW, columns, axis=1)
  padded_queries, width = z_NW.shape
  rows, blocks = padded_queries // _QUERIES, codebook_KW.shape[0] // _CODES
  each = -(-blocks // max(1, min(blocks, _PROGRAMS // rows)))
  shares = -(-blocks // each)
  value_SN, index_SN = pl.pallas_call(
    functools.partial(_kernel, columns=columns, each=each),
    grid=(rows, shares),
    in_specs=[
      pl.BlockSpec((_QUERIES, width), lambda n, s: (n, 0)),
      pl.BlockSpec(codebook_KW.shape, lambda n, s: (0, 0)),
    ],
    out_specs=[pl.BlockSpec((None, _QUERIES), lambda n, s: (s, n))] * 2,
    out_shape=[
      jax.ShapeDtypeStruct((shares, padded_queries), jnp.float32),
      jax.ShapeDtypeStruct((shares, padded_queries), jnp.int32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="nearest_code",
  )(z_NW, codebook_KW)
  value_N = jnp.min(value_SN, axis=0)
  # Shares are in order, so the lowest index is the first share's.
  index_N = jnp.min(
    jnp.where(value_SN == value_N, index_SN, num_codes - 1), axis=0
  )
  index_N = jnp.minimum(index_N, num_codes - 1)
  return value_N[:num_queries], index_N[:num_queries]


def _kernel(z_ref, codebook_ref, value_ref, index_ref, *, columns, each):
  """Finds the best code of a block of queries in a share of the codes.

  Args:
    z_ref: bfloat16[queries, width].
    codebook_ref: bfloat16[K, width], all of it, in the GPU's memory.
    value_ref: float32[queries], the least bias - z.c.
    index_ref: int32[queries], the lowest row that has it.
    columns: of the operands that are multiplied at once.
    each: blocks of codes in a share.
  """
  num_codes, width = codebook_ref.shape
  shape = (z_ref.shape[0], _CODES)
  first = pl.program_id(1) * each

  def step(block, carry):
    best_nk, block_nk = carry
    codes = pl.ds(block * _CODES, _CODES)

    # A loop, not unrolled: each of its loads would get buffers of its own.
    def multiply(part, score_nk):
      here = pl.ds(part * columns, columns)
      return score_nk + lax.dot_general(
        z_ref[:, here],
        codebook_ref[codes, here],
        (((1,), (1,)), ((), ())),
        # Whatever jax_default_matmul_precision says: these are pieces already.
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
      )

    score_nk = lax.fori_loop(
      0, width // columns, multiply, jnp.zeros(shape, jnp.float32)
    )
    # NaN never wins.
    better_nk = score_nk > best_nk
    return (
      jnp.where(better_nk, score_nk, best_nk),
      jnp.where(better_nk, block, block_nk),
    )

  best_nk, block_nk = lax.fori_loop(
    first,
    jnp.minimum(first + each, num_codes // _CODES),
    step,
    (jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)),
  )
  lane_nk = lax.broadcasted_iota(jnp.int32, shape, 1)
  best_n = jnp.max(best_nk, axis=1)
  tied_nk = best_nk == best_n[:, None]
  index_nk = jnp.where(tied_nk, block_nk * _CODES + lane_nk, num_codes)
  value_ref[...] = -best_n
  index_ref[...] = jnp.min(index_nk, axis=1)
