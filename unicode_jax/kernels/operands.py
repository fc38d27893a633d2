"""Operands whose plain bfloat16 product ranks codes as exactly as is wanted.

For METHOD.md section 2's search on matrix units, those of TPUs and GPUs, which
multiply bfloat16 and add in float32. A float32 number is the exact sum of three
bfloat16 pieces, so a float32 product is a sum of products of pieces; these, and
the codes' norms, become columns:

  z'  = [ z1 | z1 | z2 | z1 | z2 | z3 |  1 |  1 |  1 ]     bfloat16[N, W]
  c'  = [ c1 | c2 | c1 | c3 | c2 | c1 | -b1| -b2| -b3]     bfloat16[K, W]

  z'.c' = z.c - b      with b = ||c||^2 / 2

up to products of pieces that are 2^-24 of the whole (z2.c3 and smaller).
At the low `code_dim` of a visual codebook all this fits into the width that a
matrix unit multiplies at once, and exactness is free. It does not search.
"""

import jax
from jax import lax
import jax.numpy as jnp

PIECES = 3  # Of a float32: 3 x 8 bits of mantissa.
# The largest bfloat16; numbers beyond are cut down to it.
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)
# Stands for the infinite bias of a code that may not be chosen: its pieces are
# finite, so that it can be multiplied. Larger biases are not told apart.
_FORBIDDEN = 2.0**127


def pieces(x: jax.Array, count: int) -> list[jax.Array]:
  """Splits numbers into bfloat16 pieces that add up to them.

  Args:
    x: float32[...] or bfloat16[...].
    count: how many; `PIECES` lose nothing of a float32 of 1e-30 to 3.3e38.

  Returns:
    bfloat16[...] each, the largest first.
  """
  split = []
  rest = jnp.clip(x.astype(jnp.float32), -_LARGEST, _LARGEST)
  for _ in range(count):
    piece = _rounded(rest)
    split.append(piece.astype(jnp.bfloat16))
    rest = rest - piece
  return split


def _rounded(x):
  """Rounds float32 to the nearest that bfloat16 has, ties to even.

  By its bits: `astype` and back compilers may take for nothing, and Pallas has
  no `lax.reduce_precision`.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  odd = lax.shift_right_logical(bits, jnp.int32(16)) & 1
  return lax.bitcast_convert_type(
    (bits + (0x7FFF + odd)) & jnp.int32(-0x10000), jnp.float32
  )


def terms(z_dtype, codebook_dtype, fast: bool) -> list[tuple[int, int]]:
  """Names the products of pieces that matter.

  Args:
    z_dtype: float32 or bfloat16, which is one piece.
    codebook_dtype: likewise.
    fast: only the first pieces.

  Returns:
    (piece of z, piece of the codebook), each from 0, the largest first.
  """
  counts = [
    1 if fast or dtype == jnp.bfloat16 else PIECES
    for dtype in (z_dtype, codebook_dtype)
  ]
  return [
    (i, order - i)
    for order in range(PIECES)
    for i in range(order + 1)
    if i < counts[0] and order - i < counts[1]
  ]


def width(dim: int, z_dtype, codebook_dtype, fast: bool) -> int:
  """Returns W, without the columns of the bias."""
  return dim * len(terms(z_dtype, codebook_dtype, fast))


def ranking_operands(
  z: jax.Array,
  codebook: jax.Array,
  bias: jax.Array,
  *,
  fast: bool,
  with_bias: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Builds z' and c' of the module's docstring.

  Args:
    z: float32[N, C] or bfloat16[N, C].
    codebook: float32[K, C] or bfloat16[K, C], zeros where `bias` is infinite.
    bias: float32[K], infinite for a code that may not be chosen.
    fast: only the first pieces of z and codebook; the bias stays exact.
    with_bias: whether the columns of the bias are there.

  Returns:
    bfloat16[N, W] and bfloat16[K, W].
  """
  products = terms(z.dtype, codebook.dtype, fast)
  z_pieces = pieces(z, 1 + max(i for i, _ in products))
  c_pieces = pieces(codebook, 1 + max(j for _, j in products))
  left = [z_pieces[i] for i, _ in products]
  right = [c_pieces[j] for _, j in products]
  if with_bias:
    left.append(jnp.ones((z.shape[0], PIECES), jnp.bfloat16))
    right.append(jnp.stack(pieces(-finite_bias(bias), PIECES), axis=1))
  return jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=1)


def filled(x: jax.Array, multiple: int, axis: int = 0, value=0) -> jax.Array:
  """Fills an axis up to a multiple of a size."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = 0, -x.shape[axis] % multiple
  return jnp.pad(x, pad, constant_values=value)


def finite_bias(bias: jax.Array) -> jax.Array:
  """Replaces infinity by a number that loses every comparison all the same."""
  return jnp.minimum(bias, _FORBIDDEN)
