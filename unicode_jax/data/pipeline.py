"""Grain pipelines: endless image and text batches, and fixed held-out batches.

Every pipeline is an addressable `grain.MapDataset` up to its batches, so the
global order is a function of the seed alone: process p of P reads rows
p*b..(p+1)*b of each global batch (b = global_batch_size / P), whatever P is. An
iterator has no state to keep: one that starts at batch n gives what any other
gives after n batches, with any number of processes and workers.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import logging
import sys
from typing import Any

import grain
import numpy as np
from PIL import Image

from unicode_jax import config as config_lib, interruption
from unicode_jax.data import (
  sequences,
  sources as sources_lib,
  views as views_lib,
)

# Characters of a conversation that name it.
_SHOWN_OF_TEXT = 60


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
  """Mirrors an image left to right half of the time."""

  def random_map(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Returns the element with its image, uint8[S, S, 3], mirrored or not."""
    if rng.random() < 0.5:
      return element
    return {**element, "image": element["image"][:, ::-1]}


@dataclasses.dataclass(frozen=True)
class RandomShift(grain.transforms.RandomMap):
  """Moves an image, its edge repeated.

  Attributes:
    shift: largest movement in either direction, pixels; all are as likely.
  """

  shift: int

  def random_map(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Returns the element with its image, uint8[S, S, 3], moved."""
    down, right = rng.integers(-self.shift, self.shift + 1, size=2)
    view = views_lib.View(down=int(down), right=int(right))
    return {**element, "image": views_lib.see(element["image"], view)}


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
  """Cuts a random square and resizes it to the image's own size.

  Attributes:
    crop_scale: smallest area of the square as a share of the image's, in
      (0, 1]; the share is drawn uniformly from [crop_scale, 1].
  """

  crop_scale: float

  def random_map(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Returns the element with its image, uint8[S, S, 3], cropped."""
    image = element["image"]
    size = image.shape[0]
    side = size * np.sqrt(rng.uniform(self.crop_scale, 1.0))
    left, top = rng.uniform(0.0, size - side, size=2)
    cropped = Image.fromarray(np.ascontiguousarray(image)).resize(
      (size, size),
      Image.Resampling.BICUBIC,
      box=(left, top, left + side, top + side),
    )
    return {**element, "image": np.asarray(cropped)}


def to_float(images: np.ndarray) -> np.ndarray:
  """Maps pixels from uint8 0..255 to float32 [-1, 1], in any shape."""
  return np.asarray(images, np.float32) / np.float32(127.5) - np.float32(1.0)


def image_iterator(
  sources: Sequence[sources_lib.ImageSource],
  weights: Sequence[float],
  *,
  global_batch_size: int,
  seed: int,
  flip: bool = True,
  shift: int = 0,
  crop_scale: float = 1.0,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  start: int = 0,
) -> grain.DatasetIterator:
  """Iterates for ever over a weighted mixture of image sources.

  Args:
    sources: all of one image size S. Each is shuffled anew in every epoch.
    weights: share of each source in the mixture, >= 0, in any unit; a source
      of weight 0 is left out.
    global_batch_size: images per step, over all processes.
    seed: decides order and augmentation.
    flip: mirror half of the images.
    shift: see `RandomShift`; 0 for none.
    crop_scale: see `RandomResizedCrop`; 1 for no crop.
    process_index: this process.
    process_count: number of processes; divides `global_batch_size`.
    num_workers: worker processes; 0 reads in threads of this process, which
      is the fastest for images that lie in a cache.
    start: global batches to leave out, which a run that goes on has had.

  Returns:
    An iterator of {"image": float32[b, S, S, 3] in [-1, 1]}.

  Raises:
    ConfigError: weights do not fit the sources, a source is empty, the sizes
      differ, `crop_scale` is outside (0, 1], or the batch does not divide.
  """
  if len(weights) != len(sources):
    raise config_lib.ConfigError(
      f"{len(weights)} weights {tuple(weights)} for {len(sources)} image "
      "sources: give one weight per source"
    )
  if min(weights, default=0) < 0 or sum(weights) <= 0:
    raise config_lib.ConfigError(
      f"weights {tuple(weights)} must be >= 0 and at least one above 0"
    )
  if not 0 < crop_scale <= 1:
    raise config_lib.ConfigError(
      f"crop_scale must lie in (0, 1], not {crop_scale}"
    )
  chosen = [(s, w) for s, w in zip(sources, weights) if w]
  for source, _ in chosen:
    if not len(source):
      raise config_lib.ConfigError(
        f"image source {source.name} has no training images"
      )
  sizes = {source.name: source.image_size for source, _ in chosen}
  if len(set(sizes.values())) > 1:
    raise config_lib.ConfigError(f"image sources differ in size: {sizes}")
  dataset = mix(*zip(*chosen), seed).seed(seed)
  if crop_scale < 1:
    dataset = dataset.random_map(RandomResizedCrop(crop_scale))
  if flip:
    dataset = dataset.random_map(RandomFlip())
  if shift:
    dataset = dataset.random_map(RandomShift(shift))
  dataset = shard(dataset, global_batch_size, process_index, process_count)
  dataset = dataset.map(lambda batch: {"image": to_float(batch["image"])})
  threads = max(source.read_threads for source, _ in chosen)
  return iterate(dataset, num_workers, start, threads)


def image_batch_names(
  sources: Sequence[sources_lib.ImageSource],
  weights: Sequence[float],
  *,
  global_batch_size: int,
  seed: int,
  batch: int,
) -> list[str]:
  """Names the images of a batch of `image_iterator`, of all processes.

  Args:
    sources: as there.
    weights: as there.
    global_batch_size: as there.
    seed: as there.
    batch: its number, from 0.

  Returns:
    "source/image" of each.
  """
  chosen = [(s, w) for s, w in zip(sources, weights) if w]
  numbers = [Numbers(i, len(source)) for i, (source, _) in enumerate(chosen)]
  order = mix(numbers, [weight for _, weight in chosen], seed)
  first = batch * global_batch_size
  return [
    f"{chosen[i][0].name}/{chosen[i][0].items[row]['name']}"
    for i, row in (order[first + n] for n in range(global_batch_size))
  ]


class Numbers:
  """A data source of (group, 0), (group, 1), ..."""

  def __init__(self, group: int, count: int):
    self._group, self._count = group, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> tuple[int, int]:
    return self._group, index


def mix(
  sources: Sequence[Any], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Interleaves data sources for ever, each in a random order every epoch.

  Args:
    sources: addressable by number.
    weights: share of each.
    seed: decides the orders.

  Returns:
    A data set of their elements. Which element stands where depends on the
    lengths of the sources alone, not on what they hold.
  """
  return grain.MapDataset.mix(
    [
      grain.MapDataset.source(Epochs(source, seed, i))
      for i, source in enumerate(sources)
    ],
    list(weights),
  )


class PackedText:
  """Rows of packed conversations, addressable by number, for grain."""

  def __init__(
    self,
    conversations: Sequence[sequences.Conversation],
    tokenizer: sequences.Encoder,
    sequence_length: int,
    name: str = "text",
  ):
    """Tokenises and packs.

    Args:
      conversations: text-only conversations.
      tokenizer: see `sequences.Encoder`.
      sequence_length: T; longer conversations are cut, and dropped where no
        answer token is left.
      name: for the log.

    Raises:
      ConfigError: nothing is left.
    """
    encoded = [
      sequences.encode_conversation(c, tokenizer) for c in conversations
    ]
    too_long = sum(len(e.labels) > sequence_length for e in encoded)
    cut = [
      sequences.EncodedConversation(*(a[:sequence_length] for a in e))
      for e in encoded
    ]
    kept = [e.loss_mask.any() for e in cut]
    self.conversations = list(itertools.compress(cut, kept))
    self._questions = [
      str(c.turns[0][0])[:_SHOWN_OF_TEXT]
      for c in itertools.compress(conversations, kept)
    ]
    dropped = len(encoded) - len(self.conversations)
    if not self.conversations:
      raise config_lib.ConfigError(
        f"{name}: none of {len(encoded)} conversations has an answer within "
        f"{sequence_length} tokens; raise config.text.sequence_length or give "
        "more text"
      )
    lengths = [len(e.labels) for e in self.conversations]
    self.rows = sequences.plan_packing(lengths, sequence_length)
    self._sequence_length = sequence_length
    logging.info(
      "%s: %d conversations in %d rows of %d, %.0f%% full; %d cut, %d of "
      "them dropped (no answer left)",
      name,
      len(lengths),
      len(self.rows),
      sequence_length,
      100 * sum(lengths) / (len(self.rows) * sequence_length),
      too_long,
      dropped,
    )

  def __len__(self) -> int:
    return len(self.rows)

  def first_words(self, index: int) -> str:
    """Returns how the first conversation of a row begins."""
    return self._questions[self.rows[index][0]]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `sequences.pack_row`'s arrays; all padding behind the end."""
    chosen = self.rows[index] if index < len(self.rows) else ()
    return sequences.pack_row(
      [self.conversations[i] for i in chosen], self._sequence_length
    )


def text_iterator(
  rows: PackedText,
  *,
  global_batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  start: int = 0,
) -> grain.DatasetIterator:
  """Iterates for ever over packed conversations, rows shuffled in every epoch.

  Args:
    rows: of T positions each.
    global_batch_size: rows per step, over all processes.
    seed: decides the order.
    process_index: this process.
    process_count: number of processes; divides `global_batch_size`.
    num_workers: as in `image_iterator`.
    start: as in `image_iterator`.

  Returns:
    An iterator of batches of `sequences.pack_row`: token_ids int32[b, T, 1],
    labels, positions and segment_ids int32[b, T], loss_mask float32[b, T],
    image_mask bool[b, T].

  Raises:
    ConfigError: the batch does not divide.
  """
  dataset = grain.MapDataset.source(Epochs(rows, seed))
  dataset = shard(dataset, global_batch_size, process_index, process_count)
  return iterate(dataset, num_workers, start)


def text_batch_names(
  rows: PackedText, *, global_batch_size: int, seed: int, batch: int
) -> list[str]:
  """Names the rows of a batch of `text_iterator`; see `image_batch_names`.

  Returns:
    "text row n: first words of its first conversation".
  """
  numbers = Epochs(Numbers(0, len(rows)), seed)
  first = batch * global_batch_size
  chosen = (numbers[first + n][1] for n in range(global_batch_size))
  return [f"text row {row}: {rows.first_words(row)}" for row in chosen]


def heldout_text_batches(
  conversations: Sequence[sequences.Conversation],
  tokenizer: sequences.Encoder,
  *,
  sequence_length: int,
  global_batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> list[dict[str, np.ndarray]]:
  """Returns fixed batches that hold every conversation once, for perplexity.

  Args are `PackedText`'s and `text_iterator`'s, batches the latter's. The last
  batch is filled up with rows of padding, so every process has the same number
  of batches and every batch the same shape.

  Raises:
    ConfigError: no conversation has an answer in reach, or the batch does not
      divide.
  """
  size = per_process(global_batch_size, process_index, process_count)
  rows = PackedText(conversations, tokenizer, sequence_length, "held-out text")
  batches = []
  for start in range(0, len(rows), global_batch_size):
    first = start + process_index * size
    chosen = [rows[i] for i in range(first, first + size)]
    batches.append(
      {key: np.stack([row[key] for row in chosen]) for key in chosen[0]}
    )
  return batches


class Epochs:
  """A data source for ever: one random order of all its elements an epoch.

  `grain.MapDataset.shuffle` would do, but its search for an index takes 6 ms in
  a folder of 10 images, hence 0.4 s for a batch of 64.
  """

  def __init__(self, source: Any, *seeds: int):
    self._source = source
    self._seeds = seeds

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Any:
    epoch, place = divmod(index, len(self._source))
    order = _permutation(len(self._source), epoch, self._seeds)
    return self._source[int(order[place])]


@functools.lru_cache(maxsize=64)
def _permutation(count: int, epoch: int, seeds: tuple[int, ...]) -> np.ndarray:
  """Returns the order of an epoch, int64[count]."""
  return np.random.default_rng([*seeds, epoch]).permutation(count)


def heldout_image_batches(
  images: np.ndarray, batch_size: int = 64
) -> Iterator[dict[str, np.ndarray]]:
  """Yields fixed batches that hold every image once, for evaluation.

  Args:
    images: uint8[N, S, S, 3].
    batch_size: images at a time; the last batch is filled up.

  Yields:
    "image": float32[batch_size, S, S, 3] in [-1, 1] and "weight":
    float32[batch_size], 1 for an image and 0 for what fills up.
  """
  for start in range(0, len(images), batch_size):
    chunk = images[start : start + batch_size]
    weight = np.zeros(batch_size, np.float32)
    weight[: len(chunk)] = 1
    fill = ((0, batch_size - len(chunk)), (0, 0), (0, 0), (0, 0))
    yield {"image": to_float(np.pad(chunk, fill)), "weight": weight}


def source_batches(
  source: sources_lib.ImageSource, max_images: int, batch_size: int = 64
) -> Iterator[dict[str, np.ndarray]]:
  """Yields `heldout_image_batches` of a source, reading one at a time.

  Args:
    source: images.
    max_images: of a larger source, this many are taken, evenly spread.
    batch_size: images at a time.

  Yields:
    As `heldout_image_batches`.
  """
  count = min(len(source), max_images)
  chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
  for start in range(0, count, batch_size):
    rows = chosen[start : start + batch_size]
    images = np.stack([source[int(row)]["image"] for row in rows])
    yield from heldout_image_batches(images, batch_size)


def per_process(
  global_batch_size: int, process_index: int, process_count: int
) -> int:
  """Returns the rows of a global batch that one process reads."""
  if global_batch_size < 1 or global_batch_size % process_count:
    raise config_lib.ConfigError(
      f"global_batch_size {global_batch_size} must be a multiple of the "
      f"{process_count} processes"
    )
  if not 0 <= process_index < process_count:
    raise config_lib.ConfigError(
      f"process_index {process_index} is not in 0..{process_count - 1}"
    )
  return global_batch_size // process_count


def shard(
  dataset: grain.MapDataset,
  global_batch_size: int,
  process_index: int,
  process_count: int,
) -> grain.MapDataset:
  """Batches, keeping every process_count-th batch: contiguous global rows."""
  size = per_process(global_batch_size, process_index, process_count)
  batches = dataset.batch(size, drop_remainder=True)
  return batches[process_index::process_count]


def iterate(
  dataset: grain.MapDataset, num_workers: int, start: int, num_threads: int = 1
) -> grain.DatasetIterator:
  """Reads ahead from batch `start`, in threads or `num_workers` processes."""
  options = grain.ReadOptions(
    num_threads=1 if num_workers else num_threads,
    prefetch_buffer_size=max(2, num_threads),
  )
  batches = dataset[start:].to_iter_dataset(options)
  if num_workers:
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers), _begin_worker
    )
  return iter(batches)


def _begin_worker(index: int, count: int) -> None:
  """Prepares a process that reads."""
  del index, count
  interruption.end_with_parent()
