"""Codes of a data set equal those of training, whatever made them."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import instruct as instruct_config, pretrain as pretrain_config
from unicode_jax import (
  config as config_lib,
  data as data_lib,
  encoding,
  loading,
  sharding,
  tokenize,
)
from unicode_jax.data import code_cache, views
from unicode_jax.stages import instruct, run_folder, runner
from unicode_jax.training import checkpoint, instruct_step, loop

ROOT = pathlib.Path(__file__).parents[1]
TINY = {"text.vocab_size": 320, "llm.num_layers": 1}


def make_variables(config, valid):
  """Returns a tiny real model whose gains fit its features."""
  model = loading.build_model(config)
  variables = jax.jit(model.init)(jax.random.key(3), valid)
  params = dict(variables.params)
  if "table" in params["codebook"]:  # As if trained: no longer the language's.
    table = params["codebook"]["table"]
    noise = jax.random.normal(jax.random.key(4), table.shape)
    params["codebook"] = {**params["codebook"], "table": table + 0.3 * noise}
  gain = jnp.linspace(0.9, 0.4, model.depth)
  state = {**variables.codebook_state, "gain": gain}
  return model, variables.replace(params=params, codebook_state=state)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A run of stage I, as it lies on the disk."""
  config = config_lib.apply_overrides(pretrain_config.get_config("debug"), TINY)
  workdir = tmp_path_factory.mktemp("start")
  data = runner.load_data(config, with_text=True)
  valid = loading.valid_codes(config, data.text_tokenizer)
  _, variables = make_variables(config, valid)
  run_folder.claim(workdir, config)
  data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  with checkpoint.Checkpointer(workdir / "checkpoints", 1) as checkpointer:
    checkpointer.save(2, {"variables": variables}, {})
  return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder of 30 pictures of OpenMoji."""
  folder = tmp_path_factory.mktemp("pictures")
  data = data_lib.DataConfig(embedded=("openmoji",), weights=(1.0,))
  (source,) = data_lib.load_data(data, None, 16).image_sources
  for i in range(30):
    Image.fromarray(source[50 * i]["image"]).save(folder / f"{i}.png")
  return {"data.source": "folder", "data.path": str(folder)}


def folder_sources(pictures):
  config = config_lib.apply_overrides(config_lib.default_config(), pictures)
  data = data_lib.DataConfig(**config.data)
  return data_lib.load_data(data, None, 16).image_sources


def shrink(source, count):
  return dataclasses.replace(
    source, items=source.items[:count], annotations=source.annotations[:count]
  )


def run(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-m", "unicode_jax.tokenize", *arguments],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_codes_are_those_of_training(start, pictures, tmp_path, capsys):
  tokenize.encode_data_set(start, tmp_path, pictures, images_per_shard=10)
  assert "images/s" in capsys.readouterr().out
  loaded = loading.load(start)
  (source,) = folder_sources(pictures)
  assert len(source) > 20  # So there are several shards, and a last, shorter.
  (codes,) = code_cache.open_codes(
    tmp_path,
    [source],
    loading.fingerprint(loaded.model, loaded.variables),
    views=views.views(True, 0),
  )
  assert len(list(tmp_path.glob("folder_train-*.array_record"))) == 3
  images = source.images()
  shown = np.stack([images, images[:, :, ::-1]], axis=1)
  expected = jax.jit(instruct_step.batch_codes, static_argnums=0)(
    loaded.model, loaded.variables, {"images": shown}
  )
  stored = np.stack(list(codes))
  assert stored.shape == (len(source), 2, 4, 2)  # Views, P, D.
  np.testing.assert_array_equal(stored.reshape(len(source), -1), expected)
  assert (stored[:, 0] != stored[:, 1]).any()
  assert len(np.unique(stored)) > 10

  tokenize.encode_data_set(start, tmp_path, pictures, images_per_shard=10)
  assert "nothing to do" in capsys.readouterr().out


def test_what_is_written_is_not_encoded_again(start, pictures, tmp_path):
  loaded = loading.load(start)
  (source,) = folder_sources(pictures)
  made_by = loading.fingerprint(loaded.model, loaded.variables)
  begun = code_cache.CodeWriter(
    tmp_path,
    [source],
    code_cache.CodeFacts(
      made_by, 320, positions=4, depth=2, views=views.views(True, 0)
    ),
    images_per_shard=8,
  )
  begun.prepare()
  first = begun.missing()[0]
  begun.write(first, [np.zeros((8, 2, 4, 2), int)])  # No image has these codes.
  tokenize.encode_data_set(start, tmp_path, pictures, images_per_shard=8)
  (codes,) = code_cache.open_codes(tmp_path, [source], made_by)
  stored = np.stack(list(codes))
  assert not stored[:8].any() and stored[8:].any(axis=(1, 2, 3)).all()


def test_the_command(start, pictures, tmp_path):
  """As a user sees it; two devices give the codes of one."""
  flags = [f"--config.{key}={value}" for key, value in pictures.items()]
  flags += [f"--workdir={start}", "--config.data.flip=False"]
  count = "--xla_force_host_platform_device_count=2"
  done = run(*flags, f"--out={tmp_path / 'two'}", XLA_FLAGS=count)
  assert done.returncode == 0, done.stderr
  assert "config.data.codes=" in done.stdout.splitlines()[-1]
  one = tmp_path / "one"
  tokenize.encode_data_set(
    start, one, pictures | {"data.flip": "False"}, images_per_shard=8192
  )
  (name,) = (path.name for path in one.glob("*.array_record"))
  assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
  # Another data set into the same folder.
  done = run(f"--workdir={start}", f"--out={one}")
  assert done.returncode == 2 and done.stdout == ""
  note, line = done.stderr.splitlines()
  assert "trained for 2 of 10 steps" in note
  assert line.startswith("error: ") and "images of folder_train" in line


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--workdir=x", "--out=y", "--config.seed=1"], "--config.data.KEY"),
    (["--workdir=x", "--out=y", "--config.data.flp=1"], "data.flip"),
    (["--workdir=x", "--out=y", "z"], "'z'"),
    (["--workdir=x", "--out=y"], "x holds no run"),
    (["--workdir=x"], "--out"),
  ],
)
def test_a_wrong_flag_is_named(flags, message):
  done = run(*flags)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert message in done.stderr


def test_it_hides_no_other_module_and_is_light():
  # The standard library has a `tokenize` too, which `inspect` needs.
  code = (
    "import sys, inspect, tokenize\n"
    "from unicode_jax import tokenize as ours\n"
    "print(tokenize.generate_tokens and 'jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.strip() == "False", done.stderr
  assert "--images_per_shard" in run("--help").stdout


@pytest.mark.parametrize("paradigm", ["language_driven", "projected", "dual"])
def test_stage_two_has_the_fingerprint_of_its_start(paradigm):
  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"), TINY | {"codebook.paradigm": paradigm}
  )
  valid = np.arange(320) >= 261
  model, variables = make_variables(config, valid)
  before = loading.fingerprint(model, variables)
  frozen = encoding.frozen_tokenizer(model, variables)
  assert loading.fingerprint(*frozen) == before
  loaded = loading.Loaded(config, model, variables, None, pathlib.Path("."), 2)
  second = config_lib.apply_overrides(
    config, {"stage": "instruct", "instruct.vision": "separate"}
  )
  stage_two = loading.build_model(second)
  began = instruct.starting_variables(second, loaded, stage_two)
  assert loading.fingerprint(stage_two, began) == before
  # Its LLM moves, and the codes stay; a baseline's rows are its own.
  began = instruct.extend(stage_two, jax.random.key(0), began)
  params = dict(began.params)
  params["llm"] = jax.tree.map(lambda x: x + 1, params["llm"])
  params["decoder"] = jax.tree.map(lambda x: x + 1, params["decoder"])
  trained = began.replace(params=params)
  assert loading.fingerprint(stage_two, trained) == before


def test_all_that_decides_codes_is_in_the_fingerprint():
  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"),
    TINY | {"codebook.paradigm": "language_driven"},
  )
  model, variables = make_variables(config, np.arange(320) >= 261)
  params, state = variables.params, variables.codebook_state
  encoder, codebook = params["encoder"], params["codebook"]
  head = encoder["head"]
  bias = head["bias"].at[0].add(1e-6)
  changed = [
    variables.replace(
      params={**params, "encoder": {**encoder, "head": {**head, "bias": bias}}}
    ),
    variables.replace(
      params={
        **params,
        "codebook": {
          **codebook,
          "table": jnp.nextafter(codebook["table"], 9.0),
        },
      }
    ),
    variables.replace(codebook_state={**state, "gain": 2 * state["gain"]}),
    variables.replace(valid=variables.valid.at[0].set(True)),
  ]
  prints = [loading.fingerprint(model, v) for v in [variables, *changed]]
  for other in (
    dataclasses.replace(model, quantizer="hq"),
    dataclasses.replace(
      model, tokenizer=dataclasses.replace(model.tokenizer, image_size=32)
    ),
    dataclasses.replace(
      model, tokenizer=dataclasses.replace(model.tokenizer, dtype="bfloat16")
    ),
    dataclasses.replace(
      model, codebook=dataclasses.replace(model.codebook, l2_normalize=False)
    ),
  ):
    prints.append(loading.fingerprint(other, variables))
  assert len(set(prints)) == 9
  # And what decides none is not.
  params = {**params, "decoder": {}, "llm": {**params["llm"], "norm": {}}}
  same = variables.replace(params=params)
  assert loading.fingerprint(model, same) == prints[0]


def test_a_private_codebook_and_one_that_was_never_trained():
  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"),
    TINY | {"stage": "tokenizer", "codebook.paradigm": "private"},
  )
  model, variables = make_variables(config, np.ones(320, bool))
  frozen = encoding.frozen_tokenizer(model, variables)
  assert loading.fingerprint(*frozen) == loading.fingerprint(model, variables)
  state = {**variables.codebook_state, "gain": jnp.zeros(model.depth)}
  with pytest.raises(config_lib.ConfigError, match="no gains yet"):
    encoding.frozen_tokenizer(model, variables.replace(codebook_state=state))


def test_training_from_codes_is_training_from_pixels(start, tmp_path):
  loaded = loading.load(start)
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"),
    {
      "init_from": str(start),
      "num_steps": 3,
      "log_every": 1,
      "eval_every": 3,
      "checkpoint_every": 3,
      "data.shift": 2,
      "instruct.tasks.class_conditional": 0,
      "instruct.tasks.unconditional": 0,
    },
  )
  config = config_lib.validate(config_lib.inherit(config))
  data = runner.load_data(
    config, with_text=True, tokenizer_path=str(start / loading.TEXT_TOKENIZER)
  )
  data = dataclasses.replace(
    data,
    image_sources=tuple(shrink(s, 40) for s in data.image_sources),
    heldout_sources=tuple(shrink(s, 8) for s in data.heldout_sources),
    train_texts=data.train_texts[:40],
    heldout_texts=data.heldout_texts[:8],
  )
  model, variables = encoding.frozen_tokenizer(loaded.model, loaded.variables)
  made_by = loading.fingerprint(loaded.model, loaded.variables)
  seen = views.views(config.data.flip, config.data.shift)
  writer = code_cache.CodeWriter(
    tmp_path / "codes",
    data.image_sources,
    code_cache.CodeFacts(made_by, 320, model.num_positions, model.depth, seen),
    images_per_shard=16,
  )
  writer.prepare()
  encoder = encoding.Encoder(model, variables, seen, batch_size=16)
  for shard in writer.missing():
    writer.write(shard, encoder.shard(shard))
  writer.finish()
  readers = code_cache.open_codes(
    writer.folder, data.image_sources, made_by, views=seen
  )
  rows = {}
  for name, codes in (("pixels", None), ("codes", readers)):
    stage = instruct.InstructStage(config, data, loading.load(start), codes)
    assert stage.mixture.cached == (name == "codes")
    loop.train(
      stage, tmp_path / name, runner.loop_config(config), sharding.make_mesh()
    )
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    rows[name] = [
      {
        k: v
        for k, v in json.loads(line).items()
        if not k.startswith(("time/", "goodput/"))
      }
      for line in lines
    ]
  assert any("image_loss/decompression" in row for row in rows["pixels"])
  assert any("text_loss/vqa" in row for row in rows["pixels"])
  assert len(rows["pixels"]) == len(rows["codes"]) == 5
  for pixels, cached in zip(rows["pixels"], rows["codes"]):
    assert cached == pytest.approx(pixels, rel=1e-6)
