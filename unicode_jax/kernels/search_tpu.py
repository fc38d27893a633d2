"""Nearest-code search as a Pallas kernel for TPUs.

Codes are the rows of a tile and queries its lanes. The matrix unit multiplies
a tile (`operands`), and a running best is kept in VMEM for every query and each
of a register's 8 sublanes:

  codes      tile = c' z'^T           best f32[8, queries]   row i32[8, queries]
  [0:8]      8 rows of scores    ->   max                    0 where it was more
  [8:16]     8 rows of scores    ->   max                    1 where it was more
  ...

So a score costs the vector unit three operations (a comparison, two selections)
and never leaves the registers; what is kept is 8 rows high, however many codes
there are, and the 8 are compared once, at the end. The codes' norms are columns
of the product where they fit into the depth that the matrix unit multiplies at
once; where they would cost it another pass they are subtracted, a fourth
operation.

`benchmarks/tpu_schedule.py` counts the instructions that this compiles to.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from unicode_jax.kernels import operands

_LANES, _SUBLANES = 128, 8
# Rows of bfloat16 in a register.
_PACKED = 16

# Queries and codes of a tile, by generation of the chip. What a tile costs
# beside its product (loading and storing the running best, starting the loop)
# is some 100 cycles, which should be little of the 2000-8000 of the product; a
# tile of this size is. More queries than codes, since a tile's codes are read
# from HBM for every block of queries; v5e and v5p would take the half of that.
# From 4096 lanes on registers spill.
_TILES = {4: (1024, 1024), 5: (1024, 2048), 6: (2048, 1024)}
_NEWEST = max(_TILES)
# Of VMEM, for operands; the compiler needs the rest.
_SHARE = 0.5


def search(z_NC, codebook_KC, bias_K, fast: bool):
  """Ranks codes, as a backend of `nearest_code`.

  Args:
    z_NC: float32 or bfloat16.
    codebook_KC: float32 or bfloat16, zeros where the bias is infinite.
    bias_K: float32.
    fast: whether only bfloat16 products are made.

  Returns:
    The least bias - z.c, float32[N], and the lowest row that has it, int32[N].
  """
  num_queries, dim = z_NC.shape
  num_codes = codebook_KC.shape[0]
  if not num_queries:
    return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)
  generation, depth, vmem = _chip()
  width, folded = _columns(
    operands.width(dim, z_NC.dtype, codebook_KC.dtype, fast), depth
  )
  queries, codes = _tile(generation, vmem, num_queries, num_codes, width)
  z_NC = _padded(z_NC, queries)
  codebook_KC = _padded(codebook_KC, codes)
  bias_K = _padded(bias_K, codes, jnp.inf)
  z_NW, codebook_KW = operands.ranking_operands(
    z_NC, codebook_KC, bias_K, fast=fast, with_bias=folded
  )
  inputs = [_widened(codebook_KW, width), _widened(z_NW, width).T]
  specs = [
    pl.BlockSpec((codes, width), lambda n, k: (k, 0)),
    pl.BlockSpec((width, queries), lambda n, k: (0, n)),
  ]
  if not folded:
    # Spread over the lanes here: in the kernel that costs more than to read it.
    bias_K = operands.finite_bias(bias_K)
    inputs.append(jnp.broadcast_to(bias_K[:, None], (len(bias_K), _LANES)))
    specs.append(pl.BlockSpec((codes, _LANES), lambda n, k: (k, 0)))
  padded_queries = z_NW.shape[0]
  best_sN, row_sN = pl.pallas_call(
    functools.partial(_kernel, folded=folded),
    grid=(padded_queries // queries, codebook_KW.shape[0] // codes),
    in_specs=specs,
    out_specs=[pl.BlockSpec((_SUBLANES, queries), lambda n, k: (0, n))] * 2,
    out_shape=[
      jax.ShapeDtypeStruct((_SUBLANES, padded_queries), jnp.float32),
      jax.ShapeDtypeStruct((_SUBLANES, padded_queries), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      # Cores of a chip share the queries; a block of them meets all codes.
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=int(0.75 * vmem),
    ),
    name="nearest_code",
  )(*inputs)
  best_N = jnp.max(best_sN, axis=0)
  index_sN = row_sN * _SUBLANES + jnp.arange(_SUBLANES)[:, None]
  index_N = jnp.min(
    jnp.where(best_sN == best_N, index_sN, num_codes - 1), axis=0
  )
  index_N = jnp.minimum(index_N, num_codes - 1)
  return -best_N[:num_queries], index_N[:num_queries]


def _kernel(codebook_ref, z_ref, *refs, folded):
  """Updates the running best of a block of queries with a block of codes.

  Args:
    codebook_ref: bfloat16[codes, width].
    z_ref: bfloat16[width, queries].
    *refs: float32[codes, 128], the bias, unless it is folded; then, kept from
      block to block of codes, float32[8, queries], the best scores, and
      int32[8, queries], which rows of 8 codes had them.
    folded: whether the product has the bias in it.
  """
  *bias_ref, best_ref, row_ref = refs
  block = pl.program_id(1)

  @pl.when(block == 0)
  def _():
    best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
    row_ref[...] = jnp.zeros_like(row_ref)

  score_kn = jnp.dot(
    codebook_ref[...], z_ref[...], preferred_element_type=jnp.float32
  )
  best_sn, row_sn = best_ref[...], row_ref[...]
  rows = codebook_ref.shape[0] // _SUBLANES
  for row in range(rows):
    here = slice(row * _SUBLANES, (row + 1) * _SUBLANES)
    score_sn = score_kn[here]
    if not folded:
      bias_sl = bias_ref[0][here]
      repeats = score_sn.shape[1] // _LANES
      score_sn = score_sn - jnp.concatenate([bias_sl] * repeats, axis=1)
    # Not "at least": the first of equals stays. NaN never wins.
    better_sn = score_sn > best_sn
    best_sn = jnp.where(better_sn, score_sn, best_sn)
    row_sn = jnp.where(better_sn, block * rows + row, row_sn)
  best_ref[...], row_ref[...] = best_sn, row_sn


def _chip() -> tuple[int, int, int]:
  """Returns generation, depth of a matrix unit's product, and bytes of VMEM.

  Of the device that is compiled for, as far as JAX knows it: with a topology's
  mesh set (`jax.set_mesh`) its own, else the default device. Where that is not
  a TPU, what all newer ones have.
  """
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return 5, 128, 64 * 2**20
  return info.generation, info.mxu_column_size, info.vmem_capacity_bytes


def _columns(width: int, depth: int) -> tuple[int, bool]:
  """Returns the columns of the operands, and whether the bias is in them."""
  folded = -(-(width + operands.PIECES) // depth) == -(-width // depth)
  return _round_up(width + operands.PIECES * folded, _PACKED), folded


def _tile(generation, vmem, num_queries, num_codes, width):
  """Returns queries and codes of a tile: as `_TILES`, or what fits."""
  queries, codes = _TILES.get(min(generation, _NEWEST), _TILES[4])
  # Operands are read ahead, hence twice, and a row takes whole lanes.
  row_bytes = 2 * 2 * _round_up(width, _LANES)
  while (queries + codes) * row_bytes > _SHARE * vmem:
    if max(queries, codes) == _LANES:
      break
    queries, codes = max(queries // 2, _LANES), max(codes // 2, _LANES)
  return _even(num_queries, queries, _LANES), _even(num_codes, codes, _PACKED)


def _even(size: int, block: int, multiple: int) -> int:
  """Returns the block that cuts `size` into equal parts, at most `block`."""
  return _round_up(-(-size // -(-size // block)), multiple)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _padded(x, block: int, fill=0.0):
  """Fills the first axis up to whole blocks."""
  pad = [(0, -x.shape[0] % block)] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, pad, constant_values=fill)


def _widened(x, width: int):
  """Fills the second axis up with zeros."""
  return jnp.pad(x, [(0, 0), (0, width - x.shape[1])])
