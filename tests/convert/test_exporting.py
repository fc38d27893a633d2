"""Exports against transformers: there and back, and what training made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from unicode_jax import config as config_lib, loading
from unicode_jax.convert import exporting, importing
from unicode_jax.data import sequences, text_tokenizer as text_tokenizer_lib
from unicode_jax.models import llama as llama_lib

TINY = dict(
  vocab_size=320,
  embed_dim=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=48,
)


@pytest.fixture(scope="module")
def tokenizer():
  """A small tokenizer, with ChatML's tokens."""
  return text_tokenizer_lib.train_text_tokenizer(
    ["a rooster stands on a red circle", "what does the image show?"], 300
  )


def make(tokenizer, template="plain", **changes):
  """Returns an LLM away from its tame start, as if loaded from a run."""
  llama = llama_lib.LlamaConfig(**(TINY | changes))
  params = llama_lib.Llama(llama).init(
    jax.random.key(0), jnp.zeros((1, 1, 1), jnp.int32)
  )["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params
  )
  config = config_lib.apply_overrides(
    importing.run_config(llama, 64),
    {"stage": "instruct", "instruct.template": template},
  )
  return loading.LoadedLlm(config, llama, params, tokenizer, None, 0)


def logits(loaded, ids):
  run = jax.jit(llama_lib.Llama(loaded.llama).apply)
  return run({"params": loaded.params}, jnp.asarray(ids)[..., None])[0]


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"tie_embeddings": True, "head_dim": 10},
    {"qkv_bias": True},
    {"qk_norm": True, "norm_eps": 1e-5},
    {"sliding_window": 5},
    {"qk_norm": True, "sliding_window": 5},
    {"scan_layers": True},
    {"rope_scaling": llama_lib.rope.RopeScaling(4.0, 1.0, 3.0, 16)},
  ],
)
def test_transformers_computes_the_same(changes, tmp_path, tokenizer):
  loaded = make(tokenizer, **changes)
  out = exporting.export(loaded, tmp_path / "hf")
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out, attn_implementation="eager"
  ).eval()
  ids = np.random.default_rng(0).integers(0, 320, (2, 40))
  with torch.no_grad():
    theirs = model(torch.tensor(ids)).logits.numpy()
  ours = logits(loaded, ids)
  assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5
  assert model.config.max_position_embeddings == 64
  # And back again, to the bit.
  again = loading.load_llm(importing.import_checkpoint(out, tmp_path / "run"))
  np.testing.assert_array_equal(logits(again, ids), ours)


def test_shards_and_types(tmp_path, tokenizer):
  loaded = make(tokenizer)
  tmp_path = tmp_path / "hf"
  tmp_path.mkdir()
  exporting.write_weights(
    tmp_path, loaded.params, loaded.llama, "bfloat16", shard_bytes=30_000
  )
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  files = sorted(tmp_path.glob("*.safetensors"))
  assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
  assert len(files) > 2
  assert all(file.stat().st_size < 32_000 for file in files)
  total = 0
  for file in files:
    with safetensors.safe_open(file, "pt") as opened:
      for name in opened.keys():  # noqa: SIM118, it is no mapping.
        assert index["weight_map"][name] == file.name
        value = opened.get_tensor(name)
        assert value.dtype == torch.bfloat16
        total += 2 * value.numel()
  assert total == index["metadata"]["total_size"]


def test_the_file_is_the_librarys(tmp_path):
  """Byte for byte what safetensors reads, of shapes that need padding."""
  rng = np.random.default_rng(0)
  tensors = {
    "a": rng.normal(size=(3, 5)).astype(np.float32),
    "b.weight": rng.normal(size=(7,)).astype(np.float32),
    "empty": np.zeros((0, 4), np.float32),
  }
  path = tmp_path / "x.safetensors"
  exporting.write_safetensors(
    path, {k: v.shape for k, v in tensors.items()}, "float32", tensors.values()
  )
  found = safetensors.numpy.load_file(path)
  assert found.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("template", ["plain", "vicuna"])
def test_the_chat_template_gives_the_prompt_of_training(
  template, tmp_path, tokenizer
):
  out = exporting.export(make(tokenizer, template), tmp_path / "hf")
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  layout = sequences.SequenceFormat(template=sequences.TEMPLATES[template])
  turns = (("what is red?", "a circle"),)
  expected = sequences.encode_prompt(
    sequences.Conversation(turns), "what does it show?", tokenizer, layout
  )
  messages = [
    {"role": "user", "content": "what is red?"},
    {"role": "assistant", "content": "a circle"},
    {"role": "user", "content": "what does it show?"},
  ]
  found = theirs.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=False
  )
  assert found == expected[:, 0].tolist()
  with pytest.raises(Exception, match="users and assistants only"):
    theirs.apply_chat_template([{"role": "system", "content": "be kind"}])


def test_settings_that_no_architecture_has(tmp_path, tokenizer):
  loaded = make(tokenizer, qkv_bias=True, qk_norm=True)
  with pytest.raises(config_lib.ConfigError, match="no architecture"):
    exporting.export(loaded, tmp_path / "hf")
  assert not list(tmp_path.iterdir())
  (tmp_path / "hf").mkdir()
  with pytest.raises(config_lib.ConfigError, match="is there already"):
    exporting.export(make(tokenizer), tmp_path / "hf")


def test_a_run_of_stage_one(stage_one, tmp_path):
  """What training made, written to disk and read back from there."""
  workdir, *_ = stage_one
  loaded = loading.load_llm(workdir)
  whole = loading.load(workdir)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.params, whole.variables.params["llm"]
  )
  out = exporting.export(loaded, tmp_path / "hf")
  model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  text = "what colour is the shape?"
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  assert ids == loaded.text_tokenizer.encode(text)
  with torch.no_grad():
    theirs = model(torch.tensor([ids])).logits.numpy()
  np.testing.assert_allclose(logits(loaded, [ids]), theirs, atol=1e-4)


def test_no_place_of_the_machine_leaves_it(stage_one, tmp_path):
  loaded = loading.load_llm(stage_one[0])
  values = {
    "llm_from": str(tmp_path / "smollm2"),
    "data.cache_dir": str(tmp_path / "cache"),
    "data.path": "here/*.tar",
  }
  loaded = dataclasses.replace(
    loaded, config=config_lib.apply_overrides(loaded.config, values)
  )
  out = exporting.export(loaded, tmp_path / "hf")
  for path in out.rglob("*"):
    assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
  config = json.loads((out / "unicode_jax_config.json").read_text())
  assert config["llm_from"] == "smollm2"
  assert config["data"]["cache_dir"] == "cache"
  assert config["data"]["path"] == "here/*.tar"


def test_an_imported_model_keeps_its_chat_template(tmp_path, tokenizer):
  out = exporting.export(make(tokenizer), tmp_path / "hf")
  (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
  run = importing.import_checkpoint(out, tmp_path / "run")
  back = exporting.export(loading.load_llm(run), tmp_path / "back")
  theirs = transformers.AutoTokenizer.from_pretrained(back)
  messages = [{"role": "user", "content": "a red circle"}]
  text = theirs.apply_chat_template(messages, tokenize=False)
  assert text == "a red circle!"
