"""Data sets that the real TensorFlow Datasets wrote, without TensorFlow."""

import io
import json
import logging
import sys

import numpy as np
from PIL import Image
import pytest

from unicode_jax.data import sources

tfds = pytest.importorskip("tensorflow_datasets")
FEATURES = tfds.features
PICTURE = FEATURES.Image(shape=(None, None, 3))


def png(number):
  stream = io.BytesIO()
  Image.new("RGB", (9, 7), (number, 0, 0)).save(stream, "PNG")
  stream.seek(0)
  return stream


def build(folder, name, features, splits):
  """Writes a data set; elements are made of the image's number."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    # Looking for it needs a further package where pytest imports by path.
    code_path = None

    def _info(self):
      return self.dataset_info_from_configs(
        features=FEATURES.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {
        key: self._generate_examples(rows) for key, rows in splits.items()
      }

    def _generate_examples(self, rows):
      yield from enumerate(rows)

  Builder.name = name
  builder = Builder(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return folder


def load(folder, name, **kwargs):
  kwargs = {"cache_dir": folder / "cache", "data_dir": folder, **kwargs}
  return sources.load_tfds(name, 4, **kwargs)


def by_number(pair):
  """Annotation of each image by its red value, of both sides."""
  found = {}
  for source in pair:
    for image, annotation in zip(
      source.images(), source.annotations, strict=True
    ):
      assert (image == (image[0, 0, 0], 0, 0)).all()
      found[int(image[0, 0, 0])] = annotation
  return found


def test_everything_that_is_said(tmp_path):
  def row(i):
    return {
      "image": png(i),
      "captions": [f"caption {i}", "zéro"],
      "label": i % 2,
      "question": f"number {i}?",
      "answers": ["no", f"{i}", f"{i}", "no", f"{i}"],
    }

  features = {
    "image": PICTURE,
    "captions": FEATURES.Sequence(FEATURES.Text()),
    "label": FEATURES.ClassLabel(names=["cat", "dog"]),
    "question": FEATURES.Text(),
    "answers": FEATURES.Sequence(FEATURES.Text()),
  }
  splits = {
    "train": [row(i) for i in range(12)],
    "test": [row(i) for i in range(100, 105)],
  }
  folder = build(tmp_path, "everything", features, splits)
  for _ in range(2):  # Decoded, then from the cache.
    train, heldout = load(folder, "everything")
    assert (train.name, heldout.name) == ("tfds_train", "tfds_heldout")
    assert (len(train), len(heldout)) == (12, 5)
    said = by_number((train, heldout))
    assert set(said) == {*range(12), *range(100, 105)}
    for i, annotation in said.items():
      assert annotation == sources.Annotation(
        captions=(f"caption {i}", "zéro"),
        dialogues=(((f"number {i}?", str(i)),),),
        label=("cat", "dog")[i % 2],
      )
  assert "tensorflow" not in sys.modules
  # The same order and pixels as the library's own reader.
  own = tfds.data_source(
    "everything", split="train", data_dir=folder, download=False
  )
  for item, image in zip(train.items, train.images(), strict=True):
    element = own[item["number"]]
    assert item["name"] == f"train/{item['number']}"
    assert (element["image"][0, 0] == image[0, 0]).all()
  assert load(folder, "everything:1.0.0") == (train, heldout)


def test_nested_sequences_as_in_coco_and_clevr(tmp_path):
  features = {
    "image": PICTURE,
    "mask": FEATURES.Image(shape=(None, None, 3)),
    "captions": FEATURES.Sequence(
      {"id": FEATURES.Scalar(dtype=np.int64), "text": FEATURES.Text()}
    ),
    "question_answer": FEATURES.Sequence(
      {"question": FEATURES.Text(), "answer": FEATURES.Text()}
    ),
    "objects": FEATURES.Sequence({"text": FEATURES.Text()}),
  }
  rows = [
    {
      "image": png(i),
      "mask": png(200),
      "captions": [{"id": 1, "text": f"c{i}"}, {"id": 2, "text": "d"}],
      "question_answer": [
        {"question": "q", "answer": f"a{i}"},
        {"question": "hidden", "answer": ""},
        {"question": "r", "answer": "b"},
      ],
      "objects": [{"text": "not a caption"}],
    }
    for i in range(40)
  ]
  folder = build(tmp_path, "nested", features, {"train": rows})
  train, heldout = load(folder, "nested")
  # No other split: held out by number.
  assert {item["name"] for item in heldout.items} == {
    f"train/{i}" for i in range(40) if sources.is_heldout(f"train/{i}", 0.1)
  }
  said = by_number((train, heldout))
  assert set(said) == set(range(40))
  for i, annotation in said.items():
    assert annotation.captions == (f"c{i}", "d")
    assert annotation.dialogues == ((("q", f"a{i}"),), (("r", "b"),))
    assert annotation.label is None


def test_validation_comes_before_test_and_copies_are_dropped(tmp_path, caplog):
  splits = {
    "train": [{"picture": png(i), "kind": -1} for i in (1, 2, 50)],
    "test": [{"picture": png(60), "kind": 0}],
    "validation": [{"picture": png(i), "kind": 1} for i in (50, 51)],
  }
  features = {
    "picture": PICTURE,
    "kind": FEATURES.ClassLabel(names=["a", "b"]),
  }
  folder = build(tmp_path, "splits", features, splits)
  with caplog.at_level(logging.INFO):
    train, heldout = load(folder, "splits")
  assert "images from 'picture', classes from 'kind'" in caplog.text
  assert set(by_number([train])) == {1, 2}
  assert set(by_number([heldout])) == {50, 51}
  assert {a.label for a in heldout.annotations} == {"b"}
  assert {a.label for a in train.annotations} == {None}  # -1: not known.


def test_broken_images(tmp_path, caplog):
  broken = [{"image": io.BytesIO(b"\x89PNG nothing")} for _ in range(3)]
  rows = [{"image": png(i)} for i in range(40)]
  folder = build(
    tmp_path, "broken", {"image": PICTURE}, {"train": rows + broken}
  )
  with caplog.at_level(logging.WARNING):
    pair = load(folder, "broken")
  assert "skipped 3 of 43" in caplog.text
  assert set(by_number(pair)) == set(range(40))


def test_a_new_version_is_seen(tmp_path):
  for number in (7, 8):
    rows = [{"image": png(number)}]
    splits = {"train": rows, "test": [{"image": png(number + 100)}]}
    folder = build(
      tmp_path / str(number), "changing", {"image": PICTURE}, splits
    )
    pair = load(folder, "changing", cache_dir=tmp_path / "cache")
    assert set(by_number(pair)) == {number, number + 100}


@pytest.mark.parametrize(
  ("features", "row", "message"),
  [
    (
      {"x": FEATURES.Text()},
      {"x": "a"},
      r"needs an image feature, but has none; its features are x \(Text\)",
    ),
    (
      {"left": PICTURE, "right": PICTURE},
      {"left": 1, "right": 2},
      r"several images and none named 'image': \['left', 'right'\]",
    ),
  ],
)
def test_no_image(tmp_path, features, row, message):
  row = {k: png(v) if isinstance(v, int) else v for k, v in row.items()}
  folder = build(tmp_path, "imageless", features, {"train": [row]})
  with pytest.raises(ValueError, match=message):
    load(folder, "imageless")


def test_no_training_split(tmp_path):
  splits = {"test": [{"image": png(1)}]}
  folder = build(tmp_path, "testing", {"image": PICTURE}, splits)
  with pytest.raises(ValueError, match=r"no split .train., but \['test'\]"):
    load(folder, "testing")


def test_not_prepared(tmp_path):
  for name in ("nowhere", "mnist", "nowhere/config:3.0.0", "no such name"):
    with pytest.raises(ValueError, match=r"is not a prepared.*array_record"):
      load(tmp_path, name)


def test_stored_in_a_format_that_needs_tensorflow(tmp_path):
  splits = {"train": [{"image": png(1)}], "test": [{"image": png(2)}]}
  folder = build(tmp_path, "records", {"image": PICTURE}, splits)
  # As a data set of TFDS's own default format describes itself.
  info = folder / "records" / "1.0.0" / "dataset_info.json"
  said = json.loads(info.read_text())
  said["fileFormat"] = "tfrecord"
  info.write_text(json.dumps(said))
  with pytest.raises(
    ValueError, match=r"stored as tfrecord.*without TensorFlow.*array_record"
  ):
    load(folder, "records")


def test_missing_package(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(
    ValueError, match=r'tensorflow_datasets.*pip install -e "\.\[tfds\]"'
  ):
    load(tmp_path, "mnist")
