"""Nearest-code search as a Pallas kernel for GPUs, through Triton.

XLA's own path writes a tile of scores to memory and reads it again to find its
best. Here a program has a block of queries and walks over all codes: tensor
cores multiply (`operands`, the codes' norms among the columns), and the scores
meet the running best of their lane in registers:

  best f32[queries, lanes]    the best score of each lane so far
  block i32[queries, lanes]   which block of codes it came from

The lanes are compared once, at the end. Blocks follow each other in the order
of the codes, so that the lowest index wins ties.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from unicode_jax.kernels import operands

# Queries and codes of a tile. Scores, best and block fill 3 x 64 x 64 registers
# of 128 threads: 96 of the 255 that a thread may have.
_QUERIES, _CODES = 64, 64
# Columns that are multiplied at once; narrower operands take the next power of
# two, which Triton wants.
_COLUMNS, _MIN_COLUMNS = 64, 16
# Parts of the queries that stay in registers, 16 of them each.
_KEPT = 4
_WARPS, _STAGES = 4, 3


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
  codebook_KC = _padded(codebook_KC, (_CODES, 1))
  bias_K = jnp.pad(bias_K, (0, -num_codes % _CODES), constant_values=jnp.inf)
  z_NW, codebook_KW = operands.ranking_operands(
    z_NC, codebook_KC, bias_K, fast=fast
  )
  columns = min(_COLUMNS, max(_MIN_COLUMNS, pl.next_power_of_2(z_NW.shape[1])))
  z_NW = _padded(z_NW, (_QUERIES, columns))
  codebook_KW = _padded(codebook_KW, (1, columns))
  padded_queries, width = z_NW.shape
  value_N, index_N = pl.pallas_call(
    functools.partial(_kernel, columns=columns),
    grid=(padded_queries // _QUERIES,),
    in_specs=[
      pl.BlockSpec((_QUERIES, width), lambda n: (n, 0)),
      pl.BlockSpec(codebook_KW.shape, lambda n: (0, 0)),
    ],
    out_specs=[pl.BlockSpec((_QUERIES,), lambda n: (n,))] * 2,
    out_shape=[
      jax.ShapeDtypeStruct((padded_queries,), jnp.float32),
      jax.ShapeDtypeStruct((padded_queries,), jnp.int32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="nearest_code",
  )(z_NW, codebook_KW)
  index_N = jnp.minimum(index_N, num_codes - 1)
  return value_N[:num_queries], index_N[:num_queries]


def _kernel(z_ref, codebook_ref, value_ref, index_ref, *, columns):
  """Finds the best code of a block of queries.

  Args:
    z_ref: bfloat16[queries, width].
    codebook_ref: bfloat16[K, width], all of it, in the GPU's memory.
    value_ref: float32[queries], the least bias - z.c.
    index_ref: int32[queries], the lowest row that has it.
    columns: of the operands that are multiplied at once.
  """
  num_codes, width = codebook_ref.shape
  shape = (z_ref.shape[0], _CODES)
  parts = [pl.ds(start, columns) for start in range(0, width, columns)]
  kept = [z_ref[:, part] for part in parts[:_KEPT]]

  def step(block, carry):
    best_nk, block_nk = carry
    codes = pl.ds(block * _CODES, _CODES)
    score_nk = jnp.zeros(shape, jnp.float32)
    for number, part in enumerate(parts):
      z_nw = kept[number] if number < _KEPT else z_ref[:, part]
      score_nk += lax.dot_general(
        z_nw,
        codebook_ref[codes, part],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
    better_nk = score_nk > best_nk
    return (
      jnp.where(better_nk, score_nk, best_nk),
      jnp.where(better_nk, block, block_nk),
    )

  best_nk, block_nk = lax.fori_loop(
    0,
    num_codes // _CODES,
    step,
    (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)),
  )
  lane_nk = lax.broadcasted_iota(jnp.int32, shape, 1)
  best_n = jnp.max(best_nk, axis=1)
  tied_nk = best_nk == best_n[:, None]
  index_nk = jnp.where(tied_nk, block_nk * _CODES + lane_nk, num_codes)
  value_ref[...] = -best_n
  index_ref[...] = jnp.min(index_nk, axis=1)


def _padded(x, multiples):
  """Fills both axes up with zeros."""
  pad = [(0, -size % by) for size, by in zip(x.shape, multiples, strict=True)]
  return jnp.pad(x, pad)
