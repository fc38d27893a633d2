"""The exported PyTorch code against the model that it was exported from."""

import ast
import copy
import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
import transformers

from configs import instruct as instruct_config
from unicode_jax import config as config_lib, inference, loading, sampling
from unicode_jax.convert import exporting, importing, modeling_unicode
from unicode_jax.data import sequences, tasks, text_tokenizer

SMALL = {
  "image_size": 16,
  "text.vocab_size": 340,
  "codebook.code_dim": 6,
  "tokenizer.channels": 16,
  "tokenizer.channel_multipliers": (1, 2),
  "tokenizer.num_res_blocks": 1,
  "tokenizer.stem_patch": 2,
  "llm.embed_dim": 32,
  "llm.num_layers": 2,
  "llm.num_heads": 4,
  "llm.num_kv_heads": 2,
  "llm.mlp_dim": 48,
}
KINDS = {
  "rq": {"tokenizer.quantizer": "rq", "tokenizer.depth": 3},
  "vq": {
    "tokenizer.quantizer": "vq",
    "tokenizer.depth": 1,
    "tokenizer.attention": True,
    "llm.qk_norm": True,
  },
  "hq": {
    "tokenizer.quantizer": "hq",
    "tokenizer.depth": 5,
    "codebook.l2_normalize": False,
    "instruct.template": "vicuna",
  },
  "separate": {
    "tokenizer.quantizer": "rq",
    "tokenizer.depth": 2,
    "instruct.vision": "separate",
    "instruct.template": "chatml",
    "llm.qkv_bias": True,
  },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A small tokenizer that has every template's control tokens."""
  trained = text_tokenizer.train_text_tokenizer(
    ["a rooster stands on a red circle", "what does the image show?"], 300
  )
  folder = tmp_path_factory.mktemp("tokenizer")
  trained.save(folder)
  full = transformers.AutoTokenizer.from_pretrained(folder)
  full.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
  full.save_pretrained(folder)
  return text_tokenizer.load_text_tokenizer(folder)


def make(tokenizer, overrides):
  """Returns a model away from its tame start, as if loaded from a run."""
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"), SMALL | overrides
  )
  model = loading.build_model(config)
  valid = loading.valid_codes(config, tokenizer)
  variables = model.init(jax.random.key(0), jnp.asarray(valid))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32),
    variables.params,
  )
  gain = 0.6 ** jnp.arange(model.depth)
  variables = variables.replace(
    params=params, codebook_state=variables.codebook_state | {"gain": gain}
  )
  return inference.UniCodeModel(
    loading.Loaded(config, model, variables, tokenizer, None, 0)
  )


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tokenizer, tmp_path_factory):
  """Ours, and processor and model that PyTorch has of it."""
  ours = make(tokenizer, KINDS[request.param])
  folder = tmp_path_factory.mktemp("export") / request.param
  exporting.export(ours.loaded, folder)
  patch = pytest.MonkeyPatch()
  modules = str(tmp_path_factory.mktemp("modules"))
  patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
  processor = transformers.AutoProcessor.from_pretrained(
    folder, trust_remote_code=True
  )
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True
  )
  patch.undo()
  assert type(theirs).__module__.startswith("transformers_modules")
  return ours, processor, theirs


def pictures(count, size=16):
  """Returns smooth random pictures, uint8[count, size, size, 3]."""
  rng = np.random.default_rng(1)
  small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
  return np.stack(
    [
      np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
      )
      for image in small
    ]
  )


def test_codes_and_pixels(pair):
  ours, processor, theirs = pair
  images = pictures(200)
  pixels = processor.to_pixels([Image.fromarray(image) for image in images])
  expected = ours.encode(images)
  found = theirs.encode(pixels).numpy()
  assert len(np.unique(expected)) > 20
  # Where they differ, two codes are equally near (and later depths follow).
  same = (found == expected).all(-1)
  assert same.mean() >= 0.9999, f"{same.mean():.2%} of the positions are equal"
  model, variables = ours.loaded.model, ours.loaded.variables
  grid = (len(images), *model.code_grid, model.depth)
  np.testing.assert_allclose(
    theirs.decode(torch.tensor(expected)).movedim(1, -1).numpy(),
    jax.jit(model.decode)(variables, jnp.asarray(expected).reshape(grid)),
    atol=1e-4,
  )
  shown = processor.to_images(theirs.decode(torch.tensor(expected[:4])))
  difference = np.stack(shown).astype(int) - ours.decode(expected[:4])
  assert np.abs(difference).max() <= 1  # Of 255: rounding.


def test_drawings(pair):
  ours, processor, theirs = pair
  captions = ["a red circle", None, "what does the rooster show?", "red"]
  questions = [
    tasks.UNCONDITIONAL if c is None else tasks.draw_question(c)
    for c in captions
  ]
  for guidance in (1.0, 3.0):
    settings = sampling.SamplingConfig(temperature=0.0, guidance=guidance)
    expected = ours.draw_codes(questions, settings)
    inputs = processor.drawing(captions)
    found = theirs.draw_codes(**inputs, temperature=0, guidance=guidance)
    np.testing.assert_array_equal(found, expected)
  assert len(np.unique(expected)) > 3
  generator = torch.Generator().manual_seed(0)
  drawn = theirs.draw_codes(**inputs, top_k=20, generator=generator)
  assert drawn.shape == expected.shape
  assert ours.loaded.variables.valid[np.asarray(drawn)].all()
  assert (drawn.numpy() != expected).any()


def test_answers(pair):
  ours, processor, theirs = pair
  images = pictures(3)
  texts = ["what is red?", "show a circle", "what does the image show? rooster"]
  codes = ours.encode(images)
  expected = ours.answer(
    [
      inference.Question((inference.IMAGE, text), codes[i : i + 1])
      for i, text in enumerate(texts)
    ],
    dataclasses.replace(inference.ANSWER_SAMPLING, max_new_tokens=20),
    images=False,
  )
  shown = [Image.fromarray(image) for image in images]
  inputs = processor(texts, images=shown)
  found = processor.decode(theirs.generate(**inputs, max_new_tokens=20))
  prefix = ours.loaded.layout.template.prefix.strip()
  assert [t.removeprefix(prefix) for t in found] == [r.text for r in expected]
  assert any(found)
  # Logits too, at every position of a prompt that shows an image.
  prompt = ours.prompt(
    inference.Question((inference.IMAGE, texts[1]), codes[1:2])
  )
  logits, _ = llama_apply(ours, prompt[None])
  one = processor(texts[1], images=shown[1])
  with torch.no_grad():
    np.testing.assert_allclose(
      theirs(**one).logits[0].numpy(), logits[0], atol=2e-5 * 5
    )


def llama_apply(ours, token_ids):
  from unicode_jax.models import llama

  model, variables = ours.loaded.model, ours.loaded.variables
  return jax.jit(llama.Llama(model.llama).apply)(
    {"params": variables.params["llm"]},
    jnp.asarray(token_ids),
    depth_weights=model.depth_weights(variables),
  )


def test_prompts(pair):
  """Every kind of turn, and texts that would be control tokens."""
  ours, processor, _ = pair
  images = pictures(2)
  codes = ours.encode(images)
  first = "</s> <image> red <|im_end|>\n"
  turns = (((sequences.ImageSpan(0), first), " a circle"),)
  question = ("and ", sequences.ImageSpan(1), "?</image>")
  expected = ours.prompt(
    inference.Question(question, codes, sequences.Conversation(turns))
  )
  shown = [Image.fromarray(image) for image in images]
  messages = [
    {
      "role": "user",
      "content": [
        {"type": "image", "image": shown[0]},
        {"type": "text", "text": first},
      ],
    },
    {"role": "assistant", "content": " a circle"},
    {
      "role": "user",
      "content": [
        {"type": "text", "text": "and "},
        {"type": "image", "image": shown[1]},
        {"type": "text", "text": "?</image>"},
      ],
    },
  ]
  inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
  ids = inputs["input_ids"][0].numpy()
  at = ids == modeling_unicode.IMAGE_POSITION
  np.testing.assert_array_equal(ids[~at], expected[~at, 0])
  shift = ours.loaded.model.codes_shift
  flat = codes.reshape(-1, ours.loaded.model.depth) + shift
  np.testing.assert_array_equal(expected[at], flat)
  # Padding is on the left.
  batch = processor(["a", "what does the image show?"])
  assert batch["attention_mask"][0, 0] == 0
  assert batch["attention_mask"][:, -1].all()
  short = processor("a")["input_ids"][0]
  assert batch["input_ids"][0, -len(short) :].tolist() == short.tolist()


def test_wrong_use_is_said(pair):
  ours, processor, theirs = pair
  image = Image.fromarray(pictures(1)[0])
  with pytest.raises(ValueError, match="2 questions have 1 images"):
    processor(["a", "b"], images=image)
  inputs = processor("a", images=image)
  inputs.pop("pixel_values")
  with pytest.raises(ValueError, match="positions of images"):
    theirs.generate(**inputs)
  for messages, match in (
    ([{"role": "system", "content": "x"}], "'system'"),
    ([{"role": "assistant", "content": "x"}], "'assistant'"),
    ([{"role": "user", "content": "x"}] * 2, "take turns"),
    ([{"role": "user", "content": [{"type": "video"}]}], "'video'"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "url"),
  ):
    with pytest.raises(ValueError, match=match):
      processor.apply_chat_template(messages)
  with pytest.raises(ValueError, match="an image is a ndarray"):
    processor("a", images=pictures(1))
  with pytest.raises(ValueError, match=r"\[1, 3, 8, 8\], not"):
    theirs.encode(torch.zeros(1, 3, 8, 8))
  count, depth = theirs.visual_tokenizer.table.shape[0], ours.loaded.model.depth
  good = ours.encode(pictures(1))
  for codes in (good[:, 1:], np.full_like(good, -1), np.full_like(good, count)):
    with pytest.raises(ValueError, match=rf"\d+, {depth}\], or not all in"):
      theirs.decode(torch.tensor(codes))
  with pytest.raises(ValueError, match="no captions"):
    processor.drawing([])
  with pytest.raises(ValueError, match="tokenize=False"):
    processor.apply_chat_template(
      [{"role": "user", "content": "x"}], tokenize=False
    )


def test_other_types_leave_codes_as_they_are(pair):
  """Rounding is for the language model; copies of the processor are whole."""
  ours, processor, theirs = pair
  images = pictures(40)
  pixels = processor.to_pixels([Image.fromarray(image) for image in images])
  expected = ours.encode(images)
  rounded = copy.deepcopy(theirs).to(torch.bfloat16)
  assert rounded.language_model.dtype == torch.bfloat16
  np.testing.assert_array_equal(rounded.encode(pixels), expected)
  with torch.autocast("cpu", torch.bfloat16):
    np.testing.assert_array_equal(theirs.encode(pixels), expected)
    assert theirs.decode(torch.tensor(expected)).dtype == torch.float32
  text = "</s> <image> red"
  again = pickle.loads(pickle.dumps(processor))
  inputs = again(text, images=Image.fromarray(images[0]), return_tensors="pt")
  assert (
    inputs["input_ids"]
    == processor(text, Image.fromarray(images[0]))["input_ids"]
  ).all()
  assert rounded.generate(**inputs).shape[0] == 1


@pytest.mark.parametrize(
  "mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "I", "F", "JPEG"]
)
def test_images_of_other_kinds(mode, tmp_path):
  """As training reads them, by path and, but for large JPEGs, once opened."""
  image = Image.fromarray(pictures(1, 40)[0]).resize((50, 30))
  if mode == "JPEG":
    image, mode = image.resize((800, 600)), "RGB"
    file = tmp_path / "x.jpg"
  else:
    file = tmp_path / ("x.tif" if mode in ("CMYK", "I", "F") else "x.png")
  if mode == "RGBA":
    image.putalpha(Image.linear_gradient("L").resize(image.size))
  if mode == "I;16":
    values = np.asarray(image.convert("L"), np.uint16) * 257
    image = Image.fromarray(values)
  elif mode == "I":
    image = Image.fromarray(np.asarray(image.convert("L"), np.int32) * 200)
  else:
    image = image.convert(mode)
  image.save(file)
  processor = modeling_unicode.UniCodeProcessor.__new__(
    modeling_unicode.UniCodeProcessor
  )
  processor.settings = {"image_size": 16}
  expected = inference.open_image(file, 16)
  assert len(np.unique(expected)) > (1 if mode == "1" else 20)
  opened = [] if file.suffix == ".jpg" else [Image.open(file)]
  for shown in [file, *opened]:
    found = processor.to_images(processor.to_pixels([shown]))[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  "settings",
  [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}],
)
def test_what_may_be_drawn(settings):
  """The same ids as here, as often as they should."""
  logits = np.random.default_rng(0).normal(0, 2, (1, 30)).astype(np.float32)
  logits[0, :4] = logits[0, 5]  # Ties.
  ours = sampling.SamplingConfig(temperature=0.7, **settings)
  weights = np.asarray(sampling.filtered(jnp.asarray(logits), ours))[0]
  chosen = modeling_unicode._choose(
    torch.tensor(logits).repeat(20000, 1),
    temperature=0.7,
    **{"top_k": 0, "top_p": 1.0} | settings,
    generator=torch.Generator().manual_seed(0),
  )
  share = np.bincount(chosen.numpy(), minlength=30) / len(chosen)
  np.testing.assert_allclose(share, weights / weights.sum(), atol=0.012)
  assert not share[weights == 0].any()


def test_a_trained_run(tiny_run, tmp_path):
  """From the command to a process that has never heard of this project."""
  out = tmp_path / "out"
  subprocess.run(
    [
      *(sys.executable, "-m", "unicode_jax.export"),
      *(f"--workdir={tiny_run.instruct}", f"--out={out}"),
      "--license=cc-by-sa-4.0",
    ],
    check=True,
  )
  card = (out / "README.md").read_text()
  assert "license: cc-by-sa-4.0" in card
  assert "OpenMoji" in card and "8 steps" in card and "Not evaluated" in card
  images = tiny_run.data.heldout_images["openmoji_heldout"][:4]
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f"{i}.png")
  script = f"""
import sys
sys.path = [p for p in sys.path if p]
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers import AutoModelForImageTextToText
path = {str(out)!r}
AutoModelForCausalLM.from_pretrained(path)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
  path, trust_remote_code=True
)
shown = [Image.open(f"{tmp_path}/{{i}}.png") for i in range(4)]
print(model.encode(processor.to_pixels(shown)).flatten().tolist())
inputs = processor.drawing(["a red circle", "rooster"])
print(model.draw_codes(**inputs, temperature=0).flatten().tolist())
assert "jax" not in sys.modules
"""
  result = subprocess.run(
    [sys.executable, "-c", script],
    cwd=tmp_path,
    env={"HF_HOME": str(tmp_path / "hub"), "PATH": "", "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  codes, drawn = map(ast.literal_eval, result.stdout.strip().splitlines()[-2:])
  assert codes == tiny_run.model.encode(images).flatten().tolist()
  expected = tiny_run.model.draw_codes(
    [tasks.draw_question(c) for c in ("a red circle", "rooster")],
    dataclasses.replace(inference.DRAW_SAMPLING, temperature=0.0),
  )
  assert drawn == expected.flatten().tolist()


def test_a_run_of_stage_one_shows_codes_alone(stage_one, tmp_path):
  loaded = loading.load(stage_one[0])
  folder = exporting.export(loaded, tmp_path / "out")
  card = (folder / "README.md").read_text()
  assert "not learned to read or to draw" in card
  assert "model.encode" in card and "model.draw" not in card
  fresh = loaded.variables.codebook_state | {
    "gain": jnp.zeros_like(loaded.variables.codebook_state["gain"])
  }
  untrained = dataclasses.replace(
    loaded, variables=loaded.variables.replace(codebook_state=fresh)
  )
  with pytest.raises(config_lib.ConfigError, match="no gains yet"):
    exporting.export(untrained, tmp_path / "untrained")
  assert not (tmp_path / "untrained").exists()


def test_what_comes_back_and_what_cannot_be_made(tokenizer, tmp_path, caplog):
  folder = exporting.export(make(tokenizer, {}).loaded, tmp_path / "out")
  modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
  assert len(modes) == 1  # Whoever may read one file may read all.
  importing.import_checkpoint(folder, tmp_path / "run")
  assert "visual tokenizer, which is not imported" in caplog.text
  (tmp_path / "file").write_text("")
  with pytest.raises(config_lib.ConfigError, match="cannot be made"):
    importing.import_checkpoint(folder, tmp_path / "file" / "run")


def test_a_projector_stays_behind(tokenizer, tmp_path, caplog):
  ours = make(tokenizer, {"instruct.vision": "projector"})
  folder = exporting.export(ours.loaded, tmp_path / "out")
  assert "language model alone is exported" in caplog.text
  assert not (folder / "modeling_unicode.py").exists()
  assert "which is not in this folder" in (folder / "README.md").read_text()
  transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_evaluation_travels_along(tokenizer, tmp_path, caplog):
  loaded = make(tokenizer, KINDS["rq"]).loaded
  run = tmp_path / "run"
  (run / "evaluation").mkdir(parents=True)
  (run / "evaluation" / "report.md").write_text("# Evaluation")
  results = {
    "run": {"step": 0},
    "suites": {
      "vqa": {
        "results": {"test": {"accuracy": 0.913, "blind": {"accuracy": 0.67}}}
      },
      "text": {"results": {"after": {"perplexity": "inf"}}},
      "caption": {"cannot": "no captions"},
    },
  }
  (run / "evaluation" / "results.json").write_text(json.dumps(results))
  loaded = dataclasses.replace(loaded, workdir=run)
  folder = exporting.export(loaded, tmp_path / "out", licence="mit")
  card = (folder / "README.md").read_text()
  assert "| Questions answered | test | 91.3% |" in card
  assert "only the questions | test | 67.0% |" in card
  assert "inf" not in card and "license: mit" in card
  assert (folder / "evaluation" / "report.md").is_file()
  other = dataclasses.replace(loaded, step=7)
  folder = exporting.export(other, tmp_path / "other")
  assert "Not evaluated at this step, 7" in (folder / "README.md").read_text()
  assert "is of step 0, not of 7" in caplog.text
  assert not (folder / "evaluation").exists()


def test_the_code_needs_nothing_of_this_project():
  source = pathlib.Path(modeling_unicode.__file__).read_text()
  names = [
    getattr(node, "module", None) or alias.name
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
  ]
  allowed = {
    *("collections", "contextlib", "math", "numpy", "os", "PIL"),
    *("safetensors", "tokenizers", "torch", "transformers"),
  }
  assert {name.split(".")[0] for name in names} == allowed
