"""`load_data`: everything a run needs, without leaks; clear errors."""

import dataclasses
import hashlib
import json
import logging

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config, data
from unicode_jax.data import sources


def digests(images):
  return {hashlib.sha256(image.tobytes()).digest() for image in images}


@pytest.fixture(scope="module")
def embedded(cache_dir):
  return data.load_data(
    data.DataConfig(cache_dir=str(cache_dir)), data.TextConfig(), 16
  )


def test_fields_and_defaults_are_the_configs():
  tree = config.default_config()
  for cls, node in ((data.DataConfig, tree.data), (data.TextConfig, tree.text)):
    assert dataclasses.asdict(cls()) == dict(node)
  assert config.EMBEDDED_SOURCES == data.EMBEDDED


def test_embedded(embedded):
  names = [source.name for source in embedded.image_sources]
  assert names == ["openmoji_train", "easy_vqa_train"]
  assert embedded.image_weights == (0.5, 0.5)
  assert list(embedded.heldout_images) == ["openmoji_heldout", "easy_vqa_test"]
  assert embedded.heldout_images["easy_vqa_test"].shape == (1000, 16, 16, 3)
  assert embedded.text_tokenizer.vocab_size == 2048
  for source in embedded.heldout_sources:
    np.testing.assert_array_equal(
      embedded.heldout_images[source.name], source.images()
    )
    assert len(source.annotations) == len(source)
  assert [s.name for s in embedded.heldout_sources] == list(
    embedded.heldout_images
  )
  mask = embedded.text_tokenizer.visual_code_mask("<image>", "</image>")
  assert mask.sum() == 2048 - 256 - 5


def test_embedded_leaks_nothing(embedded):
  trained = set().union(
    *(digests(source.images()) for source in embedded.image_sources)
  )
  for images in embedded.heldout_images.values():
    assert len(images) > 200 and not trained & digests(images)
  assert not set(embedded.train_texts) & set(embedded.heldout_texts)


def test_tokenizer_learns_from_training_text_only(embedded, monkeypatch):
  seen = []
  real = data.text_tokenizer_lib.train_text_tokenizer

  def spy(texts, *args, **kwargs):
    seen.extend(texts)
    return real(texts, *args, **kwargs)

  monkeypatch.setattr(data.text_tokenizer_lib, "train_text_tokenizer", spy)
  cache = embedded.image_sources[0].path.parents[1]
  data.load_data(data.DataConfig(cache_dir=str(cache)), data.TextConfig(), 16)
  text = set(seen)
  _, heldout = sources.load_openmoji(16, cache_dir=cache)
  assert text and not text & {item["name"] for item in heldout.items}
  for conversation in embedded.heldout_texts:
    assert data.sequences.conversation_text(conversation) not in text


def test_validation_takes_training_images_and_leaves_the_heldout(
  embedded, cache_dir
):
  config_of = data.DataConfig(cache_dir=str(cache_dir), validation_fraction=0.2)
  loaded = data.load_data(config_of, None, 16)
  assert list(loaded.heldout_images) == [
    "openmoji_train_validation",
    "easy_vqa_train_validation",
  ]
  for before, left, taken in zip(
    embedded.image_sources, loaded.image_sources, loaded.heldout_sources
  ):
    assert left.name == before.name
    known = {x["name"]: a for x, a in zip(before.items, before.annotations)}
    for side in (left, taken):
      names = [item["name"] for item in side.items]
      assert [known[name] for name in names] == list(side.annotations)
    assert len(left) + len(taken) == len(before)
    assert abs(len(taken) / len(before) - 0.2) < 0.03
    assert not digests(left.images()) & digests(taken.images())
    assert not {sources.untoned_name(x["name"]) for x in left.items} & {
      sources.untoned_name(x["name"]) for x in taken.items
    }
  test = embedded.heldout_images["easy_vqa_test"]
  for source in loaded.image_sources + loaded.heldout_sources:
    assert not digests(source.images()) & digests(test)


def test_order_and_choice_of_sources(cache_dir):
  both = data.DataConfig(
    embedded=("easy_vqa", "openmoji"),
    weights=(0.9, 0.1),
    cache_dir=str(cache_dir),
  )
  loaded = data.load_data(both, None, 16)
  assert [s.name for s in loaded.image_sources] == [
    "easy_vqa_train",
    "openmoji_train",
  ]
  assert loaded.text_tokenizer is None and not loaded.train_texts
  one = dataclasses.replace(both, embedded=("easy_vqa",), weights=(1.0,))
  assert list(data.load_data(one, None, 16).heldout_images) == ["easy_vqa_test"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"source": "web"}, "must be .embedded., .folder., .* or .arrayrecord."),
    ({"source": "folder"}, "source=folder needs config.data.path"),
    ({"source": "llava"}, "source=llava needs config.data.path"),
    ({"source": "llava", "path": "x"}, "needs config.data.conversations"),
    ({"source": "tfds"}, "source=tfds needs config.data.tfds"),
    ({"embedded": ("openmoji", "cifar")}, "cifar.*must name some of"),
    ({"embedded": ()}, "must name some of"),
    ({"weights": (1.0,)}, "one weight for each"),
  ],
)
def test_errors(cache_dir, change, message):
  bad = dataclasses.replace(data.DataConfig(cache_dir=str(cache_dir)), **change)
  with pytest.raises(ValueError, match=message):
    data.load_data(bad, None, 16)


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "images"
  root.mkdir()
  for i in range(30):
    Image.new("RGB", (9, 7), (i, 0, 0)).save(root / f"{i}.png")
  lines = [
    {"image": f"{i}.png", "text": f"a picture of number {i}"} for i in range(30)
  ]
  captions = tmp_path / "captions.jsonl"
  captions.write_text("\n".join(map(json.dumps, lines)))
  return data.DataConfig(
    source="folder",
    path=str(root),
    captions=str(captions),
    cache_dir=str(tmp_path / "cache"),
  )


def test_folder_adds_captions_to_chatterbot(folder, caplog):
  with caplog.at_level(logging.INFO):
    loaded = data.load_data(folder, data.TextConfig(vocab_size=600), 8)
  assert "30 captions" in caplog.text
  assert list(loaded.heldout_images) == ["folder_heldout"]
  assert loaded.heldout_images["folder_heldout"].dtype == np.uint8
  assert loaded.image_weights == (1.0,)
  trained = {c.turns[0][1] for c in loaded.train_texts}
  heldout = {c.turns[0][1] for c in loaded.heldout_texts}
  assert not trained & {h for h in heldout if h.startswith("a picture of")}
  assert len(
    [t for t in trained if t.startswith("a picture of number")]
  ) == len(loaded.image_sources[0])
  assert len(loaded.train_texts) > 900


def test_heldout_captions_are_no_training_captions(folder, tmp_path):
  lines = [
    {"image": f"{i}.png", "text": f"a picture of number {i % 2}"}
    for i in range(30)
  ]
  (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  loaded = data.load_data(folder, data.TextConfig(vocab_size=600), 8)
  assert loaded.heldout_sources[0].annotations[0].captions
  assert not set(loaded.train_texts) & set(loaded.heldout_texts)


def test_folder_without_chatterbot(folder, monkeypatch, caplog):
  monkeypatch.setattr(sources, "has_chatterbot", lambda: False)
  with caplog.at_level(logging.INFO):
    loaded = data.load_data(folder, data.TextConfig(vocab_size=270), 8)
  assert "chatterbot-corpus is not installed" in caplog.text
  assert len(loaded.train_texts) + len(loaded.heldout_texts) == 30
  bare = dataclasses.replace(folder, captions=None)
  with pytest.raises(ValueError, match="no text to train"):
    data.load_data(bare, data.TextConfig(), 8)
  assert data.load_data(bare, None, 8).text_tokenizer is None


@pytest.fixture
def llava(folder, tmp_path):
  """Thirty images with a two-turn dialogue each, and thirty text records."""

  def turns(*texts):
    who = ("human", "gpt") * len(texts)
    return [{"from": w, "value": text} for w, text in zip(who, texts)]

  records = [
    {
      "image": f"{i}.png",
      "conversations": turns(
        f"<image>\nasked{i}", f"said{i}", "common", f"more{i}"
      ),
    }
    for i in range(30)
  ] + [
    {"id": i, "conversations": turns(f"textual{i}", f"reply{i}")}
    for i in range(30)
  ]
  file = tmp_path / "llava.json"
  file.write_text(json.dumps(records))
  return dataclasses.replace(
    folder, source="llava", conversations=str(file), captions=None
  )


def test_llava(llava, monkeypatch):
  monkeypatch.setattr(sources, "has_chatterbot", lambda: False)
  seen = []
  real = data.text_tokenizer_lib.train_text_tokenizer

  def spy(texts, *args, **kwargs):
    seen.extend(texts)
    return real(texts, *args, **kwargs)

  monkeypatch.setattr(data.text_tokenizer_lib, "train_text_tokenizer", spy)
  loaded = data.load_data(llava, data.TextConfig(vocab_size=300), 8)
  assert list(loaded.heldout_images) == ["llava_heldout"]
  train, heldout = *loaded.image_sources, *loaded.heldout_sources
  assert len(train) + len(heldout) == 30
  # Text-only records, and nothing else, are text.
  asked = [
    {c.turns[0][0] for c in texts}
    for texts in (loaded.train_texts, loaded.heldout_texts)
  ]
  assert asked[0] | asked[1] == {f"textual{i}" for i in range(30)}
  assert not asked[0] & asked[1]
  # The tokenizer learns from all of the training side and of nothing else.
  learned = set(" ".join(seen).split())
  for item in train.items:
    number = item["name"][:-4]
    assert {f"asked{number}", f"said{number}", f"more{number}"} <= learned
  for item in heldout.items:
    number = item["name"][:-4]
    assert not {f"asked{number}", f"said{number}", f"more{number}"} & learned
  assert asked[0] <= learned and not asked[1] & learned


def test_llava_with_captions(llava, folder):
  both = dataclasses.replace(llava, captions=folder.captions)
  loaded = data.load_data(both, data.TextConfig(vocab_size=600), 8)
  for source in (*loaded.image_sources, *loaded.heldout_sources):
    for item, said in zip(source.items, source.annotations, strict=True):
      number = item["name"][:-4]
      assert said.captions == (f"a picture of number {number}",)
      assert said.dialogues[0][0] == (f"asked{number}", f"said{number}")
  # A folder holds out the same images, whatever is said of them.
  plain = data.load_data(folder, None, 8)
  assert plain.heldout_sources[0].items == loaded.heldout_sources[0].items


def test_max_broken_reaches_every_source(llava, folder, tmp_path):
  for i in range(12):
    (tmp_path / "images" / f"{i}.png").write_text("no image")
  for config_of in (llava, folder):
    with pytest.raises(ValueError, match=r"12 of .*more than the 10"):
      data.load_data(config_of, None, 8)
    lenient = dataclasses.replace(
      config_of, max_broken=0.4, heldout_fraction=0.5
    )
    loaded = data.load_data(lenient, None, 8)
    kept = [s.items for s in loaded.image_sources + loaded.heldout_sources]
    assert sum(map(len, kept)) == 18


def test_given_tokenizer(folder, tmp_path, embedded):
  embedded.text_tokenizer.save(tmp_path / "tokenizer")
  text = data.TextConfig(tokenizer_path=str(tmp_path / "tokenizer"))
  loaded = data.load_data(folder, text, 8)
  assert loaded.text_tokenizer.encode("hello") == (
    embedded.text_tokenizer.encode("hello")
  )
