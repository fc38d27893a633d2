"""Rows of stage II: what is in them, which, how often, and in which order."""

import dataclasses
import itertools
import pickle

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from unicode_jax import config as config_lib
from unicode_jax.data import mixture, sequences, sources, tasks, views
from unicode_jax.data.sequences import Conversation

POSITIONS, DEPTH, FIRST_SLOT = 4, 2, 500
PER_IMAGE = POSITIONS * DEPTH
TEXTS = [
  Conversation(tuple((f"q{i}.{j}", f"a{i}") for j in range(1 + i % 3)))
  for i in range(9)
]
ALL = dict.fromkeys(tasks.TASKS, 1.0)


def annotation(i):
  """Said of image i: a caption, a class for some, questions, a dialogue."""
  single = tuple(((f"is{i} {j}?", f"yes{j}"),) for j in range(i % 4))
  whole = ((f"what{i}", "a b"), ("sure?", "c"))
  return sources.Annotation(
    captions=(f"number {i}",),
    dialogues=(*single, whole) if i % 2 else single,
    label=f"class{i}" if i % 3 else None,
  )


@pytest.fixture
def pictures(make_source):
  """Two sources whose images show their numbers: 0..11 and 100..106."""

  def annotated(name, count, first):
    source = make_source(name, count, first)
    return dataclasses.replace(
      source,
      annotations=tuple(annotation(first + i) for i in range(count)),
    )

  return annotated("a", 12, 0), annotated("b", 7, 100)


def codes_of(number, mirrored):
  """Stands in for a tokenizer: codes that say which image, and which view."""
  return (
    np.arange(PER_IMAGE, dtype=np.int32).reshape(POSITIONS, DEPTH)
    + 1000 * (number + 1)
    + 500 * mirrored
  )


def cached(source, first):
  seen = [[codes_of(first + i, m) for m in (0, 1)] for i in range(len(source))]
  return np.array(seen)


def config(**options):
  return mixture.MixtureConfig(
    **{
      "weights": ALL,
      "source_weights": (1.0, 1.0),
      "layout": sequences.SequenceFormat(depth=DEPTH),
      "sequence_length": 64,
      "positions": POSITIONS,
      "first_slot": FIRST_SLOT,
      "segments": 2,
      "questions_per_image": 2,
      "views": views.views(flip=True, shift=0),
    }
    | options
  )


def make(pictures, tokenizer, *, codes=False, texts=TEXTS, **options):
  arrays = None
  if codes:
    arrays = [cached(s, f) for s, f in zip(pictures, (0, 100))]
  return mixture.Mixture(pictures, texts, tokenizer, config(**options), arrays)


def iterate(made, **options):
  return mixture.mixture_iterator(
    made, **{"global_batch_size": 4, "seed": 3, **options}
  )


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_equal(batch, other, *, but=()):
  assert set(batch) - set(but) == set(other) - set(but)
  for key in set(batch) - set(but):
    np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def shown(row):
  """Reads number and view off every image of a row's pixels."""
  return [
    (int(image[0, 0, 0]), bool(image[0, -1, 1])) for image in row["images"]
  ]


def said(row, codes):
  """Fills a row and takes it apart: one tuple of arrays per conversation."""
  flat = np.concatenate([np.reshape(c, -1) for c in codes])
  found = []
  for segment in range(1, row["segment_ids"].max() + 1):
    here = row["segment_ids"] == segment
    found.append(
      (
        sequences.fill_slots(row["token_ids"][here], flat, FIRST_SLOT),
        sequences.fill_slots(row["labels"][here], flat, FIRST_SLOT),
        row["loss_mask"][here],
        row["image_mask"][here],
      )
    )
  return found


def as_key(encoded):
  return tuple(array.tobytes() for array in encoded)


@pytest.mark.parametrize("with_codes", [False, True])
def test_rows_hold_what_their_examples_say(
  pictures, word_tokenizer, with_codes
):
  """Each conversation of each row, filled with its own image's codes."""
  made = make(pictures, word_tokenizer, codes=with_codes)
  rng = np.random.default_rng(0)
  layout = made.config.layout
  names = []
  for number, group in enumerate(made.groups):
    first = 0 if group.source is None or group.source.name == "a" else 100
    met = []
    for index in range(len(group)):
      row = made.row(number, index, rng)
      assert row["group"] == number
      if with_codes:
        codes = row["codes"]
      else:
        codes = [codes_of(*what) for what in shown(row)]
      conversations = said(row, codes)
      assert len(conversations) == len(group.rows[index])
      for i, conversation in zip(group.rows[index], conversations):
        example = group.examples[i]
        # All that may be drawn of this very example.
        seen = (0, 1) if example.item is not None else (0,)
        possible = {
          as_key(
            sequences.encode_conversation(
              variant,
              word_tokenizer,
              layout,
              [codes_of(first + (example.item or 0), view)],
            )
          )
          for variant in example.variants()
          for view in seen
        }
        assert as_key(conversation) in possible
        met.append(i)
      assert len(codes) == made.max_images
    assert sorted(met) == list(range(len(group.examples)))
    names.append((group.name, group.source and group.source.name))
  assert names == [
    *((task, name) for task in tasks.TASKS[:-1] for name in "ab"),
    ("text", None),
  ]


def test_pixels_and_codes_give_the_same_rows(pictures, word_tokenizer):
  """The same numbers but for what shows the images, mirrored alike."""
  from_pixels, from_codes = (
    take(iterate(make(pictures, word_tokenizer, codes=codes)), 40)
    for codes in (False, True)
  )
  mirrored = []
  for pixels, codes in zip(from_pixels, from_codes, strict=True):
    assert_equal(pixels, codes, but=("images", "codes"))
    assert pixels["images"].shape[1:] == (*codes["codes"].shape[1:2], 4, 4, 3)
    for row in range(len(codes["codes"])):
      for place, (number, view) in enumerate(
        shown({"images": pixels["images"][row]})
      ):
        if not codes["codes"][row, place].any():  # Behind the last image.
          assert not pixels["images"][row, place].any()
          continue
        expected = codes_of(number, view).reshape(-1)
        np.testing.assert_array_equal(codes["codes"][row, place], expected)
        mirrored.append(view)
  assert len(mirrored) > 300 and 0.4 < np.mean(mirrored) < 0.6


def test_without_flips_nothing_is_mirrored(pictures, word_tokenizer):
  made = make(pictures, word_tokenizer, views=(views.AS_IS,))
  for batch in take(iterate(made), 20):
    assert not any(
      v for row in batch["images"] for _, v in shown({"images": row})
    )


def test_batches_have_the_promised_form(pictures, word_tokenizer):
  made = make(pictures, word_tokenizer)
  batch = next(iterate(made))
  M = made.max_images
  assert M > 1
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    "token_ids": ("int32", (4, 64, 2)),
    "labels": ("int32", (4, 64)),
    "loss_mask": ("float32", (4, 64)),
    "image_mask": ("bool", (4, 64)),
    "positions": ("int32", (4, 64)),
    "segment_ids": ("int32", (4, 64)),
    "group": ("int32", (4,)),
    "images": ("uint8", (4, M, 4, 4, 3)),
  }
  batch = next(iterate(make(pictures, word_tokenizer, codes=True)))
  assert batch["codes"].shape == (4, M, PER_IMAGE)
  assert batch["codes"].dtype == np.int32 and "images" not in batch


@pytest.mark.parametrize("process_count", [2, 4])
def test_shards_join_to_the_single_process_batch(
  pictures, word_tokenizer, process_count
):
  made = make(pictures, word_tokenizer)
  whole = take(iterate(made), 10)
  shards = [
    take(iterate(made, process_index=i, process_count=process_count), 10)
    for i in range(process_count)
  ]
  for step, batch in enumerate(whole):
    parts = [shard[step] for shard in shards]
    joined = {k: np.concatenate([part[k] for part in parts]) for k in batch}
    assert_equal(joined, batch)


def test_the_same_seed_gives_the_same_rows_and_resumes(
  pictures, word_tokenizer
):
  made = make(pictures, word_tokenizer)
  whole = take(iterate(made), 12)
  again = make(pictures, word_tokenizer)
  for batch, expected in zip(take(iterate(again), 12), whole, strict=True):
    assert_equal(batch, expected)
  resumed = iterate(again, start=5)
  for batch, expected in zip(take(resumed, 7), whole[5:], strict=True):
    assert_equal(batch, expected)
  other = take(iterate(made, seed=4), 12)
  assert any((a["labels"] != b["labels"]).any() for a, b in zip(whole, other))


def test_what_is_random_is_drawn_anew_every_epoch(pictures, word_tokenizer):
  """The second time around a row is mirrored otherwise, or dropped."""
  made = make(
    pictures,
    word_tokenizer,
    weights={"class_conditional": 1.0},
    codes=True,
    condition_dropout=0.5,
  )
  drawn = {}
  for batch in take(iterate(made), 60):
    for row in range(4):
      key = as_key([batch["group"][row], batch["codes"][row] // 1000])
      value = as_key([batch["labels"][row], batch["codes"][row]])
      drawn.setdefault(key, set()).add(value)
  assert len(drawn) == sum(len(group) for group in made.groups)
  assert min(len(values) for values in drawn.values()) > 5


def test_a_pickled_mixture_makes_the_same_rows(pictures, word_tokenizer):
  """As worker processes receive it."""
  made = make(pictures, word_tokenizer)
  sent = pickle.loads(pickle.dumps(made))
  for group in range(len(made.groups)):
    rows = [m.row(group, 0, np.random.default_rng(1)) for m in (made, sent)]
    assert_equal(*rows)


def test_weights_are_shares_of_the_rows(pictures, word_tokenizer):
  weights = {
    "decompression": 1.0,
    "caption": 2.0,
    "vqa": 4.0,
    "text_to_image": 0.0,
    "text": 3.0,
  }
  made = make(
    pictures, word_tokenizer, weights=weights, source_weights=(3.0, 1.0)
  )
  counts = np.zeros(len(made.groups))
  for batch in take(iterate(made, global_batch_size=50), 40):
    np.add.at(counts, batch["group"], 1)
  assert counts.sum() == 2000
  expected = {
    ("decompression", "a"): 0.075,
    ("decompression", "b"): 0.025,
    ("caption", "a"): 0.15,
    ("caption", "b"): 0.05,
    ("vqa", "a"): 0.3,
    ("vqa", "b"): 0.1,
    ("text", None): 0.3,
  }
  names = [(g.name, g.source and g.source.name) for g in made.groups]
  assert names == list(expected)
  np.testing.assert_allclose(counts / 2000, list(expected.values()), atol=0.02)


def test_every_row_of_a_group_comes_once_an_epoch(pictures, word_tokenizer):
  made = make(
    pictures,
    word_tokenizer,
    weights={"unconditional": 1},
    codes=True,
    source_weights=(1.0, 0.0),
    sequence_length=32,
    views=(views.AS_IS,),
  )
  (group,) = made.groups
  assert len(group) > 5
  batches = take(iterate(made, global_batch_size=1), 2 * len(group))
  epochs = np.split(np.array([b["codes"][0, 0, 0] for b in batches]), 2)
  assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == len(group)
  assert epochs[0].tolist() != epochs[1].tolist()


def test_tasks_without_examples_are_left_out(pictures, word_tokenizer, caplog):
  silent = [
    dataclasses.replace(
      source, annotations=(sources.Annotation(),) * len(source)
    )
    for source in pictures
  ]
  # One source of two knows captions.
  half = [pictures[0], silent[1]]
  made = make(half, word_tokenizer, weights={"caption": 1.0, "vqa": 1.0})
  assert [(g.name, g.source.name) for g in made.groups] == [
    ("caption", "a"),
    ("vqa", "a"),
  ]
  assert made.weights == [1.0, 1.0] and not caplog.records
  made = make(silent, word_tokenizer, texts=())
  assert {g.name for g in made.groups} == {"decompression", "unconditional"}
  for task in ("caption", "vqa", "text_to_image", "class_conditional", "text"):
    assert f"no example of the task {task!r}" in caplog.text
  with pytest.raises(
    config_lib.ConfigError, match=r"any task in \['caption'\]"
  ):
    make(silent, word_tokenizer, weights={"caption": 1.0, "vqa": 0.0})


def test_text_alone_needs_no_images(word_tokenizer):
  made = make((), word_tokenizer, weights={"text": 1.0}, source_weights=())
  batch = next(iterate(made))
  assert batch["images"].shape[1] == 1
  assert batch["loss_mask"].any() and not batch["image_mask"].any()


@pytest.mark.parametrize("max_rows", [None, 3])
def test_fixed_batches_hold_rows_once_and_draw_nothing(
  pictures, word_tokenizer, max_rows
):
  made = make(pictures, word_tokenizer, sequence_length=30)
  for number, group in enumerate(made.groups):
    batches = [*mixture.fixed_batches(made, number, 4, max_rows)]
    again = [*mixture.fixed_batches(made, number, 4, max_rows)]
    for batch, expected in zip(batches, again, strict=True):
      assert_equal(batch, expected)
      assert len(batch["labels"]) == 4 and (batch["group"] == number).all()
    used = [b["segment_ids"][i].any() for b in batches for i in range(4)]
    expected = min(len(group), max_rows or len(group))
    assert sum(used) == expected and len(used) - expected < 4
    # Padding comes last.
    assert used == sorted(used, reverse=True)
    row = made.row(number, 0, None)
    assert_equal({k: v[0] for k, v in batches[0].items()}, row)
    if max_rows and len(group) > max_rows:
      last = made.row(number, len(group) - 1, None)
      rows = [
        {k: v[i] for k, v in b.items()} for b in batches for i in range(4)
      ]
      assert_equal(rows[max_rows - 1], last)
    if number == 0:
      mirrored = [
        v for b in batches for r in b["images"] for _, v in shown({"images": r})
      ]
      assert not any(mirrored)


def one_source(make_source, *annotations):
  source = make_source("a", len(annotations))
  return (dataclasses.replace(source, annotations=annotations),)


def length_of(tokenizer, *turns):
  encoded = sequences.encode_conversation(
    Conversation(turns), tokenizer, config().layout, [codes_of(0, 0)]
  )
  return len(encoded.labels)


WHOLE = (sequences.ImageSpan(),)


def test_the_last_turns_of_a_long_dialogue_are_left_out(
  make_source, word_tokenizer
):
  turns = (("what is it", "a"), ("and now", "b c"), ("why", "d"))
  images = one_source(make_source, sources.Annotation(dialogues=(turns,)))
  first = ((*WHOLE, "what is it"), "a")
  for kept in (3, 2, 1):
    fits = length_of(word_tokenizer, first, *turns[1:kept])
    for spare in (0, 1):
      made = make(
        images,
        word_tokenizer,
        weights={"vqa": 1.0},
        source_weights=(1,),
        sequence_length=fits + spare,
        texts=(),
        views=(views.AS_IS,),
      )
      row = made.row(0, 0, None)
      (found,) = said(row, [codes_of(0, 0)])
      expected = sequences.encode_conversation(
        Conversation((first, *turns[1:kept])),
        word_tokenizer,
        made.config.layout,
        [codes_of(0, 0)],
      )
      assert as_key(found) == as_key(expected)


def test_a_single_long_answer_loses_its_end_and_the_image_nothing(
  make_source, word_tokenizer
):
  long = "a b c d e f g h"
  images = one_source(
    make_source,
    sources.Annotation(captions=(long,)),
    sources.Annotation(captions=("a",)),
  )
  turn = (*WHOLE, tasks.CAPTION_QUESTION), long
  whole = sequences.encode_conversation(
    Conversation((turn,)),
    word_tokenizer,
    sequences.SequenceFormat(depth=DEPTH),
    [codes_of(0, 0)],
  )
  start = int(whole.loss_mask.argmax())
  made = make(
    images,
    word_tokenizer,
    weights={"caption": 1.0},
    source_weights=(1,),
    sequence_length=start + 3,
    texts=(),
  )
  (group,) = made.groups
  assert len(group.examples) == 2
  row = made.row(0, next(i for i, r in enumerate(group.rows) if r == [0]), None)
  (found,) = said(row, [codes_of(0, 0)])
  assert as_key(found) == as_key([array[: start + 3] for array in whole])
  assert found[2].sum() == 3
  # Too short for any answer's first word, hence for either example.
  with pytest.raises(
    config_lib.ConfigError,
    match=rf"caption: none of 2 .* text.sequence_length={start}.*raise it",
  ):
    make(
      images,
      word_tokenizer,
      weights={"caption": 1.0},
      source_weights=(1,),
      sequence_length=start,
      texts=(),
    )


@pytest.mark.parametrize("task", ["decompression", "unconditional"])
def test_an_image_to_draw_is_never_cut(make_source, word_tokenizer, task):
  images = one_source(make_source, sources.Annotation())
  (example,) = tasks.image_examples(
    task, images[0], positions=POSITIONS, segments=2, questions_per_image=1
  )
  needed = length_of(word_tokenizer, *example.turns)
  options = {"weights": {task: 1.0}, "source_weights": (1,), "texts": ()}
  with pytest.raises(config_lib.ConfigError) as error:
    make(images, word_tokenizer, sequence_length=needed - 1, **options)
  for fragment in (
    f"{task} takes {needed} positions",
    f"text.sequence_length={needed - 1}",
    f"at least {needed}",
    f"instruct.tasks.{task}=0",
  ):
    assert fragment in str(error.value)
  made = make(images, word_tokenizer, sequence_length=needed, **options)
  assert made.row(0, 0, None)["image_mask"].sum() == PER_IMAGE


def test_a_long_caption_to_draw_is_left_out_and_named(
  make_source, word_tokenizer, caplog
):
  images = one_source(
    make_source,
    sources.Annotation(captions=("x y z",)),
    sources.Annotation(captions=("x y z and more and more",)),
  )
  needed = length_of(word_tokenizer, ("Draw: x y z", WHOLE))
  options = {
    "weights": {"text_to_image": 1.0},
    "source_weights": (1,),
    "texts": (),
  }
  with caplog.at_level("INFO"):
    made = make(images, word_tokenizer, sequence_length=needed, **options)
  assert [e.item for e in made.groups[0].examples] == [0]
  assert "1 of 2 examples are longer" in caplog.text
  assert ": 1 left out, the others cut short" in caplog.text
  with pytest.raises(
    config_lib.ConfigError, match="text_to_image: none of 2 examples"
  ):
    make(images, word_tokenizer, sequence_length=needed - 1, **options)


@pytest.mark.parametrize("task", ["text_to_image", "vqa"])
def test_a_full_row_has_room_for_whatever_is_drawn(make_source, bpe, task):
  """The unconditional question, or another one first, may be longer."""
  said = sources.Annotation(
    captions=("a",), dialogues=((("x", "No."),), (("a", "No."),))
  )
  images = one_source(make_source, *[said] * 6)
  if task == "vqa":
    first = ((*WHOLE, "x"), "No."), ("a", "No.")
    longer = ((*WHOLE, "a"), "No."), ("x", "No.")
  else:
    first = (("Draw: a", WHOLE),)
    longer = ((tasks.UNCONDITIONAL, WHOLE),)
  short, long = length_of(bpe, *first), length_of(bpe, *longer)
  assert short < long
  made = make(
    images,
    bpe,
    weights={task: 1.0},
    source_weights=(1,),
    texts=(),
    sequence_length=short + long,
    condition_dropout=0.5,
  )
  lengths = set()
  for seed in range(20):
    for index in range(len(made.groups[0])):
      row = made.row(0, index, np.random.default_rng(seed))
      lengths.add(int((row["segment_ids"] == 1).sum()))
  assert lengths == {short, long}


def test_real_images_and_questions(openmoji, easy_vqa, bpe):
  """Rows of the embedded data: whole images, nothing too long."""

  def few(source):
    return dataclasses.replace(
      source, items=source.items[:150], annotations=source.annotations[:150]
    )

  real = few(openmoji[0]), few(easy_vqa[0])
  made = make(real, bpe, sequence_length=60, condition_dropout=0.3)
  drawn = {g.name for g in made.groups}
  assert drawn == set(tasks.TASKS)
  opened, closed = bpe.token_id("<image>"), bpe.token_id("</image>")
  batches = take(iterate(made, global_batch_size=16), 25)
  for batch in batches:
    assert (batch["token_ids"] < FIRST_SLOT + made.max_images * PER_IMAGE).all()
    for row in range(16):
      segments = batch["segment_ids"][row]
      assert segments.max() >= 1
      used = set()
      for segment in range(1, segments.max() + 1):
        here = segments == segment
        ids = batch["token_ids"][row][here]
        labels = batch["labels"][row][here]
        assert batch["loss_mask"][row][here].any()
        first = np.concatenate([ids[:1, 0], labels])
        assert (first == opened).sum() == (first == closed).sum()
        slots = {*ids[ids >= FIRST_SLOT], *labels[labels >= FIRST_SLOT]}
        # Whole images, and no two conversations show the same.
        assert len(slots) % PER_IMAGE == 0 and not slots & used
        used |= slots
      images = len(used) // PER_IMAGE
      assert used == set(range(FIRST_SLOT, FIRST_SLOT + images * PER_IMAGE))
      shown = batch["images"][row].reshape(made.max_images, -1).any(axis=1)
      assert shown.sum() == images


WORDS = st.text("ab ", max_size=12)


@given(
  st.lists(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
  ),
  st.integers(12, 60),
  st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=150)
def test_no_row_holds_a_part_of_an_image(bpe, said, length, seed):
  """Nor a conversation without an answer, however short rows are."""
  examples = [
    tasks.Example(i, turns, reads=True, independent=True)
    for i, turns in enumerate(said)
  ]
  settings_ = config(sequence_length=length, first_slot=bpe.vocab_size)
  try:
    rows = mixture.TaskRows("vqa", examples, bpe, settings_)
  except config_lib.ConfigError as error:
    assert "text.sequence_length" in str(error)
    return
  rng = np.random.default_rng(seed)
  for index in range(len(rows)):
    row, shown = rows.build(index, rng)
    ids = row["token_ids"]
    wanted = np.arange(len(shown) * PER_IMAGE) + bpe.vocab_size
    assert sorted(ids[ids >= bpe.vocab_size]) == wanted.tolist()
    assert len(shown) == row["segment_ids"].max() <= rows.max_images
    for segment in range(1, len(shown) + 1):
      inside = row["segment_ids"] == segment
      assert row["loss_mask"][inside].any()
