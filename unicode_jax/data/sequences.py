r"""Conversations as token sequences: templates, loss mask, images, packing.

METHOD section 4's stacked ids: a position holds up to D ids, -1 where there are
fewer. Text takes one id a position. An image of P grid positions takes P
positions of D ids where it is read, and P D positions of one id where it is
drawn, position by position with depth innermost. Both lie between the tokens
that open and close an image. Drawn for the plain template, one token a word,
P = 2 and D = 2, with codes ((a, b), (c, d)):

  read    "Look" + image -> "Yes"
    column       0    1      2    3      4      5      6     7     | 8
    token_ids    <s>  User:  Look <im>   a b    c d    </im> \nAs: | Yes
    labels       User: Look  <im> a      c      </im>  \nAs: Yes   | </s>
    loss_mask    0    0      0    0      0      0      0     1     | 1

  drawn   "Draw" -> image
    column       0    1      2     3     4   5   6   7   8      9
    token_ids    <s>  User:  Draw  \nAs: <im> a  b   c   d      </im>
    labels       User: Draw  \nAs: <im>  a   b   c   d   </im>  </s>
    loss_mask    0    0      0     1     1   1   1   1   1      1
    image_mask   0    0      0     0     1   1   1   1   0      0

The target of a position is the first id of the next position of the same
conversation, and counts in the loss when that position belongs to an answer or
ends one. `image_mask` marks the targets that are codes of a drawn image. The
final token is a target only, so n tokens take n - 1 positions.

Every piece of text between control tokens and images is tokenised on its own,
which makes the border of an answer exact: no token straddles it. A conversation
packed behind another restarts `positions` at 0 and has a segment id of its own:

    token_ids    <s> User: ... Yes | <s> User: ... | -1
    positions    0   1     ... 8   | 0   1     ... | 0
    segment_ids  1   1     ... 1   | 2   2     ... | 0

Codes need not be known yet: `slots` stands in for them with ids behind the
vocabulary, which `fill_slots` replaces. Pure numpy. A user who types
"\nAssistant:" can imitate a turn, as in every plain-text template; control
tokens cannot be imitated (`TextTokenizer.encode`).
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from unicode_jax import config as config_lib


class Encoder(Protocol):
  """What this file needs of a text tokenizer."""

  bos_id: int | None
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Returns ids none of which is a control token."""

  def token_id(self, name: str) -> int:
    """Returns the id of a token, spelled as in the vocabulary."""


@dataclasses.dataclass(frozen=True)
class ImageSpan:
  """An image, or a stretch of its positions, inside a message.

  Attributes:
    index: which of the conversation's images.
    start: first grid position, row-major.
    stop: one past the last; None for the end of the image.
  """

  index: int = 0
  start: int = 0
  stop: int | None = None


Parts = str | tuple[str | ImageSpan, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Questions and answers, of text and images.

  Attributes:
    turns: (question, answer) pairs, in order; at least one. Each is text, or a
      tuple of texts and `ImageSpan`s: images in a question are read, images in
      an answer are drawn.
  """

  turns: tuple[tuple[Parts, Parts], ...]


@dataclasses.dataclass(frozen=True)
class Control:
  """A control token inside a template: its name, or "bos" or "eos"."""

  name: str


@dataclasses.dataclass(frozen=True)
class Template:
  """How turns are laid out.

  Attributes:
    name: for configs.
    opening: before the first turn.
    question: before each question.
    answer: between question and answer.
    prefix: of the text of an answer; counts as the answer's.
    end: control token that ends an answer, and where sampling stops.
    closing: after it; not learned.
  """

  name: str
  opening: tuple[str | Control, ...]
  question: tuple[str | Control, ...]
  answer: tuple[str | Control, ...]
  prefix: str
  end: Control
  closing: tuple[str | Control, ...] = ()


TEMPLATES = {
  template.name: template
  for template in (
    Template(
      "plain",
      opening=(Control("bos"),),
      question=("User: ",),
      answer=("\nAssistant:",),
      prefix=" ",
      end=Control("eos"),
    ),
    Template(
      "vicuna",
      opening=(
        Control("bos"),
        "A chat between a curious user and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers "
        "to the user's questions. ",
      ),
      question=("USER: ",),
      answer=(" ASSISTANT:",),
      prefix=" ",
      end=Control("eos"),
    ),
    Template(
      "chatml",
      opening=(),
      question=(Control("<|im_start|>"), "user\n"),
      answer=(
        Control("<|im_end|>"),
        "\n",
        Control("<|im_start|>"),
        "assistant\n",
      ),
      prefix="",
      end=Control("<|im_end|>"),
      closing=("\n",),
    ),
  )
}
PLAIN = TEMPLATES["plain"]


class EncodedConversation(NamedTuple):
  """A conversation of n positions, before padding.

  Attributes:
    token_ids: int32[n, D], the input of each position; -1 pads D.
    labels: int32[n], the token that each position must predict.
    loss_mask: float32[n], 1 where that token belongs to an answer or ends one.
    image_mask: bool[n], where it is a code of a drawn image.
  """

  token_ids: np.ndarray
  labels: np.ndarray
  loss_mask: np.ndarray
  image_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class SequenceFormat:
  """How conversations become ids.

  Attributes:
    template: layout of turns.
    image_start: token that opens an image.
    image_end: token that closes one.
    depth: D, ids per position; 1 suffices for text alone.
    codes_shift: added to codes, but not to text: 0 where images and text share
      a vocabulary, K where codes have rows of their own.
  """

  template: Template = PLAIN
  image_start: str = "<image>"
  image_end: str = "</image>"
  depth: int = 1
  codes_shift: int = 0


def conversation_text(conversation: Conversation) -> str:
  """Returns the text of a conversation, plain and without control tokens."""

  def text(parts: Parts) -> str:
    parts = (parts,) if isinstance(parts, str) else parts
    return "".join(part for part in parts if isinstance(part, str))

  return "\n".join(
    f"User: {text(question)}\nAssistant: {text(answer)}"
    for question, answer in conversation.turns
  )


class _Writer:
  """Collects positions, and what of them is an answer.

  Lists until the end: every example of a data set passes through here, and a
  numpy call for each of its pieces would take far longer than tokenising.
  """

  def __init__(
    self,
    tokenizer: Encoder,
    layout: SequenceFormat,
    codes: Sequence[np.ndarray],
  ):
    self._tokenizer = tokenizer
    self._layout = layout
    self._codes = codes
    # The first id of each position; images that are read: (start, codes).
    self._first: list[int] = []
    self._stacked: list[tuple[int, np.ndarray]] = []
    # Stretches of positions, as slices.
    self._answers: list[slice] = []
    self._drawn: list[slice] = []
    self._text = ""
    self._text_is_answer = False

  def _extend(self, ids: Sequence[int], answer: bool) -> slice:
    """Adds positions by their first ids, and says where."""
    stretch = slice(len(self._first), len(self._first) + len(ids))
    self._first.extend(ids)
    if answer:
      self._answers.append(stretch)
    return stretch

  def flush(self) -> None:
    """Tokenises the text that has gathered since the last control token."""
    if self._text:
      self._extend(self._tokenizer.encode(self._text), self._text_is_answer)
    self._text = ""

  def text(self, text: str, answer: bool) -> None:
    """Adds text; neighbours are tokenised as one, answers apart."""
    if answer != self._text_is_answer:
      self.flush()
      self._text_is_answer = answer
    self._text += text

  def control(self, name: str, answer: bool = False) -> None:
    """Adds one control token."""
    self.flush()
    if name == "bos":
      token = self._tokenizer.bos_id
      if token is None:
        return
    elif name == "eos":
      token = self._tokenizer.eos_id
    else:
      token = self._tokenizer.token_id(name)
    self._extend([token], answer)

  def image(self, span: ImageSpan, answer: bool) -> None:
    """Adds an image: read in a question, drawn in an answer."""
    depth = self._layout.depth
    if not 0 <= span.index < len(self._codes):
      raise ValueError(
        f"the conversation shows image {span.index}, but has codes of "
        f"{len(self._codes)}: give one array of codes per image"
      )
    codes = np.asarray(self._codes[span.index], np.int32)
    if codes.ndim != 2 or codes.shape[1] != depth:
      raise ValueError(
        f"codes have shape {codes.shape}, not [positions, {depth}]: flatten "
        "the grid, and set depth to the tokenizer's"
      )
    chosen = codes[span.start : span.stop] + self._layout.codes_shift
    self.control(self._layout.image_start, answer)
    if answer:
      self._drawn.append(self._extend(chosen.reshape(-1).tolist(), True))
    else:
      self._stacked.append((len(self._first), chosen))
      self._extend(chosen[:, 0].tolist(), False)
    self.control(self._layout.image_end, answer)

  def template(self, pieces: tuple[str | Control, ...]) -> None:
    """Adds pieces of a template."""
    for piece in pieces:
      if isinstance(piece, Control):
        self.control(piece.name)
      else:
        self.text(piece, False)

  def parts(self, parts: Parts, answer: bool) -> None:
    """Adds a question or an answer."""
    parts = (parts,) if isinstance(parts, str) else parts
    for i, part in enumerate(parts):
      if isinstance(part, ImageSpan):
        self.flush()
        self.image(part, answer)
      else:
        prefix = self._layout.template.prefix if answer and i == 0 else ""
        self.text(prefix + part, answer)

  def positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids int32[n, D] and bool[n]: of an answer, a drawn code."""
    self.flush()
    count = len(self._first)
    ids = np.full((count, self._layout.depth), -1, np.int32)
    ids[:, 0] = self._first
    for start, codes in self._stacked:
      ids[start : start + len(codes)] = codes
    masks = np.zeros((2, count), bool)
    for mask, stretches in zip(masks, (self._answers, self._drawn)):
      for stretch in stretches:
        mask[stretch] = True
    return ids, *masks


def _begin(writer: _Writer, turns, template: Template) -> None:
  """Writes whole turns."""
  writer.template(template.opening)
  for question, answer in turns:
    writer.template(template.question)
    writer.parts(question, False)
    writer.template(template.answer)
    writer.parts(answer, True)
    writer.control(template.end.name, True)
    writer.template(template.closing)


def encode_conversation(
  conversation: Conversation,
  tokenizer: Encoder,
  layout: SequenceFormat = SequenceFormat(),
  codes: Sequence[np.ndarray] = (),
) -> EncodedConversation:
  """Tokenises one conversation (the module's docstring draws the result).

  Args:
    conversation: at least one turn.
    tokenizer: see `Encoder`.
    layout: template, delimiters and depth.
    codes: int32[P, D] of each image that the conversation shows.

  Raises:
    ConfigError: the vocabulary lacks a token of the template, or a delimiter.
    ValueError: codes are missing, or of another depth.
  """
  writer = _Writer(tokenizer, layout, codes)
  _begin(writer, conversation.turns, layout.template)
  ids, answer, image = writer.positions()
  if layout.template.closing:  # Not worth a position, at the very end.
    last = np.flatnonzero(answer)[-1] + 1
    ids, answer, image = ids[:last], answer[:last], image[:last]
  return EncodedConversation(
    ids[:-1], ids[1:, 0], answer[1:].astype(np.float32), image[1:]
  )


def encode_prompt(
  conversation: Conversation,
  question: Parts,
  tokenizer: Encoder,
  layout: SequenceFormat = SequenceFormat(),
  codes: Sequence[np.ndarray] = (),
  *,
  draw: bool = False,
) -> np.ndarray:
  """Tokenises what the model reads before it answers.

  Args:
    conversation: turns so far; may be empty, `Conversation(())`.
    question: what is asked now.
    tokenizer: see `Encoder`.
    layout: template, delimiters and depth.
    codes: int32[P, D] of each image that is shown.
    draw: whether the answer must be an image: opens it.

  Returns:
    int32[n, D], -1 padding D; equal to the start of `encode_conversation` of
    the same turns.

  Raises:
    As `encode_conversation`.
  """
  writer = _Writer(tokenizer, layout, codes)
  _begin(writer, conversation.turns, layout.template)
  writer.template(layout.template.question)
  writer.parts(question, False)
  writer.template(layout.template.answer)
  if draw:
    writer.control(layout.image_start)
  return writer.positions()[0]


def stop_id(tokenizer: Encoder, template: Template) -> int:
  """Returns the id that ends an answer."""
  if template.end.name == "eos":
    return tokenizer.eos_id
  return tokenizer.token_id(template.end.name)


def slots(
  first_slot: int, count: int, positions: int, depth: int
) -> list[np.ndarray]:
  """Returns stand-ins for the codes of `count` images, int32[P, D] each.

  Args:
    first_slot: an id behind every real one.
    count: images.
    positions: P.
    depth: D.
  """
  ids = np.arange(count * positions * depth, dtype=np.int32) + first_slot
  return list(ids.reshape(count, positions, depth))


def fill_slots(
  ids: np.ndarray, codes: np.ndarray, first_slot: int
) -> np.ndarray:
  """Replaces the slots of one row by codes.

  Args:
    ids: int32 of any shape, some of them slots.
    codes: int32[n], what slot `first_slot + i` stands for.
    first_slot: as of `slots`.

  Returns:
    int32 of the shape of `ids`.
  """
  index = np.clip(ids - first_slot, 0, codes.shape[0] - 1)
  return np.where(ids >= first_slot, codes[index], ids)


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
  conversations: Sequence[EncodedConversation],
  sequence_length: int,
  depth: int = 1,
) -> dict[str, np.ndarray]:
  """Lays conversations side by side in one row of `sequence_length` positions.

  Args:
    conversations: their lengths sum to at most T; may be empty (all padding).
    sequence_length: T.
    depth: D of the conversations.

  Returns:
    token_ids int32[T, D] (-1 = padding), labels int32[T] (0 on padding),
    loss_mask float32[T], image_mask bool[T], positions int32[T] (restart at
    every segment), segment_ids int32[T] (1, 2, ...; 0 = padding).
  """
  row = {
    "token_ids": np.full((sequence_length, depth), -1, np.int32),
    "labels": np.zeros(sequence_length, np.int32),
    "loss_mask": np.zeros(sequence_length, np.float32),
    "image_mask": np.zeros(sequence_length, bool),
    "positions": np.zeros(sequence_length, np.int32),
    "segment_ids": np.zeros(sequence_length, np.int32),
  }
  start = 0
  for segment, conversation in enumerate(conversations, 1):
    stop = start + len(conversation.labels)
    row["token_ids"][start:stop] = conversation.token_ids
    row["labels"][start:stop] = conversation.labels
    row["loss_mask"][start:stop] = conversation.loss_mask
    row["image_mask"][start:stop] = conversation.image_mask
    row["positions"][start:stop] = np.arange(stop - start)
    row["segment_ids"][start:stop] = segment
    start = stop
  return row
