"""A trained model in use, beside its own functions and a loop without a cache.

The naive loop below knows nothing of `sampling` or of caches: it runs the whole
sequence for every id, and says by hand which ids may follow.
"""

import dataclasses
import functools
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
from PIL import Image
import pytest

import unicode_jax
from unicode_jax import config as config_lib, inference, loading
from unicode_jax.data import sequences, tasks
from unicode_jax.models import llama as llama_lib
from unicode_jax.stages import instruct

ROOT = pathlib.Path(__file__).parents[1]
IMAGE = sequences.ImageSpan()
LONGEST = 96  # Positions that the naive loop pads to.
GREEDY = dataclasses.replace(inference.ANSWER_SAMPLING, max_new_tokens=32)


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, variables, token_ids):
  logits, _ = llama_lib.Llama(model.llama).apply(
    {"params": variables.params["llm"]},
    token_ids,
    depth_weights=model.depth_weights(variables),
  )
  return logits


class Naive:
  """Greedy decoding of one prompt, by whole forward passes."""

  def __init__(self, loaded):
    self.loaded = loaded
    self.model, self.variables = loaded.model, loaded.variables
    tokenizer, text = loaded.text_tokenizer, loaded.config.text
    self.start = tokenizer.token_id(text.image_start)
    self.end = tokenizer.token_id(text.image_end)
    self.stop = tokenizer.eos_id
    never = {*tokenizer.control_ids, self.start, self.end}
    self.words = [i for i in range(tokenizer.vocab_size) if i not in never]
    valid = np.flatnonzero(np.asarray(self.variables.valid))
    self.codes = list(valid + self.model.codes_shift)
    self.per_image = self.model.num_positions * self.model.depth

  def logits(self, prompt, new):
    """Returns float64[K] of what follows a prompt and the new ids."""
    ids = np.full((LONGEST, prompt.shape[1]), -1, np.int32)
    ids[: len(prompt)] = prompt
    ids[len(prompt) : len(prompt) + len(new), 0] = new
    logits = full_forward(self.model, self.variables, ids[None])
    return np.asarray(logits[0, len(prompt) + len(new) - 1], np.float64)

  def answer(self, prompt, max_new_tokens):
    """Returns the texts' ids and the images' codes, in order."""
    new, parts = [], [[]]
    while len(new) < max_new_tokens:
      logits = self.logits(prompt, new)
      allowed = [*self.words, self.stop]
      if len(new) + 2 + self.per_image <= max_new_tokens:
        allowed.append(self.start)
      token = max(allowed, key=lambda i: logits[i])
      if token == self.stop:
        break
      new.append(token)
      if token != self.start:
        parts[-1].append(token)
        continue
      drawn = []
      for _ in range(self.per_image):
        logits = self.logits(prompt, new)
        drawn.append(max(self.codes, key=lambda i: logits[i]))
        new.append(drawn[-1])
      new.append(self.end)
      parts += [np.array(drawn) - self.model.codes_shift, []]
    return parts

  def draw(self, prompt, negative, guidance):
    """Returns the codes of one image, guided."""
    new = []
    for _ in range(self.per_image):
      yes, no = self.logits(prompt, new), self.logits(negative, new)
      mixed = no + guidance * (yes - no)
      new.append(max(self.codes, key=lambda i: mixed[i]))
    shape = self.model.num_positions, self.model.depth
    return np.reshape(new, shape) - self.model.codes_shift


def with_noise(loaded, seed=0):
  """Makes the answers of an untrained model long, mixed and far from ties."""
  rng = np.random.default_rng(seed)
  params = dict(loaded.variables.params)
  params["llm"] = jax.tree.map(
    lambda w: np.asarray(w) + rng.normal(0, 0.2, w.shape).astype(np.float32),
    params["llm"],
  )
  table = params["llm"]["embed_tokens"]["embedding"]
  table[loaded.text_tokenizer.token_id(loaded.layout.image_start)] *= 2
  variables = loaded.variables.replace(params=params)
  return dataclasses.replace(loaded, variables=variables)


def as_separate(loaded):
  """Gives the codes of a run rows of their own, as that baseline's start."""
  config = config_lib.apply_overrides(
    loaded.config, {"instruct.vision": "separate"}
  )
  model = loading.build_model(config)
  variables = instruct.extend(model, jax.random.key(1), loaded.variables)
  return dataclasses.replace(
    loaded, config=config, model=model, variables=variables
  )


@pytest.fixture(scope="module")
def loaded(tiny_run):
  return tiny_run.model.loaded


@pytest.fixture(scope="module", params=["unified", "separate"])
def noisy(request, loaded):
  """A model of either vocabulary that says much."""
  if request.param == "separate":
    loaded = as_separate(loaded)
  return inference.UniCodeModel(with_noise(loaded))


@pytest.fixture(scope="module")
def images(tiny_run):
  source = tiny_run.data.heldout_sources[-1]
  return np.stack([source[i]["image"] for i in range(9)])


def test_encoding_is_the_models(tiny_run, loaded, images):
  model = tiny_run.model
  codes = model.encode(images)
  expected = jax.jit(loaded.model.encode)(
    loaded.variables, images.astype(np.float32) / 127.5 - 1
  ).codes
  np.testing.assert_array_equal(codes.reshape(expected.shape), expected)
  assert codes.shape == (9, 4, 2) and codes.dtype == np.int32
  assert loaded.variables.valid[codes].all()
  assert len(np.unique(codes)) > 8
  # In batches of 8 and 64, padded.
  one_by_one = [model.encode(image[None])[0] for image in images[:3]]
  np.testing.assert_array_equal(one_by_one, codes[:3])
  assert model.encode(images[:0]).shape == (0, 4, 2)


def test_decoding_is_the_models(tiny_run, loaded, images):
  model = tiny_run.model
  codes = model.encode(images)
  pixels = model.decode(codes)

  @jax.jit
  def reconstruct(variables, images):
    quantized = loaded.model.encode(variables, images).quantized
    return loaded.model.decode_features(variables, quantized)

  decoded = reconstruct(loaded.variables, images.astype(np.float32) / 127.5 - 1)
  expected = (np.clip(decoded, -1, 1) + 1) * 127.5
  assert pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels, expected, atol=0.51)
  one_by_one = np.concatenate([model.decode(c[None]) for c in codes[:3]])
  np.testing.assert_allclose(
    one_by_one.astype(int), pixels[:3].astype(int), atol=1
  )


def test_images_of_another_size_or_type_are_refused(tiny_run):
  for wrong in (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 16, 16, 3))):
    with pytest.raises(config_lib.ConfigError, match="open_image"):
      tiny_run.model.encode(wrong)


def test_greedy_answers_are_those_of_whole_forward_passes(noisy, images):
  shown = noisy.encode(images[:2])
  history = sequences.Conversation((((IMAGE, "what is it?"), "a circle"),))
  questions = [
    inference.Question("hello"),
    inference.Question((IMAGE, "what is this?"), shown[:1]),
    inference.Question("and now?", shown[1:], history),
    inference.Question("tell me"),
  ]
  naive, tokenizer = Naive(noisy.loaded), noisy.loaded.text_tokenizer
  drawn = 0
  for question, reply in zip(questions, noisy.answer(questions, GREEDY)):
    expected = naive.answer(noisy.prompt(question), GREEDY.max_new_tokens)
    words = "".join(tokenizer.decode(ids) for ids in expected[::2])
    assert reply.text == words.strip()
    assert len(reply.codes) == len(expected[1::2])
    for codes, wanted in zip(reply.codes, expected[1::2]):
      np.testing.assert_array_equal(codes.ravel(), wanted)
    drawn += len(reply.codes)
  assert drawn  # Or the images were not tested.


def test_answers_without_images_have_none(loaded):
  noisy = inference.UniCodeModel(with_noise(loaded))
  (reply,) = noisy.answer([inference.Question("x")], GREEDY, images=False)
  assert reply.codes.shape == (0, 4, 2)
  assert len(reply.parts) == 1 and reply.text


def test_greedy_drawings_are_those_of_whole_forward_passes(noisy):
  naive = Naive(noisy.loaded)
  questions = [tasks.draw_question("rooster"), tasks.class_question("x")]
  empty = noisy.prompt(inference.Question(tasks.UNCONDITIONAL), draw=True)
  drawings = []
  for guidance in (1.0, 4.0):
    sampling = dataclasses.replace(
      inference.DRAW_SAMPLING, temperature=0.0, guidance=guidance
    )
    codes = noisy.draw_codes(questions, sampling)
    prompts = [
      noisy.prompt(inference.Question(q), draw=True) for q in questions
    ]
    expected = [naive.draw(prompt, empty, guidance) for prompt in prompts]
    np.testing.assert_array_equal(codes, expected)
    drawings.append(codes)
  assert (drawings[0] != drawings[1]).any()


def test_drawings_hold_valid_codes(noisy):
  hot = dataclasses.replace(inference.DRAW_SAMPLING, temperature=50.0, top_p=1)
  codes = noisy.draw_codes([tasks.UNCONDITIONAL] * 20, hot)
  valid = np.asarray(noisy.loaded.variables.valid)
  assert codes.shape == (20, 4, 2)
  assert (codes >= 0).all() and valid[codes].all()
  # So hot that every code is as likely: 160 of about a hundred.
  assert len(np.unique(codes)) > 0.5 * valid.sum()
  assert noisy.draw_codes([]).shape == (0, 4, 2)


def test_drawings_depend_on_seed_and_place_alone(tiny_run, monkeypatch):
  model = tiny_run.model
  captions = ["rooster", "a red circle", None, "a longer caption", "cat", "x"]
  drawn = model.draw(captions, seed=3)
  assert drawn.shape == (6, 16, 16, 3) and drawn.dtype == np.uint8
  np.testing.assert_array_equal(drawn, model.draw(captions, seed=3))
  np.testing.assert_array_equal(drawn[:2], model.draw(captions[:2], seed=3))
  monkeypatch.setattr(inference, "BATCH", 2)
  np.testing.assert_array_equal(drawn, model.draw(captions, seed=3))
  assert (drawn != model.draw(captions, seed=4)).any(axis=(1, 2, 3)).all()


def test_an_answer_taken_apart_is_what_history_takes(tiny_run, images):
  model = tiny_run.model
  codes = model.encode(images[:2])
  span = sequences.ImageSpan
  for parts in (
    ("a red circle",),
    (span(0),),
    ("here: ", span(0), " and ", span(1)),
    (span(0), "that's it"),
  ):
    encoded = sequences.encode_conversation(
      sequences.Conversation((("draw", parts),)),
      model.loaded.text_tokenizer,
      model.loaded.layout,
      list(codes),
    )
    ids = encoded.labels[encoded.loss_mask > 0][:-1]  # Without the end.
    reply = model._reply(ids)
    assert reply.parts == parts
    shown = sum(isinstance(part, span) for part in parts)
    np.testing.assert_array_equal(reply.codes, codes[:shown])


def test_typed_control_tokens_are_text(tiny_run):
  loaded = tiny_run.model.loaded
  control = list(loaded.text_tokenizer.control_ids)
  typed = "</s> <image> </image> <s> <pad>"
  history = sequences.Conversation(((typed, typed),))
  counts = [
    np.isin(
      tiny_run.model.prompt(
        inference.Question(text, history=sequences.Conversation(turns))
      ),
      control,
    ).sum()
    for text, turns in ((typed, history.turns), ("hello", (("hi", "ho"),)))
  ]
  assert counts[0] == counts[1] == 2  # The beginning, an answer's end.


def write(folder, image, name="x.png"):
  image.save(folder / name)
  return folder / name


@pytest.mark.parametrize(
  ("mode", "pixel", "expected"),
  [
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 0), (255, 255, 255)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 0x8000, (128, 128, 128)),
    ("I;16", 0x00FF, (1, 1, 1)),
  ],
)
def test_open_image_reads_every_mode(tmp_path, mode, pixel, expected):
  path = write(tmp_path, Image.new(mode, (16, 16), pixel))
  image = inference.open_image(path, 16)
  assert image.shape == (16, 16, 3) and image.dtype == np.uint8
  np.testing.assert_array_equal(image, np.broadcast_to(expected, (16, 16, 3)))


def test_open_image_reads_palettes(tmp_path):
  image = Image.new("P", (16, 16), 1)
  image.putpalette([255, 0, 0, 0, 128, 0])
  path = write(tmp_path, image)
  assert (inference.open_image(path, 16) == (0, 128, 0)).all()
  image.save(path, transparency=1)
  assert (inference.open_image(path, 16) == (255, 255, 255)).all()


def test_open_image_takes_the_central_square(tmp_path):
  wide = np.zeros((32, 96, 3), np.uint8)
  wide[:, 28:68] = 200  # Some more than the square, for the filter.
  path = write(tmp_path, Image.fromarray(wide))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    image = inference.open_image(path, 16)
  assert (image == 200).all()


@pytest.mark.parametrize("size", [(8, 8), (100, 15)])
def test_enlarging_warns(tmp_path, size):
  path = write(tmp_path, Image.new("RGB", size, "red"))
  with pytest.warns(inference.ResolutionWarning, match=f"{size[0]}x{size[1]}"):
    assert inference.open_image(path, 16).shape == (16, 16, 3)


def test_what_is_no_image_is_a_config_error(tmp_path, monkeypatch):
  (tmp_path / "text.png").write_text("no image")
  cut = write(tmp_path, Image.new("RGB", (64, 64), "red"), "cut.png")
  cut.write_bytes(cut.read_bytes()[:60])
  for path in (tmp_path / "missing.png", tmp_path, tmp_path / "text.png", cut):
    with pytest.raises(config_lib.ConfigError, match=path.name):
      inference.open_image(path, 16)
  bomb = write(tmp_path, Image.new("RGB", (64, 64), "red"), "bomb.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(config_lib.ConfigError, match=r"bomb\.png"):
    inference.open_image(bomb, 16)


def test_save_image_replaces_atomically(tmp_path):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (16, 16, 3), np.uint8)
  path = tmp_path / "x.png"
  path.write_text("old")
  inference.save_image(path, image)
  np.testing.assert_array_equal(inference.open_image(path, 16), image)
  with pytest.raises(TypeError):
    inference.save_image(path, image.astype(complex))
  np.testing.assert_array_equal(inference.open_image(path, 16), image)
  assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_load_is_lazy_and_the_same_model(tiny_run, images):
  code = (
    "import sys, unicode_jax\n"
    "assert 'jax' not in sys.modules\n"
    "unicode_jax.load\n"
    "assert 'jax' in sys.modules\n"
    "try: unicode_jax.nothing\n"
    "except AttributeError as error: print(error)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert "nothing" in result.stdout, result.stderr
  model = unicode_jax.load(tiny_run.instruct)
  np.testing.assert_array_equal(
    model.encode(images), tiny_run.model.encode(images)
  )
  assert unicode_jax.load(tiny_run.instruct, step=4).loaded.step == 4


@pytest.mark.parametrize(
  ("overrides", "fragment"),
  [
    ({"stage": "tokenizer"}, "visual tokenizer alone"),
    ({"stage": "instruct", "instruct.vision": "projector"}, "projector"),
  ],
)
def test_a_run_that_cannot_draw(tmp_path, loaded, overrides, fragment):
  config = config_lib.apply_overrides(config_lib.default_config(), overrides)
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  # Before the checkpoint is looked for, and by every function that needs it.
  with pytest.raises(config_lib.ConfigError, match=fragment):
    inference.load(tmp_path, draws=True)
  model = loading.build_model(config)
  other = dataclasses.replace(loaded, config=config, model=model)
  other = inference.UniCodeModel(other)
  with pytest.raises(config_lib.ConfigError, match=fragment):
    other.draw(["rooster"])
  with pytest.raises(config_lib.ConfigError, match=fragment):
    shown = inference.Question((IMAGE, "?"), np.zeros((1, 4, 2), np.int32))
    other.answer([shown])
