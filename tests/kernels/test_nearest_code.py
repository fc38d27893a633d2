"""Nearest-code search against float64, faiss, ties, masks and bad inputs.

Kernels for other platforms run interpreted, TPUs' with their memory and
transfers simulated, so that races are found too.
"""

import contextlib
import functools

from hypothesis import given, settings, strategies as st
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import quantizer
from unicode_jax.kernels import (
  nearest_code as nearest_code_lib,
  operands,
  search_gpu,
  search_tpu,
)
from unicode_jax.kernels.nearest_code import nearest_code, stacked_nearest_code

BACKENDS = ("xla", "pallas_tpu", "pallas_gpu")


@pytest.fixture(autouse=True, scope="module")
def interpreted_gpu():
  """Runs the GPU kernel without one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(
      nearest_code_lib.BACKENDS,
      "pallas_gpu",
      functools.partial(search_gpu.search, interpret=True),
    )
    yield


def find(backend, z, codebook, **options):
  """Searches with a backend, whatever the platform."""
  with interpreted(backend):
    found = nearest_code(z, codebook, backend=backend, **options)
    return jax.tree.map(np.asarray, found)


@contextlib.contextmanager
def interpreted(backend):
  """Runs the TPU kernel without one."""
  if backend != "pallas_tpu":
    yield
    return
  params = pltpu.InterpretParams(detect_races=True)
  with pltpu.force_tpu_interpret_mode(params):
    yield
  # JAX tells nobody else.
  assert not interpret_pallas_call.races.races_found


# Below, at and above the blocks; multiples of them, primes, and ones.
SHAPES = [
  (1, 1, 1),
  (1, 700, 4),
  (7, 3, 2),
  (513, 257, 3),
  (600, 1031, 2),
  (1024, 512, 8),
  (1031, 256, 5),
]


def distances(z, codebook):
  """Squared distances in float64, [N, K]."""
  difference = z[:, None].astype(np.float64) - codebook[None]
  return (difference**2).sum(-1)


def normal(*shapes, seed=0):
  """Draws float32 arrays."""
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lowest_index_wins_every_tie(shape, precision, backend):
  # Small integers: products are exact, and nearly every query has ties, within
  # blocks and between them.
  num_queries, num_codes, dim = shape
  rng = np.random.default_rng(1)
  z = rng.integers(-3, 4, (num_queries, dim)).astype(np.float32)
  codebook = rng.integers(-1, 2, (num_codes, dim)).astype(np.float32)
  mask = rng.random(num_codes) < 0.5
  mask[rng.integers(num_codes)] = True

  expected = distances(z, codebook)
  found = find(backend, z, codebook, precision=precision)
  np.testing.assert_array_equal(found.indices, expected.argmin(1))
  np.testing.assert_array_equal(found.distances, expected.min(1))

  expected[:, ~mask] = np.inf
  found = find(backend, z, codebook, valid=mask, precision=precision)
  np.testing.assert_array_equal(found.indices, expected.argmin(1))
  np.testing.assert_array_equal(found.distances, expected.min(1))


@settings(max_examples=20, deadline=None)
@given(
  num_queries=st.integers(1, 200),
  num_codes=st.integers(1, 600),
  dim=st.integers(1, 24),
  z_dtype=st.sampled_from([np.float32, jnp.bfloat16]),
  codebook_dtype=st.sampled_from([np.float32, jnp.bfloat16]),
  share=st.sampled_from([1.0, 0.5, 0.01]),
  seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_dtype_and_mask(
  backend, num_queries, num_codes, dim, z_dtype, codebook_dtype, share, seed
):
  # Small integers again, and many equal rows.
  rng = np.random.default_rng(seed)
  z = rng.integers(-3, 4, (num_queries, dim)).astype(np.float32)
  codebook = rng.integers(-2, 3, (num_codes, dim)).astype(np.float32)
  codebook = codebook[rng.integers(num_codes, size=num_codes)]
  valid = rng.random(num_codes) < share
  valid[rng.integers(num_codes)] = True
  expected = np.where(valid, distances(z, codebook), np.inf)
  found = find(
    backend,
    jnp.asarray(z, z_dtype),
    jnp.asarray(codebook, codebook_dtype),
    valid=valid,
  )
  np.testing.assert_array_equal(found.indices, expected.argmin(1))
  np.testing.assert_array_equal(found.distances, expected.min(1))


@settings(max_examples=15, deadline=None)
@given(
  dim=st.integers(1, 70),
  spread=st.floats(-7, 0).map(lambda power: 10**power),
  offset=st.sampled_from([0.0, 1.0, 30.0]),
  seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_adversarially_close(backend, dim, spread, offset, seed):
  """What is chosen is the nearest, up to float32 of the product's size."""
  rng = np.random.default_rng(seed)
  codebook = offset + rng.standard_normal((40, dim))
  codebook = np.repeat(codebook, 8, axis=0)
  codebook += spread * rng.standard_normal(codebook.shape)
  codebook = rng.permutation(codebook).astype(np.float32)
  z = (offset + rng.standard_normal((64, dim))).astype(np.float32)
  expected = distances(z, codebook)
  found = find(backend, z, codebook)
  chosen = expected[np.arange(64), found.indices]
  size = (
    np.linalg.norm(z, axis=1) + np.linalg.norm(codebook, axis=1).max()
  ) ** 2
  assert ((chosen - expected.min(1)) / size).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_far_apart_tie(backend):
  # Real numbers now: the same row must rank the same in every block and lane.
  z, codebook = normal((300, 24), (1500, 24))
  copies = np.concatenate([codebook, codebook[::-1], codebook])
  np.testing.assert_array_equal(
    find(backend, z, copies).indices, find(backend, z, codebook).indices
  )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [16, 256])
def test_exact_agrees_with_float64_and_fast_flips(dim, backend):
  z, codebook = normal((512, dim), (4000, dim), seed=2)
  expected = distances_by_product(z, codebook)
  exact = find(backend, z, codebook)
  np.testing.assert_array_equal(exact.indices, expected.argmin(1))
  np.testing.assert_allclose(exact.distances, expected.min(1), rtol=1e-5)

  fast = find(backend, z, codebook, precision="fast")
  agreement = np.mean(fast.indices == exact.indices)
  assert 0.95 < agreement < 1
  # Where it flips, it is told the true distance of what it chose.
  chosen = expected[np.arange(512), fast.indices]
  np.testing.assert_allclose(fast.distances, chosen, rtol=1e-5)


def distances_by_product(z, codebook):
  """As `distances`, for more dimensions."""
  z, codebook = z.astype(np.float64), codebook.astype(np.float64)
  squares = (z**2).sum(1)[:, None] + (codebook**2).sum(1)
  return squares - 2 * z @ codebook.T


def test_agrees_with_faiss():
  faiss = pytest.importorskip("faiss")
  z, codebook = normal((700, 32), (3001, 32), seed=3)
  index = faiss.IndexFlatL2(32)
  index.add(codebook)
  expected_distance, expected = index.search(z, 1)
  found = nearest_code(z, codebook)
  np.testing.assert_array_equal(found.indices, expected[:, 0])
  np.testing.assert_allclose(
    found.distances, expected_distance[:, 0], rtol=1e-4
  )


def test_distance_has_no_cancellation():
  codebook = normal((64, 8))[0] + 1000
  found = nearest_code(codebook, codebook)
  np.testing.assert_array_equal(found.distances, np.zeros(64))


def test_h9_masked_codes_are_never_chosen():
  codebook = normal((1000, 8))[0]
  mask = np.ones(1000, bool)
  mask[::3] = False
  # Every forbidden code is the exact nearest of a query.
  found = nearest_code(codebook, codebook, valid=mask)
  assert mask[found.indices].all()
  np.testing.assert_array_equal(
    np.flatnonzero(mask), np.asarray(found.indices)[mask]
  )


def test_h9_all_masked():
  z, codebook = normal((4, 3), (5, 3))
  nothing = np.zeros(5, bool)
  with pytest.raises(ValueError, match="forbids all 5"):
    nearest_code(z, codebook, valid=nothing)
  with pytest.raises(ValueError, match="forbids all 5"):
    jax.jit(lambda z: nearest_code(z, codebook, valid=nothing))(z)
  # Traced, it cannot raise: an id that no table has.
  found = jax.jit(nearest_code)(z, codebook, valid=nothing)
  np.testing.assert_array_equal(found.indices, [-1] * 4)
  np.testing.assert_array_equal(found.distances, [np.inf] * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_not_finite(backend):
  z, codebook = normal((6, 3), (9, 3))
  mask = np.arange(9) >= 2
  nearest_code = functools.partial(find, backend)
  clean = nearest_code(z, codebook, valid=mask)
  z[1, 0], z[3, 2], z[4, 1] = np.nan, np.inf, -np.inf
  found = nearest_code(z, codebook, valid=mask)
  bad = np.isin(np.arange(6), [1, 3, 4])
  np.testing.assert_array_equal(found.indices, np.where(bad, 2, clean.indices))
  np.testing.assert_array_equal(np.isnan(found.distances), bad)
  # A broken code is as good as masked.
  codebook[2], codebook[4, 0], codebook[5] = np.inf, np.nan, 1e30
  found = nearest_code(z[:1], codebook, valid=mask)
  rest = [3, 6, 7, 8]
  expected = rest[distances(z[:1], codebook[rest]).argmin()]
  np.testing.assert_array_equal(found.indices, [expected])
  # Products that overflow must not lead to a masked code.
  huge = nearest_code(np.full((1, 3), -1e38), np.full((9, 3), 1e18), valid=mask)
  assert huge.indices == 2
  # Also the code of a query that is not finite.
  assert nearest_code(z[1:2], codebook, valid=mask).indices == 3


def test_no_queries():
  found = nearest_code(np.zeros((0, 4)), np.ones((3, 4)))
  assert found.indices.shape == found.distances.shape == (0,)


def test_low_precision_inputs_give_float32_distances():
  z, codebook = (jnp.asarray(x, jnp.bfloat16) for x in normal((9, 4), (20, 4)))
  found = nearest_code(z, codebook)
  expected = distances(
    np.asarray(z, np.float32), np.asarray(codebook, np.float32)
  )
  assert found.distances.dtype == jnp.float32
  assert found.indices.dtype == jnp.int32
  np.testing.assert_array_equal(found.indices, expected.argmin(1))


def test_no_gradient_passes():
  z, codebook = normal((5, 4), (20, 4))
  gradients = jax.grad(
    lambda z, c: nearest_code(z, c).distances.sum(), argnums=(0, 1)
  )(z, codebook)
  assert not any(np.any(g) for g in gradients)


def test_never_builds_the_whole_matrix():
  num_queries, num_codes = 4096, 16384
  compiled = (
    jax.jit(nearest_code)
    .lower(
      jax.ShapeDtypeStruct((num_queries, 8), jnp.float32),
      jax.ShapeDtypeStruct((num_codes, 8), jnp.float32),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 4 * num_queries * num_codes / 20


@pytest.mark.parametrize(
  "arguments, options, message",
  [
    ((np.ones((2, 3)), np.ones((4, 5))), {}, "same C"),
    ((np.ones((2, 2, 3)), np.ones((4, 3))), {}, "flatten"),
    ((np.ones((2, 3)), np.ones((0, 3))), {}, "is empty"),
    ((np.ones((2, 0)), np.ones((4, 0))), {}, "is empty"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"valid": np.ones(3, bool)}, r"l\[4"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"valid": np.ones(4)}, "float64"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"precision": "half"}, "half"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"backend": "abacus"}, "abacus"),
  ],
)
def test_wrong_arguments(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    nearest_code(*arguments, **options)


def test_pieces_add_up_to_the_number():
  (x,) = normal((1000,))
  x = x * np.float32(10.0) ** np.arange(-20, 20).repeat(25).astype(np.float32)
  split = jax.jit(operands.pieces, static_argnums=1)(x, operands.PIECES)
  total = sum(np.asarray(piece, np.float64) for piece in split)
  np.testing.assert_array_equal(total, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_are_the_biased_products(backend):
  """Across devices the backends' values are what is compared."""
  z, codebook = normal((70, 130), (300, 130))
  bias = (codebook**2).sum(1) / 2
  bias[::7] = np.inf
  codebook[::7] = 0
  expected = bias.astype(np.float64) - z.astype(np.float64) @ codebook.T
  with interpreted(backend):
    value, index = nearest_code_lib.BACKENDS[backend](
      z, codebook, bias, fast=False
    )
  np.testing.assert_array_equal(index, expected.argmin(1))
  np.testing.assert_allclose(value, expected.min(1), rtol=1e-5, atol=1e-4)


@pytest.fixture
def small_tiles(monkeypatch):
  """Cuts everything into blocks, and wide operands into parts."""
  monkeypatch.setattr(search_tpu, "_TILES", {4: (128, 32), 5: (128, 32)})
  monkeypatch.setattr(search_tpu, "_WIDEST", 64)
  monkeypatch.setattr(search_tpu, "_PART", 16)
  monkeypatch.setattr(search_gpu, "_COLUMNS", 16)
  monkeypatch.setattr(search_gpu, "_PROGRAMS", 9)
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dim", [3, 40, 130])
@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_ties_across_tiles_and_parts(backend, dim, fast):
  rng = np.random.default_rng(1)
  z = rng.integers(-3, 4, (300, dim)).astype(np.float32)
  codebook = rng.integers(-1, 2, (40, dim)).astype(np.float32)
  codebook = codebook[rng.integers(40, size=333)]
  valid = rng.random(333) < 0.5
  expected = np.where(valid, distances(z, codebook), np.inf)
  found = find(
    backend, z, codebook, valid=valid, precision="fast" if fast else "exact"
  )
  np.testing.assert_array_equal(found.indices, expected.argmin(1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_parts_are_exact(backend):
  z, codebook = normal((100, 150), (500, 150), seed=4)
  expected = distances_by_product(z, codebook)
  found = find(backend, z, codebook)
  np.testing.assert_array_equal(found.indices, expected.argmin(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1, 4])
def test_stacked_against_float64(depth, backend):
  z, codebook = normal((100, 12), (400, 12), seed=5)
  gains = np.linspace(1.0, 0.3, depth).astype(np.float32)
  valid = np.arange(400) % 3 > 0
  left = z.astype(np.float64)
  indices, energies = [], []
  for gain in gains.astype(np.float64):
    expected = np.where(valid, distances(left / gain, codebook), np.inf)
    indices.append(expected.argmin(1))
    left = left - gain * codebook[indices[-1]]
    energies.append((left**2).sum(1))
  with interpreted(backend):
    found = stacked_nearest_code(
      z, codebook, gains, valid=valid, backend=backend
    )
  np.testing.assert_array_equal(found.indices, np.stack(indices, 1))
  np.testing.assert_allclose(found.distances, np.stack(energies, 1), rtol=1e-4)


def test_stacked_is_what_the_quantizer_chooses():
  z, table = normal((2, 4, 4, 7), (50, 7))
  gain = np.array([1.2, 0.6, 0.4], np.float32)
  expected = quantizer.quantize(z, table, gain, None, kind="rq", depth=3).codes
  found = stacked_nearest_code(z.reshape(-1, 7), table, gain)
  np.testing.assert_array_equal(found.indices.reshape(2, 4, 4, 3), expected)


@pytest.mark.parametrize(
  "gains", [np.ones((2, 1)), np.zeros(2), -np.ones(1), [np.inf, 1.0], []]
)
def test_stacked_wrong_gains(gains):
  with pytest.raises(ValueError, match="positive numbers"):
    stacked_nearest_code(np.ones((2, 3)), np.ones((4, 3)), gains)


def lowered(backend, platform, dim, dtype=jnp.float32):
  """Returns a search's program for a platform that is not here."""
  search = jax.jit(functools.partial(nearest_code, backend=backend))
  shapes = (
    jax.ShapeDtypeStruct((2048, dim), dtype),
    jax.ShapeDtypeStruct((4096, dim), dtype),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(nearest_code_lib.BACKENDS, "pallas_gpu", search_gpu.search)
    return search.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dim", [6, 64, 300])
def test_each_platform_gets_its_kernel(dim, dtype):
  lower = functools.partial(lowered, dim=dim, dtype=dtype)
  assert "tpu_custom_call" in lower("auto", "tpu")
  assert "tpu_custom_call" not in lower("auto", "cpu")
  # Down to Triton's own code, which its verifier has read.
  assert "gpu.triton" in lower("pallas_gpu", "cuda")


def test_settings_of_the_user_do_not_matter():
  """Precision is the search's own, and wide types stay outside."""
  with jax.default_matmul_precision("highest"):
    assert "fp32" not in lowered("pallas_tpu", "tpu", 6)
  z, codebook = normal((20, 4), (30, 4))
  expected = nearest_code(z, codebook)
  with jax.enable_x64(True):
    found = nearest_code(z, codebook)
    assert found.indices.dtype == jnp.int32
    assert found.distances.dtype == jnp.float32
    for backend in BACKENDS[1:]:
      again = find(backend, z, codebook)
      np.testing.assert_array_equal(again.indices, expected.indices)
  np.testing.assert_array_equal(found.indices, expected.indices)


def test_inside_a_shard_map():
  z, codebook = normal((20, 4), (30, 4))
  expected = nearest_code(z, codebook)
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec()
  found = jax.shard_map(
    nearest_code,
    mesh=mesh,
    in_specs=(spec, spec),
    out_specs=spec,
    check_vma=False,
  )(z, codebook)
  np.testing.assert_array_equal(found.indices, expected.indices)
