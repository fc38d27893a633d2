"""Stage II's step with a real tokenizer and LLM, both tiny.

Packed conversations don't touch each other, codes fill their slots wherever
they come from, and each baseline reads and trains what it should.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import codebook as codebook_lib
from unicode_jax.data import mixture, sequences, sources, tasks
from unicode_jax.models import llama, tokenizer, unicode
from unicode_jax.training import (
  instruct_step,
  losses as losses_lib,
  optimizer as optimizer_lib,
  state as state_lib,
)

SIZE, DEPTH, K = 16, 2, 64
BASE = unicode.UniCode(
  tokenizer=tokenizer.TokenizerConfig(
    image_size=SIZE,
    code_dim=8,
    channels=8,
    channel_multipliers=(1,),
    num_res_blocks=1,
    stem_patch=8,
  ),
  codebook=codebook_lib.CodebookConfig(
    paradigm="frozen", code_dim=8, depth=DEPTH
  ),
  quantizer="rq",
  llama=llama.LlamaConfig(
    vocab_size=K,
    embed_dim=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=32,
    tie_embeddings=False,
  ),
)
P = BASE.num_positions
VALID = np.arange(K) >= 40
WIDTH = 52


def model_of(vision):
  rows = 2 * K if vision == "separate" else K
  return dataclasses.replace(
    BASE,
    vision=vision,
    llama=dataclasses.replace(BASE.llama, vocab_size=rows),
  )


@functools.cache
def variables_of(vision):
  variables = jax.jit(model_of(vision).init)(jax.random.key(0), VALID)
  # Larger than at the start, so that what is read matters.
  params = jax.tree.map(lambda x: 3.0 * x, variables.params)
  # A gain that is not fitted yet is each batch's own.
  state = variables.codebook_state | {"gain": jnp.asarray([1.0, 0.5])}
  return variables.replace(params=params, codebook_state=state)


class Words:
  """One id for each of the few words, below every code."""

  bos_id, eos_id = 0, 1

  def encode(self, text):
    return [5 + sum(map(ord, word)) % 30 for word in text.split()]

  def token_id(self, name):
    return {"<image>": 2, "</image>": 3}[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Twelve random pictures of which everything is said."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
  # Large patches, so that codes differ more between pictures than within.
  images[:, :8] = images[:, :1, :1]
  path = tmp_path_factory.mktemp("source") / "images.npy"
  np.save(path, images)
  items = tuple({"name": str(i), "row": i} for i in range(12))
  said = tuple(
    sources.Annotation(
      captions=(f"number {i}",),
      dialogues=((("is it", "yes"),), (("or", "no"),)),
      label=f"class {i}",
    )
    for i in range(12)
  )
  return sources.ImageSource("random", path, items, said)


TEXTS = [
  sequences.Conversation((("hi there", f"hello {i}"),)) for i in range(9)
]


def make_mixture(source, vision="unified", codes=None, **weights):
  wanted = {
    task: 1.0
    for task in tasks.TASKS
    if vision != "projector" or task not in tasks.DRAWING
  }
  return mixture.Mixture(
    [source],
    TEXTS,
    Words(),
    mixture.MixtureConfig(
      weights=weights or wanted,
      source_weights=(1.0,),
      layout=sequences.SequenceFormat(depth=DEPTH),
      sequence_length=WIDTH,
      positions=P,
      first_slot=model_of(vision).llama.vocab_size,
      segments=2,
      questions_per_image=2,
    ),
    codes,
  )


def batches(made, count, rows=4):
  iterator = mixture.mixture_iterator(made, global_batch_size=rows, seed=0)
  return [next(iterator) for _ in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def losses(model, variables, batch):
  groups = {
    name: variables.params[name] for name in instruct_step.trained_groups(model)
  }
  return instruct_step.instruct_loss(model, groups, variables, batch)


@functools.partial(jax.jit, static_argnums=0)
def codes_of(model, variables, batch):
  return instruct_step.batch_codes(model, variables, batch)


def example_row():
  """Three conversations with real codes, with stacked ids and a drawn image."""
  rng = np.random.default_rng(1)
  codes = [rng.integers(40, K, (P, DEPTH), dtype=np.int32) for _ in range(2)]
  whole = sequences.ImageSpan()
  turns = (
    ((((whole, "what is it"), "a b"), ("and", "c"))),
    (("draw it", (whole,)),),
    (((whole, "what is it"), "a b"),),
  )
  encoded = [
    sequences.encode_conversation(
      sequences.Conversation(t),
      Words(),
      sequences.SequenceFormat(depth=DEPTH),
      [codes[i % 2]],
    )
    for i, t in enumerate(turns)
  ]
  return encoded, sequences.pack_row(encoded, WIDTH, DEPTH)


def as_batch(row):
  """A batch of one row that shows no image: its codes are filled in."""
  batch = {key: value[None] for key, value in row.items()}
  return batch | {"codes": np.zeros((1, 1, P * DEPTH), np.int32)}


@pytest.mark.parametrize("attention_block", [0, 8])
def test_no_loss_depends_on_another_conversation(attention_block):
  """The gradient between packed conversations is exactly 0, both ways."""
  model = dataclasses.replace(
    BASE,
    llama=dataclasses.replace(BASE.llama, attention_block=attention_block),
  )
  params = variables_of("unified").params["llm"]
  encoded, row = example_row()
  assert any(e.image_mask.any() for e in encoded)
  assert any((e.token_ids[:, 1] >= 0).any() for e in encoded)
  segments = row["segment_ids"]
  assert set(segments) == {0, 1, 2, 3}

  @jax.jit
  def gradient(weights):
    def loss(extra):
      hidden, _ = llama.Llama(model.llama).apply(
        {"params": params},
        row["token_ids"][None],
        positions=row["positions"][None],
        segment_ids=row["segment_ids"][None],
        return_hidden=True,
        extra_embedding=extra,
      )
      head = llama.head_kernel(params, model.llama)
      return losses_lib.next_token_loss(
        hidden, head, row["labels"][None], weights[None]
      )[0]

    extra = jnp.zeros((1, WIDTH, model.llama.embed_dim))
    return jax.grad(loss)(extra)[0]

  for segment in (1, 2, 3):
    own = segments == segment
    # All of its positions, not only its answers.
    found = np.abs(np.asarray(gradient(own.astype(np.float32)))).max(-1)
    assert (found[~own] == 0).all()
    assert (found[own] > 0).all()
    # And causal: the first target depends on the first input alone.
    first = np.flatnonzero(own)[0]
    alone = np.zeros(WIDTH, np.float32)
    alone[first] = 1
    found = np.abs(np.asarray(gradient(alone))).max(-1)
    assert found[first] > 0 and (np.delete(found, first) == 0).all()


def test_packed_losses_are_those_of_each_conversation_alone():
  variables = variables_of("unified")
  encoded, row = example_row()
  together = losses(BASE, variables, as_batch(row))[1]
  for segment, conversation in enumerate(encoded, 1):
    alone = sequences.pack_row([conversation], WIDTH, DEPTH)
    _, aux = losses(BASE, variables, as_batch(alone))
    n = len(conversation.labels)
    here = row["segment_ids"] == segment
    for name in ("nll", "weight"):
      np.testing.assert_allclose(
        np.asarray(together[name])[0, here],
        np.asarray(aux[name])[0, :n],
        rtol=1e-4,
        atol=1e-5,
      )
    np.testing.assert_array_equal(
      np.asarray(together["hits"])[0, here], np.asarray(aux["hits"])[0, :n]
    )


def test_the_loss_is_the_weighted_mean_over_answers():
  variables = variables_of("unified")
  _, row = example_row()
  batch = as_batch(row)

  @jax.jit
  def loss(weight):
    return instruct_step.instruct_loss(
      BASE, variables.params, variables, batch, weight
    )

  for image_weight in (0.25, 0.0):
    value, aux = loss(image_weight)
    weights = np.where(row["image_mask"], image_weight, 1.0) * row["loss_mask"]
    nll = np.asarray(aux["nll"])[0]
    assert value == pytest.approx(
      (weights * nll).sum() / weights.sum(), rel=1e-5
    )
    np.testing.assert_array_equal(aux["weight"][0], row["loss_mask"])


@pytest.mark.parametrize("vision", ["unified", "separate"])
def test_the_step_fills_slots_as_encoding_would(source, vision):
  """In the jitted step, row by row: images' codes, and text left alone."""
  model = model_of(vision)
  made = make_mixture(source, vision)
  first_slot = model.llama.vocab_size

  @jax.jit
  def filled(batch, codes):
    return instruct_step._read(model, {}, batch, codes)

  # Only codes are read, so the frozen half of a separate model's variables is
  # the unified one's.
  for batch in batches(made, 4):
    codes = np.asarray(codes_of(BASE, variables_of("unified"), batch))
    assert codes.shape == (4, made.max_images * P * DEPTH)
    assert VALID[codes].all()
    token_ids, labels, extra = filled(batch, codes)
    assert extra is None
    for name, found in (("token_ids", token_ids), ("labels", labels)):
      for row in range(4):
        want = sequences.fill_slots(
          batch[name][row], codes[row] + model.codes_shift, first_slot
        )
        np.testing.assert_array_equal(found[row], want)
      is_slot = batch[name] >= first_slot
      assert is_slot.any()
      found = np.asarray(found)
      if vision == "separate":
        assert (found[is_slot] >= K).all() and (found[is_slot] < 2 * K).all()
      np.testing.assert_array_equal(found[~is_slot], batch[name][~is_slot])
      assert (found[~is_slot] < K).all()


def test_pixels_and_codes_in_memory_give_the_same_losses(source):
  model, variables = BASE, variables_of("unified")
  images = source.images()
  views = np.stack([images, images[:, :, ::-1]], axis=1)
  codes = codes_of(model, variables, {"images": views})
  codes = np.asarray(codes).reshape(len(images), 2, P, DEPTH)
  assert (codes[:, 0] != codes[:, 1]).any()
  assert len(np.unique(codes[:, 0].reshape(len(images), -1), axis=0)) > 5
  streams = [batches(make_mixture(source, codes=c), 3) for c in (None, [codes])]
  for pixels, cached in zip(*streams):
    np.testing.assert_array_equal(
      np.asarray(codes_of(model, variables, pixels))[
        cached["codes"].reshape(4, -1) > 0
      ],
      cached["codes"][cached["codes"] > 0],
    )
    results = [losses(model, variables, batch) for batch in (pixels, cached)]
    (value, aux), (other, other_aux) = results
    assert value == other and value > 0
    used = pixels["segment_ids"] > 0
    for name in ("nll", "hits", "weight"):
      np.testing.assert_array_equal(aux[name][used], other_aux[name][used])


def test_the_loss_depends_on_what_the_image_shows(source):
  """Another picture's codes in the slots: another loss."""
  variables = variables_of("unified")
  batch = batches(make_mixture(source), 1)[0]
  other = batch | {"images": 255 - batch["images"]}
  assert losses(BASE, variables, batch)[0] != losses(BASE, variables, other)[0]


def test_separate_codes_never_touch_rows_of_text(source):
  """Ids of codes have input rows of their own; text keeps its."""
  model, variables = model_of("separate"), variables_of("separate")

  def loss(llm, batch):
    return instruct_step.instruct_loss(model, {"llm": llm}, variables, batch)[0]

  gradient = jax.jit(jax.grad(loss))
  for batch in batches(make_mixture(source, "separate"), 3):
    grads = gradient(variables.params["llm"], batch)
    moved = np.asarray(grads["embed_tokens"]["embedding"]).any(axis=1)
    codes = np.asarray(codes_of(model, variables, batch))
    read = set()
    for row, ids in enumerate(batch["token_ids"]):
      slots = ids[ids >= 2 * K] - 2 * K
      read |= set(codes[row][slots] + K) | set(ids[(ids >= 0) & (ids < 2 * K)])
    # What lies behind the last answer of a row moves nothing.
    assert set(np.flatnonzero(moved)) <= read
    assert moved[:K].any() and moved[K:].any()
    assert not moved[40:K].any()  # Codes, in the text's half.
    labels = batch["labels"][batch["image_mask"]]
    assert (labels >= 2 * K).all()
    # The head is drawn to a code's own row.
    head = np.asarray(grads["lm_head"]["kernel"])
    assert head.shape[1] == 2 * K and head[:, K:].any()


def test_projector_reads_features_and_trains_the_projector_alone(source):
  model, variables = model_of("projector"), variables_of("projector")
  assert instruct_step.trained_groups(model) == ("llm", "projector")
  made = make_mixture(source, "projector", caption=1.0)
  batch = batches(made, 1)[0]
  first_slot = model.llama.vocab_size

  def loss(params, batch):
    return instruct_step.instruct_loss(
      model,
      {"llm": params["llm"], "projector": params["projector"]},
      variables.replace(params=params),
      batch,
    )[0]

  gradient = jax.jit(jax.value_and_grad(loss))
  value, grads = gradient(variables.params, batch)
  for name in ("in_proj", "out_proj"):
    for leaf in jax.tree.leaves(grads["projector"][name]):
      assert np.abs(leaf).max() > 0
  for name in ("encoder", "decoder", "codebook"):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[name])), name
  # Of the token table only text is read: no code.
  moved = np.asarray(grads["llm"]["embed_tokens"]["embedding"]).any(axis=1)
  text = batch["token_ids"][
    (batch["token_ids"] >= 0) & (batch["token_ids"] < first_slot)
  ]
  assert set(np.flatnonzero(moved)) <= set(text.tolist())
  # Pixels matter, and each image's features stand at their own place.
  other = batch | {"images": 255 - batch["images"]}
  assert gradient(variables.params, other)[0] != value

  @jax.jit
  def extra(batch):
    return instruct_step._read(
      model,
      {"variables": variables, "projector": variables.params["projector"]},
      batch,
      None,
    )

  token_ids, labels, read = map(np.asarray, extra(batch))
  images = instruct_step.to_float(batch["images"].reshape(-1, SIZE, SIZE, 3))
  want = np.asarray(jax.jit(model.project)(variables, images))
  want = want.reshape(4, -1, want.shape[-1])
  shown = batch["token_ids"][..., 0] >= first_slot
  row = np.nonzero(shown)[0]
  place = (batch["token_ids"][shown][:, 0] - first_slot) // DEPTH
  assert len(place) > P and len(set(place)) > P
  np.testing.assert_allclose(
    read[shown], want[row, place], rtol=1e-5, atol=1e-6
  )
  assert not read[~shown].any()
  assert (token_ids[shown] == -1).all()
  np.testing.assert_array_equal(token_ids[~shown], batch["token_ids"][~shown])
  np.testing.assert_array_equal(labels, batch["labels"] * (labels > 0))


def test_sums_tell_groups_and_kinds_apart():
  rng = np.random.default_rng(0)
  batch = {
    "image_mask": rng.random((6, 9)) < 0.5,
    "group": np.array([2, 0, 2, 3, 0, 2], np.int32),
  }
  aux = {
    "nll": rng.random((6, 9)).astype(np.float32),
    "hits": (rng.random((6, 9)) < 0.5).astype(np.float32),
    "weight": (rng.random((6, 9)) < 0.7).astype(np.float32),
  }
  sums = np.asarray(instruct_step.loss_sums(batch, aux, 5))
  want = np.zeros((5, 2, 3))
  for row in range(6):
    for at in range(9):
      if aux["weight"][row, at]:
        kind = int(batch["image_mask"][row, at])
        want[batch["group"][row], kind] += (
          aux["nll"][row, at],
          aux["hits"][row, at],
          1,
        )
  np.testing.assert_allclose(sums, want, rtol=1e-5)


def test_a_step_trains_the_llm_and_leaves_the_tokenizer(source):
  model, variables = BASE, variables_of("unified")
  made = make_mixture(source)
  adamw = optimizer_lib.make_optimizer(
    optimizer_lib.OptimizerConfig(
      learning_rate=3e-3,
      warmup_steps=0,
      final_fraction=1.0,
      weight_decay=0.0,
      b1=0.9,
      b2=0.95,
      clip_norm=1.0,
    ),
    100,
  )
  trained = instruct_step.trained_groups(model)
  step = jax.jit(
    instruct_step.make_instruct_step(
      model, adamw, num_groups=len(made.groups), image_loss_weight=0.5
    )
  )
  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=jax.random.key_data(jax.random.key(0)),
    variables=variables,
    discriminator={},
    opt_state={
      "instruct": adamw.init({n: variables.params[n] for n in trained})
    },
  )
  batch = batches(made, 1)[0]
  first, values = state, []
  for _ in range(12):
    state, metrics = step(state, batch)
    values.append(float(metrics["loss"]))
  assert values[-1] < 0.7 * values[0]
  assert int(state.step) == 12
  for name, params in state.variables.params.items():
    before = first.variables.params[name]
    if name in trained:
      changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
      assert all(jax.tree.leaves(changed)), name
    else:
      chex.assert_trees_all_equal(params, before)
  chex.assert_trees_all_equal(
    state.variables.codebook_state, first.variables.codebook_state
  )
  # The table is what it was, though the rows that it came from have moved.
  np.testing.assert_array_equal(
    model.table(state.variables), model.table(first.variables)
  )
  assert metrics["sums"].shape == (len(made.groups), 2, 3)
  assert float(metrics["sums"][..., 2].sum()) == batch["loss_mask"].sum()


def test_exact_answers_by_hand():
  """One number a conversation: did it hit every token of all its answers?"""
  batch = {
    "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3]]),
    "loss_mask": np.array([[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1.0]]),
  }
  hits = np.array([[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1.0]])
  exact = instruct_step.exact_answers(batch, hits)
  assert exact.tolist() == [True, False, True, False, True]
  empty = {"segment_ids": np.zeros((2, 3), int), "loss_mask": np.zeros((2, 3))}
  assert instruct_step.exact_answers(empty, np.zeros((2, 3))).tolist() == []
