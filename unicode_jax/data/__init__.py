"""Data: real images and texts, split, cached, and served without a network.

`load_data` gathers what a run needs; `pipeline` turns it into batches. Files:
`sources` (what there is and what is held out), `cache` (decoded once),
`text_tokenizer`, `sequences` (template, loss mask, packing) and `pipeline`
(grain; import it by itself, it is the slow one).
Nothing here imports JAX.
"""

from collections.abc import Sequence
import dataclasses
import logging

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import (
  sequences,
  sources,
  text_tokenizer as text_tokenizer_lib,
)

Conversation = sequences.Conversation
ImageSource = sources.ImageSource
TextTokenizer = text_tokenizer_lib.TextTokenizer

EMBEDDED = config_lib.EMBEDDED_SOURCES


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Images: `config.data`.

  Attributes:
    source: "embedded" (installed packages) or "folder".
    path: folder of images, for "folder".
    captions: JSONL of {"image", "text"} for the folder, or None.
    cache_dir: where decoded images are kept; None for the user's cache folder.
    global_batch_size: images per step, over all processes.
    embedded: names from `EMBEDDED`, for "embedded".
    weights: share of each of those in the mixture, in any unit.
    heldout_fraction: share of each source that is held out; easy-VQA brings its
      own split.
    flip: mirror half of the images.
    crop_scale: smallest area of a random crop as a share; 1 for none.
    num_workers: reading processes; 0 for a thread.
  """

  source: str = "embedded"
  path: str | None = None
  captions: str | None = None
  cache_dir: str | None = None
  global_batch_size: int = 64
  embedded: tuple[str, ...] = EMBEDDED
  weights: tuple[float, ...] = (0.5, 0.5)
  heldout_fraction: float = 0.1
  flip: bool = True
  crop_scale: float = 1.0
  num_workers: int = 0


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Texts: `config.text`.

  Attributes:
    tokenizer_path: Hugging Face tokenizer; None to train one.
    vocab_size: K of the trained one; of a loaded one, the rows of the LLM.
    sequence_length: T, positions of a packed row.
    global_batch_size: rows per step, over all processes.
    heldout_fraction: share of the questions that is held out.
    image_start: token that opens an image.
    image_end: token that closes one.
  """

  tokenizer_path: str | None = None
  vocab_size: int = 2048
  sequence_length: int = 128
  global_batch_size: int = 8
  heldout_fraction: float = 0.1
  image_start: str = text_tokenizer_lib.IMAGE_START
  image_end: str = text_tokenizer_lib.IMAGE_END


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything that a run reads.

  Attributes:
    image_sources: to train on.
    image_weights: share of each in the mixture, in any unit.
    heldout_images: name -> uint8[n, S, S, 3], never trained on.
    train_texts: conversations; empty without a text config.
    heldout_texts: conversations, never trained on.
    text_tokenizer: None without a text config.
  """

  image_sources: tuple[ImageSource, ...]
  image_weights: tuple[float, ...]
  heldout_images: dict[str, np.ndarray]
  train_texts: list[Conversation]
  heldout_texts: list[Conversation]
  text_tokenizer: TextTokenizer | None


def load_data(
  data: DataConfig, text: TextConfig | None, image_size: int
) -> Data:
  """Loads images, texts and the text tokenizer; the same for every seed.

  With source "folder" the texts are those of the ChatterBot corpus, where it is
  installed, and the folder's captions.

  Args:
    data: what images.
    text: what texts; None for no text (a visual tokenizer alone).
    image_size: S, pixels.

  Raises:
    ConfigError: a bad value, an empty folder, no text, ...; says which and what
      to do.
    ConfigError: a package is missing; says how to install it.
  """
  if data.source == "embedded":
    pairs, weights = _embedded(data, image_size), data.weights
  elif data.source == "folder":
    if data.path is None:
      raise config_lib.ConfigError(
        "config.data.source=folder needs config.data.path: a folder of images"
      )
    folder = sources.load_folder(
      data.path,
      image_size,
      captions=data.captions,
      heldout_fraction=data.heldout_fraction,
      cache_dir=data.cache_dir,
    )
    pairs, weights = [folder], (1.0,)
  else:
    raise config_lib.ConfigError(
      f'config.data.source must be "embedded" or "folder", not {data.source!r}'
    )
  train = tuple(pair[0] for pair in pairs)
  heldout = {pair[1].name: pair[1].images() for pair in pairs}
  for name, count in [(s.name, len(s)) for s in train] + [
    (name, len(images)) for name, images in heldout.items()
  ]:
    logging.info("%s: %d images", name, count)
  if text is None:
    return Data(train, weights, heldout, [], [], None)
  train_texts, heldout_texts = _texts(data, text, pairs)
  if text.tokenizer_path is None:
    tokenizer = text_tokenizer_lib.train_text_tokenizer(
      _tokenizer_texts(train_texts, train),
      text.vocab_size,
      image_start=text.image_start,
      image_end=text.image_end,
    )
  else:
    tokenizer = text_tokenizer_lib.load_text_tokenizer(text.tokenizer_path)
  return Data(train, weights, heldout, train_texts, heldout_texts, tokenizer)


def _embedded(
  data: DataConfig, image_size: int
) -> list[tuple[ImageSource, ImageSource]]:
  """Loads (train, heldout) of each embedded source."""
  unknown = sorted(set(data.embedded) - set(EMBEDDED))
  if unknown or not data.embedded:
    raise config_lib.ConfigError(
      f"config.data.embedded={tuple(data.embedded)} must name some of "
      f"{EMBEDDED}"
    )
  if len(data.weights) != len(data.embedded):
    raise config_lib.ConfigError(
      f"config.data.weights={tuple(data.weights)} must have one weight for "
      f"each of config.data.embedded={tuple(data.embedded)}"
    )
  pairs = {}
  if "openmoji" in data.embedded:
    pairs["openmoji"] = sources.load_openmoji(
      image_size,
      heldout_fraction=data.heldout_fraction,
      cache_dir=data.cache_dir,
    )
  if "easy_vqa" in data.embedded:
    pairs["easy_vqa"] = sources.load_easy_vqa(
      image_size, cache_dir=data.cache_dir
    )
  return [pairs[name] for name in data.embedded]


def _texts(
  data: DataConfig,
  text: TextConfig,
  pairs: Sequence[tuple[ImageSource, ImageSource]],
) -> tuple[list[Conversation], list[Conversation]]:
  """Gathers training and held-out conversations."""
  train, heldout = [], []
  if data.source == "embedded" or sources.has_chatterbot():
    train, heldout = sources.load_chatterbot(text.heldout_fraction)
  if data.source == "folder":
    train_source, heldout_source = pairs[0]
    captions = (
      sources.caption_conversations(train_source),
      sources.caption_conversations(heldout_source),
    )
    logging.info(
      "texts: %d from the ChatterBot corpus%s, %d captions",
      len(train) + len(heldout),
      "" if train else " (chatterbot-corpus is not installed)",
      len(captions[0]) + len(captions[1]),
    )
    train, heldout = train + captions[0], heldout + captions[1]
  if not train or not heldout:
    raise config_lib.ConfigError(
      "there is no text to train and to evaluate the LLM on: run "
      'pip install -e ".[demo]" (chatterbot-corpus), or give captions with '
      "config.data.captions"
    )
  return train, heldout


def _tokenizer_texts(
  train_texts: Sequence[Conversation], train_images: Sequence[ImageSource]
) -> list[str]:
  """Returns what the text tokenizer learns from: training text only."""
  texts = [sequences.conversation_text(c) for c in train_texts]
  for source in train_images:
    texts += [caption for captions in source.captions for caption in captions]
    if source.name == "easy_vqa_train":
      asked = sources.easy_vqa_questions("train")
      texts += sorted({f"{question} {answer}" for question, answer, _ in asked})
  return texts
