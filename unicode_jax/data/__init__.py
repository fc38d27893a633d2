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
Annotation = sources.Annotation
ImageSource = sources.ImageSource
TextTokenizer = text_tokenizer_lib.TextTokenizer

EMBEDDED = config_lib.EMBEDDED_SOURCES


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Images: `config.data`.

  Attributes:
    source: "embedded" (installed packages), "folder", "llava", "tfds" or
      "arrayrecord".
    path: folder of images, for "folder" and "llava"; for "tfds" that of the
      prepared data sets, None for TFDS's default; for "arrayrecord" what
      `unicode_jax.prepare` wrote, or a pattern that matches several.
    captions: JSONL of {"image", "text"} for "folder" and "llava", or None.
    conversations: LLaVA's JSON, for "llava".
    tfds: name of a data set, for "tfds".
    max_broken: share of the images (and of LLaVA's records) that may be broken
      or missing; 10 always may.
    codes: folder of cached codes for stage II, or None; not read here.
    cache_dir: where decoded images are kept; None for the user's cache folder.
    global_batch_size: images per step, over all processes.
    embedded: names from `EMBEDDED`, for "embedded".
    weights: share of each of those in the mixture, in any unit.
    heldout_fraction: share of each source that is held out; easy-VQA, and most
      of TFDS, bring their own split.
    validation_fraction: share of the training images, and texts, that is
      evaluated instead of the held-out ones, and not trained on.
    flip: mirror half of the images.
    shift: move them by up to so many pixels each way.
    crop_scale: smallest area of a random crop as a share; 1 for none.
    num_workers: reading processes; 0 for a thread.
  """

  source: str = "embedded"
  path: str | None = None
  captions: str | None = None
  conversations: str | None = None
  tfds: str | None = None
  max_broken: float = 0.1
  codes: str | None = None
  cache_dir: str | None = None
  global_batch_size: int = 64
  embedded: tuple[str, ...] = EMBEDDED
  weights: tuple[float, ...] = (0.5, 0.5)
  heldout_fraction: float = 0.1
  validation_fraction: float = 0.0
  flip: bool = True
  shift: int = 0
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
    heldout_sources: the same images with their annotations, in the same order.
    train_texts: conversations; empty without a text config.
    heldout_texts: conversations, never trained on.
    text_tokenizer: None without a text config.
  """

  image_sources: tuple[ImageSource, ...]
  image_weights: tuple[float, ...]
  heldout_images: dict[str, np.ndarray]
  heldout_sources: tuple[ImageSource, ...]
  train_texts: list[Conversation]
  heldout_texts: list[Conversation]
  text_tokenizer: TextTokenizer | None


def load_data(
  data: DataConfig, text: TextConfig | None, image_size: int
) -> Data:
  """Loads images, texts and the text tokenizer; the same for every seed.

  With a source of your own the texts are those of the ChatterBot corpus, where
  it is installed, the captions and LLaVA's text-only conversations.

  Args:
    data: what images.
    text: what texts; None for no text (a visual tokenizer alone).
    image_size: S, pixels.

  Raises:
    ConfigError: a bad value, an empty folder, no text, ...; says which and what
      to do.
    ConfigError: a package is missing; says how to install it.
  """
  pairs, weights, texts = _sources(data, text, image_size)
  if data.validation_fraction:
    pairs = [
      sources.validation(train, data.validation_fraction) for train, _ in pairs
    ]
  train, heldout_sources = (tuple(side) for side in zip(*pairs))
  heldout = {source.name: source.images() for source in heldout_sources}
  for source in train + heldout_sources:
    logging.info(
      "%s: %d images, %d captions, %d dialogues",
      source.name,
      len(source),
      sum(len(a.captions) for a in source.annotations),
      sum(len(a.dialogues) for a in source.annotations),
    )
  if text is None:
    return Data(train, weights, heldout, heldout_sources, [], [], None)
  train_texts, heldout_texts = _texts(data, text, pairs, texts)
  if text.tokenizer_path is None:
    tokenizer = text_tokenizer_lib.train_text_tokenizer(
      _tokenizer_texts(train_texts, train),
      text.vocab_size,
      image_start=text.image_start,
      image_end=text.image_end,
    )
  else:
    tokenizer = text_tokenizer_lib.load_text_tokenizer(text.tokenizer_path)
  return Data(
    train,
    weights,
    heldout,
    heldout_sources,
    train_texts,
    heldout_texts,
    tokenizer,
  )


_Pair = tuple[ImageSource, ImageSource]
_Texts = tuple[list[Conversation], list[Conversation]]


def _sources(
  data: DataConfig, text: TextConfig | None, image_size: int
) -> tuple[list[_Pair], tuple[float, ...], _Texts]:
  """Loads (train, heldout) images with weights, and texts that came along."""
  if data.source == "embedded":
    return _embedded(data, image_size), data.weights, ([], [])
  shared = {
    "heldout_fraction": data.heldout_fraction,
    "cache_dir": data.cache_dir,
    "max_broken": data.max_broken,
  }
  texts = [], []
  if data.source == "folder":
    path = _needed(data, "path", "a folder of images")
    images = sources.load_folder(
      path, image_size, captions=data.captions, **shared
    )
  elif data.source == "llava":
    path = _needed(data, "path", "a folder of images")
    file = _needed(data, "conversations", "LLaVA's JSON file")
    images, texts = sources.load_llava(
      path,
      file,
      image_size,
      captions=data.captions,
      text_heldout_fraction=text.heldout_fraction if text else 0.0,
      **shared,
    )
  elif data.source == "tfds":
    name = _needed(data, "tfds", "the name of a data set")
    images = sources.load_tfds(name, image_size, data_dir=data.path, **shared)
  elif data.source == "arrayrecord":
    path = _needed(data, "path", "a prepared folder")
    images = sources.load_arrayrecord(
      path, image_size, heldout_fraction=data.heldout_fraction
    )
  else:
    raise config_lib.ConfigError(
      'config.data.source must be "embedded", "folder", "llava", "tfds" or '
      f'"arrayrecord", not {data.source!r}'
    )
  return [images], (1.0,), texts


def _needed(data: DataConfig, key: str, what: str) -> str:
  """Returns a value without which the source cannot be read."""
  value = getattr(data, key)
  if value is None:
    raise config_lib.ConfigError(
      f"config.data.source={data.source} needs config.data.{key}: {what}"
    )
  return value


def _embedded(data: DataConfig, image_size: int) -> list[_Pair]:
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
  pairs: Sequence[_Pair],
  texts: _Texts,
) -> _Texts:
  """Gathers training and held-out conversations without images."""
  train, heldout = [], []
  if data.source == "embedded" or sources.has_chatterbot():
    train, heldout = sources.load_chatterbot(text.heldout_fraction)
  if data.validation_fraction:
    train, heldout = _validation(train, data.validation_fraction)
    texts = _validation(texts[0], data.validation_fraction)
  if data.source != "embedded":
    captions = [sources.caption_conversations(source) for source in pairs[0]]
    logging.info(
      "texts: %d from the ChatterBot corpus%s, %d captions, %d text-only "
      "conversations",
      len(train) + len(heldout),
      "" if train else " (chatterbot-corpus is not installed)",
      len(captions[0]) + len(captions[1]),
      len(texts[0]) + len(texts[1]),
    )
    train = train + captions[0] + texts[0]
    heldout = heldout + captions[1] + texts[1]
    # Two images may have one caption.
    trained = set(train)
    unseen = [text for text in heldout if text not in trained]
    if heldout and not unseen:
      logging.warning(
        "all %d held-out texts are training texts too: their perplexity says "
        "nothing of unseen text",
        len(heldout),
      )
    heldout = unseen or heldout
  if not train or not heldout:
    raise config_lib.ConfigError(
      "there is no text to train and to evaluate the LLM on: run "
      'pip install -e ".[demo]" (chatterbot-corpus), or give captions with '
      "config.data.captions, or text-only records among "
      "config.data.conversations"
    )
  return train, heldout


def _validation(texts: Sequence[Conversation], fraction: float) -> _Texts:
  """Takes a share of the training texts, by their first questions."""
  return sources.partition(
    texts,
    lambda text: sources.is_heldout(
      f"validation {sources.bare_words(text.turns[0][0])}", fraction
    ),
  )


def _tokenizer_texts(
  train_texts: Sequence[Conversation], train_images: Sequence[ImageSource]
) -> list[str]:
  """Returns what the text tokenizer learns from: training text only."""
  texts = [sequences.conversation_text(c) for c in train_texts]
  for source in train_images:
    # easy-VQA's captions are made of words of its questions; thousands more of
    # them would only move merges, and so the ids that results rest on.
    if source.name != "easy_vqa_train":
      texts += [text for a in source.annotations for text in a.captions]
    turns = {
      turn for a in source.annotations for d in a.dialogues for turn in d
    }
    texts += sorted({f"{question} {answer}" for question, answer in turns})
  return texts
