"""Every shipped config validates and says what it claims."""

import pathlib
import runpy

import pytest

from unicode_jax import config as config_lib

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PRESETS = tuple(runpy.run_path(str(CONFIGS / "pretrain.py"))["PRESETS"])
FILES = {
  path: runpy.run_path(str(path)) for path in sorted(CONFIGS.glob("*.py"))
}
SHIPPED, CHAINS = (
  [
    (path, preset)
    for path, names in FILES.items()
    if ("get_chain" in names) == is_chain
    for preset in names.get("PRESETS", PRESETS)
  ]
  for is_chain in (False, True)
)


def load(path, preset):
  return config_lib.load(f"{path}:{preset}")


def is_shown(case):
  return case.stem if isinstance(case, pathlib.Path) else case or "default"


@pytest.mark.parametrize(("path", "preset"), SHIPPED, ids=is_shown)
def test_preset_validates(path, preset):
  config = load(path, preset)
  # What only the user can name.
  named = {}
  if config.data.source in ("folder", "llava"):
    named["data.path"] = str(CONFIGS)
  if config.data.source == "llava":
    named["data.conversations"] = str(path)
  if config.text.vocab_size > config_lib.MAX_TRAINED_VOCAB:
    named["text.tokenizer_path"] = str(CONFIGS)
  if named and path.stem == "pretrain":
    with pytest.raises(config_lib.ConfigError, match=max(named)):
      config_lib.validate(config)
  config = config_lib.validate(config_lib.apply_overrides(config, named))
  assert config.preset == preset
  assert config.stage == path.stem


@pytest.mark.parametrize(("path", "preset"), CHAINS, ids=is_shown)
def test_a_link_that_is_none_is_named(path, preset):
  links = config_lib.load_links(f"{path}:{preset}")
  with pytest.raises(config_lib.ConfigError, match=r"'stag2'.*warmup.*stage2"):
    config_lib.resolve_links(links, {"stag2.num_steps": "1"}, "runs/x")


@pytest.mark.parametrize(("path", "preset"), CHAINS, ids=is_shown)
def test_chain_validates(path, preset):
  links = config_lib.load_links(f"{path}:{preset}")
  resolved = config_lib.resolve_links(links, {}, "runs/x")
  stages = [config.stage for config in resolved.values()]
  # Of stage II there may be several.
  assert list(dict.fromkeys(stages)) == ["tokenizer", "pretrain", "instruct"]
  assert stages.count("pretrain") == 1
  assert {config.preset for config in resolved.values()} == {preset}
  starts = [config.init_from for config in resolved.values()]
  assert starts == [None, *(f"runs/x/{link}" for link in list(links)[:-1])]
  # One model all along.
  first, second, *others = resolved.values()
  assert second.tokenizer == first.tokenizer
  for config in others:
    for section in ("tokenizer", "codebook", "llm"):
      assert config[section] == second[section]


@pytest.mark.parametrize("path", FILES, ids=is_shown)
def test_file_states_its_provenance(path):
  text = path.read_text(encoding="utf-8")
  for word in ("arXiv", f"--config=configs/{path.name}", "hardware", "time"):
    assert word in text, word
  assert "Expected:" in text


def test_sections_fit_what_is_built_from_them():
  from unicode_jax import data
  from unicode_jax.training import alarm, optimizer

  config = config_lib.default_config()
  data.DataConfig(**config.data)
  data.TextConfig(**config.text)
  alarm.AlarmConfig(**config.alarm)
  for settings in config.optimizer.values():
    optimizer.OptimizerConfig(**settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_downsampling_is_the_models(preset):
  from unicode_jax import loading

  config = load(CONFIGS / "tokenizer.py", preset)
  tokenizer = loading.build_model(config).tokenizer
  assert config_lib.downsampling(config) == tokenizer.downsampling
