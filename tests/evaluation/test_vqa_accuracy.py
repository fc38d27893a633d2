"""Tests of VQA scores: the official rule by hand, and easy-VQA's own data."""

import collections

import pytest

from unicode_jax.config import ConfigError
from unicode_jax.data import sources
from unicode_jax.evaluation import vqa_accuracy


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("yes", "yes"),
    ("  Yes.\n", "yes"),
    ("YES!", "yes"),
    ("The Red Bus", "red bus"),
    ("a", ""),
    ("an apple a day", "apple day"),
    # Numbers.
    ("two", "2"),
    ("None", "0"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("twenty two", "twenty 2"),
    ("3.5", "3.5"),
    ("1.", "1"),
    (".5", ".5"),
    ("5.a", "5a"),
    ("1,000", "1000"),
    # A comma in a number removes all other punctuation, too.
    ("1,000 t-shirts", "1000 tshirts"),
    # Punctuation between words becomes a space, beside a space nothing.
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("t-shirt", "t shirt"),
    ("red,blue", "red blue"),
    ("red, blue", "red blue"),
    # One mark beside a space takes all of its kind with it.
    ("t-shirt - red", "tshirt red"),
    ("(left)", "left"),
    ("@home", "home"),
    ("what?", "what"),
    ("p.m.", "pm"),
    ("u.s.a", "usa"),
    # These marks stay.
    ("5:30", "5:30"),
    ("$5", "$5"),
    ("50%", "50%"),
    ("man's", "man's"),
    ("a&w", "a&w"),
    # Contractions.
    ("dont", "don't"),
    ("DONT", "don't"),
    ("don't", "don't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("oclock", "o'clock"),
    ("yalld've", "yalld've"),
    ("y'alld've", "y'all'd've"),
    ("ow's'at", "'ow's'at"),
    ("somebody'd", "somebodyd"),
    ("im", "im"),
    ("ill", "ill"),
    ("well", "well"),
    ("its", "its"),
    ("red\tbus\nstop", "red bus stop"),
    ("", ""),
  ],
)
def test_normalize_answer(text, expected):
  assert vqa_accuracy.normalize_answer(text) == expected


@pytest.mark.parametrize(
  ("agreeing", "expected"),
  # Leaving out one who agrees and one who does not, of ten:
  # (n * min((n - 1) / 3, 1) + (10 - n) * min(n / 3, 1)) / 10.
  [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_ten_human_answers(agreeing, expected):
  answers = ["Two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
  assert vqa_accuracy.vqa_score("2.", answers) == pytest.approx(expected)


def test_one_answer_must_match():
  assert vqa_accuracy.vqa_score("The circle.", ["circle"]) == 1
  assert vqa_accuracy.vqa_score("circles", ["circle"]) == 0


@pytest.mark.parametrize("answers", [[], "yes"])
def test_answers_must_be_given_as_a_sequence(answers):
  with pytest.raises(ConfigError, match="sequence"):
    vqa_accuracy.vqa_score("yes", answers)


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("Yes", "yes/no"),
    ("no.", "yes/no"),
    ("two", "number"),
    ("3.5", "number"),
    ("1,000", "number"),
    ("red", "other"),
    ("2 dogs", "other"),
  ],
)
def test_answer_type(answer, expected):
  assert vqa_accuracy.answer_type(answer) == expected


def test_evaluate_answers_by_hand():
  predictions = ["yes", "yes", "yes", "yes", "3", "red"]
  answers = [["yes"], ["yes"], ["yes"], ["no"], ["three"], ["blue"] * 10]
  result = vqa_accuracy.evaluate_answers(predictions, answers)
  assert result.accuracy == pytest.approx(4 / 6)
  assert result.count == 6
  assert result.by_type == {
    "number": (1.0, 1),
    "other": (0.0, 1),
    "yes/no": (0.75, 4),
  }
  assert result.yes_no == (0.75, 4)
  assert result.yes_no_balanced == 0.5
  assert result.yes_no_unguessed is None


def test_balance_within_questions_by_hand():
  predictions = ["yes", "yes", "no", "yes", "no", "no"]
  answers = [[a] for a in ("yes", "no", "no", "yes", "no", "no")]
  questions = ["a circle?", "A circle?", "a circle?", "red?", "red?", "blue?"]
  result = vqa_accuracy.evaluate_answers(predictions, answers, questions)
  # The circle's: 1 of 1 yes and 1 of 2 no; the red's: all; blue: never yes.
  assert result.yes_no_unguessed == pytest.approx((0.75 + 1.0) / 2)
  assert result.yes_no_balanced == pytest.approx((1.0 + 0.75) / 2)


def test_no_balance_without_both_answers():
  result = vqa_accuracy.evaluate_answers(["yes"], [["yes"]])
  assert result.yes_no == (1.0, 1)
  assert result.yes_no_balanced is None
  result = vqa_accuracy.evaluate_answers(["red"], [["red"]])
  assert result.yes_no is None


def test_lengths_must_agree():
  with pytest.raises(ConfigError, match="2 predictions and 1"):
    vqa_accuracy.evaluate_answers(["yes", "no"], [["yes"]])
  with pytest.raises(ConfigError, match="at least one question"):
    vqa_accuracy.evaluate_answers([], [])
  with pytest.raises(ConfigError, match="2 questions for 1"):
    vqa_accuracy.evaluate_answers(["yes"], [["yes"]], ["is it?", "what?"])
  with pytest.raises(ConfigError, match="needs the questions"):
    vqa_accuracy.evaluate_answers(["yes"], [["yes"]], question_type=str)
  with pytest.raises(ConfigError, match="as many of each"):
    vqa_accuracy.BlindBaseline(["is it?"], [])


@pytest.mark.parametrize(
  ("question", "expected"),
  [
    ("is there not a red shape in the image?", "yes/no: color"),
    ("does the image contain a circle?", "yes/no: shape"),
    ("is no triangle present?", "yes/no: shape"),
    ("what color is the circle?", "color"),
    ("what is the color of the shape?", "color"),
    ("what is the gray shape?", "shape"),
    ("what shape does the image contain?", "shape"),
  ],
)
def test_easy_vqa_type(question, expected):
  assert vqa_accuracy.easy_vqa_type(question) == expected


def test_easy_vqa_type_refuses_other_questions():
  with pytest.raises(ConfigError, match="why not"):
    vqa_accuracy.easy_vqa_type("why not?")


def test_easy_vqa_types_agree_with_the_answers():
  answers = collections.defaultdict(set)
  for question, answer, _ in sources.easy_vqa_questions("train"):
    answers[vqa_accuracy.easy_vqa_type(question)].add(answer)
  colors = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
  assert answers == {
    "yes/no: shape": {"yes", "no"},
    "yes/no: color": {"yes", "no"},
    "shape": {"circle", "rectangle", "triangle"},
    "color": colors,
  }


def test_blind_baseline_on_easy_vqa():
  """The figures that every easy-VQA result is to be compared with."""
  train = sources.easy_vqa_questions("train")
  questions, answers, _ = zip(*sources.easy_vqa_questions("test"), strict=True)
  baseline = vqa_accuracy.BlindBaseline(*list(zip(*train, strict=True))[:2])
  result = vqa_accuracy.evaluate_answers(
    baseline.predict(questions),
    [[answer] for answer in answers],
    questions,
    vqa_accuracy.easy_vqa_type,
  )
  assert result.count == 9673
  assert result.accuracy == pytest.approx(0.670, abs=5e-4)
  assert result.yes_no.accuracy == pytest.approx(0.825, abs=5e-4)
  # Half of the questions say "not", so balance alone does not help here.
  assert result.yes_no_balanced == pytest.approx(0.825, abs=5e-4)
  assert result.yes_no_unguessed == 0.5


def test_blind_baseline_falls_back():
  baseline = vqa_accuracy.BlindBaseline(
    ["is it  red?", "Is it red?", "is it red?", "what?", "who?"],
    ["No", "no.", "yes", "yes", "Yes"],
  )
  assert baseline.predict(["IS IT RED?", "what?", "unseen?"]) == [
    "no",
    "yes",
    "yes",
  ]
