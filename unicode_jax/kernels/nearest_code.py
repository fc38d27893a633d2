"""Nearest-code search, `argmin_k ||z - C_k||^2`, without the N x K matrix.

Every visual tokenizer (METHOD.md section 2) selects its codes here. The entry
point `nearest_code` settles what all backends share: the mask, ties, inputs
that are not finite, and the distances. A backend only ranks: it is a function

  search(z f32[N, C], codebook f32[K, C], bias f32[K], fast bool) -> int32[N]

that returns the lowest k among those that minimise `bias_k - z.C_k`, where
`bias_k` is ||C_k||^2 / 2, or infinity for a code that may not be chosen.
Another backend is another entry of `BACKENDS`.

Does not do: gradients (the choice has none), gains, residuals (`quantizer`).
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Queries and codes in a tile, so that its products and its running best, half a
# MiB each, stay in a CPU's cache.
_QUERY_BLOCK = 512
_CODE_BLOCK = 256


class NearestCode(NamedTuple):
  """What the search found.

  Attributes:
    indices: int32[N], the row of the codebook.
    distances: float32[N], squared Euclidean distance to that row.
  """

  indices: jax.Array
  distances: jax.Array


def nearest_code(
  z, codebook, mask=None, *, precision="exact", backend="auto"
) -> NearestCode:
  """Finds the nearest permitted code of every query.

  Of codes at equal distance the lowest index wins. No gradient passes. The
  distance is computed again from the chosen row, so it does not suffer from
  the cancellation that the ranking does.

  A query with a NaN or infinite entry gets the lowest permitted index and a
  distance of NaN: a valid id, and a visible error. A code with such an entry,
  or whose squared norm overflows, is never chosen. Where no code is left, an
  error that cannot be raised under `jit`, the index is -1 and the distance
  infinite.

  Args:
    z: float[N, C], the queries.
    codebook: float[K, C].
    mask: bool[K], True where a code may be chosen; None permits all.
    precision: "exact" ranks by float32 products, "fast" by products of
      bfloat16 operands summed in float32, which changes some of the choices.
    backend: a name in `BACKENDS`, or "auto" for the platform's best.

  Returns:
    A `NearestCode` of N entries.

  Raises:
    ValueError: on shapes that do not match, an unknown option, or a mask that
      permits nothing (checked wherever its value is known).
  """
  z, codebook = jnp.asarray(z), jnp.asarray(codebook)
  if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
    raise ValueError(
      f"z{list(z.shape)} and codebook{list(codebook.shape)} must be [N, C] "
      "and [K, C] with the same C: flatten the positions first."
    )
  if not codebook.shape[0]:
    raise ValueError("The codebook has no rows: it needs at least one.")
  if precision not in ("exact", "fast"):
    raise ValueError(
      f'precision={precision!r} is unknown: use "exact" or "fast".'
    )
  if backend != "auto" and backend not in BACKENDS:
    raise ValueError(
      f'backend={backend!r} is unknown: use "auto" or one of '
      f"{sorted(BACKENDS)}."
    )
  check_mask(mask, codebook.shape[0])
  if mask is None:
    mask = np.ones(codebook.shape[0], bool)
  name = "xla" if backend == "auto" else backend
  return _nearest_code(z, codebook, mask, precision == "fast", name)


def check_mask(mask, num_codes: int) -> None:
  """Checks the mask's shape, and that it permits a code if that is known.

  Args:
    mask: bool[K] or None.
    num_codes: K.

  Raises:
    ValueError: if the shape is another, or nothing is permitted.
  """
  if mask is None:
    return
  if mask.shape != (num_codes,) or mask.dtype != bool:
    raise ValueError(
      f"mask is {mask.dtype}{list(mask.shape)} but the codebook has "
      f"{num_codes} rows: it must be bool[{num_codes}]."
    )
  # A tracer has no value, and of another process's shards we see nothing.
  known = not isinstance(mask, jax.core.Tracer) and getattr(
    mask, "is_fully_addressable", True
  )
  if known and not np.asarray(mask).any():
    raise ValueError(
      f"The mask forbids all {num_codes} codes: permit at least one."
    )


@functools.partial(jax.jit, static_argnames=("fast", "backend"))
def _nearest_code(z, codebook, mask, fast, backend):
  """Brackets a backend's search with the rules that all of them share."""
  z_NC = lax.stop_gradient(z).astype(jnp.float32)
  codebook_KC = lax.stop_gradient(codebook).astype(jnp.float32)
  norm_K = jnp.sum(codebook_KC**2, axis=1)
  permitted_K = mask & jnp.isfinite(norm_K)
  # Zeros, because infinity - infinity would poison a lane of the search.
  codebook_KC = jnp.where(permitted_K[:, None], codebook_KC, 0.0)
  bias_K = jnp.where(permitted_K, norm_K / 2, jnp.inf)

  best_N = BACKENDS[backend](z_NC, codebook_KC, bias_K, fast)

  finite_N = jnp.all(jnp.isfinite(z_NC), axis=1)
  index_N = jnp.where(
    finite_N & permitted_K[best_N], best_N, jnp.argmax(permitted_K)
  ).astype(jnp.int32)
  distance_N = jnp.sum((z_NC - codebook_KC[index_N]) ** 2, axis=1)
  distance_N = jnp.where(finite_N, distance_N, jnp.nan)
  any_left = jnp.any(permitted_K)
  return NearestCode(
    jnp.where(any_left, index_N, -1),
    jnp.where(any_left, distance_N, jnp.inf),
  )


def _search_xla(z_NC, codebook_KC, bias_K, fast):
  """Searches in tiles, with the running best kept per lane.

  XLA's argmin is a variadic reduction, which does not vectorise on a CPU. So
  each lane of a tile keeps its own best value and the number of the block that
  it came from, by elementwise selects, and the lanes are compared once at the
  end. Blocks are strided (lane l of block i is row l * blocks + i), so that
  rows that are sharded over devices stay where they are.
  """
  num_queries, num_codes = z_NC.shape[0], codebook_KC.shape[0]
  if not num_queries:
    return jnp.zeros(0, jnp.int32)
  if fast:
    z_NC = z_NC.astype(jnp.bfloat16)
    codebook_KC = codebook_KC.astype(jnp.bfloat16)
  z_bnC = _strided_blocks(z_NC, _QUERY_BLOCK)
  codebook_bkC = _strided_blocks(codebook_KC, _CODE_BLOCK)
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
        precision=None if fast else lax.Precision.HIGHEST,
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
      (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)),
      (codebook_bkC, bias_bk, jnp.arange(num_blocks, dtype=jnp.int32)),
    )
    index_nk = lane_k * num_blocks + block_nk
    ties_nk = best_nk == jnp.min(best_nk, axis=1, keepdims=True)
    return jnp.min(jnp.where(ties_nk, index_nk, num_codes), axis=1)

  index_bn = lax.map(search_block, z_bnC)
  return jnp.minimum(index_bn.T.reshape(-1)[:num_queries], num_codes - 1)


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


# A name, and a function as the module's docstring describes it.
BACKENDS = {"xla": _search_xla}
