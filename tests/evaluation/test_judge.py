"""Tests of the judge of drawn pictures, on easy-VQA."""

import re

import jax
import numpy as np
import pytest

from unicode_jax.config import ConfigError
from unicode_jax.data import sources
from unicode_jax.evaluation import judge

SHAPES = ("circle", "rectangle", "triangle")


def _labelled(split, count):
  """Returns easy-VQA pictures whose label one of their questions tells."""
  import easy_vqa

  paths = {
    "train": easy_vqa.get_train_image_paths,
    "test": easy_vqa.get_test_image_paths,
  }[split]()
  labels = {}
  for question, answer, name in sources.easy_vqa_questions(split):
    if found := re.fullmatch(r"what .*color.* the (\w+)\?", question):
      if found[1] in SHAPES:
        labels[name] = f"{answer} {found[1]}"
    elif found := re.fullmatch(r"what is the (\w+) shape\?", question):
      labels[name] = f"{found[1]} {answer}"
  names = sorted(labels)[:count]
  images = [
    sources.decode_image(paths[int(name)], judge.SIDE) for name in names
  ]
  return np.stack(images), [labels[name] for name in names]


@pytest.fixture(scope="module")
def train():
  return _labelled("train", 512)


@pytest.fixture(scope="module")
def test():
  return _labelled("test", 256)


@pytest.fixture(scope="module")
def trained(train):
  """A short training: 600 steps of 64 on all pictures reach 99 %."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(judge, "_BATCH", 24)
    return judge.train_judge(*train, steps=250)


def test_judge_learns_colors_first(trained, test):
  assert trained.values[1] == SHAPES
  assert len(trained.values[0]) == 8
  result = trained.accuracy(*test)
  assert result.count == 256
  color, shape = result.per_attribute
  assert color > 0.9, result
  assert shape > 0.6, result  # 1/3 by chance
  assert result.all_right > 0.6, result


def test_verdicts_are_the_likeliest_values(trained, test):
  images = test[0][:130]  # more than one chunk
  probabilities = trained.probabilities(images)
  assert [p.shape for p in probabilities] == [(130, 8), (130, 3)]
  for p in probabilities:
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
  verdicts = trained.predict(images)
  for i in (0, 128, 129):
    expected = tuple(
      values[np.argmax(p[i])]
      for values, p in zip(trained.values, probabilities, strict=True)
    )
    assert verdicts[i] == expected
    assert trained.predict(images[i : i + 1]) == [expected]


def test_larger_pictures_are_judged_alike(trained, test):
  images = test[0][:16]
  large = images.repeat(2, axis=1).repeat(2, axis=2)
  assert trained.predict(large) == trained.predict(images)


def test_accuracy_by_hand(trained, test):
  images = test[0][:4]
  verdicts = trained.predict(images)
  labels = [
    verdicts[0],
    (verdicts[1][0], "hexagon"),
    " ".join(verdicts[2]),
    ("pink", "hexagon"),
  ]
  assert trained.accuracy(images, labels) == (0.5, (0.75, 0.5), 4)


def test_training_repeats_and_is_cached(train, tmp_path):
  images, labels = train[0][:64], train[1][:64]
  first = judge.train_judge(images, labels, steps=4, cache_dir=tmp_path)
  (file,) = tmp_path.iterdir()
  written = file.stat().st_mtime_ns
  cached = judge.train_judge(images, labels, steps=4, cache_dir=tmp_path)
  again = judge.train_judge(images, labels, steps=4)
  for other in (cached, again):
    assert other.values == first.values
    jax.tree.map(np.testing.assert_array_equal, other.params, first.params)
  assert file.stat().st_mtime_ns == written
  changed = images.copy()
  changed[0, 0, 0, 0] ^= 1
  judge.train_judge(changed, labels, steps=4, cache_dir=tmp_path)
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (["blue circle"], "1 labels for 2"),
    (["blue circle", "red"], "'red' has 1 attributes"),
    (["blue circle", None], "without a label"),
    (["", ""], "'' has 0"),
  ],
)
def test_labels_are_checked(labels, message):
  with pytest.raises(ConfigError, match=message):
    judge.train_judge(np.zeros((2, 32, 32, 3), np.uint8), labels)


def test_pictures_and_labels_of_accuracy_are_checked(trained, test):
  with pytest.raises(ConfigError, match="float32"):
    trained.predict(test[0].astype(np.float32))
  with pytest.raises(ConfigError, match="has 1 attributes, the judge knows 2"):
    trained.accuracy(test[0][:1], ["blue"])
