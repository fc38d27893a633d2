"""Template, loss mask and packing, by hand-written cases."""

from hypothesis import given, strategies as st
import numpy as np
import pytest

from unicode_jax.data import sequences
from unicode_jax.data.sequences import Conversation


def names(tokenizer, ids):
  known = {id_: word for word, id_ in tokenizer.words.items()}
  known |= {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", -1: "pad"}
  return [known[int(id_)] for id_ in ids]


def test_one_turn_is_what_the_docstring_draws(word_tokenizer):
  encoded = sequences.encode_conversation(
    Conversation((("Hi", "Yes"),)), word_tokenizer
  )
  assert names(word_tokenizer, encoded.token_ids) == (
    ["<s>", "User", ":", "Hi", "\nAssistant", ":", "Yes"]
  )
  assert names(word_tokenizer, encoded.labels) == (
    ["User", ":", "Hi", "\nAssistant", ":", "Yes", "</s>"]
  )
  assert encoded.loss_mask.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_two_turns_learn_every_answer_and_its_end_only(word_tokenizer):
  encoded = sequences.encode_conversation(
    Conversation((("a", "b c"), ("d", "e"))), word_tokenizer
  )
  learnt = encoded.labels[encoded.loss_mask == 1]
  assert names(word_tokenizer, learnt) == ["b", "c", "</s>", "e", "</s>"]
  # The input before the first learnt token is the end of the prompt, and the
  # first </s> is an input too, whose target (the next question) is not learnt.
  inputs = names(word_tokenizer, encoded.token_ids)
  at = inputs.index("</s>")
  assert names(word_tokenizer, encoded.labels)[at] == "User"
  assert encoded.loss_mask[at] == 0
  first = int(encoded.loss_mask.argmax())
  assert inputs[first] == ":" and inputs[first - 1] == "\nAssistant"


def test_a_vocabulary_without_bos(word_tokenizer):
  word_tokenizer.bos_id = None
  encoded = sequences.encode_conversation(
    Conversation((("a", "b"),)), word_tokenizer
  )
  assert names(word_tokenizer, encoded.token_ids)[0] == "User"
  assert encoded.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]


def test_the_prompt_is_a_prefix_of_the_conversation(word_tokenizer):
  """Decoding starts from exactly what training showed."""
  encoded = sequences.encode_conversation(
    Conversation((("a", "b"),)), word_tokenizer
  )
  prompt = [1, *word_tokenizer.encode(sequences.prompt_text("a"))]
  assert encoded.token_ids[: len(prompt)].tolist() == prompt
  assert encoded.loss_mask[len(prompt) - 1] == 1
  assert encoded.loss_mask[len(prompt) - 2] == 0


def test_packed_row_by_hand():
  def conversation(*ids):
    ids = np.array(ids, np.int32)
    mask = np.array([0] * (len(ids) - 2) + [1], np.float32)
    return sequences.EncodedConversation(ids[:-1], ids[1:], mask)

  row = sequences.pack_row([conversation(5, 6, 7), conversation(8, 9, 4, 3)], 7)
  assert row["token_ids"].tolist() == [[5], [6], [8], [9], [4], [-1], [-1]]
  assert row["labels"].tolist() == [6, 7, 9, 4, 3, 0, 0]
  assert row["loss_mask"].tolist() == [0, 1, 0, 0, 1, 0, 0]
  assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0]
  assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0, 0]
  assert {key: value.dtype for key, value in row.items()} == {
    "token_ids": np.int32,
    "labels": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
  }


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
