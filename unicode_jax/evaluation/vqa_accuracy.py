"""Scores of answers to questions about pictures.

The rule is VQA v2's (Antol et al., arXiv 1505.00468; Goyal et al., arXiv
1612.00837), with its normalisation of answers, so that a VQAv2 or VizWiz number
(METHOD section 5) means what it means elsewhere. Since most questions can be
guessed, there is also what guessing alone gets (`BlindBaseline`), yes and no
balanced, and accuracy by type of question. Plain Python: it asks no model.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
import re
from typing import NamedTuple

from unicode_jax import config as config_lib

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {"none": "0"} | {
  word: str(number) for number, word in enumerate(_NUMBERS.split())
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern means "nor after a digit", too, but does not ask for it.
_PERIOD = re.compile(r"\.(?!\d)")

# What is restored when one apostrophe of it was left out.
_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
  it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
  not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've 'twas
  wasn't we'd've we've weren't what'll what're what's what've when's where'd
  where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
  you're you've
"""
_CONTRACTIONS = {
  word[:i] + word[i + 1 :]: word
  for word in _CONTRACTED.split()
  for i, letter in enumerate(word)
  if letter == "'"
}
# The official table has this one the wrong way round.
_CONTRACTIONS["somebody'd"] = "somebodyd"


class Share(NamedTuple):
  """An accuracy and how many questions it is over.

  Attributes:
    accuracy: in [0, 1].
    count: questions.
  """

  accuracy: float
  count: int


class VqaAccuracy(NamedTuple):
  """How well a set of questions was answered.

  Attributes:
    accuracy: over all questions, in [0, 1].
    count: questions.
    by_type: of each type of question, sorted by name.
    yes_no: of the questions whose answer is yes or no; None where none is.
    yes_no_balanced: mean of the accuracy where yes is right and of that where
      no is: 0.5 for whoever always says the same. None if either is missing.
    yes_no_unguessed: the same balance inside each distinct question, then the
      mean over those that have both answers: 0.5 for whoever does not look,
      though "is there not a …?" gives most of the other numbers away. None
      without questions, or where none has both answers.
  """

  accuracy: float
  count: int
  by_type: dict[str, Share]
  yes_no: Share | None
  yes_no_balanced: float | None
  yes_no_unguessed: float | None


def normalize_answer(text: str) -> str:
  """Returns an answer as VQA v2's evaluation compares it.

  Punctuation goes (to a space between two words, to nothing beside a space or
  if a number like 1,000 is anywhere), then capitals, articles and the words for
  0 to 10; missing apostrophes come back. Colons, apostrophes, currency signs
  and the points of decimal fractions stay.

  Args:
    text: an answer.
  """
  text = text.replace("\n", " ").replace("\t", " ").strip()
  removes_all = _COMMA_IN_NUMBER.search(text) is not None
  result = text
  for mark in _PUNCTUATION:
    beside_space = mark + " " in text or " " + mark in text
    result = result.replace(mark, "" if beside_space or removes_all else " ")
  words = [
    _NUMBER_WORDS.get(word, word)
    for word in _PERIOD.sub("", result).lower().split()
  ]
  return " ".join(
    _CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES
  )


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
  """Scores one answer, in [0, 1].

  With several human answers: min(number of humans who said it / 3, 1), averaged
  over leaving each human out in turn. With one answer: 1 where it is the same
  once both are normalised.

  Differs from the official evaluation, which leaves capitals, articles, number
  words and, where all humans agree, punctuation of the *human* answers as they
  are: here both sides are normalised alike. VQA v2's answers were published
  without most of these, so that it matters for other data only.

  Args:
    prediction: the answer to score.
    answers: of humans, 10 in VQA v2. Fewer than four cannot make a full score,
      except for one alone.

  Raises:
    ConfigError: there is no answer to compare with.
  """
  if not answers or isinstance(answers, str):
    raise config_lib.ConfigError(
      f"answers={answers!r} must be a sequence of one or more answers"
    )
  predicted = normalize_answer(prediction)
  agrees = [normalize_answer(answer) == predicted for answer in answers]
  if len(agrees) == 1:
    return float(agrees[0])
  total = sum(agrees)
  return sum(min((total - own) / 3, 1.0) for own in agrees) / len(agrees)


def majority_answer(answers: Sequence[str]) -> str:
  """Returns the commonest of one question's answers, normalised.

  Args:
    answers: of humans; the one seen first wins a tie.
  """
  return _commonest(Counter(map(normalize_answer, answers)))


def _commonest(counts: Counter[str]) -> str:
  return max(counts, key=counts.__getitem__)


def answer_type(answer: str) -> str:
  """Returns "yes/no", "number" or "other", VQA v2's types, by an answer."""
  answer = normalize_answer(answer)
  if answer in ("yes", "no"):
    return "yes/no"
  return "number" if re.fullmatch(r"\d*\.?\d+", answer) else "other"


_EASY_VQA_SHAPE = re.compile(r"\b(circle|rectangle|triangle)\b")


def easy_vqa_type(question: str) -> str:
  """Returns the type of an easy-VQA question, by what it asks for.

  Args:
    question: one of easy-VQA's, as "is there not a circle?".

  Returns:
    "shape" or "color", after "yes/no: " where yes or no is to be said.

  Raises:
    ConfigError: it is no question of that data.
  """
  words = question.lower()
  if words.startswith("what"):
    return "color" if "color" in words else "shape"
  if words.startswith(("is ", "does ")):
    asks_shape = _EASY_VQA_SHAPE.search(words) is not None
    return "yes/no: shape" if asks_shape else "yes/no: color"
  raise config_lib.ConfigError(
    f"{question!r} is no question of easy-VQA: give another question_type"
  )


def evaluate_answers(
  predictions: Sequence[str],
  answers: Sequence[Sequence[str]],
  questions: Sequence[str] | None = None,
  question_type: Callable[[str], str] | None = None,
) -> VqaAccuracy:
  """Scores the answers to a set of questions.

  Args:
    predictions: one per question.
    answers: one or more right answers per question, see `vqa_score`.
    questions: one per prediction; for `question_type` and `yes_no_unguessed`.
    question_type: names the type of a question; None goes by the majority's
      answer, see `answer_type`.

  Raises:
    ConfigError: there is no question, the lengths differ, or a question_type
      comes without questions.
  """
  if not predictions or len(predictions) != len(answers):
    raise config_lib.ConfigError(
      f"{len(predictions)} predictions and {len(answers)} lists of answers: "
      "want one of each per question, and at least one question"
    )
  if questions is None and question_type is not None:
    raise config_lib.ConfigError("question_type needs the questions: pass them")
  if questions is not None and len(questions) != len(answers):
    raise config_lib.ConfigError(
      f"{len(questions)} questions for {len(answers)} lists of answers: want "
      "one of each"
    )
  scores, by_type, by_truth = [], defaultdict(list), defaultdict(list)
  by_question = defaultdict(lambda: defaultdict(list))
  for i, (prediction, right) in enumerate(zip(predictions, answers)):
    score = vqa_score(prediction, right)
    majority = majority_answer(right)
    scores.append(score)
    if question_type is None:
      kind = answer_type(majority)
    else:
      kind = question_type(questions[i])
    by_type[kind].append(score)
    if majority in ("yes", "no"):
      by_truth[majority].append(score)
      if questions is not None:
        by_question[_question_key(questions[i])][majority].append(score)
  both = by_truth["yes"] + by_truth["no"]
  within = [_balanced(truths) for truths in by_question.values()]
  within = [value for value in within if value is not None]
  return VqaAccuracy(
    _mean(scores),
    len(scores),
    {kind: _share(by_type[kind]) for kind in sorted(by_type)},
    _share(both) if both else None,
    _balanced(by_truth),
    _mean(within) if within else None,
  )


def _balanced(by_truth: dict[str, list[float]]) -> float | None:
  """Returns the mean of both truths' mean scores, if both occur."""
  if not by_truth["yes"] or not by_truth["no"]:
    return None
  return (_mean(by_truth["yes"]) + _mean(by_truth["no"])) / 2


def _mean(scores: list[float]) -> float:
  return sum(scores) / len(scores)


def _share(scores: list[float]) -> Share:
  return Share(_mean(scores), len(scores))


class BlindBaseline:
  """Answers without seeing the picture: what data alone gives away.

  It says the commonest training answer to the very question, and to a question
  that training lacks, the commonest answer of all. Report a model's gain over
  it: on easy-VQA it is right on two thirds of the test questions.
  """

  def __init__(self, questions: Sequence[str], answers: Sequence[str]):
    """Counts the training answers.

    Args:
      questions: of the training split.
      answers: one per question; answers are compared normalised, and the one
        seen first wins a tie.

    Raises:
      ConfigError: there is no question, or the lengths differ.
    """
    if not questions or len(questions) != len(answers):
      raise config_lib.ConfigError(
        f"{len(questions)} questions and {len(answers)} answers to count: want "
        "as many of each, and at least one"
      )
    normalized = [normalize_answer(answer) for answer in answers]
    counts = defaultdict(Counter)
    for question, answer in zip(questions, normalized):
      counts[_question_key(question)][answer] += 1
    self._answers = {key: _commonest(c) for key, c in counts.items()}
    self._fallback = _commonest(Counter(normalized))

  def predict(self, questions: Sequence[str]) -> list[str]:
    """Returns one answer, normalised, per question."""
    return [
      self._answers.get(_question_key(question), self._fallback)
      for question in questions
    ]


def _question_key(question: str) -> str:
  """Spelling that does not tell questions apart."""
  return " ".join(question.lower().split())
