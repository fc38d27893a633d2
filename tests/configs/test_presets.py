"""Every shipped config validates and says what it claims."""

import pathlib
import runpy

import pytest

from unicode_jax import config as config_lib

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PRESETS = tuple(runpy.run_path(str(CONFIGS / "pretrain.py"))["PRESETS"])
SHIPPED = [
  (path, preset) for path in sorted(CONFIGS.glob("*.py")) for preset in PRESETS
]
LLAMA_7B = 6_738_415_616
SMOLLM2_135M = 134_515_008


def load(path, preset):
  return config_lib.load(f"{path}:{preset}")


@pytest.mark.parametrize(("path", "preset"), SHIPPED)
def test_preset_validates(path, preset):
  config = config_lib.validate(load(path, preset))
  assert config.preset == preset
  assert config.stage == path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")))
def test_file_states_its_provenance(path):
  text = path.read_text(encoding="utf-8")
  for word in ("arXiv", f"--config=configs/{path.name}", "hardware", "time"):
    assert word in text, word
  assert "Expected:" in text


def count(tree):
  import jax

  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("preset", "published"), [("paper", LLAMA_7B), ("smollm2", SMOLLM2_135M)]
)
def test_llm_has_the_published_size(preset, published):
  import jax
  import jax.numpy as jnp

  from unicode_jax.models import llama
  from unicode_jax.stages import pretrain

  config = load(CONFIGS / "pretrain.py", preset)
  model = llama.Llama(pretrain.build_model(config).llama)
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 2, 1), jnp.int32)
  )
  assert count(params) == pytest.approx(published, rel=0.02)


def test_sections_fit_what_is_built_from_them():
  from unicode_jax import data
  from unicode_jax.training import alarm, optimizer

  config = config_lib.default_config()
  data.DataConfig(**config.data)
  data.TextConfig(**config.text)
  alarm.AlarmConfig(**config.alarm)
  for settings in config.optimizer.values():
    optimizer.OptimizerConfig(**settings)


def tokenizer_shapes(config):
  import jax
  import jax.numpy as jnp

  from unicode_jax.models import tokenizer
  from unicode_jax.stages import tokenizer as stage

  architecture = stage.build_model(config).tokenizer
  size = config.image_size
  key = jax.random.key(0)
  image = jnp.zeros((1, size, size, 3))
  features, encoder = jax.eval_shape(
    tokenizer.Encoder(architecture).init_with_output, key, image
  )
  _, decoder = jax.eval_shape(
    tokenizer.Decoder(architecture).init_with_output, key, features
  )
  return architecture, features, encoder, decoder


@pytest.mark.parametrize("preset", PRESETS)
def test_downsampling_is_the_models(preset):
  config = load(CONFIGS / "tokenizer.py", preset)
  architecture, features, *_ = tokenizer_shapes(config)
  assert config_lib.downsampling(config) == architecture.downsampling
  grid = config.image_size // config_lib.downsampling(config)
  assert features.shape == (1, grid, grid, config.codebook.code_dim)


def test_paper_tokenizer_has_the_published_size():
  config = load(CONFIGS / "tokenizer.py", "paper")
  _, features, encoder, decoder = tokenizer_shapes(config)
  assert features.shape[1:3] == (16, 16)  # HQ: 8x8 cells over 16x16.
  assert count(encoder) + count(decoder) == pytest.approx(104e6, rel=0.1)
