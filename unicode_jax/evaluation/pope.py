"""Yes/no questions about what is, and what is not, in a picture.

POPE: Li et al., "Evaluating Object Hallucination in Large Vision-Language
Models" (arXiv 2305.10355), a column of METHOD section 5. Each picture is asked
about objects that it has and as many that it lacks, which are drawn at random,
among the most frequent objects, or among those that most often go with what it
has. The published suite is of 500 COCO pictures; this builds one of any
annotations, and its figures compare only within one set of pictures. It asks no
model and reads no picture.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
import hashlib
import re
from typing import NamedTuple

import numpy as np

from unicode_jax import config as config_lib

NEGATIVES = ("random", "popular", "adversarial")


class PopeQuestion(NamedTuple):
  """One question.

  Attributes:
    image_key: of the picture, as given.
    object: what is asked about.
    question: the words of it.
    answer: "yes" or "no".
  """

  image_key: str
  object: str
  question: str
  answer: str


class PopeScores(NamedTuple):
  """What a model's answers are worth; "yes" is the positive class.

  An answer that is neither yes nor no is wrong: it lowers accuracy, and recall
  where the object is there. Shares are 0 where there is nothing to share.

  Attributes:
    accuracy: share of right answers.
    precision: share of objects that are there, of those said to be.
    recall: share of objects said to be there, of those that are.
    f1: harmonic mean of both.
    yes_ratio: share of answers that are yes; 0.5 is right.
    unparsable: number of answers that are neither.
    count: number of questions.
  """

  accuracy: float
  precision: float
  recall: float
  f1: float
  yes_ratio: float
  unparsable: int
  count: int


def ask_in_general(object: str) -> str:
  """Returns POPE's own question."""
  article = "an" if object[:1].lower() in "aeiou" else "a"
  return f"Is there {article} {object} in the image?"


def ask_as_easy_vqa(object: str) -> str:
  """Returns a question of easy-VQA, about "circle" or "red shape"."""
  return f"is there a {object} in the image?"


def easy_vqa_objects(label: str) -> frozenset[str]:
  """Returns what easy-VQA asks about, for a label as "blue rectangle".

  Args:
    label: color and shape.

  Returns:
    As {"rectangle", "blue shape"}.

  Raises:
    ConfigError: the label is not two words.
  """
  words = label.split()
  if len(words) != 2:
    raise config_lib.ConfigError(
      f"label {label!r} is not a color and a shape, as 'blue rectangle'"
    )
  return frozenset({words[1], f"{words[0]} shape"})


def build_pope(
  images: Sequence[tuple[str, Collection[str]]],
  *,
  vocabulary: Collection[str] | None = None,
  negatives: str = "random",
  per_image: int = 3,
  seed: int = 0,
  ask: Callable[[str], str] = ask_in_general,
) -> list[PopeQuestion]:
  """Returns the questions, picture by picture, yes and no in turn.

  Args:
    images: key of each picture and what is in it.
    vocabulary: what can be asked about; None takes all objects of the images.
      Other objects are passed over.
    negatives: "random", "popular" (in most of the images) or "adversarial" (in
      the same images as this one's objects most often); ties are broken at
      random.
    per_image: objects that are there, and as many that are not. A picture has
      fewer where one of the two runs out.
    seed: of what is drawn; a picture's draws depend on it and on the key alone.
    ask: turns an object into a question.

  Raises:
    ConfigError: no such negatives, per_image below 1, or nothing to ask.
  """
  if negatives not in NEGATIVES:
    raise config_lib.ConfigError(
      f"negatives={negatives!r} must be one of {', '.join(NEGATIVES)}"
    )
  if per_image < 1:
    raise config_lib.ConfigError(f"per_image={per_image} must be 1 or more")
  if vocabulary is None:
    vocabulary = {name for _, present in images for name in present}
  names = sorted(set(vocabulary))
  number = {name: i for i, name in enumerate(names)}
  has = np.zeros((len(images), len(names)), bool)
  for row, (_, present) in zip(has, images, strict=True):
    row[[number[name] for name in present if name in number]] = True
  # together[i, j] counts the images with both.
  together = has.T.astype(np.int64) @ has

  questions = []
  for row, (key, _) in zip(has, images, strict=True):
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    order = rng.permutation(len(names))
    present, absent = order[row[order]], order[~row[order]]
    if negatives == "popular":
      weight = together.diagonal()
    elif negatives == "adversarial":
      weight = together[row].sum(axis=0)
    else:
      weight = np.zeros(len(names), np.int64)
    absent = absent[np.argsort(-weight[absent], kind="stable")]
    for pair in list(zip(present, absent))[:per_image]:
      for i, answer in zip(pair, ("yes", "no"), strict=True):
        questions.append(PopeQuestion(key, names[i], ask(names[i]), answer))
  if not questions:
    raise config_lib.ConfigError(
      f"nothing to ask about {len(images)} images and {len(names)} objects: an "
      "image must have an object that is known and lack another"
    )
  return questions


def parse_yes_no(text: str) -> bool | None:
  """Reads an answer: the first "yes", or "no" or "not", decides.

  Args:
    text: whatever the model said.

  Returns:
    True for yes, False for no, None for neither.
  """
  found = re.search(r"\b(yes|no|not)\b", text.lower())
  return None if found is None else found[0] == "yes"


def score_pope(
  predictions: Sequence[str], questions: Sequence[PopeQuestion]
) -> PopeScores:
  """Scores the answers to POPE's questions.

  Args:
    predictions: what the model said, one per question.
    questions: from `build_pope`.

  Raises:
    ConfigError: there is no question, or the lengths differ.
  """
  if not questions or len(predictions) != len(questions):
    raise config_lib.ConfigError(
      f"{len(predictions)} predictions for {len(questions)} questions: want "
      "one of each, and at least one"
    )
  counts = Counter(
    (question.answer == "yes", parse_yes_no(text))
    for text, question in zip(predictions, questions, strict=True)
  )
  total = len(questions)
  hits, false_alarms = counts[True, True], counts[False, True]
  there = sum(n for (truth, _), n in counts.items() if truth)
  said = hits + false_alarms
  precision = hits / said if said else 0.0
  recall = hits / there if there else 0.0
  return PopeScores(
    accuracy=(hits + counts[False, False]) / total,
    precision=precision,
    recall=recall,
    f1=2 * hits / (said + there) if hits else 0.0,
    yes_ratio=said / total,
    unparsable=counts[True, None] + counts[False, None],
    count=total,
  )
