"""What a source of images is, and how it is split so that nothing leaks.

Splits hash names, so adding or removing items moves no other item, and a
training image that equals a held-out one pixel for pixel is dropped with all
that is said of it. The names are the loaders' choice; nothing here reads a file
but the cached pixels, and nothing knows of batches or of sequences.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import logging
from pathlib import Path
import re
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import cache

_T = TypeVar("_T")

# A larger held-out set adds time to every evaluation and little certainty; what
# lies beyond is not evaluated, and not trained on either.
MAX_HELDOUT = 4096
# A few broken images or records stop no run, however small its data.
ALWAYS_SKIPPED = 10


@dataclasses.dataclass(frozen=True)
class Annotation:
  """What is said of one image.

  Attributes:
    captions: descriptions, in the order of the source.
    dialogues: conversations about the image, each of (question, answer) turns
      in order; a single question is a dialogue of one turn.
    label: name of its class; None where it has none.
  """

  captions: tuple[str, ...] = ()
  dialogues: tuple[tuple[tuple[str, str], ...], ...] = ()
  label: str | None = None


NO_ANNOTATION = Annotation()


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Images of one split of one source, addressable by number.

  Grain reads it as a data source. Pickling it (for worker processes) carries
  the path, not the pixels.

  Attributes:
    name: for reports.
    path: .npy file of uint8[N, S, S, 3].
    items: what is known of each image of the split: at least `name` and `row`
      (its place in the file).
    annotations: what is said of each image, aligned with `items`.
  """

  name: str
  path: Path
  items: tuple[Mapping[str, Any], ...]
  annotations: tuple[Annotation, ...]

  # Threads that a pipeline best reads with; more only help what is decoded.
  read_threads: ClassVar[int] = 1

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns {"image": uint8[S, S, 3]}."""
    return {"image": np.asarray(self._pixels[self.items[index]["row"]])}

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_pixels"}

  @functools.cached_property
  def _pixels(self) -> np.ndarray:
    return np.load(self.path, mmap_mode="r")

  @property
  def image_size(self) -> int:
    """S, pixels."""
    return self._pixels.shape[1]

  def images(self) -> np.ndarray:
    """Returns all images of the split in memory, uint8[n, S, S, 3]."""
    return self._pixels[[item["row"] for item in self.items]]

  def take(self, indices: Iterable[int], name: str | None = None):
    """Returns a source of some of the images, under a name of its own or not.

    Args:
      indices: their numbers, in the order that they will have.
      name: for reports; None keeps this source's.
    """
    chosen = list(indices)
    return dataclasses.replace(
      self,
      name=name or self.name,
      items=tuple(self.items[i] for i in chosen),
      annotations=tuple(self.annotations[i] for i in chosen),
    )


def untoned_name(name: str) -> str:
  """Removes skin tones from an emoji's name: the key of its split.

  Couples of two tones say "person person" where those of one don't.
  """
  tone = r"(medium-light|medium-dark|light|medium|dark) skin tone"
  bare = re.sub(rf"\b{tone}", "", name)
  if bare != name:
    bare = bare.replace("person person", "")
  return " ".join(bare.split())


def bare_words(text: str) -> str:
  """Removes case and punctuation: the key of a text's split."""
  return re.sub(r"[\W_]+", " ", text).strip().lower()


def is_heldout(name: str, fraction: float) -> bool:
  """Decides by a hash of the name; the same on every machine, for ever."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:8], "big") < fraction * 2**64


def partition(
  things: Iterable[_T], heldout: Callable[[_T], bool]
) -> tuple[list[_T], list[_T]]:
  """Returns what is trained on and what is held out, in order.

  Args:
    things: images' items, texts, ...
    heldout: says of each on which side it falls.
  """
  sides = [], []
  for thing in things:
    sides[bool(heldout(thing))].append(thing)
  return sides


class Side(NamedTuple):
  """One side of a split, before it is a source.

  Attributes:
    path: as `ImageSource.path`.
    items: as `ImageSource.items`.
  """

  path: Path
  items: Sequence[Mapping[str, Any]]


def max_skipped(share: float, count: int) -> int:
  """Returns how many of `count` images or records may be broken."""
  return max(ALWAYS_SKIPPED, int(share * count))


def split(
  name: str,
  cached: cache.CachedImages,
  heldout: Callable[[Mapping[str, Any]], bool],
  annotations: Mapping[str, Annotation],
) -> tuple[ImageSource, ImageSource]:
  """Splits cached images in two sources.

  Args:
    name: start of the names of both.
    cached: the images.
    heldout: says of an item whether it is held out.
    annotations: by the item's name; images without one have an empty one.

  Returns:
    Training and held-out images, as `pair` gives them.
  """
  train, evaluated = (
    Side(cached.path, items) for items in partition(cached.items, heldout)
  )
  return pair(name, train, evaluated, annotations)


def pair(
  name: str,
  train: Side,
  heldout: Side,
  annotations: Mapping[str, Annotation],
) -> tuple[ImageSource, ImageSource]:
  """Makes the two sources, and drops training images that are held out too.

  Args:
    name: start of the names of both.
    train: images to train on.
    heldout: all that are held out; `MAX_HELDOUT` of them are evaluated.
    annotations: by the item's name, which is unique over both sides.

  Returns:
    Training and held-out images.
  """
  digests = {item["digest"] for item in heldout.items}
  kept = [item for item in train.items if item["digest"] not in digests]
  if len(kept) < len(train.items):
    logging.info(
      "%s: dropped %d training images that equal held-out ones",
      name,
      len(train.items) - len(kept),
    )
  train_source, heldout_source = (
    ImageSource(
      f"{name}_{side}",
      path,
      tuple(items),
      tuple(annotations.get(item["name"], NO_ANNOTATION) for item in items),
    )
    for side, path, items in (
      ("train", train.path, kept),
      ("heldout", heldout.path, heldout.items),
    )
  )
  return train_source, _evaluated(heldout_source)


def _evaluated(heldout: ImageSource) -> ImageSource:
  """Returns the held-out images that are evaluated, `MAX_HELDOUT` at most."""
  if len(heldout) <= MAX_HELDOUT:
    return heldout
  logging.info(
    "%s: %d of %d held-out images are evaluated",
    heldout.name,
    MAX_HELDOUT,
    len(heldout),
  )
  order = sorted(range(len(heldout)), key=lambda i: heldout.items[i]["digest"])
  return heldout.take(order[:MAX_HELDOUT])


def validation(
  train: ImageSource, fraction: float
) -> tuple[ImageSource, ImageSource]:
  """Takes a share of the training images to choose settings by.

  Args:
    train: images to train on.
    fraction: share of the names, without skin tones, that is taken.

  Returns:
    What is left to train on, under the same name, and what was taken, of which
    `MAX_HELDOUT` are evaluated. Equal images are on one side.

  Raises:
    ConfigError: a side without images.
  """
  chosen = {
    item["digest"]
    for item in train.items
    if is_heldout(f"validation {untoned_name(item['name'])}", fraction)
  }

  left, taken = partition(
    range(len(train)), lambda i: train.items[i]["digest"] in chosen
  )
  left = train.take(left)
  held = _evaluated(train.take(taken, f"{train.name}_validation"))
  if not len(left) or not len(held):
    raise config_lib.ConfigError(
      f"{train.name}: {len(train)} training images are too few to take "
      f"{fraction:.0%} of them for validation: change "
      "config.data.validation_fraction"
    )
  return left, held


def check_split(
  sources: tuple[ImageSource, ImageSource],
  found: str,
  heldout_fraction: float,
) -> None:
  """Raises ConfigError where a hashed split left a side without images.

  Args:
    sources: training and held-out images.
    found: what was read and from where, for the message.
    heldout_fraction: share that was to be held out.
  """
  train, heldout = sources
  if not len(train) or not len(heldout):
    raise config_lib.ConfigError(
      f"{found} are too few to hold out {heldout_fraction:.0%} of them "
      f"({len(train)} to train on, {len(heldout)} held out): add images or "
      "change config.data.heldout_fraction"
    )
