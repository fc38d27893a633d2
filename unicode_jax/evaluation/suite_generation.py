"""Suite: whether drawings show what was asked for and look like real pictures.

METHOD section 4's drawing from text, and section 5's Fréchet distance. What a
drawing shows is told by `judge`, which is trained here on real pictures; how
near sets of pictures are, by `Bench.distances`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unicode_jax.data import cache, tasks
from unicode_jax.evaluation import judge as judge_lib
from unicode_jax.evaluation.bench import (
  PIXEL_IMAGES,
  Bench,
  HeldOut,
  Outcome,
  spread,
)

# Drawings by default: of each label, and of each other set.
_PER_LABEL, _DRAWN = 8, 256
_JUDGE_IMAGES = 8192


def generation(bench: Bench) -> Outcome:
  """Measures whether drawings show what was asked for, as real ones do.

  Args:
    bench: the model and the data.
  """
  settings = bench.settings
  judged, words = {}, []
  for held in bench.sets:
    if asked := held.label_questions():
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
      "sampling": settings.drawing_protocol,
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
  chosen = spread(len(held.train), min(most, PIXEL_IMAGES))
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
