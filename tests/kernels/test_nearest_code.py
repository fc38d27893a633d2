"""Nearest-code search against float64, faiss, ties, masks and bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.kernels.nearest_code import BACKENDS, nearest_code

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


@pytest.mark.parametrize("backend", sorted(BACKENDS))
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
  found = nearest_code(z, codebook, precision=precision, backend=backend)
  np.testing.assert_array_equal(found.indices, expected.argmin(1))
  np.testing.assert_array_equal(found.distances, expected.min(1))

  expected[:, ~mask] = np.inf
  found = nearest_code(z, codebook, mask, precision=precision, backend=backend)
  np.testing.assert_array_equal(found.indices, expected.argmin(1))
  np.testing.assert_array_equal(found.distances, expected.min(1))


def test_equal_rows_far_apart_tie():
  # Real numbers now: the same row must rank the same in every block and lane.
  z, codebook = normal((300, 24), (1500, 24))
  copies = np.concatenate([codebook, codebook[::-1], codebook])
  np.testing.assert_array_equal(
    nearest_code(z, copies).indices, nearest_code(z, codebook).indices
  )


@pytest.mark.parametrize("dim", [16, 256])
def test_exact_agrees_with_float64_and_fast_flips(dim):
  z, codebook = normal((512, dim), (4000, dim), seed=2)
  expected = distances_by_product(z, codebook)
  exact = nearest_code(z, codebook)
  np.testing.assert_array_equal(exact.indices, expected.argmin(1))
  np.testing.assert_allclose(exact.distances, expected.min(1), rtol=1e-5)

  fast = nearest_code(z, codebook, precision="fast")
  agreement = np.mean(np.asarray(fast.indices) == np.asarray(exact.indices))
  assert 0.95 < agreement < 1
  # Where it flips, it is told the true distance of what it chose.
  chosen = expected[np.arange(512), np.asarray(fast.indices)]
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
  found = nearest_code(codebook, codebook, mask)
  assert mask[found.indices].all()
  np.testing.assert_array_equal(
    np.flatnonzero(mask), np.asarray(found.indices)[mask]
  )


def test_h9_all_masked():
  z, codebook = normal((4, 3), (5, 3))
  nothing = np.zeros(5, bool)
  with pytest.raises(ValueError, match="forbids all 5"):
    nearest_code(z, codebook, nothing)
  with pytest.raises(ValueError, match="forbids all 5"):
    jax.jit(lambda z: nearest_code(z, codebook, nothing))(z)
  # Traced, it cannot raise: an id that no table has.
  found = jax.jit(nearest_code)(z, codebook, nothing)
  np.testing.assert_array_equal(found.indices, [-1] * 4)
  np.testing.assert_array_equal(found.distances, [np.inf] * 4)


def test_inputs_that_are_not_finite():
  z, codebook = normal((6, 3), (9, 3))
  mask = np.arange(9) >= 2
  clean = nearest_code(z, codebook, mask)
  z[1, 0], z[3, 2], z[4, 1] = np.nan, np.inf, -np.inf
  found = nearest_code(z, codebook, mask)
  bad = np.isin(np.arange(6), [1, 3, 4])
  np.testing.assert_array_equal(found.indices, np.where(bad, 2, clean.indices))
  np.testing.assert_array_equal(np.isnan(found.distances), bad)
  # A broken code is as good as masked.
  codebook[2], codebook[4, 0], codebook[5] = np.inf, np.nan, 1e30
  found = nearest_code(z[:1], codebook, mask)
  rest = [3, 6, 7, 8]
  expected = rest[distances(z[:1], codebook[rest]).argmin()]
  np.testing.assert_array_equal(found.indices, [expected])
  # Products that overflow must not lead to a masked code.
  huge = nearest_code(np.full((1, 3), -1e38), np.full((9, 3), 1e18), mask)
  assert huge.indices == 2
  # Also the code of a query that is not finite.
  assert nearest_code(z[1:2], codebook, mask).indices == 3


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
    ((np.ones((2, 3)), np.ones((0, 3))), {}, "no rows"),
    ((np.ones((2, 3)), np.ones((4, 3)), np.ones(3, bool)), {}, r"bool\[4"),
    ((np.ones((2, 3)), np.ones((4, 3)), np.ones(4)), {}, "float64"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"precision": "half"}, "half"),
    ((np.ones((2, 3)), np.ones((4, 3))), {"backend": "abacus"}, "abacus"),
  ],
)
def test_wrong_arguments(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    nearest_code(*arguments, **options)
