"""Tests of the yes/no suite: negatives and scores, by hand."""

import collections

import pytest
from sklearn import metrics

from unicode_jax.config import ConfigError
from unicode_jax.data import sources
from unicode_jax.evaluation import pope

# Dogs are in most pictures; forks go with cakes, boats with nothing else.
IMAGES = [
  ("1", {"dog", "ball"}),
  ("2", {"dog", "ball"}),
  ("3", {"dog"}),
  ("4", {"fork", "cake"}),
  ("5", {"fork", "cake"}),
  ("6", {"cake"}),
  ("7", {"boat"}),
]


def _asked(questions, key, answer):
  return [
    q.object for q in questions if q.image_key == key and q.answer == answer
  ]


@pytest.mark.parametrize("negatives", pope.NEGATIVES)
def test_answers_are_true_and_balanced(negatives):
  questions = pope.build_pope(IMAGES, negatives=negatives, per_image=2)
  present = dict(IMAGES)
  for question in questions:
    truth = question.object in present[question.image_key]
    assert (question.answer == "yes") == truth
    assert question.question == f"Is there a {question.object} in the image?"
  for key, objects in IMAGES:
    expected = min(2, len(objects))
    for answer in ("yes", "no"):
      asked = _asked(questions, key, answer)
      assert len(asked) == len(set(asked)) == expected


def test_popular_negatives_are_the_most_frequent():
  # In 3 images each: dog and cake. In 2 each: ball and fork.
  questions = pope.build_pope(IMAGES, negatives="popular", per_image=1)
  assert _asked(questions, "3", "no") == ["cake"]
  assert _asked(questions, "6", "no") == ["dog"]
  questions = pope.build_pope(IMAGES, negatives="popular", per_image=2)
  assert _asked(questions, "1", "no")[0] == "cake"
  assert _asked(questions, "1", "no")[1] == "fork"


def test_adversarial_negatives_go_with_what_is_there():
  questions = pope.build_pope(IMAGES, negatives="adversarial", per_image=1)
  assert _asked(questions, "3", "no") == ["ball"]
  assert _asked(questions, "6", "no") == ["fork"]


def test_random_negatives_are_random_and_repeatable():
  asked = collections.Counter()
  for seed in range(60):
    questions = pope.build_pope(IMAGES, seed=seed, per_image=1)
    assert questions == pope.build_pope(IMAGES, seed=seed, per_image=1)
    asked[_asked(questions, "7", "no")[0]] += 1
  assert set(asked) == {"dog", "ball", "fork", "cake"}
  assert min(asked.values()) >= 5  # 15 each are expected


def test_a_picture_is_asked_the_same_among_others():
  vocabulary = {"dog", "ball", "fork", "cake", "boat"}
  alone = pope.build_pope(IMAGES[4:5], vocabulary=vocabulary)
  among = pope.build_pope(IMAGES, vocabulary=vocabulary)
  assert [q for q in among if q.image_key == "5"] == alone


def test_vocabulary_limits_what_is_asked():
  questions = pope.build_pope(IMAGES, vocabulary={"dog", "cake", "owl"})
  assert {q.object for q in questions} <= {"dog", "cake", "owl"}
  assert "7" not in {q.image_key for q in questions}  # nothing known in it


def test_questions_take_an_article():
  assert pope.ask_in_general("owl") == "Is there an owl in the image?"


def test_easy_vqa_is_asked_in_its_own_words():
  known = {question for question, _, _ in sources.easy_vqa_questions("train")}
  images = [
    ("a", pope.easy_vqa_objects("blue rectangle")),
    ("b", pope.easy_vqa_objects("red circle")),
    ("c", pope.easy_vqa_objects("blue triangle")),
  ]
  questions = pope.build_pope(
    images, negatives="adversarial", per_image=2, ask=pope.ask_as_easy_vqa
  )
  assert len(questions) == 12
  assert {q.question for q in questions} <= known
  # Blue is seen with triangles, not with circles.
  assert _asked(questions, "a", "no")[0] == "triangle"
  with pytest.raises(ConfigError, match="'rectangle'"):
    pope.easy_vqa_objects("rectangle")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"negatives": "hard"}, "random, popular, adversarial"),
    ({"per_image": 0}, "per_image=0"),
    ({"vocabulary": {"owl"}}, "nothing to ask"),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ConfigError, match=message):
    pope.build_pope(IMAGES, **arguments)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("yes", True),
    ("Yes, there is no doubt.", True),
    ("No.", False),
    ("There is not a dog.", False),
    ("a dog", None),
    ("yesterday, nothing", None),
    ("", None),
  ],
)
def test_parse_yes_no(text, expected):
  assert pope.parse_yes_no(text) is expected


def _questions(truths):
  return [pope.PopeQuestion("k", "dog", "?", truth) for truth in truths]


def test_scores_with_scikit_learn():
  truths = ["yes", "no", "yes", "no", "yes", "no", "no"]
  said = ["yes", "yes", "no", "no", "yes", "no", "yes"]
  scores = pope.score_pope(said, _questions(truths))
  assert scores.accuracy == pytest.approx(metrics.accuracy_score(truths, said))
  precision, recall, f1, _ = metrics.precision_recall_fscore_support(
    truths, said, pos_label="yes", average="binary"
  )
  assert scores[1:4] == pytest.approx((precision, recall, f1))
  assert scores.yes_ratio == pytest.approx(4 / 7)
  assert (scores.unparsable, scores.count) == (0, 7)


def test_unparsable_answers_are_wrong_and_counted():
  scores = pope.score_pope(
    ["yes", "red", "maybe", "no"], _questions(["yes", "yes", "no", "no"])
  )
  assert scores == (0.5, 1.0, 0.5, pytest.approx(2 / 3), 0.25, 2, 4)


def test_always_no():
  scores = pope.score_pope(["no", "no"], _questions(["yes", "no"]))
  assert scores == (0.5, 0.0, 0.0, 0.0, 0.0, 0, 2)


def test_predictions_must_be_as_many():
  with pytest.raises(ConfigError, match="1 predictions for 2"):
    pope.score_pope(["no"], _questions(["yes", "no"]))
