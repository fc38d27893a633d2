"""Tests of BLEU and CIDEr-D, by hand and against COCO's own evaluation."""

import math

import pytest

from unicode_jax.config import ConfigError
from unicode_jax.evaluation import caption_metrics

CAPTIONS = [
  "A man riding a wave on top of a surfboard.",
  "a black and white photo of a train at a station",
  "two dogs dogs dogs play in the snow",
  "a bowl of fruit on the table",
]
REFERENCES = [
  [
    "A man riding a wave on a surfboard.",
    "A surfer rides a large wave in the ocean.",
    "Man on top of a surfboard riding a wave",
  ],
  ["A train is parked at the station.", "An old photo of a train station"],
  ["Two dogs play in the deep snow", "The dogs are playing in snow"],
  ["A bowl of apples and bananas on a wooden table"],
]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A Dog, (small).", "a dog small"),
    ("I don't know", "i do n't know"),
    ("can\N{RIGHT SINGLE QUOTATION MARK}t", "ca n't"),
    ("the dog's tail", "the dog 's tail"),
    ("the dogs' tails", "the dogs tails"),
    ("they've won't they'll", "they 've wo n't they 'll"),
    ("a 'sunny' day", "a sunny day"),
    ("a t-shirt - red", "a t-shirt red"),
    ("3.5 of 1,000 at 10:30.", "3.5 of 1,000 at 10:30"),
    ("the 3rd 2-year-old", "the 3rd 2-year-old"),
    ("snake_case", "snake case"),
    ("Ein Bär", "ein bär"),
    ("", ""),
  ],
)
def test_tokenize(text, expected):
  assert caption_metrics.tokenize(text) == expected.split()


def test_bleu_by_hand():
  # Papineni's example: seven "the", of which the reference allows two.
  scores = caption_metrics.bleu(
    ["the the the the the the the"],
    [["The cat is on the mat.", "There is a cat on the mat."]],
  )
  assert scores == (pytest.approx(2 / 7), 0.0, 0.0, 0.0)


def test_brevity_penalty_by_hand():
  # 2 words against the closest reference's 4; all of them match.
  scores = caption_metrics.bleu(
    ["the cat"], [["the cat sat down", "on the mat the cat sat"]]
  )
  assert scores[0] == pytest.approx(math.exp(1 - 4 / 2))
  assert scores[1] == pytest.approx(math.exp(1 - 4 / 2))
  assert scores[2] == 0.0


def test_the_shorter_of_two_references_as_close_counts():
  # 3 words; references of 2 and 4 words.
  scores = caption_metrics.bleu(["a b c"], [["a b c d", "a b"]])
  assert scores[0] == pytest.approx(1.0)


def test_bleu_is_of_the_corpus_not_a_mean():
  scores = caption_metrics.bleu(["a b", "c d e f"], [["a b"], ["c x y z"]])
  assert scores[0] == pytest.approx(3 / 6)


def test_bleu_of_empty_captions_is_zero():
  assert caption_metrics.bleu(["", "?"], [["a"], ["b"]]) == (0.0,) * 4


def test_bleu_as_coco_and_nltk_compute_it():
  # pycocoevalcap 1.2 (Bleu(4), and nltk 3.10.4's corpus_bleu agrees to 1e-8),
  # on the tokenized captions.
  theirs = (0.750000000, 0.649519053, 0.565460581, 0.479207328)
  assert caption_metrics.bleu(CAPTIONS, REFERENCES) == pytest.approx(
    theirs, abs=1e-6
  )


def test_cider_as_coco_computes_it():
  # pycocoevalcap 1.2, Cider(), on the tokenized captions.
  theirs = [4.455631949, 1.930804598, 2.363890362, 2.099004628]
  mean, scores = caption_metrics.cider(CAPTIONS, REFERENCES)
  assert scores == pytest.approx(theirs, abs=1e-6)
  assert mean == pytest.approx(sum(theirs) / len(theirs))


def test_cider_by_hand():
  # Of two pictures; every n-gram is in one of them: idf log 2 throughout.
  mean, scores = caption_metrics.cider(
    ["red cat", "dog"], [["red cat"], ["blue dog"]]
  )
  # Orders 1 and 2 are the same, 3 and 4 empty.
  assert scores[0] == pytest.approx(10 * 2 / 4)
  # One word of two: cosine 1 / sqrt 2; one word of difference in length.
  assert scores[1] == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))
  assert mean == pytest.approx(sum(scores) / 2)


def test_cider_of_perfect_captions_is_ten():
  captions = ["a red cat sat down", "the big dog ran off"]
  mean, _ = caption_metrics.cider(captions, [[text] for text in captions])
  assert mean == pytest.approx(10)


def test_cider_gains_nothing_by_repetition():
  references = [["cat"], ["dog"]]
  once, _ = caption_metrics.cider(["cat", "dog"], references)
  often, _ = caption_metrics.cider(["cat cat cat", "dog"], references)
  assert often < once


@pytest.mark.parametrize(
  "metric", [caption_metrics.bleu, caption_metrics.cider]
)
def test_inputs_are_checked(metric):
  with pytest.raises(ConfigError, match="1 captions and 2"):
    metric(["a"], [["a"], ["b"]])
  with pytest.raises(ConfigError, match="at least one picture"):
    metric([], [])
  with pytest.raises(ConfigError, match="picture 1 are 'b'"):
    metric(["a", "b"], [["a"], "b"])
