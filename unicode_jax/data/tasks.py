"""The tasks of stage II: what is asked about images, and what is answered.

METHOD section 4. Each task turns a source's annotations into examples, an
example into a conversation:

  decompression      image -> its codes, in segments, one turn each
  caption            image + "what is in the image?" -> text
  vqa                image + question -> answer, several to a conversation
  described          caption + question -> answer: vqa without the image
  text_to_image      "Draw: a caption" -> image
  class_conditional  "Draw one of: a class" -> image
  unconditional      "Draw a picture." -> image
  text               question -> answer, no image

Where the condition of an image is dropped, for classifier-free guidance (Ho &
Salimans, arXiv 2207.12598), its question becomes the unconditional one. Pure
Python: no pixels, no codes, no batches.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools

import numpy as np

from unicode_jax.data import sequences, sources as sources_lib

TASKS = (
  "decompression",
  "caption",
  "vqa",
  "described",
  "text_to_image",
  "class_conditional",
  "unconditional",
  "text",
)
# Tasks whose answers are images: a baseline that cannot draw has none.
DRAWING = (
  "decompression",
  "text_to_image",
  "class_conditional",
  "unconditional",
)
CAPTION_QUESTION = "what is in the image?"
UNCONDITIONAL = "Draw a picture."

_WHOLE = sequences.ImageSpan()
_OPPOSITE = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes"}


def draw_question(caption: str) -> str:
  """Returns what is asked for a picture of a caption."""
  return f"Draw: {caption}"


def class_question(label: str) -> str:
  """Returns what is asked for a picture of a class."""
  return f"Draw one of: {label}"


@dataclasses.dataclass(frozen=True)
class Example:
  """What one conversation is made of.

  Attributes:
    item: number of the image in its source, None without one.
    turns: questions and answers.
    reads: whether the image comes before the first question.
    caption: comes before the first question instead of the image.
    independent: whether the turns may change places.
    conditional: whether the first question may become the unconditional one.
  """

  item: int | None
  turns: tuple[tuple[sequences.Parts, sequences.Parts], ...]
  reads: bool = False
  caption: str | None = None
  independent: bool = False
  conditional: bool = False

  def conversation(
    self,
    rng: np.random.Generator | None = None,
    condition_dropout: float = 0.0,
  ) -> sequences.Conversation:
    """Returns a conversation of the example.

    Args:
      rng: decides order and dropout; None changes nothing.
      condition_dropout: chance that a condition is dropped.
    """
    order, dropped = range(len(self.turns)), False
    if rng is not None and self.independent:
      order = rng.permutation(len(self.turns))
    if rng is not None and self.conditional:
      dropped = rng.random() < condition_dropout
    return self._arranged(order, dropped)

  def variants(self) -> Iterator[sequences.Conversation]:
    """Yields conversations one of which is as long as any that may be drawn.

    A text has fewer or more tokens where it stands behind an image instead of a
    template's words, so it counts which question is the first.
    """
    count = len(self.turns)
    for first in range(count if self.independent else 1):
      order = [first, *(i for i in range(count) if i != first)]
      yield self._arranged(order, False)
    if self.conditional:
      yield self._arranged(range(count), True)

  def _arranged(
    self, order: Iterable[int], dropped: bool
  ) -> sequences.Conversation:
    """Returns the turns in an order, perhaps without the condition."""
    turns = tuple(self.turns[i] for i in order)
    if dropped:
      turns = ((UNCONDITIONAL, turns[0][1]), *turns[1:])
    question, answer = turns[0]
    if self.reads:
      question = show(question)
    elif self.caption is not None:
      question = describe(self.caption, question)
    return sequences.Conversation(((question, answer), *turns[1:]))


def show(question: sequences.Parts) -> sequences.Parts:
  """Puts the image before a question."""
  parts = (question,) if isinstance(question, str) else question
  return (_WHOLE, *parts)


def describe(caption: str, question: str) -> str:
  """Puts a caption before a question, in place of the image."""
  return f"{caption.rstrip(' .')}. {question}"


def decompression_spans(
  positions: int, segments: int
) -> list[sequences.ImageSpan]:
  """Cuts an image into stretches that differ by one position at most.

  Args:
    positions: P.
    segments: how many; at most P.
  """
  borders = np.linspace(0, positions, segments + 1).round().astype(int)
  return [
    sequences.ImageSpan(0, int(start), int(stop))
    for start, stop in itertools.pairwise(borders)
  ]


def image_examples(
  task: str,
  source: sources_lib.ImageSource,
  *,
  positions: int,
  segments: int,
  questions_per_image: int,
  yes_no_ratio: float = 0.0,
) -> list[Example]:
  """Returns the examples of one task about the images of a source.

  Args:
    task: one of `TASKS` but "text".
    source: images and what is known of them.
    positions: P, grid positions of an image.
    segments: turns of decompression.
    questions_per_image: questions of a conversation; dialogues of several turns
      stay whole, and apart.
    yes_no_ratio: see `balanced`; 0 keeps every question.

  Raises:
    ValueError: there is no such task.
  """
  if task == "decompression":
    spans = decompression_spans(positions, segments)
    turns = tuple(((span,), (span,)) for span in spans)
    return [Example(i, turns) for i in range(len(source))]
  if task == "unconditional":
    turns = ((UNCONDITIONAL, (_WHOLE,)),)
    return [Example(i, turns) for i in range(len(source))]
  if task == "caption":
    return [
      Example(i, ((CAPTION_QUESTION, caption),), reads=True)
      for i, known in enumerate(source.annotations)
      for caption in known.captions
    ]
  if task == "text_to_image":
    return [
      Example(i, ((draw_question(caption), (_WHOLE,)),), conditional=True)
      for i, known in enumerate(source.annotations)
      for caption in known.captions
    ]
  if task == "class_conditional":
    return [
      Example(i, ((class_question(known.label), (_WHOLE,)),), conditional=True)
      for i, known in enumerate(source.annotations)
      if known.label is not None
    ]
  if task not in ("vqa", "described"):
    raise ValueError(f"there is no task {task!r} about images: {TASKS}")
  singles = [
    [d[0] for d in known.dialogues if len(d) == 1]
    for known in source.annotations
  ]
  if yes_no_ratio:
    singles = balanced(singles, yes_no_ratio)
  examples = []
  for i, (known, single) in enumerate(
    zip(source.annotations, singles, strict=True)
  ):
    if task == "vqa":
      about = functools.partial(Example, i, reads=True)
    elif known.captions:
      about = functools.partial(Example, None, caption=known.captions[0])
    else:
      continue
    # So that questions that are neighbours in the data need not be here.
    order = np.random.default_rng(i).permutation(len(single))
    for start in range(0, len(single), questions_per_image):
      turns = tuple(
        single[j] for j in order[start : start + questions_per_image]
      )
      examples.append(about(turns, independent=True))
    examples += [about(tuple(d)) for d in known.dialogues if len(d) > 1]
  return examples


def text_examples(
  conversations: Sequence[sequences.Conversation],
) -> list[Example]:
  """Returns the examples of the task without images."""
  return [Example(None, c.turns) for c in conversations]


def balanced(
  questions: Sequence[Sequence[tuple[str, str]]], ratio: float
) -> list[list[tuple[str, str]]]:
  """Leaves out some answers that a question's wording gives away.

  Where nine of ten answers to a question are "no", a model can be nearly right
  without a look at the image, and learns to look late.

  Args:
    questions: (question, answer) pairs of each image.
    ratio: at least 1. Of a question that is answered by yes and by no, at most
      so many of the commoner answer stay for each of the rarer, about.

  Returns:
    The pairs of each image that stay; which ones is a hash of the image's
    number and the question. Other questions all do.
  """
  counts = collections.Counter(pair for pairs in questions for pair in pairs)

  def stays(image: int, question: str, answer: str) -> bool:
    if answer not in _OPPOSITE:
      return True
    other = counts[question, _OPPOSITE[answer]]
    share = ratio * other / counts[question, answer]
    return not other or sources_lib.is_heldout(f"{image} {question}", share)

  return [
    [pair for pair in pairs if stays(i, *pair)]
    for i, pairs in enumerate(questions)
  ]
