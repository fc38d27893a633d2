"""Iterators: sharding, exact resume, mixture, augmentation, held-out text."""

import itertools
import pickle

from absl import flags
import numpy as np
import pytest

from unicode_jax.data import pipeline
from unicode_jax.data.sequences import Conversation

CONVERSATIONS = [
  Conversation(((f"q{i} " * (i % 5 + 1), f"a{i}"),)) for i in range(23)
]


def image_batches(sources, weights=(1, 1), count=8, **kwargs):
  kwargs = {"global_batch_size": 8, "seed": 0, **kwargs}
  iterator = pipeline.image_iterator(sources, weights, **kwargs)
  return [b["image"] for b in itertools.islice(iterator, count)]


def red(images):
  """The images' numbers; see `make_source`."""
  return np.round((images[..., 0].mean((1, 2)) + 1) * 127.5).astype(int)


@pytest.fixture
def sources(make_source):
  return [make_source("a", 10), make_source("b", 7, first=100)]


AUGMENTED = {"flip": True, "crop_scale": 0.4}


@pytest.mark.parametrize("process_count", [2, 4])
def test_shards_join_to_the_single_process_batch(sources, process_count):
  whole = image_batches(sources, **AUGMENTED)
  shards = [
    image_batches(
      sources, process_index=i, process_count=process_count, **AUGMENTED
    )
    for i in range(process_count)
  ]
  for step, batch in enumerate(whole):
    parts = [shard[step] for shard in shards]
    assert {len(part) for part in parts} == {8 // process_count}
    np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_shards_are_disjoint(make_source):
  source = [make_source("a", 32)]
  seen = [
    np.concatenate(
      [
        red(b)
        for b in image_batches(
          source, [1], count=4, process_index=i, process_count=2
        )
      ]
    )
    for i in range(2)
  ]
  assert len(seen[0]) == len(seen[1]) == 16
  assert set(seen[0]) | set(seen[1]) == set(range(32))


def test_image_iterator_resumes_mid_epoch(sources):
  flags.FLAGS.mark_as_parsed()  # Grain's worker processes read them.

  def fresh(**kwargs):
    return pipeline.image_iterator(
      sources, (1, 1), global_batch_size=4, seed=3, **AUGMENTED, **kwargs
    )

  straight = [b["image"] for b in itertools.islice(fresh(), 12)]
  for process_count, num_workers in ((1, 0), (2, 0), (4, 0), (1, 2)):
    resumed = [
      fresh(
        process_index=i,
        process_count=process_count,
        num_workers=num_workers,
        start=5,
      )
      for i in range(process_count)
    ]
    for expected in straight[5:]:
      got = np.concatenate([next(part)["image"] for part in resumed])
      np.testing.assert_array_equal(got, expected)


def test_every_epoch_is_complete_and_in_another_order(make_source):
  batches = image_batches(
    [make_source("a", 12)], [1], count=3, global_batch_size=12
  )
  orders = [red(b).tolist() for b in batches]
  assert all(sorted(order) == list(range(12)) for order in orders)
  assert orders[0] != orders[1] != orders[2]


def test_seed_decides_the_order(sources):
  first, again, other = (image_batches(sources, seed=s) for s in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_weights_are_the_mixture(sources):
  for weights, share in (((3, 1), 0.25), ((1, 0), 0), ((0.2, 0.6), 0.75)):
    numbers = np.concatenate(
      [red(b) for b in image_batches(sources, weights, count=20)]
    )
    assert abs((numbers >= 100).mean() - share) < 0.02


def test_pixels_are_floats_from_minus_one_to_one(sources):
  batch = image_batches(sources, flip=False, count=1)[0]
  assert batch.dtype == np.float32 and batch.shape == (8, 4, 4, 3)
  assert batch.min() == -1 and batch.max() == 1
  np.testing.assert_array_equal(
    pipeline.to_float(np.array([0, 51, 255], np.uint8)),
    np.array([-1, -0.6, 1], np.float32),
  )


def test_flip_mirrors_half(sources):
  batches = np.concatenate(image_batches(sources, count=50))
  mirrored = batches[:, 0, -1, 1] == 1
  kept = batches[:, 0, 0, 1] == 1
  assert (mirrored != kept).all()
  assert 0.4 < mirrored.mean() < 0.6
  unflipped = np.concatenate(image_batches(sources, count=50, flip=False))
  assert (unflipped[:, 0, 0, 1] == 1).all()


def test_shift_goes_everywhere_up_to_its_size(sources):
  image = np.zeros((9, 9, 3), np.uint8)
  image[4, 4] = 255
  shift = pipeline.RandomShift(2)
  rng = np.random.default_rng(0)
  places = set()
  for _ in range(500):
    moved = shift.random_map({"image": image}, rng)["image"]
    assert moved.shape == image.shape and moved.dtype == np.uint8
    ((row, column),) = np.argwhere(moved[..., 0])
    places.add((row - 4, column - 4))
  assert places == {(r, c) for r in range(-2, 3) for c in range(-2, 3)}
  still = np.concatenate(image_batches(sources, count=5, flip=False))
  moved = np.concatenate(image_batches(sources, count=5, flip=False, shift=2))
  assert still.shape == moved.shape and (still != moved).any()


def test_crop_takes_at_least_its_share():
  # A ramp: the spread of a crop's values says how wide it is.
  ramp = np.repeat(np.arange(0, 256, 4, np.uint8)[None, :], 64, 0)
  image = np.repeat(ramp[..., None], 3, -1)
  crop = pipeline.RandomResizedCrop(0.25)
  rng = np.random.default_rng(0)
  widths, lefts = [], []
  for _ in range(100):
    out = crop.random_map({"image": image}, rng)["image"]
    assert out.shape == image.shape and out.dtype == np.uint8
    row = out[32, :, 0].astype(float)
    widths.append((row[63] - row[0]) / 252)
    lefts.append(row[0])
  assert 0.48 < min(widths) < 0.6 and 0.95 < max(widths) <= 1.01
  assert np.std(lefts) > 10


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"weights": (1,)}, "one weight per source"),
    ({"weights": (0, 0)}, "at least one above 0"),
    ({"weights": (1, -1)}, ">= 0"),
    ({"crop_scale": 0.0}, r"\(0, 1\]"),
    ({"crop_scale": 1.5}, r"\(0, 1\]"),
    ({"process_count": 3}, "global_batch_size 8 must be a multiple"),
    ({"process_index": 2, "process_count": 2}, "process_index 2"),
  ],
)
def test_bad_arguments(sources, kwargs, message):
  with pytest.raises(ValueError, match=message):
    image_batches(sources, **kwargs)


def test_bad_sources(make_source):
  with pytest.raises(ValueError, match="empty_one has no training images"):
    image_batches([make_source("a", 3), make_source("empty_one", 0)])
  with pytest.raises(ValueError, match="differ in size"):
    image_batches([make_source("a", 3), make_source("b", 3, size=8)])


def test_pickled_source_carries_no_pixels(make_source):
  source = make_source("a", 200, size=32)
  before = source[7]["image"]
  pickled = pickle.dumps(source)
  assert len(pickled) < 20_000 < source.images().nbytes
  np.testing.assert_array_equal(pickle.loads(pickled)[7]["image"], before)


def text_iterator(tokenizer, **kwargs):
  rows = pipeline.PackedText(CONVERSATIONS, tokenizer, 20)
  kwargs = {"global_batch_size": 4, "seed": 0, **kwargs}
  return pipeline.text_iterator(rows, **kwargs)


def segments(batches):
  """Returns the inputs of every segment of every row."""
  found = []
  for batch in batches:
    for row, ids in enumerate(batch["segment_ids"]):
      for segment in range(1, ids.max() + 1):
        tokens = batch["token_ids"][row, ids == segment, 0]
        found.append(tuple(tokens.tolist()))
  return found


def test_text_batches_have_the_promised_form(word_tokenizer):
  batch = next(text_iterator(word_tokenizer))
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    "token_ids": ("int32", (4, 20, 1)),
    "labels": ("int32", (4, 20)),
    "loss_mask": ("float32", (4, 20)),
    "image_mask": ("bool", (4, 20)),
    "positions": ("int32", (4, 20)),
    "segment_ids": ("int32", (4, 20)),
  }
  padding = batch["segment_ids"] == 0
  assert ((batch["token_ids"][..., 0] == -1) == padding).all()
  assert (batch["loss_mask"][padding] == 0).all()
  # Inside a segment the target of t is the input of t + 1.
  same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
  same &= ~padding[:, 1:]
  np.testing.assert_array_equal(
    batch["token_ids"][:, 1:, 0][same], batch["labels"][:, :-1][same]
  )
  np.testing.assert_array_equal(
    (batch["positions"][:, 1:] - batch["positions"][:, :-1])[same], 1
  )


def test_text_shards_and_resume(word_tokenizer):
  def take(iterator, count):
    return list(itertools.islice(iterator, count))

  whole = take(text_iterator(word_tokenizer), 9)
  parts = [
    take(text_iterator(word_tokenizer, process_index=i, process_count=2), 9)
    for i in range(2)
  ]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      np.testing.assert_array_equal(
        np.concatenate([part[step][key] for part in parts]), value
      )
  resumed = text_iterator(word_tokenizer, start=4)
  for batch, expected in zip(take(resumed, 5), whole[4:], strict=True):
    for key, value in expected.items():
      np.testing.assert_array_equal(batch[key], value)


@pytest.mark.parametrize("process_count", [1, 2])
def test_heldout_batches_hold_every_item_once(word_tokenizer, process_count):
  shards = [
    pipeline.heldout_text_batches(
      CONVERSATIONS,
      word_tokenizer,
      sequence_length=20,
      global_batch_size=4,
      process_index=i,
      process_count=process_count,
    )
    for i in range(process_count)
  ]
  assert len({len(shard) for shard in shards}) == 1
  shapes = {b["labels"].shape for shard in shards for b in shard}
  assert shapes == {(4 // process_count, 20)}
  expected = [
    (
      1,
      *word_tokenizer.encode(f"User: {c.turns[0][0]}\nAssistant:"),
      *word_tokenizer.encode(" " + c.turns[0][1]),
    )
    for c in CONVERSATIONS
  ]
  found = [s for shard in shards for s in segments(shard)]
  assert sorted(found) == sorted(expected)


def test_long_conversations_are_cut_and_dropped_without_an_answer(
  word_tokenizer,
):
  cut = Conversation((("q", "a b c d e f g h"),))
  hopeless = Conversation((("q " * 30, "a"),))
  batches = pipeline.heldout_text_batches(
    [cut, hopeless], word_tokenizer, sequence_length=9, global_batch_size=1
  )
  assert len(batches) == 1
  # <s> User : q \nAssistant : a b c, predicting a b c d.
  assert batches[0]["loss_mask"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
  with pytest.raises(ValueError, match="none of 1 conversations has an answer"):
    pipeline.heldout_text_batches(
      [hopeless], word_tokenizer, sequence_length=9, global_batch_size=1
    )
