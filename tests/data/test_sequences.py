"""Templates, loss mask, images, slots and packing, by hand-written cases.

The words of the tasks are in `test_tasks`; here is what holds for any
conversation, and what the module's docstring draws.
"""

import dataclasses

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from unicode_jax import config as config_lib
from unicode_jax.data import sequences
from unicode_jax.data.sequences import Conversation, ImageSpan

IMAGE = ImageSpan()
# P = 2 positions of D = 2 codes: the docstring's ((a, b), (c, d)).
A, B, C, D = 101, 102, 103, 104
CODES = np.array([[A, B], [C, D]], np.int32)
PAIRS = sequences.SequenceFormat(depth=2)
TEMPLATES = sorted(sequences.TEMPLATES)


def layout(template, **options):
  return sequences.SequenceFormat(sequences.TEMPLATES[template], **options)


def test_a_read_image_is_what_the_docstring_draws(word_tokenizer):
  encoded = sequences.encode_conversation(
    Conversation(((("Look", IMAGE), "Yes"),)), word_tokenizer, PAIRS, [CODES]
  )
  word = word_tokenizer.words
  user, colon, look = word["User"], word[":"], word["Look"]
  answers, yes = word["\nAssistant"], word["Yes"]
  # fmt: off
  assert encoded.token_ids.tolist() == [
    [1, -1], [user, -1], [colon, -1], [look, -1], [3, -1],
    [A, B], [C, D], [4, -1], [answers, -1], [colon, -1], [yes, -1],
  ]
  assert encoded.labels.tolist() == [
    user, colon, look, 3, A, C, 4, answers, colon, yes, 2,
  ]
  assert encoded.loss_mask.tolist() == [0] * 9 + [1, 1]
  # fmt: on
  assert not encoded.image_mask.any()


def test_a_drawn_image_is_what_the_docstring_draws(word_tokenizer):
  encoded = sequences.encode_conversation(
    Conversation((("Draw", (IMAGE,)),)), word_tokenizer, PAIRS, [CODES]
  )
  word = word_tokenizer.words
  user, colon, draw = word["User"], word[":"], word["Draw"]
  answers = word["\nAssistant"]
  # fmt: off
  assert encoded.token_ids.tolist() == [
    [1, -1], [user, -1], [colon, -1], [draw, -1], [answers, -1], [colon, -1],
    [3, -1], [A, -1], [B, -1], [C, -1], [D, -1], [4, -1],
  ]
  assert encoded.labels.tolist() == [
    user, colon, draw, answers, colon, 3, A, B, C, D, 4, 2,
  ]
  assert encoded.loss_mask.tolist() == [0] * 5 + [1] * 7
  assert encoded.image_mask.tolist() == [False] * 6 + [True] * 4 + [False] * 2
  # fmt: on


def test_a_packed_row_is_what_the_docstring_draws(word_tokenizer):
  first, second = (
    sequences.encode_conversation(
      Conversation(((question, "Yes"),)), word_tokenizer, PAIRS, [CODES]
    )
    for question in (("Look", IMAGE), "b")
  )
  row = sequences.pack_row([first, second], 20, depth=2)
  n, m = len(first.labels), len(second.labels)
  assert (n, m) == (11, 7)
  assert row["positions"].tolist() == [*range(n), *range(m), 0, 0]
  assert row["segment_ids"].tolist() == [1] * n + [2] * m + [0] * 2
  for name, fill in (
    ("token_ids", -1),
    ("labels", 0),
    ("loss_mask", 0),
    ("image_mask", False),
  ):
    one, two = getattr(first, name), getattr(second, name)
    np.testing.assert_array_equal(row[name][:n], one)
    np.testing.assert_array_equal(row[name][n : n + m], two)
    assert (row[name][n + m :] == fill).all()
  assert {key: value.dtype for key, value in row.items()} == {
    "token_ids": np.int32,
    "labels": np.int32,
    "loss_mask": np.float32,
    "image_mask": bool,
    "positions": np.int32,
    "segment_ids": np.int32,
  }
  empty = sequences.pack_row([], 3, depth=2)
  assert (empty["token_ids"] == -1).all() and not empty["segment_ids"].any()


def test_two_turns_learn_every_answer_and_its_end_only(word_tokenizer):
  encoded = sequences.encode_conversation(
    Conversation((("a", "b c"), ("d", "e"))), word_tokenizer, PAIRS
  )
  word_tokenizer.check(
    encoded,
    r"<s> User : a \nAssistant : !b !c !</s>"
    r" User : d \nAssistant : !e !</s>",
  )


def test_a_vocabulary_without_bos(word_tokenizer):
  word_tokenizer.bos_id = None
  encoded = sequences.encode_conversation(
    Conversation((("a", "b"),)), word_tokenizer, PAIRS
  )
  word_tokenizer.bos_id = 1
  word_tokenizer.check(encoded, r"User : a \nAssistant : !b !</s>")


def test_images_anywhere_in_a_turn(word_tokenizer):
  """Several images and stretches of one, between words, in both directions."""
  other = CODES + 100
  encoded = sequences.encode_conversation(
    Conversation(
      (
        (("a", ImageSpan(1), "b", IMAGE), ("c", ImageSpan(0, 1), "d")),
        ((ImageSpan(0, 0, 1),), (ImageSpan(1, 1, 2), "e")),
      )
    ),
    word_tokenizer,
    PAIRS,
    [CODES, other],
  )
  word_tokenizer.check(
    encoded,
    r"<s> User : a <image> 201+202 203+204 </image> b"
    r" <image> 101+102 103+104 </image> \nAssistant :"
    r" !c !<image> #103 #104 !</image> !d !</s>"
    r" User : <image> 101+102 </image> \nAssistant :"
    r" !<image> #203 #204 !</image> !e !</s>",
  )


def test_shifted_codes_leave_text_alone(word_tokenizer):
  conversation = Conversation(((("Look", IMAGE), ("so", IMAGE)),))
  plain, shifted = (
    sequences.encode_conversation(
      conversation, word_tokenizer, layout("plain", depth=2, **shift), [CODES]
    )
    for shift in ({}, {"codes_shift": 1000})
  )
  for name in ("token_ids", "labels"):
    before, after = getattr(plain, name), getattr(shifted, name)
    expected = np.where(before > 100, before + 1000, before)
    np.testing.assert_array_equal(after, expected)
    assert (after > 1100).any()


def test_delimiters_are_those_of_the_config(word_tokenizer):
  swapped = layout(
    "plain", depth=2, image_start="</image>", image_end="<|im_end|>"
  )
  encoded = sequences.encode_conversation(
    Conversation((("a", (IMAGE,)),)), word_tokenizer, swapped, [CODES]
  )
  word_tokenizer.check(
    encoded,
    r"<s> User : a \nAssistant : !</image> #101 #102 #103 #104"
    r" !<|im_end|> !</s>",
  )


def test_what_cannot_be_encoded(word_tokenizer):
  conversation = Conversation((((ImageSpan(1), "a"), "b"),))
  with pytest.raises(ValueError, match="shows image 1, but has codes of 1"):
    sequences.encode_conversation(conversation, word_tokenizer, PAIRS, [CODES])
  with pytest.raises(ValueError, match=r"shape \(2, 2\), not \[positions, 3\]"):
    sequences.encode_conversation(
      conversation, word_tokenizer, layout("plain", depth=3), [CODES] * 2
    )
  unknown = dataclasses.replace(PAIRS, image_start="<picture>")
  with pytest.raises(config_lib.ConfigError, match="no token '<picture>'"):
    sequences.encode_conversation(
      conversation, word_tokenizer, unknown, [CODES] * 2
    )


def test_text_cannot_open_an_image(bpe):
  """Delimiters and ends that a user types are words."""
  encoded = sequences.encode_conversation(
    Conversation((("<image> </s> <s>", "</image> </s>"),)), bpe, PAIRS
  )
  control = [bpe.bos_id, bpe.token_id("<image>"), bpe.token_id("</image>")]
  assert np.isin(encoded.token_ids[1:, 0], control).sum() == 0
  assert (encoded.labels == bpe.eos_id).tolist() == [
    *[False] * (len(encoded.labels) - 1),
    True,
  ]


def test_stop_ids(word_tokenizer):
  ends = {
    name: sequences.stop_id(word_tokenizer, template)
    for name, template in sequences.TEMPLATES.items()
  }
  assert ends == {"plain": 2, "vicuna": 2, "chatml": 6}


TEXTS = st.text("ab:.\n <>/s", max_size=8)
SPANS = st.builds(
  ImageSpan, st.integers(0, 1), st.integers(0, 2), st.none() | st.integers(2, 3)
)
PARTS = TEXTS | st.lists(TEXTS | SPANS, min_size=1, max_size=3).map(tuple)
TURNS = st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=3).map(tuple)
ARRAYS = (np.arange(6).reshape(3, 2) + 20, np.arange(6).reshape(3, 2) + 40)


def whole(encoded):
  """Returns all tokens, the last one included: int32[n + 1, D]."""
  last = np.full((1, encoded.token_ids.shape[1]), -1, np.int32)
  last[0, 0] = encoded.labels[-1]
  return np.concatenate([encoded.token_ids, last])


@given(TURNS, st.sampled_from(TEMPLATES))
@settings(deadline=None, max_examples=300)
def test_a_prompt_is_exactly_what_training_showed(bpe, turns, template):
  """Sampling begins where the loss does, at every turn of a conversation."""
  form = layout(template, depth=2)
  for count in range(1, len(turns) + 1):
    encoded = sequences.encode_conversation(
      Conversation(turns[:count]), bpe, form, ARRAYS
    )
    question, answer = turns[count - 1]
    context = Conversation(turns[: count - 1])
    prompt = sequences.encode_prompt(context, question, bpe, form, ARRAYS)
    n = len(prompt)
    np.testing.assert_array_equal(prompt, whole(encoded)[:n])
    # The answer begins right behind it, and not before.
    assert encoded.loss_mask[n - 1 :].all() and not encoded.loss_mask[n - 2]
    if isinstance(answer, tuple) and isinstance(answer[0], ImageSpan):
      opened = sequences.encode_prompt(
        context, question, bpe, form, ARRAYS, draw=True
      )
      assert len(opened) == n + 1
      np.testing.assert_array_equal(opened, whole(encoded)[: n + 1])
      span = answer[0]
      drawn = ARRAYS[span.index][span.start : span.stop].reshape(-1)
      np.testing.assert_array_equal(encoded.labels[n : n + len(drawn)], drawn)
      assert encoded.image_mask[n : n + len(drawn)].all()
      assert encoded.labels[n + len(drawn)] == bpe.token_id("</image>")


@given(TURNS, st.integers(0, 500))
@settings(deadline=None, max_examples=200)
def test_text_is_text_and_targets_are_the_next_inputs(bpe, turns, shift):
  """Invariants of any conversation, and what its words were."""
  form = layout("plain", depth=2, codes_shift=shift + bpe.vocab_size)
  encoded = sequences.encode_conversation(
    Conversation(turns), bpe, form, ARRAYS
  )
  np.testing.assert_array_equal(encoded.token_ids[1:, 0], encoded.labels[:-1])
  assert (encoded.loss_mask >= encoded.image_mask).all()
  is_code = whole(encoded)[:, 0] >= bpe.vocab_size
  np.testing.assert_array_equal(
    encoded.image_mask, is_code[1:] & (encoded.loss_mask > 0)
  )
  text = bpe.decode(whole(encoded)[~is_code, 0])
  said = ""
  for question, answer in turns:
    for prefix, parts in (("User: ", question), ("\nAssistant:", answer)):
      parts = (parts,) if isinstance(parts, str) else parts
      space = prefix == "\nAssistant:" and isinstance(parts[0], str)
      said += prefix + " " * space
      said += "".join(part for part in parts if isinstance(part, str))
  assert text == said


@given(
  TURNS,
  st.sampled_from(TEMPLATES),
  st.integers(0, 3),
  st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=200)
def test_filled_slots_are_the_codes(bpe, turns, template, place, seed):
  """A row with slots, filled, is the row that was encoded with the codes."""
  rng = np.random.default_rng(seed)
  first_slot = bpe.vocab_size
  positions, depth = 3, 2
  # Slots of two images that are not the first ones of their row.
  codes = rng.integers(0, first_slot, (place + 2, positions, depth), np.int32)
  stand_ins = sequences.slots(
    first_slot + place * positions * depth, 2, positions, depth
  )
  with_slots, with_codes = (
    sequences.encode_conversation(
      Conversation(turns), bpe, layout(template, depth=depth), arrays
    )
    for arrays in (stand_ins, codes[place:])
  )
  for name in ("token_ids", "labels"):
    filled = sequences.fill_slots(
      getattr(with_slots, name), codes.reshape(-1), first_slot
    )
    np.testing.assert_array_equal(filled, getattr(with_codes, name))
    assert filled.dtype == np.int32
  np.testing.assert_array_equal(with_slots.loss_mask, with_codes.loss_mask)
  np.testing.assert_array_equal(with_slots.image_mask, with_codes.image_mask)


WHOLE = TEXTS | st.lists(
  TEXTS | st.builds(ImageSpan, st.integers(0, 1)), min_size=1, max_size=3
).map(tuple)


@given(
  st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=3).map(tuple),
  st.sampled_from(TEMPLATES),
)
@settings(deadline=None, max_examples=200)
def test_an_image_takes_its_positions_wherever_it_stands(bpe, turns, template):
  """P where it is read, P D where it is drawn, and every slot each time."""
  positions, depth, first_slot = 3, 2, bpe.vocab_size
  stand_ins = sequences.slots(first_slot, 2, positions, depth)
  encoded = sequences.encode_conversation(
    Conversation(turns), bpe, layout(template, depth=depth), stand_ins
  )
  read, drawn = (
    [
      part.index
      for turn in turns
      for part in (turn[side] if isinstance(turn[side], tuple) else ())
      if isinstance(part, ImageSpan)
    ]
    for side in (0, 1)
  )
  ids = whole(encoded)
  assert (ids[:, 1] >= 0).sum() == len(read) * positions
  assert encoded.image_mask.sum() == len(drawn) * positions * depth
  wanted = [slot for i in read + drawn for slot in stand_ins[i].ravel()]
  assert sorted(ids[ids >= first_slot]) == sorted(wanted)


@given(
  st.lists(TURNS, min_size=1, max_size=5),
  st.sampled_from(TEMPLATES),
  st.integers(5, 90),
)
@settings(deadline=None, max_examples=200)
def test_rows_keep_conversations_apart_however_they_are_cut(
  bpe, conversations, template, capacity
):
  form = layout(template, depth=2)
  encoded = [
    sequences.encode_conversation(Conversation(turns), bpe, form, ARRAYS)
    for turns in conversations
  ]
  cut = [
    sequences.EncodedConversation(*(piece[:capacity] for piece in e))
    for e in encoded
  ]
  for chosen in sequences.plan_packing([len(e.labels) for e in cut], capacity):
    row = sequences.pack_row([cut[i] for i in chosen], capacity, 2)
    assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
      "token_ids": ("int32", (capacity, 2)),
      "labels": ("int32", (capacity,)),
      "loss_mask": ("float32", (capacity,)),
      "image_mask": ("bool", (capacity,)),
      "positions": ("int32", (capacity,)),
      "segment_ids": ("int32", (capacity,)),
    }
    start = 0
    for segment, i in enumerate(chosen, 1):
      stop = start + len(cut[i].labels)
      own = {name: values[start:stop] for name, values in row.items()}
      assert (own["segment_ids"] == segment).all()
      assert own["positions"].tolist() == list(range(stop - start))
      for name, values in cut[i]._asdict().items():
        np.testing.assert_array_equal(own[name], values)
      # The next input of the same conversation, also where it was cut off.
      np.testing.assert_array_equal(own["token_ids"][1:, 0], own["labels"][:-1])
      assert own["labels"][-1] == whole(encoded[i])[stop - start, 0]
      start = stop
    padding = {name: values[start:] for name, values in row.items()}
    assert (padding.pop("token_ids") == -1).all()
    assert not any(values.any() for values in padding.values())
    assert (row["loss_mask"] >= row["image_mask"]).all()


def test_slots_are_counted_like_codes():
  one, two = sequences.slots(50, 2, 2, 3)
  assert one.tolist() == [[50, 51, 52], [53, 54, 55]]
  assert two.tolist() == [[56, 57, 58], [59, 60, 61]]
  assert one.dtype == np.int32


def test_packed_row_by_hand():
  def conversation(*ids):
    ids = np.array(ids, np.int32)
    mask = np.array([0] * (len(ids) - 2) + [1], np.float32)
    return sequences.EncodedConversation(
      ids[:-1, None], ids[1:], mask, mask == 1
    )

  row = sequences.pack_row([conversation(5, 6, 7), conversation(8, 9, 4, 3)], 7)
  assert row["token_ids"].tolist() == [[5], [6], [8], [9], [4], [-1], [-1]]
  assert row["labels"].tolist() == [6, 7, 9, 4, 3, 0, 0]
  assert row["loss_mask"].tolist() == [0, 1, 0, 0, 1, 0, 0]
  assert row["image_mask"].tolist() == [0, 1, 0, 0, 1, 0, 0]
  assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0]
  assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0, 0]


@given(
  st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(
      st.just(capacity), st.lists(st.integers(1, capacity), max_size=60)
    )
  )
)
def test_packing_holds_everything_once_within_capacity(case):
  capacity, lengths = case
  rows = sequences.plan_packing(lengths, capacity)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  filled = [sum(lengths[i] for i in row) for row in rows]
  assert all(0 < total <= capacity for total in filled)
  # Best fit never leaves two rows that would fit in one.
  filled.sort()
  assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_packing_prefers_the_tightest_row():
  # 6 leaves 4, 7 leaves 3: the 3 belongs behind the 7, then the 4 fits too.
  assert sequences.plan_packing([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("length", [0, 6])
def test_packing_refuses_what_fits_nowhere(length):
  with pytest.raises(ValueError, match=f"sequence 1 has {length} positions"):
    sequences.plan_packing([1, length], 5)
