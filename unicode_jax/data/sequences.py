r"""Conversations as token sequences: template, loss mask, packing.

The template is plain text, so that it fits any vocabulary and adds no token:

    <s>User: QUESTION\nAssistant: ANSWER</s>User: QUESTION\nAssistant: ...

Each piece between control tokens is tokenised on its own, which makes the
border of an answer exact: no token straddles it. The target of position t is
the next token of the same conversation, and counts in the loss when it belongs
to an answer or is the </s> that ends one. Drawn for "Hi" -> "Yes", with one
token a word, and a second conversation packed behind it:

    column       0    1    2   3    4     5   6    | 7    8    9   ... pad
    token_ids    <s>  User :   Hi   \nAss :   Yes  | <s>  User :   ... -1
    labels       User :    Hi  \nAss :    Yes </s> | User :    A   ...  0
    loss_mask    0    0    0   0    0     1   1    | 0    0    0   ...  0
    positions    0    1    2   3    4     5   6    | 0    1    2   ...  0
    segment_ids  1    1    1   1    1     1   1    | 2    2    2   ...  0

The final </s> is a target only, so a conversation of n tokens takes n - 1
positions. Pure numpy and text only: images inside conversations belong to stage
II. A user who types "\nAssistant:" can imitate a turn, as in every plain-text
template; control tokens cannot be imitated (`TextTokenizer.encode`).
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from unicode_jax import config as config_lib

USER_PREFIX = "User: "
ASSISTANT_PREFIX = "\nAssistant:"
ANSWER_PREFIX = " "


class Encoder(Protocol):
  """What this file needs of a text tokenizer."""

  bos_id: int | None
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Returns ids none of which is a control token."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A text-only conversation.

  Attributes:
    turns: (question, answer) pairs, in order; at least one.
  """

  turns: tuple[tuple[str, str], ...]


class EncodedConversation(NamedTuple):
  """A conversation of n positions, before padding.

  Attributes:
    token_ids: int32[n], the input of each position.
    labels: int32[n], the token that each position must predict.
    loss_mask: float32[n], 1 where that token belongs to an answer or ends one.
  """

  token_ids: np.ndarray
  labels: np.ndarray
  loss_mask: np.ndarray


def prompt_text(question: str) -> str:
  """Returns the text that asks; the model continues it with its answer."""
  return f"{USER_PREFIX}{question}{ASSISTANT_PREFIX}"


def conversation_text(conversation: Conversation) -> str:
  """Returns a conversation as text without control tokens."""
  return "\n".join(
    prompt_text(question) + ANSWER_PREFIX + answer
    for question, answer in conversation.turns
  )


def encode_conversation(
  conversation: Conversation, tokenizer: Encoder
) -> EncodedConversation:
  """Tokenises one conversation (the module's docstring draws the result).

  Args:
    conversation: at least one turn.
    tokenizer: see `Encoder`.
  """
  ids, answer = [], []

  def extend(new_ids, is_answer):
    ids.extend(new_ids)
    answer.extend([is_answer] * len(new_ids))

  if tokenizer.bos_id is not None:
    extend([tokenizer.bos_id], False)
  for question, reply in conversation.turns:
    extend(tokenizer.encode(prompt_text(question)), False)
    extend(tokenizer.encode(ANSWER_PREFIX + reply), True)
    extend([tokenizer.eos_id], True)
  ids, answer = np.asarray(ids, np.int32), np.asarray(answer, np.float32)
  return EncodedConversation(ids[:-1], ids[1:], answer[1:])


def plan_packing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Assigns sequences to rows of `capacity` positions.

  Best fit, the longest first.

  Packing all at once instead of as a stream keeps every row addressable, so
  that the order does not depend on the number of processes and an iterator can
  be restored from one integer. With segment-aware attention it does not matter
  to a sequence which others share its row.

  Args:
    lengths: positions of each sequence, each in 1..capacity.
    capacity: T, positions of a row.

  Returns:
    One list of indices per row; each index occurs exactly once. Deterministic.

  Raises:
    ConfigError: a length is outside 1..capacity.
  """
  rows: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    length = lengths[index]
    if not 0 < length <= capacity:
      raise config_lib.ConfigError(
        f"sequence {index} has {length} positions, a row has {capacity}: cut "
        "or drop it before packing"
      )
    for room in range(length, capacity + 1):
      if with_room[room]:
        row = with_room[room].pop()
        rows[row].append(index)
        break
    else:
      room, row = capacity, len(rows)
      rows.append([index])
    with_room[room - length].append(row)
  return rows


def pack_row(
  conversations: Sequence[EncodedConversation], sequence_length: int
) -> dict[str, np.ndarray]:
  """Lays conversations side by side in one row of `sequence_length` positions.

  Args:
    conversations: their lengths sum to at most T; may be empty (all padding).
    sequence_length: T.

  Returns:
    token_ids int32[T, 1] (-1 = padding), labels int32[T] (0 on padding),
    loss_mask float32[T], positions int32[T] (restart at every segment),
    segment_ids int32[T] (1, 2, ...; 0 = padding).
  """
  row = {
    "token_ids": np.full((sequence_length, 1), -1, np.int32),
    "labels": np.zeros(sequence_length, np.int32),
    "loss_mask": np.zeros(sequence_length, np.float32),
    "positions": np.zeros(sequence_length, np.int32),
    "segment_ids": np.zeros(sequence_length, np.int32),
  }
  start = 0
  for segment, conversation in enumerate(conversations, 1):
    stop = start + len(conversation.labels)
    row["token_ids"][start:stop, 0] = conversation.token_ids
    row["labels"][start:stop] = conversation.labels
    row["loss_mask"][start:stop] = conversation.loss_mask
    row["positions"][start:stop] = np.arange(stop - start)
    row["segment_ids"][start:stop] = segment
    start = stop
  return row
