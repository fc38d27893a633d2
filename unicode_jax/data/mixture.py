"""Rows of stage II: packed conversations with their images, as a weighted mix.

A row holds examples of one task and one source, packed side by side. Which
examples share a row is planned once, so that rows have numbers: order, resuming
and the share of each process work as in `pipeline`. What is drawn at random
(order of questions, dropped conditions, views of images) is drawn anew every
time a row is served.

A row says what it shows either by pixels or, with a code cache, by codes; the
sequences themselves hold slots (`sequences.slots`), behind the LLM's
vocabulary, that the train step fills. So both give the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import logging
import math
from typing import Any, Protocol

import grain
import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import (
  pipeline,
  sequences,
  sources as sources_lib,
  tasks,
  views as views_lib,
)


class Codes(Protocol):
  """Codes of a source's images, in their order; see `code_cache`."""

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns int32[views, P, D], in the order of `MixtureConfig.views`."""


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
  """How examples become rows: `config.instruct` and the model's sizes.

  Attributes:
    weights: share of the rows of each task, in any unit.
    source_weights: share of each source within a task, in any unit.
    layout: template and delimiters; without a shift of codes.
    sequence_length: T.
    positions: P, of an image.
    first_slot: the LLM's vocabulary size.
    segments: turns of decompression.
    questions_per_image: questions of a conversation.
    yes_no_ratio: of `tasks.balanced`; 0 keeps every question.
    condition_dropout: chance that an image's condition is dropped.
    views: what is drawn from for an image, its own first.
  """

  weights: Mapping[str, float]
  source_weights: tuple[float, ...]
  layout: sequences.SequenceFormat
  sequence_length: int
  positions: int
  first_slot: int
  segments: int = 4
  questions_per_image: int = 3
  yes_no_ratio: float = 0.0
  condition_dropout: float = 0.1
  views: tuple[views_lib.View, ...] = (views_lib.AS_IS,)


_KEPT_LENGTH = 1024  # Characters of a text whose ids are remembered.


class _CachedEncoder:
  """A text tokenizer that remembers: few texts occur in most questions."""

  def __init__(self, tokenizer: sequences.Encoder):
    self._tokenizer = tokenizer
    self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
    self.token_id = functools.cache(tokenizer.token_id)
    self._kept = functools.lru_cache(65536)(tokenizer.encode)

  def encode(self, text: str) -> list[int]:
    """As the tokenizer; long texts would fill the memory, and rarely return."""
    if len(text) > _KEPT_LENGTH:
      return self._tokenizer.encode(text)
    return self._kept(text)

  def __reduce__(self):
    return _CachedEncoder, (self._tokenizer,)


class TaskRows:
  """Rows of the examples of one task and one source.

  Attributes:
    name: task.
    max_images: images of the fullest row.
  """

  def __init__(
    self,
    name: str,
    examples: Sequence[tasks.Example],
    tokenizer: sequences.Encoder,
    config: MixtureConfig,
    source: sources_lib.ImageSource | None = None,
    codes: Codes | None = None,
  ):
    """Measures every example and plans the rows.

    Args:
      name: task.
      examples: at least one that fits. Of one that is too long the last turns
        are left out; where a single turn is, its end, but never a part of an
        image.
      tokenizer: see `sequences.Encoder`.
      config: see `MixtureConfig`.
      source: the images; None for text.
      codes: their codes, where they are cached.

    Raises:
      ConfigError: rows are too short for an image that is to be drawn, or no
        example fits.
    """
    self.name = name
    self.source, self.codes, self.config = source, codes, config
    self._tokenizer = _CachedEncoder(tokenizer)
    self.examples, lengths, cut = [], [], 0
    shortest = math.inf
    for example in examples:
      fitted, length = self._fit(example)
      shortest = min(shortest, length)
      cut += fitted != example or length > config.sequence_length
      if fitted is not None:
        self.examples.append(fitted)
        lengths.append(min(length, config.sequence_length))
    if not self.examples:
      raise config_lib.ConfigError(
        f"{name}: none of {len(examples)} examples has an answer within "
        f"text.sequence_length={config.sequence_length} positions, of which an "
        f"image takes {config.positions}: raise it to {shortest} or more"
      )
    self.rows = sequences.plan_packing(lengths, config.sequence_length)
    self.max_images = max(
      sum(self.examples[i].item is not None for i in row) for row in self.rows
    )
    title = f"{name} of {source.name}" if source else name
    logging.info(
      "%s: %d examples in %d rows of %d, %.0f%% full",
      title,
      len(self.examples),
      len(self.rows),
      config.sequence_length,
      100 * sum(lengths) / (len(self.rows) * config.sequence_length),
    )
    if cut:
      logging.warning(
        "%s: %d of %d examples are longer than text.sequence_length=%d: %d "
        "left out, the others cut short",
        title,
        cut,
        len(examples),
        config.sequence_length,
        len(examples) - len(self.examples),
      )

  def _encode(self, conversation, first_slot) -> sequences.EncodedConversation:
    stand_ins = sequences.slots(
      first_slot, 1, self.config.positions, self.config.layout.depth
    )
    return sequences.encode_conversation(
      conversation, self._tokenizer, self.config.layout, stand_ins
    )

  def _fit(self, example):
    """Returns the example, perhaps shorter, and its length; None if unfit."""
    longest = self.config.sequence_length
    while True:
      # The longest that may be drawn, so that a row never overflows.
      encoded = max(
        (
          self._encode(variant, self.config.first_slot)
          for variant in example.variants()
        ),
        key=lambda encoded: len(encoded.labels),
      )
      length = len(encoded.labels)
      if length <= longest:
        return example, length
      if len(example.turns) == 1 or self.name in tasks.DRAWING:
        break
      example = dataclasses.replace(example, turns=example.turns[:-1])
    if self.name in tasks.DRAWING:
      if self.name == "decompression" or not example.conditional:
        raise config_lib.ConfigError(
          f"{self.name} takes {length} positions, a row has "
          f"text.sequence_length={longest}: raise it to at least {length}, or "
          f"set instruct.tasks.{self.name}=0"
        )
      return None, length
    if not encoded.loss_mask[:longest].any():
      return None, length
    return example, length

  def __len__(self) -> int:
    return len(self.rows)

  def build(
    self, index: int, rng: np.random.Generator | None
  ) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
    """Makes a row.

    Args:
      index: its number; rows behind the last are all padding.
      rng: for what is drawn at random; None draws nothing.

    Returns:
      `sequences.pack_row`'s arrays, and the images that they have slots for:
      number in the source, and number of the view.
    """
    config = self.config
    per_image = config.positions * config.layout.depth
    encoded, shown = [], []
    for i in self.rows[index] if index < len(self.rows) else ():
      example = self.examples[i]
      conversation = example.conversation(rng, config.condition_dropout)
      first_slot = config.first_slot + len(shown) * per_image
      pieces = self._encode(conversation, first_slot)
      encoded.append(
        sequences.EncodedConversation(
          *(piece[: config.sequence_length] for piece in pieces)
        )
      )
      if example.item is not None:
        view = 0 if rng is None else int(rng.integers(len(config.views)))
        shown.append((example.item, view))
    row = sequences.pack_row(
      encoded, config.sequence_length, config.layout.depth
    )
    return row, shown


class Mixture:
  """Rows of all tasks and sources, with the weight of each.

  Attributes:
    groups: rows by task and source.
    cached: whether rows show codes instead of pixels.
    weights: share of each group, in any unit.
    max_images: M, images of the fullest row, at least 1.
  """

  def __init__(
    self,
    sources: Sequence[sources_lib.ImageSource],
    conversations: Sequence[sequences.Conversation],
    tokenizer: sequences.Encoder,
    config: MixtureConfig,
    codes: Sequence[Codes] | None = None,
  ):
    """Makes the examples of every task with a weight.

    Args:
      sources: images; all of one size.
      conversations: text-only ones.
      tokenizer: see `sequences.Encoder`.
      config: see `MixtureConfig`.
      codes: codes of each source, where they are cached.

    Raises:
      ConfigError: no task has an example, or one doesn't fit (`TaskRows`).
    """
    self.config, self.image_size = config, 0
    self.cached = codes is not None
    self.groups: list[TaskRows] = []
    self.weights: list[float] = []
    if sources:
      self.image_size = sources[0].image_size
    for task, weight in config.weights.items():
      if not weight:
        continue
      found = self._examples(task, sources, conversations)
      total = sum(share for _, _, share in found)
      if not total:
        logging.warning(
          "the data has no example of the task %r: left out of the mixture",
          task,
        )
        continue
      for i, examples, share in found:
        source = None if i is None else sources[i]
        cached = codes[i] if codes is not None and i is not None else None
        self.groups.append(
          TaskRows(task, examples, tokenizer, config, source, cached)
        )
        self.weights.append(weight * share / total)
    if not self.groups:
      raise config_lib.ConfigError(
        "the data has no example of any task in "
        f"{[task for task, w in config.weights.items() if w]}: see "
        "docs/own_data.md for what each task needs"
      )
    self.max_images = max(1, *(group.max_images for group in self.groups))

  def _examples(self, task, sources, conversations):
    """Returns (source number or None, examples, share) where there are any."""
    if task == "text":
      examples = tasks.text_examples(conversations)
      return [(None, examples, 1.0)] if examples else []
    found = []
    for i, source in enumerate(sources):
      examples = tasks.image_examples(
        task,
        source,
        positions=self.config.positions,
        segments=self.config.segments,
        questions_per_image=self.config.questions_per_image,
        yes_no_ratio=self.config.yes_no_ratio,
      )
      share = self.config.source_weights[i]
      if examples and share:
        found.append((i, examples, share))
    return found

  def row(
    self, group: int, index: int, rng: np.random.Generator | None
  ) -> dict[str, np.ndarray]:
    """Makes a row of a group; the arguments are `TaskRows.build`'s.

    Returns:
      `sequences.pack_row`'s arrays, "group" int32[] and, zeros behind the row's
      last image, "images" uint8[M, S, S, 3] or "codes" int32[M, P D].
    """
    rows = self.groups[group]
    row, shown = rows.build(index, rng)
    row["group"] = np.int32(group)
    if self.cached:
      width = self.config.positions * self.config.layout.depth
      row["codes"] = np.zeros((self.max_images, width), np.int32)
      for place, (item, view) in enumerate(shown):
        row["codes"][place] = rows.codes[item][view].reshape(-1)
      return row
    shape = self.max_images, self.image_size, self.image_size, 3
    row["images"] = np.zeros(shape, np.uint8)
    for place, (item, view) in enumerate(shown):
      image = rows.source[item]["image"]
      row["images"][place] = views_lib.see(image, self.config.views[view])
    return row


@dataclasses.dataclass(frozen=True, eq=False)
class _BuildRow(grain.transforms.RandomMap):
  """Makes the row of a number."""

  mixture: Mixture

  def random_map(self, element, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a row; see `Mixture.row`."""
    return self.mixture.row(*element, rng)


def mixture_iterator(
  mixture: Mixture,
  *,
  global_batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  start: int = 0,
) -> grain.DatasetIterator:
  """Iterates for ever over rows of a mixture, shuffled anew in every epoch.

  Args:
    mixture: rows and weights.
    global_batch_size: rows per step, over all processes.
    seed: decides order and what is drawn.
    process_index: this process.
    process_count: number of processes; divides `global_batch_size`.
    num_workers: as in `pipeline.image_iterator`.
    start: as in `pipeline.image_iterator`.

  Returns:
    An iterator of batches of `Mixture.row`'s arrays with a leading axis.

  Raises:
    ConfigError: the batch does not divide.
  """
  dataset = _order(mixture, seed).seed(seed)
  dataset = dataset.random_map(_BuildRow(mixture))
  dataset = pipeline.shard(
    dataset, global_batch_size, process_index, process_count
  )
  read_threads = [
    group.source.read_threads for group in mixture.groups if group.source
  ]
  threads = 1 if mixture.cached else max(read_threads, default=1)
  return pipeline.iterate(dataset, num_workers, start, threads)


def _order(mixture: Mixture, seed: int) -> grain.MapDataset:
  """Says which (group, row) comes when."""
  numbers = [
    pipeline.Numbers(i, len(group)) for i, group in enumerate(mixture.groups)
  ]
  return pipeline.mix(numbers, mixture.weights, seed)


def batch_names(
  mixture: Mixture, *, global_batch_size: int, seed: int, batch: int
) -> list[str]:
  """Names the rows of a batch of `mixture_iterator`, of all processes.

  Args:
    mixture: as there.
    global_batch_size: as there.
    seed: as there.
    batch: its number, from 0.

  Returns:
    "task row n", with the names of its images behind it.
  """
  order = _order(mixture, seed)
  first = batch * global_batch_size
  names = []
  for group, row in (order[first + n] for n in range(global_batch_size)):
    rows = mixture.groups[group]
    shown = [rows.examples[i].item for i in rows.rows[row]]
    images = [
      f"{rows.source.name}/{rows.source.items[item]['name']}"
      for item in shown
      if item is not None
    ]
    name = f"{rows.name} row {row}"
    names.append(f"{name}: {', '.join(images)}" if images else name)
  return names


def fixed_batches(
  mixture: Mixture, group: int, batch_size: int, max_rows: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches that hold rows of one group once, nothing at random.

  Args:
    mixture: rows.
    group: which of its groups.
    batch_size: rows at a time; the last batch is filled up with padding.
    max_rows: of more rows, so many are taken, evenly spread.
  """
  count = len(mixture.groups[group])
  chosen = range(count)
  if max_rows is not None and count > max_rows:
    chosen = np.linspace(0, count - 1, max_rows).round().astype(int)
  for start in range(0, len(chosen), batch_size):
    numbers = [*map(int, chosen[start : start + batch_size])]
    numbers += [count] * (batch_size - len(numbers))
    rows = [mixture.row(group, number, None) for number in numbers]
    yield {k: np.stack([row[k] for row in rows]) for k in rows[0]}
