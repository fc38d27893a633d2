"""Stage II on real data at toy size, from a tiny run of stage I."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from configs import instruct as instruct_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.data import mixture as mixture_lib, pipeline, tasks
from unicode_jax.stages import instruct, runner
from unicode_jax.training import instruct_step, loop

TIMING = ("time/", "goodput/")
VISIONS = ("unified", "separate", "projector")


def make_config(run, **overrides):
  overrides = {
    "init_from": str(run),
    "num_steps": 4,
    "eval_every": 1000,
    "checkpoint_every": 2,
    **overrides,
  }
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"), overrides
  )
  return config_lib.validate(config_lib.inherit(config, tuple(overrides)))


@pytest.fixture(scope="module")
def shared(stage_one):
  """What every run here starts from, loaded once, with fewer images."""
  workdir, *_ = stage_one
  config = make_config(workdir)
  loaded = loading.load(workdir)
  data = runner.load_data(
    config,
    with_text=True,
    tokenizer_path=str(workdir / loading.TEXT_TOKENIZER),
  )

  def few(sources):
    return tuple(
      dataclasses.replace(
        source, items=source.items[:200], annotations=source.annotations[:200]
      )
      for source in sources
    )

  data = dataclasses.replace(
    data,
    image_sources=few(data.image_sources),
    heldout_sources=few(data.heldout_sources),
  )
  return config, loaded, data


def train(shared, workdir, until_step=None, **overrides):
  config, loaded, data = shared
  overrides = {"instruct.heldout_rows": 8} | overrides
  config = make_config(config.init_from, **overrides)
  stage = instruct.InstructStage(config, data, loaded)
  state = loop.train(
    stage, workdir, runner.loop_config(config), sharding.make_mesh(), until_step
  )
  return stage, state


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory):
  """One run of each kind: (run folder, stage, final state)."""
  made = {}
  for vision in VISIONS:
    workdir = tmp_path_factory.mktemp(vision)
    made[vision] = (
      workdir,
      *train(shared, workdir, **{"instruct.vision": vision}),
    )
  return made


def rows_without_timing(workdir):
  rows = []
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    rows.append({k: v for k, v in row.items() if not k.startswith(TIMING)})
  return rows


@pytest.mark.parametrize("vision", VISIONS)
def test_only_the_llm_learns(shared, runs, vision):
  """Tokenizer, table and ids are stage I's to the bit; the LLM is not."""
  _, loaded, _ = shared
  _, stage, state = runs[vision]
  before, after = loaded.variables, state.variables
  for name in ("encoder", "decoder"):
    chex.assert_trees_all_equal(after.params[name], before.params[name])
  assert after.params["codebook"] == {}
  np.testing.assert_array_equal(
    stage.model.table(after), loaded.model.table(before)
  )
  np.testing.assert_array_equal(
    after.codebook_state["gain"], before.codebook_state["gain"]
  )
  np.testing.assert_array_equal(after.valid, before.valid)
  assert loading.fingerprint(stage.model, after) == (
    loading.fingerprint(loaded.model, before)
  )
  llm, old = after.params["llm"], before.params["llm"]
  rows = old["embed_tokens"]["embedding"].shape[0]
  llm = llm | {
    "embed_tokens": {"embedding": llm["embed_tokens"]["embedding"][:rows]}
  }
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), llm, old)
  assert all(jax.tree.leaves(changed))
  # The LLM's own view has moved on, which is why the table is fixed.
  assert (
    np.asarray(stage.model.language_table(after)) != stage.model.table(after)
  ).any()
  assert ("projector" in after.params) == (vision == "projector")


def test_separate_rows_are_added_behind_those_of_text(shared, runs):
  _, loaded, _ = shared
  _, stage, state = runs["separate"]
  key = jax.random.key(0)
  old = loaded.variables.params["llm"]["embed_tokens"]["embedding"]
  with pytest.raises(RuntimeError, match="starts once"):
    stage.start(sharding.make_mesh())
  start = instruct.starting_variables(stage.config, loaded, stage.model)
  start = instruct.extend(stage.model, key, start)
  table = start.params["llm"]["embed_tokens"]["embedding"]
  rows = len(old)
  assert table.shape == (2 * rows, old.shape[1])
  np.testing.assert_array_equal(table[:rows], old)
  assert np.std(table[rows:]) == pytest.approx(0.02, rel=0.05)
  trained = state.variables.params["llm"]["embed_tokens"]["embedding"]
  assert trained.shape == table.shape
  llama = dataclasses.replace(stage.model.llama, embedding_std=0.5)
  model = dataclasses.replace(stage.model, llama=llama)
  wider = instruct.extend(
    model, key, instruct.starting_variables(stage.config, loaded, model)
  ).params["llm"]["embed_tokens"]["embedding"]
  assert np.std(wider[rows:]) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("vision", VISIONS)
def test_what_is_logged(runs, vision):
  workdir, stage, _ = runs[vision]
  rows = rows_without_timing(workdir)
  logged = {name for row in rows for name in row}
  assert {"loss", "gradient_norm", "eval/text_perplexity"} <= logged
  assert {"text_loss/vqa", "text_loss/vqa/easy_vqa_train"} <= logged
  assert "eval/text_accuracy/caption/openmoji_heldout" in logged
  assert "eval/exact/vqa/easy_vqa_test" in logged
  drawn = {name for name in logged if "image_loss" in name}
  if vision == "projector":
    assert not drawn
  else:
    tasks_drawn = {
      name.split("/")[2] for name in drawn if name.startswith("eval/")
    }
    assert tasks_drawn == set(tasks.DRAWING)
    for title, prefixes in instruct.CURVES.items():
      assert any(name.startswith(prefixes) for name in logged), title
  # Text is measured before and after (H10), like everything held out.
  evaluated = [row["step"] for row in rows if "eval/text_perplexity" in row]
  assert evaluated == [0, 4]
  assert all(np.isfinite(v) for row in rows for v in row.values())
  assert "loss" in stage.headline(next(r for r in rows if "loss" in r))


def test_resuming_changes_nothing(shared, runs, tmp_path):
  """2N steps straight equal N + restore + N, bit for bit."""
  straight_dir, _, straight = runs["unified"]
  train(shared, tmp_path, until_step=2)
  _, halves = train(shared, tmp_path)
  assert int(halves.step) == 4
  chex.assert_trees_all_equal(straight, halves)
  assert rows_without_timing(straight_dir) == rows_without_timing(tmp_path)


def test_a_start_stays_as_it_was_loaded(shared, runs):
  """Making one stage of it does not spoil it for the next."""
  config, loaded, _ = shared
  model = loading.build_model(config)
  first, second = (
    instruct.starting_variables(config, loaded, model) for _ in range(2)
  )
  chex.assert_trees_all_equal(first, second)
  assert "table" in loaded.variables.params["codebook"]
  fresh = loading.load(config.init_from).variables
  chex.assert_trees_all_equal(loaded.variables, fresh)


def test_text_alone_gives_the_mixture_that_is_asked(shared):
  config, loaded, data = shared
  config = make_config(
    config.init_from,
    **{f"instruct.tasks.{t}": float(t == "text") for t in tasks.TASKS},
  )
  stage = instruct.InstructStage(config, data, loaded)
  assert [group.name for group in stage.mixture.groups] == ["text"]
  assert [group.name for group in stage.heldout.groups] == ["text"]


def test_nothing_held_out_is_trained_on(shared, runs):
  """Neither images nor what is asked and said of them."""
  _, _, data = shared
  _, stage, _ = runs["unified"]
  trained = {
    image.tobytes() for s in data.image_sources for image in s.images()
  }
  for group in stage.heldout.groups:
    if group.source is not None:
      assert group.source in data.heldout_sources
      images = group.source.images()
      assert not trained & {image.tobytes() for image in images}
  for group in stage.mixture.groups:
    assert group.source is None or group.source in data.image_sources
  # Asked one question at a time, and nothing is drawn at random.
  for group in stage.heldout.groups:
    if group.name == "vqa":
      assert all(len(e.turns) == 1 for e in group.examples)
  batches = [
    next(mixture_lib.fixed_batches(stage.heldout, 0, 8, 8)) for _ in range(2)
  ]
  jax.tree.map(np.testing.assert_array_equal, *batches)


def test_a_run_of_stage_two_loads_and_goes_on(shared, runs, tmp_path):
  config, *_ = shared
  workdir, stage, state = runs["separate"]
  (workdir / "config.json").write_text(config_lib.to_json(stage.config))
  stage.data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  loaded = loading.load(workdir)
  chex.assert_trees_all_equal(loaded.variables, state.variables)
  assert loaded.layout.codes_shift == config.text.vocab_size
  on = make_config(workdir, **{"instruct.vision": "separate"})
  model = loading.build_model(on)
  again = instruct.starting_variables(on, loaded, model)
  extended = instruct.extend(model, jax.random.key(9), again)
  chex.assert_trees_all_equal(extended, state.variables)
  other = make_config(workdir)
  with pytest.raises(
    config_lib.ConfigError, match=r"'separate', not 'unified': start from stage"
  ):
    instruct.starting_variables(other, loaded, loading.build_model(other))


def test_adapters_learn_in_place_of_the_llm(shared, tmp_path):
  """And are merged wherever the run is loaded."""
  _, loaded, _ = shared
  workdir = tmp_path / "lora"
  overrides = {"instruct.lora_rank": 2, "instruct.lora_alpha": 8.0}
  stage, state = train(shared, workdir, **overrides)
  params = state.variables.params
  chex.assert_trees_all_equal(params["llm"], loaded.variables.params["llm"])
  model_key = jax.random.split(jax.random.key(stage.config.seed))[0]
  start = instruct.extend(stage.model, model_key, loaded.variables)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), params["lora"], start.params["lora"]
  )
  assert all(jax.tree.leaves(moved))
  moments = jax.tree.leaves(state.opt_state)
  assert sum(leaf.size for leaf in moments) < 2.1 * sum(
    leaf.size for leaf in jax.tree.leaves(params["lora"])
  )

  merged = stage.model.llm(params)
  (workdir / "config.json").write_text(config_lib.to_json(stage.config))
  stage.data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  again = loading.load(workdir)
  assert "lora" not in again.variables.params and not again.model.lora_rank
  for found in (
    again.variables.params["llm"],
    loading.load_llm(workdir).params,
  ):
    chex.assert_trees_all_close(found, merged, atol=1e-6)
  kernel = merged["layers_0"]["mlp"]["up_proj"]["kernel"]
  base = params["llm"]["layers_0"]["mlp"]["up_proj"]["kernel"]
  assert np.abs(kernel - base).max() > 1e-4

  # What is merged answers as what was trained.
  batch = next(mixture_lib.fixed_batches(stage.heldout, 0, 8, 8))
  trained = instruct_step.instruct_loss(
    stage.model, {"lora": params["lora"]}, state.variables, batch
  )
  plain = instruct_step.instruct_loss(
    again.model, {"llm": again.variables.params["llm"]}, again.variables, batch
  )
  np.testing.assert_allclose(trained[0], plain[0], rtol=1e-5)


def test_exact_answers_are_what_greedy_decoding_gets_right(shared, runs):
  """Against the plain logits of every conversation by itself."""
  from unicode_jax.models import llama

  _, stage, state = runs["unified"]
  number = next(
    i for i, g in enumerate(stage.heldout.groups) if g.name == "text"
  )
  batch = next(mixture_lib.fixed_batches(stage.heldout, number, 8, 8))
  # Targets that an untrained model hits: its own choices, in half of the rows.
  apply = jax.jit(
    lambda params, ids, positions, segments: llama.Llama(
      stage.model.llama
    ).apply({"params": params}, ids, positions=positions, segment_ids=segments)[
      0
    ]
  )
  choice = np.asarray(
    apply(
      state.variables.params["llm"],
      batch["token_ids"],
      batch["positions"],
      batch["segment_ids"],
    )
  ).argmax(-1)
  rng = np.random.default_rng(0)
  labels = np.where(rng.random(choice.shape) < 0.85, choice, batch["labels"])
  batch = batch | {"labels": labels.astype(np.int32)}
  _, hits = stage._measure(state.variables, batch)
  got = instruct_step.exact_answers(batch, np.asarray(hits))
  want = []
  for row in range(8):
    for segment in range(1, batch["segment_ids"][row].max() + 1):
      here = (batch["segment_ids"][row] == segment) & (
        batch["loss_mask"][row] > 0
      )
      want.append((choice[row][here] == labels[row][here]).all())
  assert got.tolist() == want
  assert 0 < sum(want) < len(want)


def test_stage_two_needs_a_run_with_an_llm(tmp_path):
  for start in (None, str(tmp_path)):
    config = config_lib.apply_overrides(
      instruct_config.get_config("debug"), {"init_from": start}
    )
    with pytest.raises(config_lib.ConfigError, match="init_from"):
      config_lib.validate(config_lib.inherit(config))
  alone = config_lib.apply_overrides(
    config_lib.default_config(),
    {"stage": "tokenizer", "codebook.paradigm": "private"},
  )
  (tmp_path / "config.json").write_text(config_lib.to_json(alone))
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"), {"init_from": str(tmp_path)}
  )
  with pytest.raises(
    config_lib.ConfigError, match=r"'tokenizer'.*pretrain\.py"
  ):
    config_lib.inherit(config)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      {
        "text.sequence_length": 24,
        "instruct.tasks.caption": 0.0,
        "instruct.tasks.class_conditional": 0.0,
      },
      r"decompression takes \d+ positions.*length=24.*tasks.decompression=0",
    ),
    (
      {
        "instruct.vision": "projector",
        "instruct.tasks.caption": 0.0,
        "instruct.tasks.vqa": 0.0,
        "instruct.tasks.text": 0.0,
      },
      r"'projector' cannot draw.*caption",
    ),
  ],
)
def test_mixtures_that_cannot_be_made(shared, overrides, message):
  config, loaded, data = shared
  config = make_config(config.init_from, **overrides)
  with pytest.raises(config_lib.ConfigError, match=message):
    instruct.InstructStage(config, data, loaded)


def test_a_start_without_gains(shared):
  config, loaded, _ = shared
  state = dict(loaded.variables.codebook_state)
  state["gain"] = np.zeros_like(state["gain"])
  untrained = dataclasses.replace(
    loaded, variables=loaded.variables.replace(codebook_state=state)
  )
  model = loading.build_model(config)
  with pytest.raises(config_lib.ConfigError, match="no gains yet"):
    instruct.starting_variables(config, untrained, model)


def test_another_template_is_said(shared, caplog):
  config, loaded, _ = shared
  model = loading.build_model(config)
  earlier = make_config(config.init_from, **{"instruct.template": "chatml"})
  variables = instruct.starting_variables(config, loaded, model)
  earlier_run = dataclasses.replace(
    loaded, config=earlier, variables=variables, model=model
  )
  instruct.starting_variables(config, earlier_run, model)
  assert "trained with instruct.template='chatml'" in caplog.text


def test_images_reach_the_step_as_stage_one_encoded_them(shared, runs):
  """Pixels of a batch give the codes that the stage-I model gives."""
  _, loaded, data = shared
  _, stage, state = runs["unified"]
  images = pipeline.to_float(data.heldout_images["easy_vqa_test"][:16])
  encode = jax.jit(
    lambda variables, images: stage.model.encode(variables, images).codes
  )
  before = jax.jit(
    lambda variables, images: loaded.model.encode(variables, images).codes
  )
  np.testing.assert_array_equal(
    encode(state.variables, images), before(loaded.variables, images)
  )
