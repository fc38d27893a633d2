"""Questions, objects and captions of a tiny run, and what a guess gets."""

import collections

import numpy as np

from unicode_jax.evaluation import bench as bench_lib


def test_vqa_counts_every_question_and_the_blind_guess(tiny, evaluated):
  found = evaluated.found("vqa")
  assert list(found) == ["easy_vqa_test"]  # The other has no questions.
  found = found["easy_vqa_test"]
  test, train = tiny.data.heldout_sources[1], tiny.data.image_sources[1]
  counts = collections.defaultdict(collections.Counter)
  for known in train.annotations:
    for ((question, answer),) in known.dialogues:
      counts[question][answer] += 1
  asked = [
    dialogue[0]
    for i in bench_lib.spread(len(test), evaluated.few)
    for dialogue in test.annotations[i].dialogues
  ]
  right = [counts[q].most_common(1)[0][0] == a for q, a in asked]
  assert found["count"] == len(asked)
  assert sum(share["count"] for share in found["by_type"].values()) == len(
    asked
  )
  np.testing.assert_allclose(found["blind"]["accuracy"], np.mean(right))
  assert set(found["by_type"]) == {
    "color",
    "shape",
    "yes/no: color",
    "yes/no: shape",
  }


def test_pope_asks_for_what_is_there_and_what_is_not(evaluated):
  found = evaluated.found("pope")["easy_vqa_test"]
  assert set(found) == {"random", "popular", "adversarial"}
  for scores in found.values():
    # Two objects that are there and two that are not, of labelled pictures.
    assert scores["count"] % 4 == 0 and scores["count"] <= 4 * evaluated.few
    assert scores["blind"]["accuracy"] == 0.5


def test_captions_are_scored_beside_the_commonest_one(tiny, evaluated):
  found = evaluated.found("caption")
  assert set(found) == {"openmoji_heldout", "easy_vqa_test"}
  commonest = found["easy_vqa_test"]["blind"]["caption"]
  test = tiny.data.heldout_sources[1]
  captions = [
    test.annotations[i].captions[0]
    for i in bench_lib.spread(len(test), evaluated.few)
    if test.annotations[i].captions
  ]
  np.testing.assert_allclose(
    found["easy_vqa_test"]["blind"]["exact_match"],
    np.mean([caption == commonest for caption in captions]),
  )
