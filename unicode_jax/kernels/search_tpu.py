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

Operands of many columns are cut into parts, whose products add up in VMEM, and
split into their pieces there, so that HBM holds no wider copy of the codebook.

`benchmarks/tpu_schedule.py` counts the instructions that this compiles to. It
computes METHOD.md section 2's choice; the rules that all backends share are
`nearest_code`'s.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from unicode_jax.kernels import operands

_LANES, _SUBLANES = 128, 8
# Rows of bfloat16 in a register.
_PACKED = 16

# Queries and codes of a tile, by generation of the chip. What a tile costs
# beside its product (starting the loop, loading and storing the running best)
# is little of a product of this size, and it fits, with the scores where they
# are kept, into the VMEM of the generation.
_TILES = {4: (512, 512), 5: (1024, 2048), 6: (2048, 1024)}
# Operands of more columns than this are cut into parts of so many dimensions.
_WIDEST, _PART = 1536, 256
# What is assumed of a chip that is not known: generation, depth, VMEM.
_SMALLEST = 4, 128, 16 * 2**20


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
  queries, codes = _tile(generation, num_queries, num_codes)
  width, folded = _columns(
    operands.width(dim, z_NC.dtype, codebook_KC.dtype, fast), depth
  )
  in_parts = width > _WIDEST
  part = _round_up(min(dim, _PART), _PACKED) if in_parts else width
  # The codes' own columns are filled up, the queries' are their transpose's.
  z_NC = operands.filled(z_NC, queries)
  codebook_KC = operands.filled(codebook_KC, codes)
  bias_K = operands.filled(bias_K, codes, value=jnp.inf)
  products = ((0, 0),)
  if in_parts:
    folded = False
    products = operands.terms(z_NC.dtype, codebook_KC.dtype, fast)
    z_NW, codebook_KW = z_NC, codebook_KC
  else:
    z_NW, codebook_KW = operands.ranking_operands(
      z_NC, codebook_KC, bias_K, fast=fast, with_bias=folded
    )
  inputs = [
    operands.filled(codebook_KW, part, axis=1),
    operands.filled(z_NW, part, axis=1).T,
  ]
  padded_queries, parts = z_NW.shape[0], inputs[0].shape[1] // part
  specs = [
    pl.BlockSpec((codes, part), lambda n, k, w: (k, w)),
    pl.BlockSpec((part, queries), lambda n, k, w: (w, n)),
  ]
  if not folded:
    # Spread over the lanes here: in the kernel that costs more than to read it.
    bias_K = operands.finite_bias(bias_K)
    inputs.append(jnp.broadcast_to(bias_K[:, None], (len(bias_K), _LANES)))
    specs.append(pl.BlockSpec((codes, _LANES), lambda n, k, w: (k, 0)))
  best_sN, row_sN = pl.pallas_call(
    functools.partial(_kernel, products=products, folded=folded, parts=parts),
    grid=(padded_queries // queries, codebook_KW.shape[0] // codes, parts),
    in_specs=specs,
    out_specs=[pl.BlockSpec((_SUBLANES, queries), lambda n, k, w: (0, n))] * 2,
    out_shape=[
      jax.ShapeDtypeStruct((_SUBLANES, padded_queries), jnp.float32),
      jax.ShapeDtypeStruct((_SUBLANES, padded_queries), jnp.int32),
    ],
    scratch_shapes=[pltpu.VMEM((codes, queries), jnp.float32)] * (parts > 1),
    compiler_params=pltpu.CompilerParams(
      # Cores of a chip share the queries; a block of them meets all codes.
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=int(0.9 * vmem),
    ),
    name="nearest_code",
  )(*inputs)
  best_N = jnp.max(best_sN, axis=0)
  sublane_s1 = jnp.arange(_SUBLANES, dtype=jnp.int32)[:, None]
  index_sN = row_sN * _SUBLANES + sublane_s1
  index_N = jnp.min(
    jnp.where(best_sN == best_N, index_sN, num_codes - 1), axis=0
  )
  index_N = jnp.minimum(index_N, num_codes - 1)
  return -best_N[:num_queries], index_N[:num_queries]


def _kernel(codebook_ref, z_ref, *refs, products, folded, parts):
  """Updates the running best of a block of queries with a block of codes.

  Args:
    codebook_ref: [codes, part], bfloat16, or as it is to be split here.
    z_ref: [part, queries], likewise.
    *refs: float32[codes, 128], the bias, unless it is folded; then, kept from
      block to block of codes, float32[8, queries], the best scores, and
      int32[8, queries], which rows of 8 codes had them; then, of operands in
      parts, float32[codes, queries], the sum of their products so far.
    products: of pieces, as `operands.terms`.
    folded: whether the product has the bias in it.
    parts: of the operands.
  """
  bias_ref = None if folded else refs[0]
  best_ref, row_ref = refs[not folded : 2 + (not folded)]
  block, part = pl.program_id(1), pl.program_id(2)

  @pl.when((block == 0) & (part == 0))
  def _():
    best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, jnp.float32)
    row_ref[...] = jnp.zeros(row_ref.shape, jnp.int32)

  if parts == 1:
    score_kn = _product(codebook_ref, z_ref, products)
    _update(score_kn, block, bias_ref, best_ref, row_ref)
    return
  score_ref = refs[-1]

  @pl.when(part == 0)
  def _():
    score_ref[...] = jnp.zeros(score_ref.shape, jnp.float32)

  score_ref[...] += _product(codebook_ref, z_ref, products)

  @pl.when(part == parts - 1)
  def _():
    _update(score_ref, block, bias_ref, best_ref, row_ref)


def _product(codebook_ref, z_ref, products):
  """Multiplies as exactly as `products` say: float32[codes, queries]."""
  if len(products) == 1:
    split = (
      [codebook_ref[...].astype(jnp.bfloat16)],
      [z_ref[...].astype(jnp.bfloat16)],
    )
  else:
    split = [
      operands.pieces(ref[...], 1 + max(p[side] for p in products))
      for side, ref in ((1, codebook_ref), (0, z_ref))
    ]
  return sum(
    jnp.dot(
      split[0][j],
      split[1][i],
      # Whatever jax_default_matmul_precision says: these are pieces already.
      precision=lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
    )
    for i, j in reversed(products)
  )


def _update(score_kn, block, bias_ref, best_ref, row_ref):
  """Compares all rows of scores, 8 at a time, with the best so far."""
  best_sn, row_sn = best_ref[...], row_ref[...]
  rows = score_kn.shape[0] // _SUBLANES
  for row in range(rows):
    here = slice(row * _SUBLANES, (row + 1) * _SUBLANES)
    score_sn = score_kn[here]
    if bias_ref is not None:
      repeats = score_sn.shape[1] // _LANES
      score_sn = score_sn - jnp.concatenate([bias_ref[here]] * repeats, axis=1)
    # Not "at least": the first of equals stays. NaN never wins.
    better_sn = score_sn > best_sn
    best_sn = jnp.where(better_sn, score_sn, best_sn)
    row_sn = jnp.where(better_sn, block * rows + row, row_sn)
  best_ref[...], row_ref[...] = best_sn, row_sn


def _chip() -> tuple[int, int, int]:
  """Returns generation, depth of a matrix unit's product, and bytes of VMEM.

  Of the device that is compiled for, as far as JAX knows it: with a topology's
  mesh set (`jax.set_mesh`) its own, else the default device. Where that is not
  a TPU that is known, what is the least of all.
  """
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return _SMALLEST
  return info.generation, info.mxu_column_size, info.vmem_capacity_bytes


def _columns(width: int, depth: int) -> tuple[int, bool]:
  """Returns the columns of the operands, and whether the bias is in them."""
  folded = -(-(width + operands.PIECES) // depth) == -(-width // depth)
  return _round_up(width + operands.PIECES * folded, _PACKED), folded


def _tile(generation: int, num_queries: int, num_codes: int) -> tuple[int, int]:
  """Returns queries and codes of a tile."""
  known = min(max(generation, min(_TILES)), max(_TILES))
  queries, codes = _TILES[known]
  return _even(num_queries, queries, _LANES), _even(num_codes, codes, _PACKED)


def _even(size: int, block: int, multiple: int) -> int:
  """Returns the block that cuts `size` into equal parts, at most `block`."""
  return _round_up(-(-size // -(-size // block)), multiple)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
