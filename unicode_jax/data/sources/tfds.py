"""Image data sets that TensorFlow Datasets has prepared, without TensorFlow.

What `tfds.data_source` reads: files in the array_record format. Nothing is
downloaded or prepared here, and the code of the data set is not needed, only
its files. Features are found by name and type:

  image                         an Image feature; "image" if there are several
  captions                      text under "caption", "captions" or "text"
  dialogues, one turn each      text under "question(s)" and "answer(s)"; of the
                                answers to one question, the most frequent
  label                         a ClassLabel; "label" if there are several

"train" is trained on. "validation", else "test", is held out (the tests of many
benchmarks come without answers); where there is neither, a share of "train" is.
"""

import collections
from collections.abc import Mapping, Sequence
import importlib
import io
import logging
import os
from pathlib import Path
import threading
import types
from typing import Any

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.data import cache, text_files
from unicode_jax.data.sources.images import decode_image, file_stamp
from unicode_jax.data.sources.source import (
  Annotation,
  ImageSource,
  Side,
  check_split,
  is_heldout,
  max_skipped,
  pair,
  split as split_source,
)

_CAPTIONS = ("caption", "captions", "text")
# Where features.json names a class, today and formerly.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_OWN_CLASSES = "tensorflow_datasets."
_QUESTIONS, _ANSWERS = ("question", "questions"), ("answer", "answers")


def load_tfds(
  name: str,
  image_size: int,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.1,
  cache_dir: str | os.PathLike[str] | None = None,
  max_broken: float = 0.1,
) -> tuple[ImageSource, ImageSource]:
  """Loads images, and what is said of them, from a prepared data set.

  Args:
    name: "data_set", "data_set/config" or "data_set/config:1.0.0".
    image_size: S, pixels; see `decode_image`.
    data_dir: where TFDS keeps its data sets; None for its own default.
    heldout_fraction: share of "train" that is held out, by the number of the
      image, where the data set has no other split.
    cache_dir: see `cache.cached_images`.
    max_broken: share of the images that may be broken; see `max_skipped`.

  Returns:
    Training and held-out images; the name of an image is "split/number".

  Raises:
    ConfigError: the package is missing, the data set is not prepared or not as
      array_record, or it has no images or no training split.
  """
  tfds = _import_tfds()
  builder = _open(name, data_dir)
  splits = builder.info.splits
  if "train" not in splits:
    raise config_lib.ConfigError(
      f'config.data.tfds={name!r} has no split "train", but {sorted(splits)}: '
      "name another data set"
    )
  image = _image_feature(tfds, name, builder.info.features)
  label = _label_feature(tfds, builder.info.features)
  logging.info(
    "%s: images from %r, classes from %r, other features %s",
    builder.info.full_name,
    image,
    label,
    sorted(set(builder.info.features) - {image, label}),
  )
  heldout = next((s for s in ("validation", "test") if s in splits), None)
  sides = {
    split: _cache_split(
      tfds,
      builder,
      split,
      (image, label),
      image_size,
      cache_dir=cache_dir,
      max_broken=max_broken,
    )
    for split in ("train", heldout)
    if split
  }
  annotations = {
    item["name"]: Annotation(
      tuple(item["captions"]),
      tuple((tuple(turn),) for turn in item["questions"]),
      item["label"],
    )
    for cached in sides.values()
    for item in cached.items
  }
  if heldout is None:
    sources = split_source(
      "tfds",
      sides["train"],
      lambda item: is_heldout(item["name"], heldout_fraction),
      annotations,
    )
  else:
    sources = pair(
      "tfds",
      *(Side(sides[s].path, sides[s].items) for s in ("train", heldout)),
      annotations,
    )
  check_split(sources, f"the images of {name}", heldout_fraction)
  return sources


def _import_tfds() -> types.ModuleType:
  """Imports TensorFlow Datasets, or says how to install it."""
  try:
    return importlib.import_module("tensorflow_datasets")
  except ModuleNotFoundError as error:
    raise config_lib.ConfigError(
      f"config.data.source=tfds needs the package {error.name!r}, which is not "
      'installed; run: pip install -e ".[tfds]"'
    ) from error


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  """Returns the builder of a data set that is on disk."""
  # What `tfds.data_source` falls back on; by itself it would first run the code
  # of a data set that it knows, which often needs TensorFlow.
  read_only = importlib.import_module(
    "tensorflow_datasets.core.read_only_builder"
  )
  folder = None if data_dir is None else os.path.expanduser(data_dir)
  where = "TFDS's default folder" if folder is None else folder
  if folder is not None:
    _check_classes(Path(folder), name)
  try:
    builder = read_only.builder_from_files(name, data_dir=folder)
    # They are read when they are first asked for.
    _ = builder.info.features, builder.info.splits, builder.info.full_name
  except (ImportError, ValueError) as error:  # Not found is a ValueError.
    raise config_lib.ConfigError(
      f"config.data.tfds={name!r} is not a prepared data set in {where} "
      f"(config.data.path): {_first_line(error)}; " + _prepare(name, folder)
    ) from error
  except Exception as error:  # Whatever is raised by what parses its JSON.
    raise config_lib.ConfigError(
      f"the description of {name!r} in {where} is damaged: "
      f"{_first_line(error)}; remove it, and " + _prepare(name, folder)
    ) from error
  return builder


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _check_classes(folder: Path, name: str) -> None:
  """Raises ConfigError where a data set's features are not TFDS's own.

  TFDS would import whatever modules its files name.
  """
  for file in (folder / name.partition("/")[0]).glob("**/features.json"):
    try:
      stack = [config_lib.parse_json(file.read_text(encoding="utf-8"))]
    except ValueError as error:
      raise config_lib.ConfigError(
        f"{file} cannot be read ({error}): get the data set again"
      ) from None
    while stack:
      node = stack.pop()
      stack += node.values() if isinstance(node, dict) else ()
      stack += node if isinstance(node, list) else ()
      for key in _CLASS_KEYS:
        wanted = node.get(key) if isinstance(node, dict) else None
        if isinstance(wanted, str) and not wanted.startswith(_OWN_CLASSES):
          raise config_lib.ConfigError(
            f"{file} names the class {wanted!r:.99}, which is not one of TFDS: "
            "its code would run; name another data set"
          )


def _prepare(name: str, folder: str | None) -> str:
  """Says how to prepare a data set so that it can be read here."""
  where = "" if folder is None else f"data_dir={folder!r}, "
  return (
    "prepare it, where TensorFlow is installed if the data set needs it, with: "
    f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
    f"{where}file_format='array_record').download_and_prepare()\""
  )


def _image_feature(
  tfds: types.ModuleType, name: str, features: Mapping[str, Any]
) -> str:
  """Returns the key of the image."""
  keys = sorted(
    k for k, f in features.items() if isinstance(f, tfds.features.Image)
  )
  if "image" in keys:
    return "image"
  if len(keys) == 1:
    return keys[0]
  found = ", ".join(f"{k} ({type(f).__name__})" for k, f in features.items())
  problem = f"several images and none named 'image': {keys}" if keys else "none"
  raise config_lib.ConfigError(
    f"config.data.tfds={name!r} needs an image feature, but has {problem}; its "
    f"features are {found}: name another data set"
  )


def _label_feature(
  tfds: types.ModuleType, features: Mapping[str, Any]
) -> str | None:
  """Returns the key of the class, if there is one."""
  keys = [
    k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)
  ]
  if "label" in keys:
    return "label"
  return keys[0] if len(keys) == 1 else None


def _cache_split(
  tfds: types.ModuleType,
  builder: Any,
  split: str,
  keys: tuple[str, str | None],
  image_size: int,
  *,
  cache_dir: str | os.PathLike[str] | None,
  max_broken: float,
) -> cache.CachedImages:
  """Decodes a split once; items keep captions, questions and label."""
  features = builder.info.features
  skip = {
    key: tfds.decode.SkipDecoding()  # Gives the bytes of the image file.
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  try:
    source = builder.as_data_source(split=split, decoders=skip)
  except (NotImplementedError, ValueError) as error:
    raise config_lib.ConfigError(
      f"{builder.info.full_name} is stored as "
      f"{getattr(builder.info.file_format, 'value', 'an unknown format')}, "
      "which cannot be read without TensorFlow; "
      + _prepare(builder.info.full_name, str(builder.data_dir_root))
    ) from error
  image_key, label_key = keys
  lock = threading.Lock()  # Decoding runs in threads, reading need not.

  def decode(content):
    try:
      with lock:
        element = source[content["number"]]
      label = None
      if label_key and (number := int(element[label_key])) >= 0:  # -1: unknown.
        label = features[label_key].int2str(number)
      fields = {
        "captions": _captions(element),
        "questions": _questions(element),
        "label": label,
      }
      file = io.BytesIO(element[image_key])
    # What array_record, protobuf and TFDS raise on a damaged record.
    except Exception as error:
      raise ValueError(f"{type(error).__name__}: {error}") from error
    return decode_image(file, image_size), fields

  files = sorted(Path(builder.data_path).iterdir())
  return cache.cached_images(
    f"tfds-{split}",
    [{"name": f"{split}/{i}", "number": i} for i in range(len(source))],
    decode,
    image_size,
    version=repr([(str(file), *file_stamp(file)) for file in files]),
    cache_dir=cache_dir,
    max_broken=max_skipped(max_broken, len(source)),
  )


def _captions(element: Mapping[str, Any]) -> list[str]:
  """Returns the captions of an element."""
  captions = []
  for key in _CAPTIONS:
    value = element.get(key)
    if isinstance(value, dict):  # COCO's: a sequence of {"id", "text"}.
      value = next((value[k] for k in _CAPTIONS if k in value), None)
    captions += _texts(value)
  return [text for text in captions if text]


def _questions(element: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the (question, answer) pairs of an element."""
  pairs = []
  # CLEVR's: a sequence of {"question", "answer"}.
  for holder in (element, *element.values()):
    if not isinstance(holder, dict):
      continue
    asked = next((holder[k] for k in _QUESTIONS if k in holder), None)
    answered = next((holder[k] for k in _ANSWERS if k in holder), None)
    questions, answers = _texts(asked), _texts(answered)
    if isinstance(asked, bytes | str):
      given = collections.Counter(text for text in answers if text)
      answers = [text for text, _ in given.most_common(1)]
    if len(questions) == len(answers):
      pairs += [(q, a) for q, a in zip(questions, answers) if q and a]
  return pairs


def _texts(value: Any) -> list[str]:
  """Returns a feature's value as texts; none where it is no text.

  Empty ones, and in place of those that are too long, keep the others' places.
  """
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, str):
    return [value.strip() if len(value) <= text_files.MAX_TEXT_BYTES else ""]
  if isinstance(value, Sequence | np.ndarray):
    return [text for entry in value for text in _texts(entry)]
  return []
