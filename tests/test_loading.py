"""A run that is loaded is the run that was trained."""

import functools
import shutil

import chex
import jax
import numpy as np
import pytest

from unicode_jax import config as config_lib, loading
from unicode_jax.data import pipeline


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(model, variables, images):
  codes = model.encode(variables, images).codes
  return codes, model.decode(variables, codes)


def test_a_loaded_run_is_the_one_that_was_trained(stage_one):
  workdir, stage, state = stage_one
  loaded = loading.load(workdir)
  assert loaded.step == int(state.step) == 4
  assert loaded.workdir == workdir
  assert config_lib.flatten(loaded.config) == config_lib.flatten(stage.config)
  assert loaded.model == stage.model
  chex.assert_trees_all_equal(loaded.variables, state.variables)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    loaded.variables, state.variables
  )
  # And so reconstructs the same, bit for bit.
  images = pipeline.to_float(stage.data.heldout_images["openmoji_heldout"][:8])
  before = reconstruct(stage.model, state.variables, images)
  after = reconstruct(loaded.model, loaded.variables, images)
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert len(np.unique(before[0])) > 1
  text = "User: Hello, </s> Ünïcode!\n"
  assert loaded.text_tokenizer.encode(text) == (
    stage.data.text_tokenizer.encode(text)
  )


def test_an_earlier_step_and_text_for_a_path(stage_one):
  workdir, _, state = stage_one
  loaded = loading.load(str(workdir), step=2)
  assert loaded.step == 2
  chex.assert_trees_all_equal_shapes(loaded.variables, state.variables)
  # Two steps of text came after it.
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    loaded.variables.params,
    state.variables.params,
  )
  assert all(jax.tree.leaves(changed["llm"]))
  assert not any(jax.tree.leaves(changed["decoder"]))


def test_the_layout_is_the_configs(stage_one):
  loaded = loading.load(stage_one[0])
  layout = loaded.layout
  assert (layout.template.name, layout.depth) == ("plain", 2)
  assert (layout.image_start, layout.image_end) == ("<image>", "</image>")
  assert layout.codes_shift == 0
  config = config_lib.apply_overrides(
    loaded.config,
    {
      "stage": "instruct",
      "instruct.template": "chatml",
      "instruct.vision": "separate",
      "text.image_start": "<s>",
    },
  )
  layout = loading.sequence_format(config)
  assert layout.template.name == "chatml" and layout.image_start == "<s>"
  assert layout.codes_shift == config.text.vocab_size == 384


@pytest.mark.parametrize(
  ("vision", "rows"), [("unified", 384), ("separate", 768), ("projector", 384)]
)
@pytest.mark.parametrize(
  "paradigm",
  [
    {"codebook.paradigm": "projected"},
    {"codebook.paradigm": "language_driven", "codebook.update_rule": "ema"},
  ],
)
def test_stage_two_has_a_frozen_codebook(stage_one, vision, rows, paradigm):
  config = config_lib.apply_overrides(
    stage_one[1].config,
    {"stage": "instruct", "instruct.vision": vision, **paradigm},
  )
  model = loading.build_model(config)
  assert model.codebook.paradigm == "frozen" and model.vision == vision
  assert model.llama.vocab_size == rows
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones(384, bool))
  table = shapes.params["llm"]["embed_tokens"]["embedding"]
  assert table.shape == (rows, 32)
  own = jax.eval_shape(model.embedding, shapes.params)
  assert own.shape == (384, 32)  # The rows that text and codes share.
  assert shapes.codebook_state["table"].shape == (384, 8)
  assert ("projector" in shapes.params) == (vision == "projector")


def test_folders_that_hold_no_run(stage_one, tmp_path):
  workdir, *_ = stage_one
  with pytest.raises(config_lib.ConfigError, match=r"holds no run.*--workdir"):
    loading.load(tmp_path)
  (tmp_path / "stage2").mkdir()
  shutil.copy(workdir / "config.json", tmp_path / "stage2")
  with pytest.raises(config_lib.ConfigError, match=r"its links.*stage2"):
    loading.load(tmp_path)
  shutil.copy(workdir / "config.json", tmp_path)
  with pytest.raises(config_lib.ConfigError, match=r"no checkpoint: let the"):
    loading.load(tmp_path)
  with pytest.raises(
    config_lib.ConfigError, match=r"no checkpoint of step 3; it has \[2, 4\]"
  ):
    loading.load(workdir, step=3)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(config_lib.ConfigError, match=r"Hugging Face.*convert"):
    loading.load(tmp_path)


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
  stage_one, tmp_path, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(stage_one[0], workdir)
  for path in (workdir / "checkpoints/4/state").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  loaded = loading.load(workdir)
  assert loaded.step == 2
  assert "step 2 is used, newer checkpoints are damaged (step 4" in caplog.text
  with pytest.raises(config_lib.ConfigError, match=r"step 4: .*\[2, 4\]"):
    loading.load(workdir, step=4)


@pytest.mark.parametrize(
  ("name", "old", "new", "message"),
  [
    ("config.json", '"gain_decay": 0.99', '"gain_decay": 0.98', "gain_decay: "),
    ("config.json", "{", "[", "is not JSON"),
    ("text_tokenizer/tokenizer.json", ":", ";", r"tokenizer\.json"),
    ("text_tokenizer/tokenizer_config.json", "</s>", "<s>", "that the run was"),
  ],
)
def test_a_damaged_config_or_tokenizer_is_named(
  stage_one, tmp_path, name, old, new, message
):
  workdir = tmp_path / "run"
  shutil.copytree(stage_one[0], workdir)
  text = (workdir / name).read_text()
  assert old in text
  (workdir / name).write_text(text.replace(old, new, 1))
  with pytest.raises(config_lib.ConfigError, match=message) as caught:
    loading.load(workdir)
  assert name.split("/")[0] in str(caught.value)
