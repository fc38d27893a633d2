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
    ({"source": "web"}, "must be .embedded. or .folder."),
    ({"source": "folder"}, "needs config.data.path"),
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


def test_given_tokenizer(folder, tmp_path, embedded):
  embedded.text_tokenizer.save(tmp_path / "tokenizer")
  text = data.TextConfig(tokenizer_path=str(tmp_path / "tokenizer"))
  loaded = data.load_data(folder, text, 8)
  assert loaded.text_tokenizer.encode("hello") == (
    embedded.text_tokenizer.encode("hello")
  )
