"""Shared by the tests of the data: one cache of the real embedded images."""

import types

import numpy as np
import pytest
import tokenizers

from unicode_jax import config as config_lib
from unicode_jax.data import sources, text_tokenizer

SIZE = 16


class WordTokenizer:
  """One id per word; knows the words it has met. Spaces belong to words."""

  bos_id, eos_id = 1, 2
  control = types.MappingProxyType(
    {"<image>": 3, "</image>": 4, "<|im_start|>": 5, "<|im_end|>": 6}
  )

  def __init__(self):
    self.words = {}

  def encode(self, text):
    pieces = text.replace(":", " :").replace("\n", " \n").split(" ")
    return [self.words.setdefault(p, len(self.words) + 10) for p in pieces if p]

  def token_id(self, name):
    if name not in self.control:
      raise config_lib.ConfigError(f"the vocabulary has no token {name!r}")
    return self.control[name]

  def read(self, written):
    r"""Reads what a test writes down: ids int32[n, D], bool[n], bool[n].

    Tokens are words, `\n` in one is a line break, `1+2` are the codes of one
    position. `!` marks what an answer must learn, `#` a code of a drawn image.
    """
    known = {**self.control, **self.words, "<s>": self.bos_id}
    known["</s>"] = self.eos_id
    ids, answer, drawn = [], [], []
    for word in written.split():
      mark = word[0] if word[0] in "!#" else ""
      word = word.removeprefix(mark).replace("\\n", "\n")
      stacked = word.replace("+", "").isdigit()
      ids.append(
        [int(c) for c in word.split("+")] if stacked else [known[word]]
      )
      answer.append(mark != "")
      drawn.append(mark == "#")
    depth = max(2, *map(len, ids))
    ids = [row + [-1] * (depth - len(row)) for row in ids]
    return np.array(ids, np.int32), np.array(answer), np.array(drawn)

  def check(self, encoded, written):
    """Asserts that a conversation is, token by token, what is written."""
    ids, answer, drawn = self.read(written)
    np.testing.assert_array_equal(encoded.token_ids, ids[:-1])
    np.testing.assert_array_equal(encoded.labels, ids[1:, 0])
    np.testing.assert_array_equal(encoded.loss_mask, answer[1:])
    np.testing.assert_array_equal(encoded.image_mask, drawn[1:])
    dtypes = [array.dtype for array in encoded]
    assert dtypes == [np.int32, np.int32, np.float32, bool]


@pytest.fixture
def word_tokenizer():
  return WordTokenizer()


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
  """A real tokenizer: tokens that join words, spaces and line breaks."""
  texts = [f"User: Is the picture red?\nAssistant: {a}." for a in ("Yes", "No")]
  texts += ["Draw: a red dot. Draw a picture. what is in the image?"] * 3
  folder = tmp_path_factory.mktemp("bpe")
  text_tokenizer.train_text_tokenizer(texts * 5, 300).save(folder)
  trained = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  return text_tokenizer.TextTokenizer(trained.to_str(), {})


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
