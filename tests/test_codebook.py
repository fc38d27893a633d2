"""The codebook's paradigms against numpy, and hazards H1 and H3 to H5."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import codebook, quantizer
from unicode_jax.codebook import CodebookConfig
from unicode_jax.kernels.nearest_code import nearest_code

UNIFIED = ("frozen", "dual", "language_driven", "projected")
NUM_CODES, DIM, CODE_DIM = 40, 12, 5
VALID = np.arange(NUM_CODES) >= 4


@pytest.fixture
def embedding():
  rng = np.random.default_rng(0)
  scale = np.linspace(3, 0.5, DIM)
  rows = rng.standard_normal((NUM_CODES, DIM)) * scale + rng.standard_normal(
    DIM
  )
  rows[~VALID] *= 30  # control tokens may look like anything
  return jnp.asarray(rows, jnp.float32)


def build(embedding, paradigm, **options):
  """Returns (params, state, config)."""
  options = {"code_dim": CODE_DIM, "depth": 3} | options
  config = CodebookConfig(paradigm=paradigm, **options)
  rows = None if paradigm == "private" else embedding
  params, state = codebook.init_codebook(jax.random.key(1), rows, VALID, config)
  return params, state, config


def reference_view(embedding, projection):
  """V(E) in float64."""
  rows = np.asarray(embedding, np.float64)
  return (rows - rows[VALID].mean(0)) @ np.asarray(projection, np.float64)


@pytest.mark.parametrize("paradigm", UNIFIED)
@pytest.mark.parametrize("projection", ["pca", "random", "identity"])
def test_starts_at_the_language(embedding, paradigm, projection):
  code_dim = DIM if projection == "identity" else CODE_DIM
  params, state, config = build(
    embedding,
    paradigm,
    projection=projection,
    code_dim=code_dim,
    l2_normalize=False,
  )
  p = params.get("projection", state.get("projection"))
  table = codebook.codebook_table(params, state, embedding, VALID, config)
  np.testing.assert_allclose(
    table, reference_view(embedding, p), rtol=1e-4, atol=1e-4
  )
  rms = np.sqrt(np.mean(np.asarray(table)[VALID] ** 2))
  np.testing.assert_allclose(rms, 1, rtol=1e-5)
  # Orthogonal columns of one length.
  gram = np.asarray(p).T @ np.asarray(p)
  np.testing.assert_allclose(gram, gram[0, 0] * np.eye(code_dim), atol=1e-5)
  assert codebook.drift(params, state, embedding, VALID, config) == 0
  unit = dataclasses.replace(config, l2_normalize=True)
  rows = codebook.codebook_table(params, state, embedding, VALID, unit)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_pca_is_numpys(embedding):
  params, _, _ = build(embedding, "projected")
  rows = np.asarray(embedding, np.float64)[VALID]
  _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
  expected = directions[:CODE_DIM].T
  expected *= np.sign(expected[np.abs(expected).argmax(0), np.arange(CODE_DIM)])
  actual = np.asarray(params["projection"])
  actual = actual / np.linalg.norm(actual, axis=0)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_projected_gradient_against_finite_differences(embedding):
  # The reference is numpy in float64, through the normalisation.
  params, state, config = build(embedding, "projected")
  weight = np.random.default_rng(2).standard_normal((NUM_CODES, CODE_DIM))

  def reference(projection):
    rows = reference_view(embedding, projection)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.sum(rows * weight)

  def loss(params, embedding):
    table = codebook.codebook_table(params, state, embedding, VALID, config)
    return jnp.sum(table * weight)

  gradient, to_language = jax.grad(loss, argnums=(0, 1))(params, embedding)
  projection = np.asarray(params["projection"], np.float64)
  expected = np.zeros_like(projection)
  for at in np.ndindex(projection.shape):
    step = np.zeros_like(projection)
    step[at] = 1e-5
    expected[at] = reference(projection + step) - reference(projection - step)
  expected /= 2e-5
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(gradient["projection"], expected, atol=1e-3)
  assert not np.any(to_language)


def test_gradient_of_a_row_of_zeros_is_finite():
  config = CodebookConfig(paradigm="private", code_dim=3)
  state = {"gain": jnp.zeros(4)}

  def loss(table):
    return codebook.codebook_table(
      {"table": table}, state, None, np.ones(2, bool), config
    ).sum()

  assert np.isfinite(jax.grad(loss)(jnp.zeros((2, 3)))).all()


def test_projected_never_drifts(embedding):
  params, state, config = build(embedding, "projected")
  noise = np.random.default_rng(3).standard_normal(params["projection"].shape)
  params = {"projection": params["projection"] + noise.astype(np.float32)}
  for rows in (embedding, embedding**3 + 2):
    drift = functools.partial(codebook.drift, config=config)
    assert drift(params, state, rows, VALID) == 0
    assert jax.jit(drift)(params, state, rows, VALID) == 0
    np.testing.assert_array_equal(
      codebook.codebook_table(params, state, rows, VALID, config),
      codebook.language_table(params, state, rows, VALID, config),
    )


def test_frozen_stays_when_the_language_moves(embedding):
  params, state, config = build(embedding, "frozen")
  assert not params
  moved = embedding.at[7].add(5.0)
  np.testing.assert_array_equal(
    codebook.codebook_table(params, state, moved, VALID, config),
    codebook.codebook_table(params, state, embedding, VALID, config),
  )
  assert codebook.drift(params, state, moved, VALID, config) > 0.01


@pytest.mark.parametrize(
  ("paradigm", "options"),
  [
    *((paradigm, {}) for paradigm in UNIFIED),
    ("projected", {"l2_normalize": False}),
    ("dual", {"update_rule": "ema"}),
    ("language_driven", {"update_rule": "ema"}),
  ],
)
def test_freezing_changes_no_id_then_or_later(embedding, paradigm, options):
  """Stage II's codes are stage I's, bit for bit, while the LLM moves (H3)."""
  params, state, config = build(embedding, paradigm, **options)
  # As training leaves them: nothing is what it was at the start.
  rng = np.random.default_rng(5)
  params = {
    name: value + rng.normal(size=value.shape).astype(np.float32)
    for name, value in params.items()
  }
  state = state | {"gain": jnp.asarray([1.5, 0.5, 0.25])}
  embedding = embedding + jnp.asarray(
    rng.normal(size=embedding.shape), jnp.float32
  )
  before = codebook.codebook_table(params, state, embedding, VALID, config)

  frozen = codebook.freeze(params, state, embedding, VALID, config)
  rules = codebook.frozen_config(config)
  assert rules == dataclasses.replace(
    config, paradigm="frozen", update_rule="gradient"
  )
  assert frozen[0] == {}  # Nothing that an optimizer could move.
  np.testing.assert_array_equal(frozen[1]["gain"], state["gain"])
  for rows in (embedding, embedding * 3 + 1):
    table = codebook.codebook_table(*frozen, rows, VALID, rules)
    np.testing.assert_array_equal(table, before)
  # The language is seen as it was before, fixed centre and all.
  for rows in (embedding, embedding * 3 + 1):
    np.testing.assert_array_equal(
      codebook.language_view(*frozen, rows, VALID, rules),
      codebook.language_view(params, state, rows, VALID, config),
    )
  # Freezing what is frozen does nothing.
  again = codebook.freeze(*frozen, embedding * 3 + 1, VALID, rules)
  jax.tree.map(np.testing.assert_array_equal, again, frozen)


def test_drift_is_relative_and_of_valid_rows(embedding):
  params, state, config = build(embedding, "language_driven")
  table = params["table"].at[0].add(100.0)
  assert codebook.drift({"table": table}, state, embedding, VALID, config) == 0
  np.testing.assert_allclose(
    codebook.drift({"table": 1.5 * table}, state, embedding, VALID, config),
    0.5,
    rtol=1e-5,
  )


def test_h3_syncs_leave_a_power_of_lambda(embedding):
  params, state, config = build(embedding, "language_driven", sync_decay=0.8)
  noise = np.random.default_rng(4).standard_normal((NUM_CODES, CODE_DIM))
  params = {"table": params["table"] + noise.astype(np.float32)}
  view = codebook.language_view(params, state, embedding, VALID, config)
  start = np.asarray(params["table"] - view)
  for n in range(1, 6):
    params = codebook.sync(params, state, embedding, VALID, config)
    # All rows move, also those that are not valid.
    np.testing.assert_allclose(
      params["table"] - view, 0.8**n * start, atol=1e-5
    )
  snapped = codebook.snap(params, state, embedding, VALID, config)
  np.testing.assert_array_equal(snapped["table"], view)
  assert codebook.drift(snapped, state, embedding, VALID, config) == 0


@pytest.mark.parametrize("projection", ["pca", "random", "identity"])
def test_dual_round_trip(embedding, projection):
  code_dim = DIM if projection == "identity" else CODE_DIM
  params, state, config = build(
    embedding, "dual", projection=projection, code_dim=code_dim
  )
  rng = np.random.default_rng(5)
  # Training moves the table, its mean too.
  change = rng.standard_normal((NUM_CODES, code_dim)) + 0.7
  params = {"table": params["table"] + change.astype(np.float32)}
  written = codebook.write_back(params, state, embedding, VALID, config)
  again = codebook.load_from_language(params, state, written, VALID, config)
  np.testing.assert_allclose(
    again["table"][VALID], params["table"][VALID], atol=2e-5
  )
  assert codebook.drift(params, state, written, VALID, config) < 1e-5
  # Nothing else of the language changes.
  np.testing.assert_array_equal(written[~VALID], embedding[~VALID])
  basis = np.linalg.qr(np.asarray(state["projection"], np.float64))[0]
  aside = np.eye(DIM) - basis @ basis.T
  np.testing.assert_allclose((written - embedding)[VALID] @ aside, 0, atol=1e-5)
  assert np.abs(written - embedding)[VALID].max() > 0.1
  if projection == "identity":
    scale = state["projection"][0, 0]
    literal = params["table"] / scale + state["centre"]
    np.testing.assert_allclose(written[VALID], literal[VALID], atol=2e-5)


def test_write_back_keeps_dtype_and_is_idle_without_training(embedding):
  params, state, config = build(embedding, "dual")
  low = embedding.astype(jnp.bfloat16)
  written = codebook.write_back(params, state, low, VALID, config)
  assert written.dtype == jnp.bfloat16
  written = codebook.write_back(params, state, embedding, VALID, config)
  np.testing.assert_allclose(written, embedding, atol=1e-5)


def test_operations_are_bound_to_their_paradigm(embedding):
  places = {
    codebook.sync: {"language_driven"},
    codebook.load_from_language: {"dual"},
    codebook.write_back: {"dual"},
    codebook.snap: set(UNIFIED),
    codebook.freeze: set(UNIFIED),
    codebook.drift: set(UNIFIED),
    codebook.language_table: set(UNIFIED),
  }
  for paradigm in codebook.PARADIGMS:
    params, state, config = build(embedding, paradigm)
    for operation, allowed in places.items():
      arguments = (params, state, embedding, VALID, config)
      if paradigm in allowed:
        operation(*arguments)
      else:
        with pytest.raises(ValueError, match=paradigm):
          operation(*arguments)
    if paradigm in ("frozen", "projected"):
      assert codebook.snap(params, state, embedding, VALID, config) is params


def test_first_gain_is_the_fit_and_later_ones_average():
  config = CodebookConfig(depth=2, gain_decay=0.9)
  state = codebook.fit_gain(
    {"gain": jnp.zeros(2)}, jnp.array([2.0, 3.0]), config
  )
  np.testing.assert_array_equal(state["gain"], [2, 3])
  state = codebook.fit_gain(state, jnp.array([4.0, 1.0]), config)
  np.testing.assert_allclose(state["gain"], [2.2, 2.8], rtol=1e-6)


@pytest.mark.parametrize("paradigm", ["dual", "language_driven", "private"])
def test_h5_one_ema_update_for_all_depths(embedding, paradigm):
  # Against running averages of the counts and of the sums, in numpy.
  params, state, config = build(
    embedding, paradigm, update_rule="ema", ema_decay=0.9, l2_normalize=False
  )
  rng = np.random.default_rng(6)
  n = np.ones(NUM_CODES)
  m = np.asarray(params["table"], np.float64)
  start = np.asarray(params["table"])
  for _ in range(3):
    counts = rng.integers(0, 4, (config.depth, NUM_CODES)).astype(np.float32)
    counts[:, 10:20] = 0
    sums = rng.standard_normal((config.depth, NUM_CODES, CODE_DIM))
    sums = (sums * counts[..., None]).astype(np.float32)
    n = 0.9 * n + 0.1 * counts.sum(0)
    m = 0.9 * m + 0.1 * sums.sum(0)
    params, state = codebook.ema_update(
      params, state, counts.sum(0), sums.sum(0), config
    )
    np.testing.assert_allclose(state["ema_counts"], n, rtol=1e-5)
    np.testing.assert_allclose(
      params["table"], m / n[:, None], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(params["table"][10:20], start[10:20])


def test_ema_of_unit_rows_turns_them_and_keeps_their_length(embedding):
  params, state, config = build(
    embedding, "language_driven", update_rule="ema", ema_decay=0.9
  )
  rng = np.random.default_rng(7)
  counts = rng.integers(0, 3, NUM_CODES).astype(np.float32)
  sums = rng.standard_normal((NUM_CODES, CODE_DIM)) * counts[:, None]
  moved, state = codebook.ema_update(
    params, state, counts, sums.astype(np.float32), config
  )
  table = np.asarray(params["table"], np.float64)
  length = np.linalg.norm(table, axis=1, keepdims=True)
  mean = 0.9 * table / length + 0.1 * sums
  expected = mean / np.linalg.norm(mean, axis=1, keepdims=True) * length
  np.testing.assert_allclose(moved["table"], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    moved["table"][counts == 0], params["table"][counts == 0]
  )


def test_ema_does_not_undo_a_sync(embedding):
  # Averages of sums that were taken before the sync would pull back.
  params, state, config = build(
    embedding, "language_driven", update_rule="ema", sync_decay=0.0
  )
  params = {"table": params["table"][::-1]}
  params = codebook.sync(params, state, embedding, VALID, config)
  table = codebook.codebook_table(params, state, embedding, VALID, config)
  counts = jnp.full(NUM_CODES, 5.0)
  params, _ = codebook.ema_update(params, state, counts, 5 * table, config)
  np.testing.assert_allclose(
    codebook.codebook_table(params, state, embedding, VALID, config),
    table,
    atol=1e-6,
  )


@pytest.mark.parametrize("paradigm", UNIFIED)
def test_h4_rows_of_the_llm_are_never_restarted(embedding, paradigm):
  with pytest.raises(ValueError, match="belong to the LLM"):
    CodebookConfig(paradigm=paradigm, restart_dead_after=10)
  params, state, config = build(embedding, paradigm)
  state["last_used"] = jnp.zeros(NUM_CODES, jnp.int32)
  with pytest.raises(ValueError, match="belong to the LLM"):
    codebook.restart_dead_codes(
      jax.random.key(0),
      params,
      state,
      jnp.zeros(NUM_CODES),
      100,
      jnp.ones((3, CODE_DIM)),
      config,
    )


def test_dead_private_codes_are_restarted(embedding):
  params, state, config = build(
    embedding,
    "private",
    restart_dead_after=3,
    l2_normalize=False,
    update_rule="ema",
  )
  state["ema_counts"] *= 7
  before = np.asarray(params["table"])
  candidates = jnp.asarray(
    np.random.default_rng(8).standard_normal((6, CODE_DIM)), jnp.float32
  )
  used = jnp.arange(NUM_CODES) < 30
  restart = jax.jit(codebook.restart_dead_codes, static_argnames="config")
  for step in range(1, 4):
    params, state = restart(
      jax.random.key(step),
      params,
      state,
      used * 1.0,
      step,
      candidates,
      config=config,
    )
    if step < 3:
      np.testing.assert_array_equal(params["table"], before)
  table = np.asarray(params["table"])
  np.testing.assert_array_equal(table[:30], before[:30])
  for row in table[30:]:
    assert (row == np.asarray(candidates)).all(1).any()
  np.testing.assert_array_equal(state["last_used"], [3] * NUM_CODES)
  np.testing.assert_array_equal(state["ema_counts"], [7] * 30 + [1] * 10)
  with pytest.raises(ValueError, match="restarts off"):
    codebook.restart_dead_codes(
      None,
      params,
      state,
      used,
      9,
      candidates,
      dataclasses.replace(config, restart_dead_after=0),
    )


def test_statistics():
  counts = np.zeros((3, NUM_CODES), np.float32)
  counts[0, 4:13] = 5  # 9 of the 36 valid codes, equally
  counts[1, [5, 6]] = [3, 1]
  statistics = jax.jit(codebook.codebook_statistics)(counts, VALID)
  np.testing.assert_allclose(statistics["usage"], [1 / 4, 2 / 36, 0])
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(
    statistics["perplexity"], [9, np.exp(entropy), 1], rtol=1e-5
  )


@pytest.mark.parametrize(
  "code_dim, l2_normalize, gain", [(16, True, 1.0), (32, False, 0.0)]
)
def test_h1_selection_does_not_collapse(code_dim, l2_normalize, gain):
  # The setting that collapses: a language's table (near-constant norm, most of
  # it a common mean), a fresh encoder with small outputs, 512 of them. Cosine
  # saves the choice at any gain; the matched scale of the first gain does too.
  num_codes, dim = 8192, 512
  rng = np.random.default_rng(9)
  rows = rng.standard_normal((num_codes, dim))
  rows *= (1 + 0.02 * rng.standard_normal((num_codes, 1))) / np.linalg.norm(
    rows, axis=1, keepdims=True
  )
  mean = rng.standard_normal(dim)
  rows = (rows + mean / np.linalg.norm(mean)).astype(np.float32)

  def encode(dim):
    return 0.01 * rng.standard_normal((2, 16, 16, dim)).astype(np.float32)

  direct = nearest_code(encode(dim).reshape(-1, dim), rows).indices
  assert len(np.unique(direct)) < 32

  valid = np.ones(num_codes, bool)
  config = CodebookConfig(
    paradigm="frozen",
    code_dim=code_dim,
    projection="random",
    l2_normalize=l2_normalize,
    depth=1,
  )
  params, state = codebook.init_codebook(jax.random.key(0), rows, valid, config)
  table = codebook.codebook_table(params, state, rows, valid, config)
  found = quantizer.quantize(
    encode(code_dim), table, jnp.array([gain]), valid, kind="vq", depth=1
  )
  assert len(np.unique(found.codes)) > 400


@pytest.mark.parametrize(
  "options, message",
  [
    ({"paradigm": "shared"}, "shared"),
    ({"projection": "umap"}, "umap"),
    ({"update_rule": "sgd"}, "sgd"),
    ({"code_dim": 0}, "code_dim=0"),
    ({"depth": 0}, "depth=0"),
    ({"sync_decay": 1.5}, "sync_decay=1.5"),
    ({"paradigm": "frozen", "update_rule": "ema"}, "none to move"),
    ({"paradigm": "private", "restart_dead_after": -1}, "negative"),
  ],
)
def test_wrong_configs(options, message):
  with pytest.raises(ValueError, match=message):
    CodebookConfig(**options)


def test_wrong_embeddings(embedding):
  with pytest.raises(ValueError, match="code_dim=13 is larger"):
    build(embedding, "projected", code_dim=13)
  with pytest.raises(ValueError, match="needs code_dim=12"):
    build(embedding, "projected", projection="identity")
  with pytest.raises(ValueError, match="needs the embedding"):
    build(None, "dual")
  with pytest.raises(ValueError, match="no language"):
    codebook.init_codebook(
      jax.random.key(0), embedding, VALID, CodebookConfig(paradigm="private")
    )
  with pytest.raises(ValueError, match="keeps no averages"):
    params, state, config = build(embedding, "dual")
    codebook.ema_update(params, state, None, None, config)
