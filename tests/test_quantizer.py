"""Quantizers against numpy, vector-quantize-pytorch and hand computation."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import codebook, quantizer

KIND_DEPTH = [("vq", 1), ("rq", 3), ("hq", 5)]

quantize = jax.jit(quantizer.quantize, static_argnames=("kind", "depth"))


def draw(*shapes, seed=0):
  """Draws float32 arrays."""
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def reference(z, table, gain, mask, kind, depth):
  """Quantizes position by position in float64.

  Returns codes, partial sums, the assigned r / g per depth and code, and the
  least-squares gains.
  """
  z, table = z.astype(np.float64), table.astype(np.float64)
  batch, height, width, _ = z.shape
  factor = 2 if kind == "hq" else 1
  codes = np.zeros((batch, height // factor, width // factor, depth), int)
  partial = np.zeros((depth, *z.shape))
  sums = np.zeros((depth, *table.shape))
  over, under = np.zeros(depth), np.zeros(depth)
  for b, i, j in np.ndindex(codes.shape[:3]):
    cell = np.s_[
      b, factor * i : factor * (i + 1), factor * j : factor * j + factor
    ]
    total = np.zeros_like(z[cell])
    for d in range(depth):
      if kind != "hq":
        place = np.s_[0, 0]
      elif d == 0:
        place = np.s_[:, :]
      else:
        place = [np.s_[0, 0], np.s_[0, 1], np.s_[1, 0], np.s_[1, 1]][d - 1]
      r = (z[cell] - total)[place].reshape(-1, z.shape[-1]).mean(0)
      distance = ((r / gain[d] - table) ** 2).sum(1)
      distance[~mask] = np.inf
      k = distance.argmin()
      total[place] += gain[d] * table[k]
      codes[b, i, j, d] = k
      partial[(d, *cell)] = total
      sums[d, k] += r / gain[d]
      over[d] += r @ table[k]
      under[d] += table[k] @ table[k]
  return codes, partial, sums, over / under


@pytest.mark.parametrize(
  "kind, depth, cosine",
  [("vq", 1, False), ("rq", 3, False), ("rq", 3, True), ("hq", 5, True)],
)
def test_against_numpy(kind, depth, cosine):
  z, table = draw((2, 4, 6, 7), (50, 7))
  table = unit(table) if cosine else table
  gain = np.linspace(1.5, 0.4, depth).astype(np.float32)
  mask = np.arange(50) % 5 > 0
  codes, partial, sums, fit = reference(z, table, gain, mask, kind, depth)
  found = jax.jit(quantizer.quantize, static_argnames=("kind", "depth"))(
    z, table, gain, mask, kind=kind, depth=depth
  )
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_allclose(found.partial, partial, atol=1e-5)
  np.testing.assert_array_equal(found.quantized, found.partial[-1])
  np.testing.assert_allclose(found.sums, sums.sum(0), atol=1e-4)
  np.testing.assert_allclose(found.gain_fit, fit, rtol=1e-4)
  counts = [
    np.bincount(codes[..., d].ravel(), minlength=50) for d in range(depth)
  ]
  np.testing.assert_array_equal(found.counts, counts)
  error = ((z - partial) ** 2).sum((1, 2, 3, 4))
  np.testing.assert_allclose(
    found.residual_energy, error / (z**2).sum(), rtol=1e-4
  )
  # Of "hq" the levels count, not the positions one after another.
  levels = [0, -1] if kind == "hq" else slice(None)
  loss = error[levels].mean() / z.size
  np.testing.assert_allclose(found.commitment_loss, loss, rtol=1e-4)
  np.testing.assert_allclose(found.codebook_loss, loss, rtol=1e-4)
  for d in range(1, depth + 1):
    features = quantizer.dequantize(
      found.codes, table, gain, kind=kind, depth=d
    )
    np.testing.assert_allclose(features, found.partial[d - 1], atol=1e-6)
  np.testing.assert_array_equal(
    quantizer.dequantize(found.codes, table, gain, kind=kind), features
  )


def test_codes_of_vector_quantize_pytorch():
  torch = pytest.importorskip("torch")
  peer = pytest.importorskip("vector_quantize_pytorch")
  z, table = draw((2, 5, 5, 8), (64, 8), seed=1)
  module = peer.ResidualVQ(
    dim=8, codebook_size=64, num_quantizers=4, shared_codebook=True
  ).eval()
  for layer in module.layers:
    layer._codebook.embed.data.copy_(torch.tensor(table)[None])
  with torch.no_grad():
    quantized, codes, _ = module(torch.tensor(z).reshape(2, 25, 8))
  found = quantize(z, table, jnp.ones(4), None, kind="rq", depth=4)
  np.testing.assert_array_equal(found.codes.reshape(2, 25, 4), codes.numpy())
  np.testing.assert_allclose(
    found.quantized.reshape(2, 25, 8), quantized.numpy(), atol=1e-5
  )


@pytest.mark.parametrize("kind, depth", [("rq", 4), ("hq", 5)])
def test_h2_energy_falls_at_every_depth(kind, depth):
  # Rows of one length in many dimensions, and inputs of another scale: the
  # unscaled table adds energy, and so would unit rows without a gain.
  num_codes, dim = 512, 128
  z, rows = draw((4, 8, 8, dim), (num_codes, dim), seed=2)
  z *= 0.05
  valid = np.ones(num_codes, bool)
  raw = quantize(
    z, rows, jnp.ones(depth), valid, kind=kind, depth=depth
  ).residual_energy
  assert raw[0] > 1 and raw[-1] > 1

  config = codebook.CodebookConfig(code_dim=dim, depth=depth)
  params, state = codebook.init_codebook(jax.random.key(0), rows, valid, config)
  table = codebook.codebook_table(params, state, rows, valid, config)

  def energy(z, gain):
    found = quantize(z, table, gain, valid, kind=kind, depth=depth)
    return found, np.concatenate([[1], found.residual_energy])

  found, first = energy(z, state["gain"])
  assert (np.diff(first) < 0).all(), first
  # The batch's own fit becomes the gain, and then is what is used.
  state = codebook.fit_gain(state, found.gain_fit, config)
  again, second = energy(z, state["gain"])
  np.testing.assert_array_equal(again.codes, found.codes)
  np.testing.assert_allclose(again.gain_fit, state["gain"], rtol=1e-4)
  np.testing.assert_allclose(second, first, rtol=1e-5)
  # And it holds for inputs that it was not fitted to.
  unseen = 0.05 * draw(z.shape, seed=3)[0]
  assert (np.diff(energy(unseen, state["gain"])[1]) < 0).all()


def test_fit_minimises_the_energy():
  z, table = draw((2, 4, 4, 6), (30, 6), seed=4)
  table = unit(table)

  def left(gain):
    found = quantize(z, table, jnp.array([gain]), None, kind="vq", depth=1)
    return found.residual_energy[0], found.gain_fit[0]

  _, best = left(1.0)
  assert left(best)[0] < min(left(0.95 * best)[0], left(1.05 * best)[0])


def test_h6_gradients_by_hand():
  # One position, two depths, three codes; everything below was done on paper.
  #   r_0 = (1, 2); with g_1 = 2: r_0 / g_1 = (0.5, 1) -> code 1 = (0, 1)
  #   partial_1 = (0, 2), r_1 = (1, 0)
  #   with g_2 = 0.5: r_1 / g_2 = (2, 0) -> code 2 = (3, 0)
  #   partial_2 = (1.5, 2), r_2 = (-0.5, 0)
  z = jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)
  table = jnp.array([[-1.0, -1.0], [0.0, 1.0], [3.0, 0.0]])
  gain = jnp.array([2.0, 0.5])

  def losses(z, table):
    found = quantize(z, table, gain, None, kind="rq", depth=2)
    return found.commitment_loss, found.codebook_loss, found

  commitment, codebook_loss, found = losses(z, table)
  np.testing.assert_array_equal(found.codes.ravel(), [1, 2])
  # ((1^2 + 0^2) + (0.5^2 + 0^2)) / (2 depths * 2 entries)
  np.testing.assert_allclose(commitment, 1.25 / 4)
  np.testing.assert_allclose(codebook_loss, 1.25 / 4)
  # d/dz: 2 (r_1 + r_2) / 4; nothing to the table.
  to_z, to_table = jax.grad(lambda *a: losses(*a)[0], (0, 1))(z, table)
  np.testing.assert_allclose(to_z.ravel(), [0.25, 0])
  assert not np.any(to_table)
  # d/dc_1: -2 g_1 (r_1 + r_2) / 4 = -(0.5, 0), since both partial sums hold it;
  # d/dc_2: -2 g_2 r_2 / 4 = (0.125, 0); nothing to z.
  to_z, to_table = jax.grad(lambda *a: losses(*a)[1], (0, 1))(z, table)
  assert not np.any(to_z)
  np.testing.assert_allclose(to_table, [[0, 0], [-0.5, 0], [0.125, 0]])
  # A partial sum alone: the gain, to each of its codes.
  for d, expected in ((0, [0, 2, 0]), (1, [0, 2, 0.5])):
    to_table = jax.grad(lambda t, d=d: losses(z, t)[2].partial[d].sum())(table)
    np.testing.assert_allclose(to_table[:, 0], expected)


@pytest.mark.parametrize("kind, depth", KIND_DEPTH)
def test_h6_gradients_reach_every_depth(kind, depth):
  z, table = draw((2, 4, 4, 5), (40, 5), seed=5)
  gain = np.linspace(1, 0.5, depth).astype(np.float32)
  codes, partial, _, _ = reference(
    z, table, gain, np.ones(40, bool), kind, depth
  )

  def loss(name):
    def value(z, table):
      found = quantize(z, table, gain, None, kind=kind, depth=depth)
      return getattr(found, name)

    return jax.grad(value, argnums=(0, 1))(z, table)

  # Of "hq" the levels count, not the positions one after another.
  levels = np.array([0, depth - 1] if kind == "hq" else range(depth))
  expected = 2 * (z - partial[levels]).mean(0) / z.size
  np.testing.assert_allclose(loss("commitment_loss")[0], expected, atol=1e-6)
  # Each emitted row is in every partial sum from its own depth on.
  expected = np.zeros(table.shape)
  for d in range(depth):
    errors = z - partial[levels[levels >= d]]
    later = -2 * errors.sum(0) / z.size / len(levels)
    if kind == "hq" and d == 0:
      later = later.reshape(2, 2, 2, 2, 2, 5).sum((2, 4))
    elif kind == "hq":
      later = later[:, (d - 1) // 2 :: 2, (d - 1) % 2 :: 2]
    np.add.at(expected, codes[..., d], gain[d] * later)
    assert np.abs(expected[codes[..., d]]).max() > 1e-4
  np.testing.assert_allclose(loss("codebook_loss")[1], expected, atol=1e-6)


@pytest.mark.parametrize("kind, depth", KIND_DEPTH)
def test_h6_straight_through_is_the_identity(kind, depth):
  z, table, cotangent = draw((2, 4, 4, 5), (40, 5), (2, 4, 4, 5), seed=6)

  def quantized(z, table):
    gain = jnp.full(depth, 0.7)
    return quantize(z, table, gain, None, kind=kind, depth=depth).quantized

  value, pull = jax.vjp(quantized, z, table)
  to_z, to_table = pull(jnp.asarray(cotangent))
  np.testing.assert_array_equal(to_z, cotangent)
  assert not np.any(to_table)
  assert np.abs(value - z).max() > 0.1


def test_codebook_loss_trains_the_projection():
  embedding, z = draw((60, 20), (2, 4, 4, 8), seed=7)
  valid = np.ones(60, bool)
  config = codebook.CodebookConfig(code_dim=8, depth=3)
  params, state = codebook.init_codebook(
    jax.random.key(0), embedding, valid, config
  )

  @jax.jit
  def loss(params):
    table = codebook.codebook_table(params, state, embedding, valid, config)
    return quantize(
      z, table, jnp.ones(3), valid, kind="rq", depth=3
    ).codebook_loss

  before, gradient = jax.value_and_grad(loss)(params)
  after = loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
  assert after < before


@pytest.mark.parametrize("kind, depth", KIND_DEPTH)
def test_h9_masked_codes_are_never_chosen(kind, depth):
  (table,) = draw((64, 6), seed=8)
  table = unit(table)
  mask = np.arange(64) >= 40
  # Every position is exactly a forbidden code.
  z = np.repeat(table[:36], 4, axis=0).reshape(36, 2, 2, 6)
  for gain in (jnp.ones(depth), jnp.zeros(depth)):
    found = quantize(z, table, gain, mask, kind=kind, depth=depth)
    assert mask[found.codes].all()
    assert not np.any(found.counts[:, ~mask])
  with pytest.raises(ValueError, match="forbids all 64"):
    quantizer.quantize(z, table, gain, mask & False, kind=kind, depth=depth)


def test_masked_rows_have_no_say_in_the_first_gain():
  z, table = draw((2, 4, 4, 6), (64, 6), seed=9)
  mask = np.arange(64) >= 10
  wild = np.where(mask[:, None], table, 1000 * table)
  usual, other = (
    quantize(z, t, jnp.zeros(3), mask, kind="rq", depth=3)
    for t in (table, wild)
  )
  np.testing.assert_array_equal(usual.codes, other.codes)


def test_an_input_of_zeros_is_harmless():
  (table,) = draw((20, 4))
  found = quantize(
    jnp.zeros((1, 2, 2, 4)), table, jnp.zeros(2), None, kind="rq", depth=2
  )
  assert all(np.isfinite(x).all() for x in found)
  assert (found.gain_fit > 0).all()


def test_code_agreement():
  z, table = draw((4, 4, 4, 5), (30, 5), seed=10)
  swapped = table[::-1]
  options = {"kind": "vq", "depth": 1}
  gain = jnp.ones(1)

  def agreement(other):
    return quantizer.code_agreement(z, table, other, gain, None, **options)

  assert agreement(table) == 1
  assert agreement(swapped) == 0
  codes = quantize(z, table, gain, None, **options).codes
  common = np.bincount(np.ravel(codes)).argmax()
  moved = table.copy()
  moved[common] = 100
  share = np.mean(np.asarray(codes) == common)
  np.testing.assert_allclose(agreement(moved), 1 - share)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"kind": "pq"}, "pq"),
    ({"kind": "vq"}, "depth=3"),
    ({"kind": "hq"}, "depth=3"),
    ({"kind": "rq", "depth": 0}, "depth=0"),
    ({"gain": np.ones(2)}, "one entry per depth"),
    ({"z": np.ones((1, 3, 2, 9))}, r"B, h, w, 4"),
    ({"mask": np.ones(5, bool)}, r"bool\[6\]"),
    ({"kind": "hq", "depth": 5, "gain": np.ones(5)}, "3 x 2 features is odd"),
  ],
)
def test_wrong_arguments(options, message):
  arguments = {
    "z": np.ones((1, 3, 2, 4)),
    "table": np.ones((6, 4)),
    "gain": np.ones(3),
    "mask": None,
    "kind": "rq",
    "depth": 3,
  } | options
  with pytest.raises(ValueError, match=message):
    quantizer.quantize(**arguments)


def test_wrong_depth_of_dequantize():
  for depth in (0, 4):
    with pytest.raises(ValueError, match=f"depth={depth}"):
      quantizer.dequantize(
        np.zeros((1, 2, 2, 3), int),
        np.ones((6, 4)),
        np.ones(3),
        kind="rq",
        depth=depth,
      )


_EIGHT_DEVICES = """
import functools
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unicode_jax import codebook, quantizer
from unicode_jax.kernels.nearest_code import nearest_code

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec('data'))
whole = NamedSharding(mesh, PartitionSpec())
rng = np.random.default_rng(0)
z = rng.standard_normal((16, 4, 4, 6)).astype(np.float32)
valid = np.arange(50) > 3

# No query leaves its device, though there are several blocks of them.
queries = jax.ShapeDtypeStruct((4096, 6), np.float32)
codes = jax.ShapeDtypeStruct((700, 6), np.float32)
text = jax.jit(nearest_code, in_shardings=(split, whole)).lower(
    queries, codes).compile().as_text()
assert 'all-gather' not in text and 'all-to-all' not in text, text

for kind, depth in (('rq', 2), ('hq', 5)):
  config = codebook.CodebookConfig(
      paradigm='private', code_dim=6, depth=depth, update_rule='ema',
      ema_decay=.9)
  params, state = codebook.init_codebook(
      jax.random.key(0), None, valid, config)

  def step(z, params, state):
    table = codebook.codebook_table(params, state, None, valid, config)
    found = quantizer.quantize(
        z, table, state['gain'], valid, kind=kind, depth=depth)
    state = codebook.fit_gain(state, found.gain_fit, config)
    params, state = codebook.ema_update(
        params, state, found.counts.sum(0), found.sums, config)
    return found, params, state

  many = jax.jit(step, in_shardings=(split, whole, whole),
                 out_shardings=whole)
  one = jax.jit(step)
  a = b = (None, params, state)
  for i in range(3):
    a = one(z + i, *a[1:])
    b = many(z + i, *b[1:])
    np.testing.assert_array_equal(a[0].codes, b[0].codes)
    np.testing.assert_array_equal(a[0].counts, b[0].counts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, rtol=1e-4, atol=1e-5), a, b)
  assert a[0].counts.sum() == z[..., 0].size * (depth if kind == 'rq' else 5/4)
  assert np.abs(a[1]['table'] - params['table']).max() > .1
"""


def test_h5_eight_devices_equal_one(host_devices):
  done = subprocess.run(
    [sys.executable, "-c", _EIGHT_DEVICES],
    env=host_devices(8),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]


def test_h5_update_from_all_depths_by_hand():
  # Two codes, each used by one position at both depths; decay 0.5, and a prior
  # of one assignment. Depth 1: r / g = (5, 0) and (0, 6).
  table = jnp.array([[4.0, 0.0], [0.0, 4.0]])
  z = jnp.array([[5.0, 0.0], [0.0, 6.0]]).reshape(1, 1, 2, 2)
  gain = jnp.array([1.0, 0.25])
  found = quantize(z, table, gain, None, kind="rq", depth=2)
  # Depth 2: r = (1, 0) and (0, 2), r / g = (4, 0) and (0, 8).
  np.testing.assert_array_equal(found.codes.reshape(2, 2), [[0, 0], [1, 1]])
  np.testing.assert_allclose(found.sums, [[5 + 4, 0], [0, 6 + 8]])
  np.testing.assert_allclose(found.counts, [[1, 1], [1, 1]])
  config = codebook.CodebookConfig(
    paradigm="private",
    code_dim=2,
    depth=2,
    update_rule="ema",
    ema_decay=0.5,
    l2_normalize=False,
  )
  params, state = codebook.ema_update(
    {"table": table},
    {"gain": gain, "ema_counts": jnp.ones(2)},
    found.counts.sum(0),
    found.sums,
    config,
  )
  # n = (1 + 2) / 2; c = ((4 + 9) / 2 / n, (4 + 14) / 2 / n).
  np.testing.assert_allclose(state["ema_counts"], [1.5, 1.5])
  np.testing.assert_allclose(params["table"], [[13 / 3, 0], [0, 6]], rtol=1e-6)
