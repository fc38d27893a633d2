"""Shared by the tests of the data: one cache of the real embedded images."""

import numpy as np
import pytest

from unicode_jax.data import sources

SIZE = 16


class WordTokenizer:
  """One id per word; knows the words it has met. Spaces belong to words."""

  bos_id, eos_id = 1, 2

  def __init__(self):
    self.words = {}

  def encode(self, text):
    pieces = text.replace(":", " :").replace("\n", " \n").split(" ")
    return [self.words.setdefault(p, len(self.words) + 3) for p in pieces if p]


@pytest.fixture
def word_tokenizer():
  return WordTokenizer()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def openmoji(cache_dir):
  return sources.load_openmoji(SIZE, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def easy_vqa(cache_dir):
  return sources.load_easy_vqa(SIZE, cache_dir=cache_dir)


@pytest.fixture
def make_source(tmp_path):
  """Builds a source whose image i has every red value `first` + i."""

  def make(name, count, first=0, size=4):
    images = np.zeros((count, size, size, 3), np.uint8)
    images[..., 0] = np.arange(first, first + count)[:, None, None]
    images[:, :, 0, 1] = 255  # A green left edge shows mirroring.
    path = tmp_path / f"{name}.npy"
    np.save(path, images)
    items = tuple({"name": str(i), "row": i} for i in range(count))
    return sources.ImageSource(
      name, path, items, (sources.Annotation(),) * count
    )

  return make
