"""Stage I on real data at toy size: what each paradigm may and may not move."""

import json

import chex
import jax
import numpy as np
import pytest

from configs import pretrain as pretrain_config
from unicode_jax import (
  codebook as codebook_lib,
  config as config_lib,
  loading,
  sharding,
)
from unicode_jax.convert import exporting, importing
from unicode_jax.data import pipeline
from unicode_jax.models import llama as llama_lib
from unicode_jax.stages import pretrain, run_folder, runner
from unicode_jax.training import loop

# Timing is the only thing that two equal runs may disagree on.
TIMING = ("time/", "goodput/")


def make_config(**overrides):
  config = pretrain_config.get_config("debug")
  return config_lib.apply_overrides(config, overrides)


def make_stage(config):
  data = runner.load_data(config, with_text=True)
  valid = data.text_tokenizer.visual_code_mask(
    config.text.image_start, config.text.image_end, config.text.vocab_size
  )
  model = loading.build_model(config)
  return pretrain.PretrainStage(config, data, model, valid)


def train(config, workdir, until_step=None):
  stage = make_stage(config)
  state = loop.train(
    stage,
    workdir,
    runner.loop_config(config),
    sharding.make_mesh(),
    until_step,
  )
  return stage, state


def rows_without_timing(workdir):
  rows = []
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    rows.append({k: v for k, v in row.items() if not k.startswith(TIMING)})
  return rows


@pytest.mark.parametrize(
  "overrides",
  [
    {"codebook.paradigm": "language_driven", "codebook.update_rule": "ema"},
    pytest.param(
      {"codebook.paradigm": "dual", "tokenizer.depth_dropout": 0.5},
      marks=pytest.mark.slow,
    ),
    {
      "codebook.paradigm": "projected",
      "tokenizer.loss.adversarial": 0.5,
      "tokenizer.loss.disc_start": 3,
      "data.crop_scale": 0.5,
    },
  ],
  ids=lambda overrides: overrides["codebook.paradigm"],
)
def test_resuming_changes_nothing(tmp_path, overrides):
  """2N steps straight equal N + restore + N, bit for bit."""
  config = make_config(**overrides)
  _, straight = train(config, tmp_path / "straight")
  train(config, tmp_path / "halves", until_step=4)
  _, halves = train(config, tmp_path / "halves")
  assert int(halves.step) == config.num_steps + config.schedule.finetune_steps
  chex.assert_trees_all_equal(straight, halves)
  assert rows_without_timing(tmp_path / "straight") == rows_without_timing(
    tmp_path / "halves"
  )


def test_paradigms_move_what_they_may(tmp_path):
  """Each paradigm's rule about C and E_L, on one and the same schedule."""
  states, stages = {}, {}
  for paradigm in ("frozen", "dual", "language_driven", "projected"):
    config = make_config(**{"codebook.paradigm": paradigm})
    stages[paradigm], states[paradigm] = train(config, tmp_path / paradigm)
  variables = {name: state.variables for name, state in states.items()}
  embeddings = {
    name: np.asarray(stages[name].model.embedding(v.params))
    for name, v in variables.items()
  }

  # frozen: C is what it was at the start.
  config = make_config(**{"codebook.paradigm": "frozen"})
  start = train(config, tmp_path / "start", until_step=0)[1].variables
  np.testing.assert_array_equal(
    variables["frozen"].codebook_state["table"], start.codebook_state["table"]
  )
  # Nothing flows from C to E_L except in `dual`: the LLM that never heard of
  # images ends the same to the bit.
  for paradigm in ("language_driven", "projected"):
    np.testing.assert_array_equal(embeddings[paradigm], embeddings["frozen"])
  changed = (embeddings["dual"] != embeddings["frozen"]).any(axis=1)
  assert changed.mean() > 0.5

  # At the end ids mean one thing, except where C may not follow.
  def drift(name):
    v, model = variables[name], stages[name].model
    return float(
      codebook_lib.drift(
        v.params["codebook"],
        v.codebook_state,
        model.embedding(v.params),
        v.valid,
        model.codebook,
      )
    )

  assert drift("projected") == 0.0
  assert drift("language_driven") == 0.0
  assert drift("dual") == 0.0
  assert drift("frozen") > 0.0

  # H9: control tokens, bytes and delimiters are never codes.
  for name, stage in stages.items():
    images = pipeline.to_float(stage.data.heldout_images["openmoji_heldout"])
    codes = np.asarray(stage.model.encode(variables[name], images).codes)
    assert stage.valid[codes].all(), name

  # Drift and agreement are logged, and tell the paradigms apart (H3).
  for name in states:
    rows = rows_without_timing(tmp_path / name)
    logged = [row for row in rows if "code_agreement" in row]
    assert all("drift" in row for row in logged), name
    if name == "projected":
      assert all(row["drift"] == 0.0 for row in logged)
      assert all(row["code_agreement"] == 1.0 for row in logged)
    else:
      assert any(row["drift"] > 0.0 for row in logged), name


def test_the_finetune_moves_the_decoder_alone(tmp_path):
  """After the snap every image keeps its codes (H3)."""
  config = make_config()
  stage, before = train(config, tmp_path, until_step=config.num_steps)
  _, after = train(config, tmp_path)
  images = pipeline.to_float(stage.data.heldout_images["easy_vqa_test"][:64])
  np.testing.assert_array_equal(
    stage.model.encode(before.variables, images).codes,
    stage.model.encode(after.variables, images).codes,
  )
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    before.variables.params,
    after.variables.params,
  )
  assert any(jax.tree.leaves(changed["decoder"]))
  for group in ("encoder", "codebook", "llm"):
    assert not any(jax.tree.leaves(changed[group])), group


def test_the_run_folder_holds_everything(tmp_path):
  config = make_config()
  pretrain.run(config, tmp_path / "run")
  files = {
    str(path.relative_to(tmp_path / "run"))
    for path in (tmp_path / "run").rglob("*")
  }
  expected = {"config.json", "metrics.jsonl", "report.md", "text_tokenizer"}
  assert expected <= files
  assert any(name.startswith("tensorboard/events") for name in files)
  last = config.num_steps + config.schedule.finetune_steps
  for name in ("openmoji_heldout", "easy_vqa_test"):
    assert f"pictures/{name}_{last:06d}.png" in files
  assert config_lib.flatten(
    config_lib.from_json(tmp_path / "run" / "config.json")
  ) == config_lib.flatten(config)
  report = (tmp_path / "run" / "report.md").read_text()
  for curve in ("psnr", "drift", "text_loss", "codebook_usage"):
    assert f"curves/{curve}.png" in files
    assert f"curves/{curve}.png" in report
  assert "eval/text_perplexity" in report
  # Another config in the same folder is refused and named, before any work.
  other = make_config(**{"codebook.code_dim": 4})
  with pytest.raises(config_lib.ConfigError, match="code_dim: 8 there, 4"):
    pretrain.run(other, tmp_path / "run")


def test_collapse_stops_the_run_when_asked(tmp_path):
  config = make_config(
    **{
      "alarm.usage_floor": 1.0,
      "alarm.patience": 2,
      "alarm.stop": True,
    }
  )
  with pytest.raises(
    config_lib.RunError, match=r"CODEBOOK COLLAPSE .* Likely cause"
  ):
    train(config, tmp_path)
  assert "COLLAPSE" in (tmp_path / "ALARM.txt").read_text()
  # What it had is kept, and it goes on when told to.
  on = config_lib.apply_overrides(config, {"alarm.stop": False})
  run_folder.claim(tmp_path, config)
  run_folder.check(tmp_path, on)
  _, state = train(on, tmp_path)
  assert int(state.step) == config.num_steps + config.schedule.finetune_steps


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = make_config(
    **{
      "optimizer.tokenizer.learning_rate": 1e30,
      "optimizer.tokenizer.warmup_steps": 0,
      "recovery.skip_limit": 1,
    }
  )
  with pytest.raises(config_lib.RunError, match="not finite at every"):
    train(config, tmp_path)


def test_dual_keeps_a_round_that_the_end_cuts_short(tmp_path):
  """num_steps may end within a tokenizer turn: C is still written back."""
  config = make_config(
    **{"codebook.paradigm": "dual", "num_steps": 5, "codebook.code_dim": 32}
  )
  stage, before = train(config, tmp_path, until_step=4)
  assert stage.transition(5) == stage.write_back_and_snap
  _, after = train(config, tmp_path, until_step=5)
  tables = [
    np.asarray(stage.model.embedding(state.variables.params))
    for state in (before, after)
  ]
  assert (tables[0] != tables[1])[stage.valid].any()


def test_easy_vqa_test_images_are_never_trained_on():
  stage = make_stage(make_config())
  trained = {
    image.tobytes()
    for source in stage.data.image_sources
    for image in source.images()
  }
  test = stage.data.heldout_images["easy_vqa_test"]
  assert len(test) == 1000
  assert not trained & {image.tobytes() for image in test}


def test_stage_one_starts_from_a_language_model(stage_one, tmp_path):
  """Its weights, its tokenizer, and a codebook made of its table."""
  workdir, *_ = stage_one
  loaded = loading.load_llm(workdir)
  out = exporting.export(loaded, tmp_path / "hf")
  llm = importing.import_checkpoint(out, tmp_path / "llm")
  for scanned in (False, True):
    overrides = {"llm_from": str(llm), "llm.scan_layers": scanned}
    config = config_lib.apply_overrides(
      pretrain_config.get_config("debug"), overrides
    )
    config = config_lib.validate(config_lib.inherit(config, tuple(overrides)))
    assert config.text.tokenizer_path == str(llm / "text_tokenizer")
    stage = make_stage(config)
    state = stage.init(jax.random.key(0), stage.start(sharding.make_mesh()))
    params = state.variables.params["llm"]
    assert ("layers" in params) == scanned
    jax.tree.map(
      np.testing.assert_array_equal,
      llama_lib.with_layers_as(params, False),
      dict(loaded.params),
    )
    # What the codebook is made from is the table that was given.
    np.testing.assert_allclose(
      stage.model.table(state.variables),
      stage.model.language_table(state.variables),
      atol=1e-5,
    )
  with pytest.raises(config_lib.ConfigError, match="leave it unset"):
    wrong = config_lib.apply_overrides(config, {"llm.embed_dim": 64})
    config_lib.inherit(wrong, ("llm_from", "llm.embed_dim"))
  with pytest.raises(config_lib.ConfigError, match="holds no language model"):
    config_lib.inherit(
      config_lib.apply_overrides(config, {"llm_from": str(tmp_path)})
    )
