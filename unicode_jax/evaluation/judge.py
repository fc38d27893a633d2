"""A classifier, trained on real pictures, that says what drawn ones show.

METHOD section 4 draws pictures from text; whether "a blue rectangle" came out
as one is what this measures, where pictures are simple enough to be judged by
a network that trains in half a minute on a CPU. Its verdicts count for as much
as its accuracy on real held-out pictures (`Judge.accuracy`), so report both. It
is no part of the model, and never trains on what a model drew.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import os
from pathlib import Path
import tempfile
from typing import Any, NamedTuple

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from unicode_jax import config as config_lib
from unicode_jax.evaluation import features
from unicode_jax.nn import conv

# Pictures are judged at this size, pixels, whatever theirs.
SIDE = 32
_BATCH, _LEARNING_RATE, _WARMUP = 64, 3e-3, 50
_MAX_SHIFT = 3  # pixels
_PREDICT_CHUNK = 128
_FORMAT = 1  # Raise it when training changes: cached judges are then stale.


class JudgeAccuracy(NamedTuple):
  """How often a judge agrees with labels.

  Attributes:
    all_right: share of pictures with every attribute right.
    per_attribute: share of right values, by the attribute's place in a label.
    count: pictures.
  """

  all_right: float
  per_attribute: tuple[float, ...]
  count: int


class _Classifier(nn.Module):
  """Four convolutions at 1/2 and 1/4 of the resolution, and a head each.

  Attributes:
    sizes: values of each attribute.
    width: channels at 1/2 of the resolution.
  """

  sizes: tuple[int, ...]
  width: int = 32

  @nn.compact
  def __call__(self, image: jax.Array) -> list[jax.Array]:
    """Maps image float32[B, X, Y, 3] in [-1, 1] to logits [B, size] each."""
    x_BXYC = conv.space_to_depth(image, 2)
    x_BXYC = nn.relu(nn.Conv(self.width, (3, 3))(x_BXYC))
    x_BXYC = nn.relu(nn.Conv(self.width, (3, 3))(x_BXYC))
    x_BXYC = conv.space_to_depth(x_BXYC, 2)
    x_BXYC = nn.relu(nn.Conv(2 * self.width, (2, 2))(x_BXYC))
    x_BXYC = nn.relu(nn.Conv(2 * self.width, (3, 3))(x_BXYC))
    # Where a shape is does not matter; the background does a little.
    x_BC = jnp.concatenate([x_BXYC.max((1, 2)), x_BXYC.mean((1, 2))], axis=-1)
    x_BC = nn.relu(nn.Dense(4 * self.width)(x_BC))
    return [nn.Dense(size)(x_BC) for size in self.sizes]


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model, params, image):
  return [jax.nn.softmax(x) for x in model.apply(params, image)]


@dataclasses.dataclass(frozen=True)
class Judge:
  """Says what pictures show.

  Attributes:
    values: sorted values of each attribute, as (("black", "blue", ...),
      ("circle", ...)).
    params: of the classifier.
  """

  values: tuple[tuple[str, ...], ...]
  params: Any = dataclasses.field(repr=False)

  def probabilities(self, images: np.ndarray) -> list[np.ndarray]:
    """Returns how sure it is of each value.

    Args:
      images: uint8[N, H, W, 3].

    Returns:
      float32[N, values], of each attribute.

    Raises:
      ConfigError: the array holds no such pictures.
    """
    _check_images(images)
    model = _Classifier(tuple(map(len, self.values)))
    parts = []
    for start in range(0, len(images), _PREDICT_CHUNK):
      chunk = images[start : start + _PREDICT_CHUNK]
      # Filled up, so that one program serves all.
      missing = _PREDICT_CHUNK - len(chunk)
      x = np.pad(_normalized(chunk), [(0, missing), (0, 0), (0, 0), (0, 0)])
      outputs = _probabilities(model, self.params, x)
      parts.append([np.asarray(p)[: len(chunk)] for p in outputs])
    return [np.concatenate(attribute) for attribute in zip(*parts, strict=True)]

  def predict(self, images: np.ndarray) -> list[tuple[str, ...]]:
    """Returns the likeliest value of each attribute, as ("blue", "circle").

    Args:
      images: uint8[N, H, W, 3].

    Raises:
      ConfigError: the array holds no such pictures.
    """
    names = [
      np.asarray(values)[p.argmax(axis=1)].tolist()
      for values, p in zip(self.values, self.probabilities(images), strict=True)
    ]
    return list(zip(*names, strict=True))

  def accuracy(
    self, images: np.ndarray, labels: Sequence[str | tuple[str, ...]]
  ) -> JudgeAccuracy:
    """Compares its verdicts with labels: on real pictures, or those asked for.

    Args:
      images: uint8[N, H, W, 3].
      labels: one per picture, as for `train_judge`; an unknown value is wrong.

    Raises:
      ConfigError: images and labels differ in number, or are not such.
    """
    wanted = _split_labels(labels, images)
    if len(wanted[0]) != len(self.values):
      raise config_lib.ConfigError(
        f"label {labels[0]!r} has {len(wanted[0])} attributes, the judge knows "
        f"{len(self.values)}: {self.values}"
      )
    right = np.array(
      [
        [a == b for a, b in zip(said, label, strict=True)]
        for said, label in zip(self.predict(images), wanted, strict=True)
      ]
    )
    return JudgeAccuracy(
      float(right.all(axis=1).mean()),
      tuple(right.mean(axis=0).tolist()),
      len(right),
    )


def train_judge(
  images: np.ndarray,
  labels: Sequence[str | tuple[str, ...]],
  *,
  seed: int = 0,
  steps: int = 600,
  cache_dir: str | os.PathLike[str] | None = None,
) -> Judge:
  """Trains a classifier of pictures.

  It sees them mirrored, shifted, blurred, faded, tinted and with noise, so that
  it reads the soft pictures of a tokenizer as it reads real ones.

  Args:
    images: uint8[N, H, W, 3], real ones. They are judged at 32 pixels.
    labels: one per picture: attributes, as "blue rectangle" or ("blue",
      "rectangle"), as many in each.
    seed: of the start and of what is drawn.
    steps: optimizer steps of 64 pictures.
    cache_dir: folder where judges are kept, by a hash of all of the above; None
      keeps none.

  Raises:
    ConfigError: images and labels differ in number, or are not such.
  """
  split = _split_labels(labels, images)
  values = tuple(tuple(sorted(set(v))) for v in zip(*split, strict=True))
  targets = np.array(
    [[v.index(x) for v, x in zip(values, s, strict=True)] for s in split],
    np.int32,
  )
  model = _Classifier(tuple(map(len, values)))
  file = None
  if cache_dir is not None:
    key = repr((_FORMAT, seed, steps, images.shape, split)).encode()
    digest = hashlib.sha256(key + np.ascontiguousarray(images).tobytes())
    folder = Path(os.path.expanduser(cache_dir))
    file = folder / f"judge-{digest.hexdigest()[:16]}.npz"
    if file.exists():
      with np.load(file) as arrays:
        return Judge(values, traverse_util.unflatten_dict(dict(arrays), "/"))
  params = _train(model, _normalized(images), targets, seed, steps)
  if file is not None:
    _save(file, traverse_util.flatten_dict(params, sep="/"))
  return Judge(values, params)


def _train(model, images, targets, seed, steps):
  """Returns trained parameters, as NumPy arrays."""
  start, run = jax.random.split(jax.random.key(seed))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, _LEARNING_RATE, min(_WARMUP, steps // 4), steps
  )
  optimizer = optax.adamw(schedule, weight_decay=1e-3)

  def loss(params, image, target):
    logits = model.apply(params, image)
    return sum(
      optax.softmax_cross_entropy_with_integer_labels(x, y).mean()
      for x, y in zip(logits, target.T, strict=True)
    )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, number, images, targets):
    params, optimizer_state = state
    draw, augment = jax.random.split(jax.random.fold_in(run, number))
    chosen = jax.random.randint(draw, (_BATCH,), 0, len(images))
    image = _augment(augment, images[chosen])
    gradient = jax.grad(loss)(params, image, targets[chosen])
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, params
    )
    return optax.apply_updates(params, updates), optimizer_state

  params = jax.jit(model.init)(start, images[:1])
  state = params, optimizer.init(params)
  images, targets = jnp.asarray(images), jnp.asarray(targets)
  for number in range(steps):
    state = step(state, number, images, targets)
  return jax.device_get(state[0])


def _augment(key: jax.Array, image: jax.Array) -> jax.Array:
  """Makes pictures harder to judge, as compression does.

  Args:
    key: of what is drawn.
    image: float32[B, 32, 32, 3] in [-1, 1].

  Returns:
    As many, of the same shape; pixels may leave [-1, 1] a little.
  """
  B, X, Y, C = image.shape
  keys = iter(jax.random.split(key, 7))

  def uniform(low, high, shape=(B, 1, 1, 1)):
    return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

  mirrored = jax.random.bernoulli(next(keys), 0.5, (B, 1, 1, 1))
  image = jnp.where(mirrored, image[:, :, ::-1], image)

  border = (_MAX_SHIFT, _MAX_SHIFT)
  padded = jnp.pad(image, ((0, 0), border, border, (0, 0)), mode="edge")
  offsets = jax.random.randint(next(keys), (B, 2), 0, 2 * _MAX_SHIFT + 1)
  image = jax.vmap(
    lambda x, offset: jax.lax.dynamic_slice(x, (*offset, 0), (X, Y, C))
  )(padded, offsets)

  # Gaussian blur as two products, each picture's with a width of its own.
  sigma = uniform(0.05, 1.0)[:, :, :, 0]
  distance = jnp.arange(X)[:, None] - jnp.arange(X)
  blur_BXX = jax.nn.softmax(-0.5 * jnp.square(distance / sigma), axis=-1)
  image = jnp.einsum("bxi,bijc->bxjc", blur_BXX, image)
  image = jnp.einsum("byj,bxjc->bxyc", blur_BXX, image)

  mean = image.mean(axis=(1, 2), keepdims=True)
  image = mean + uniform(0.7, 1.1) * (image - mean)
  image += 0.1 * jax.random.normal(next(keys), (B, 1, 1, C))
  return image + uniform(0.0, 0.15) * jax.random.normal(next(keys), image.shape)


def _normalized(images: np.ndarray) -> np.ndarray:
  """Returns float32[N, 32, 32, 3] in [-1, 1]."""
  return features.area_resize(images, SIDE) / np.float32(127.5) - 1


def _check_images(images: np.ndarray) -> None:
  if (
    images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[-1] != 3
    or not len(images)
  ):
    raise config_lib.ConfigError(
      f"want pictures uint8[N, H, W, 3], got {images.dtype}"
      f"{list(images.shape)}: map pixels to 0..255 first"
    )


def _split_labels(
  labels: Sequence[str | tuple[str, ...]], images: np.ndarray
) -> list[tuple[str, ...]]:
  """Returns the attributes of each label, or says what is wrong."""
  _check_images(images)
  if len(labels) != len(images):
    raise config_lib.ConfigError(
      f"{len(labels)} labels for {len(images)} pictures: want one of each"
    )
  split = [
    tuple(x.split()) if isinstance(x, str) else tuple(x or ()) for x in labels
  ]
  for label, attributes in zip(labels, split, strict=True):
    if not attributes or len(attributes) != len(split[0]):
      raise config_lib.ConfigError(
        f"label {label!r} has {len(attributes)} attributes, the first one "
        f"({labels[0]!r}) {len(split[0])}: want as many in each, and leave out "
        "pictures without a label"
      )
  return split


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes a file that is whole as soon as it has its name."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=file.parent, prefix="judge-") as folder:
    building = Path(folder, file.name)
    np.savez(building, **arrays)
    building.replace(file)
