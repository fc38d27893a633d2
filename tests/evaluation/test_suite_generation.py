"""Drawings of a tiny run: what is judged, and against what."""


def test_generation_judges_each_label(tiny, evaluated):
  results = evaluated.found("generation")
  judged = results["judged"]["easy_vqa_test"]
  assert list(results["judged"]) == ["easy_vqa_test"]  # OpenMoji has no labels.
  known = tiny.data.image_sources[1].annotations
  labels = len({a.label for a in known} - {None})
  assert 20 < labels <= evaluated.few
  assert judged["labels"] == labels
  assert judged["guess"] == {"colour": 1 / 8, "shape": 1 / 3}
  pictures = judged["pictures"]
  assert pictures["drawn"]["count"] == labels
  labelled = pictures["real, held out"]["count"]
  assert labelled == pictures["reconstructed"]["count"]
  assert 0.75 * evaluated.few < labelled <= evaluated.few
  assert set(results["distances"]) == {
    "openmoji_heldout",
    "easy_vqa_test",
    "all sets as mixed",
  }
  drawn = results["distances"]["openmoji_heldout"]["drawn of its captions"]
  assert drawn["pixels"]["drawn"] == drawn["pixels"]["real"] == evaluated.few
  assert drawn["pixels"]["note"]
