"""Nearest-code search, `argmin_k ||z - C_k||^2`, without the N x K matrix.

Every visual tokenizer (METHOD.md section 2) selects its codes here. The entry
point `nearest_code` settles what all backends share: the codes that may be
chosen, ties, inputs that are not finite, the distances, and devices. A backend
only ranks: it is a function

  search(z[N, C], codebook[K, C], bias f32[K], fast bool) -> f32[N], int32[N]

that returns the least `bias_k - z.C_k` and the lowest k that has it, where
`bias_k` is ||C_k||^2 / 2, or infinity for a code that may not be chosen.
Another backend is another entry of `BACKENDS`.

Does not do: gradients (the choice has none), gains or their fit (`quantizer`).
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np

from unicode_jax import sharding
from unicode_jax.kernels import operands, search_xla


class NearestCode(NamedTuple):
  """What the search found.

  Attributes:
    indices: int32[N], the row of the codebook.
    distances: float32[N], squared Euclidean distance to that row.
  """

  indices: jax.Array
  distances: jax.Array


def nearest_code(
  z, codebook, *, valid=None, precision="exact", backend="auto"
) -> NearestCode:
  """Finds the nearest valid code of every query.

  Of codes at equal distance the lowest index wins. No gradient passes. The
  distance is computed again from the chosen row, so it does not suffer from
  the cancellation that the ranking does.

  A query with a NaN or infinite entry gets the lowest valid index and a
  distance of NaN: a valid id, and a visible error. A code with such an entry,
  or whose squared norm overflows, is never chosen. Where no code is left, an
  error that cannot be raised under `jit`, the index is -1 and the distance
  infinite.

  "exact" is exact as a float32 product is: of codes whose squared distances to
  a query differ by less than 1e-6 of (||z|| + ||c||)^2, either may be chosen.

  On several devices set the mesh (`jax.set_mesh`; its axes must be `Auto`): TPU
  kernels cannot be split otherwise. Queries are then split over its axes `data`
  and `fsdp` and codes over `tensor`, as far as it has them: each device
  searches its own codes, and the best of all are compared. Inside
  `jax.shard_map` a call searches what its device has, and needs
  `check_vma=False`.

  Args:
    z: float32[N, C] or bfloat16[N, C], the queries; other types are rounded to
      float32.
    codebook: float32[K, C] or bfloat16[K, C]; likewise.
    valid: bool[K], True where a code may be chosen; None permits all.
    precision: "exact" ranks as float32 products do, "fast" by products of
      bfloat16 operands summed in float32, which changes some of the choices.
    backend: "auto", "xla", "pallas_tpu" or "pallas_gpu" (on such devices only);
      "auto" takes the kernel on TPUs, and plain XLA elsewhere, on GPUs too:
      their kernel was never timed.

  Returns:
    A `NearestCode` of N entries.

  Raises:
    ValueError: on shapes that do not match, an unknown option, a mesh with
      other axes than `Auto` ones, or `valid` that permits nothing (checked
      wherever its value is known).
  """
  z, codebook = _floating(z), _floating(codebook)
  if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
    raise ValueError(
      f"z{list(z.shape)} and codebook{list(codebook.shape)} must be [N, C] "
      "and [K, C] with the same C: flatten the positions first."
    )
  if not codebook.size:
    raise ValueError(
      f"codebook{list(codebook.shape)} is empty: it needs a row and a column."
    )
  if precision not in ("exact", "fast"):
    raise ValueError(
      f'precision={precision!r} is unknown: use "exact" or "fast".'
    )
  if backend not in BACKENDS:
    raise ValueError(
      f"backend={backend!r} is unknown: use one of {sorted(BACKENDS)}."
    )
  if valid is None:
    valid = np.ones(codebook.shape[0], bool)
  elif not isinstance(valid, jax.Array):
    valid = np.asarray(valid)
  check_valid(valid, codebook.shape[0])
  search = BACKENDS[backend]
  return _nearest_code(z, codebook, valid, precision == "fast", search, _mesh())


def stacked_nearest_code(
  z, codebook, gains, *, valid=None, precision="exact", backend="auto"
) -> NearestCode:
  """Finds the codes of every query, each for what the ones before left over.

  The residual search of RQ-VAE (arXiv 2203.01941, section 3.1) over one table:
  at depth d the code nearest to r / g_d, after which g_d C_k is taken away. The
  search alone, with gains that are known; `quantizer.quantize` also fits them,
  pools, and keeps losses and statistics.

  Args:
    z: float32[N, C] or bfloat16[N, C], the queries.
    codebook: float32[K, C] or bfloat16[K, C], for every depth.
    gains: float32[D], positive; ones for none.
    valid: as in `nearest_code`.
    precision: as in `nearest_code`.
    backend: as in `nearest_code`.

  Returns:
    A `NearestCode` with indices int32[N, D] and distances float32[N, D]: the
    squared length of what is left after each depth.

  Raises:
    ValueError: as `nearest_code`, or on gains that are no vector, or not
      positive numbers (where their values are known).
  """
  gains = jnp.asarray(gains, jnp.float32)
  good = gains.ndim == 1 and gains.size > 0
  if good and not isinstance(gains, jax.core.Tracer):
    good = bool(jnp.all((gains > 0) & jnp.isfinite(gains)))
  if not good:
    raise ValueError(
      f"gains={gains} must be a vector of positive numbers, one per depth."
    )
  left = lax.stop_gradient(_floating(z)).astype(jnp.float32)
  rows = lax.stop_gradient(_floating(codebook)).astype(jnp.float32)
  indices, distances = [], []
  for gain in gains:
    found = nearest_code(
      left / gain, codebook, valid=valid, precision=precision, backend=backend
    )
    left = left - gain * rows[found.indices]
    indices.append(found.indices)
    distances.append(gain**2 * found.distances)
  return NearestCode(jnp.stack(indices, 1), jnp.stack(distances, 1))


def check_valid(valid, num_codes: int) -> None:
  """Checks the shape of `valid`, and that it permits a code if that is known.

  Args:
    valid: bool[K] or None.
    num_codes: K.

  Raises:
    ValueError: if the shape is another, or nothing is permitted.
  """
  if valid is None:
    return
  if valid.shape != (num_codes,) or valid.dtype != bool:
    raise ValueError(
      f"valid is {valid.dtype}{list(valid.shape)} but the codebook has "
      f"{num_codes} rows: it must be bool[{num_codes}]."
    )
  # A tracer has no value, and of another process's shards we see nothing.
  known = not isinstance(valid, jax.core.Tracer) and getattr(
    valid, "is_fully_addressable", True
  )
  if known and not np.asarray(valid).any():
    raise ValueError(
      f"valid forbids all {num_codes} codes: permit at least one."
    )


def _floating(x):
  """Returns an array of float32 or bfloat16."""
  x = jnp.asarray(x)
  return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("fast", "search", "mesh"))
def _nearest_code(z, codebook, valid, fast, search, mesh):
  """Brackets a backend's search with the rules that all of them share."""
  z_NC, codebook_KC = lax.stop_gradient((z, codebook))
  norm_K = jnp.sum(codebook_KC.astype(jnp.float32) ** 2, axis=1)
  permitted_K = valid & jnp.isfinite(norm_K)
  # Zeros, because infinity - infinity would poison a lane of the search.
  codebook_KC = jnp.where(permitted_K[:, None], codebook_KC, 0)
  bias_K = jnp.where(permitted_K, norm_K / 2, jnp.inf)

  search = functools.partial(search, fast=fast)
  if mesh is None:
    _, best_N = search(z_NC, codebook_KC, bias_K)
  else:
    best_N = _search_sharded(search, z_NC, codebook_KC, bias_K, mesh)

  finite_N = jnp.all(jnp.isfinite(z_NC), axis=1)
  index_N = jnp.where(
    finite_N & permitted_K[best_N], best_N, jnp.argmax(permitted_K)
  ).astype(jnp.int32)
  difference_NC = z_NC.astype(jnp.float32) - codebook_KC[index_N]
  distance_N = jnp.sum(difference_NC**2, axis=1)
  distance_N = jnp.where(finite_N, distance_N, jnp.nan)
  any_left = jnp.any(permitted_K)
  return NearestCode(
    jnp.where(any_left, index_N, -1),
    jnp.where(any_left, distance_N, jnp.inf),
  )


def _mesh():
  """Returns the mesh that is set, if there is work to share."""
  mesh = sharding.active_mesh()
  if mesh is not None and set(mesh.axis_types) != {AxisType.Auto}:
    raise ValueError(
      f"The mesh that is set has axes of types {mesh.axis_types}: make it with "
      "axis_types=(jax.sharding.AxisType.Auto,) * number of axes."
    )
  return mesh


def _search_sharded(search, z_NC, codebook_KC, bias_K, mesh):
  """Searches where queries and codes are, and compares the devices' best."""
  batch = tuple(a for a in sharding.BATCH_AXES if a in mesh.axis_names)
  codes = sharding.CODE_AXIS if sharding.CODE_AXIS in mesh.axis_names else None
  batch_shards = sharding.num_batch_shards(mesh)
  code_shards = mesh.shape[codes] if codes else 1
  num_queries, num_codes = z_NC.shape[0], codebook_KC.shape[0]

  def local(z_nC, codebook_kC, bias_k):
    value_n, index_n = search(z_nC, codebook_kC, bias_k)
    if not codes:
      return index_n
    index_n += lax.axis_index(codes) * bias_k.shape[0]
    best_n = lax.pmin(value_n, codes)
    return lax.pmin(jnp.where(value_n == best_n, index_n, num_codes), codes)

  rows, columns = PartitionSpec(batch), PartitionSpec(codes)
  index_N = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, columns, columns),
    out_specs=rows,
    check_vma=False,
  )(
    operands.filled(z_NC, batch_shards),
    operands.filled(codebook_KC, code_shards),
    operands.filled(bias_K, code_shards, value=jnp.inf),
  )
  return jnp.minimum(index_N[:num_queries], num_codes - 1)


def _search_auto(z_NC, codebook_KC, bias_K, fast):
  """Takes the platform's best when it is known, at compilation."""
  return lax.platform_dependent(
    z_NC,
    codebook_KC,
    bias_K,
    tpu=functools.partial(_search_tpu, fast=fast),
    default=functools.partial(search_xla.search, fast=fast),
  )


def _search_tpu(z_NC, codebook_KC, bias_K, fast):
  # At the first search, so that commands without one start sooner.
  from unicode_jax.kernels import search_tpu

  return search_tpu.search(z_NC, codebook_KC, bias_K, fast)


def _search_gpu(z_NC, codebook_KC, bias_K, fast):
  from unicode_jax.kernels import search_gpu

  return search_gpu.search(z_NC, codebook_KC, bias_K, fast)


# A name, and a function as the module's docstring describes it.
BACKENDS = {
  "auto": _search_auto,
  "xla": search_xla.search,
  "pallas_tpu": _search_tpu,
  "pallas_gpu": _search_gpu,
}
