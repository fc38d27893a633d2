"""Requests as lmms-eval makes them, on a tiny run and without the package."""

import importlib.util
import io
import types

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, inference
from unicode_jax.data.sequences import ImageSpan
from unicode_jax.evaluation import lmms_eval


def request(*args):
  return types.SimpleNamespace(args=args)


def picture(seed, size=(40, 24), mode="RGB"):
  pixels = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), np.uint8)
  return Image.fromarray(pixels).resize(size).convert(mode)


@pytest.fixture(scope="module")
def adapter(tiny):
  adapter = lmms_eval.Requests(str(tiny.instruct), max_new_tokens=6)
  adapter.task_dict["task"] = {
    "test": [
      {"images": [picture(0)], "question": "what is the shape?"},
      {"images": [picture(1, mode="L")], "question": "is there a circle?"},
      {"images": [picture(2, mode="P"), picture(3)], "question": "which?"},
      {"images": [], "question": "Are you there?"},
      {"images": [picture(4, mode="CMYK")], "question": "what color?"},
    ]
  }
  return adapter


def visuals(document):
  return document["images"]


def make_requests(adapter, settings):
  documents = adapter.task_dict["task"]["test"]
  return [
    request(d["question"], settings, visuals, i, "task", "test")
    for i, d in enumerate(documents)
  ]


def ask(adapter, index, max_new_tokens=6):
  """Answers one document through the model alone."""
  document = adapter.task_dict["task"]["test"][index]
  model, codes = adapter.unicode, None
  parts = [ImageSpan(i) for i in range(len(document["images"]))]
  if parts:
    pixels = []
    for image in document["images"]:
      file = io.BytesIO()
      image.convert("RGB").save(file, "PNG")
      pixels.append(inference.open_image(file, model.image_size))
    codes = model.encode(np.stack(pixels))
  question = inference.Question((*parts, document["question"]), codes)
  settings = inference.sampling_lib.SamplingConfig(
    temperature=0.0, max_new_tokens=max_new_tokens
  )
  return question, model.answer([question], settings, images=False)[0].text


def test_generate_until_answers_in_order(adapter):
  settings = {"until": ["\n\n"], "do_sample": False, "temperature": 0}
  before = dict(settings)
  answers = adapter.generate_until(make_requests(adapter, settings))
  expected = [ask(adapter, i)[1] for i in range(5)]
  assert answers == expected
  assert len(set(answers)) > 1 or answers[0]
  assert settings == before


def test_settings_of_requests_count(adapter):
  short = adapter.generate_until(make_requests(adapter, {"max_new_tokens": 2}))
  assert short == [ask(adapter, i, 2)[1] for i in range(5)]
  sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
  config = adapter._sampling(sampled)
  assert (config.temperature, config.top_p) == (0.7, 0.9)
  assert config.max_new_tokens == 6
  greedy = adapter._sampling({"do_sample": False, "temperature": 0.7})
  assert (greedy.temperature, greedy.top_p) == (0, 1)
  assert adapter._sampling({"do_sample": True}).temperature == 1
  assert adapter._sampling({"temperature": 0.5}).temperature == 0.5


@pytest.mark.parametrize(
  ("text", "until", "expected"),
  [
    ("yes. no", ["."], "yes"),
    ("yes\nno", "\n", "yes"),
    ("a b c", ["c", "b"], "a"),
    (" yes ", ["", "</s>"], "yes"),
    ("yes", None, "yes"),
  ],
)
def test_answers_end_where_told(text, until, expected):
  assert lmms_eval._until(text, until) == expected


def test_log_likelihood_is_that_of_the_whole_sequence(tiny, adapter):
  loaded = adapter.unicode.loaded
  texts = ["yes", " no", "a blue circle, and much more than that"]
  asked = [ask(adapter, 0)[0], ask(adapter, 2)[0], ask(adapter, 3)[0]]
  found = adapter.log_likelihoods(asked, texts)
  for question, text, (total, greedy) in zip(asked, texts, found, strict=True):
    prompt = adapter.unicode.prompt(question)
    answer = loaded.text_tokenizer.encode(" " + text.strip())
    column = np.full((len(answer), prompt.shape[1]), -1, np.int32)
    column[:, 0] = answer
    logits = tiny.logits(np.concatenate([prompt, column]))[len(prompt) - 1 : -1]
    rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = rows[np.arange(len(answer)), answer].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert greedy == (rows.argmax(axis=1) == answer).all()


def test_the_likeliest_of_words_is_found(tiny, adapter):
  question, _ = ask(adapter, 0)
  loaded = adapter.unicode.loaded
  logits = tiny.logits(adapter.unicode.prompt(question))
  # Of tokens that are the start of an answer of one token, the likeliest.
  encode = loaded.text_tokenizer.encode
  words = ["yes", "no", "red", "a", "the", "is", "it", "I"]
  first = {w: encode(" " + w)[0] for w in words if len(encode(" " + w)) == 1}
  best = max(first, key=lambda w: logits[-1, first[w]])
  found = dict(
    zip(first, adapter.log_likelihoods([question] * len(first), list(first)))
  )
  assert max(found, key=lambda w: found[w][0]) == best


def test_loglikelihood_is_a_loss_as_multiple_choice_wants(adapter):
  documents = adapter.task_dict["task"]["test"]
  requests = [
    request(documents[0]["question"], choice, visuals, 0, "task", "test")
    for choice in (" yes", " no", lambda document: " yes")
  ]
  found = adapter.loglikelihood([*requests, request("", " yes")])
  question, _ = ask(adapter, 0)
  expected = adapter.log_likelihoods([question, question], ["yes", "no"])
  np.testing.assert_allclose(
    [found[0][0], found[1][0]], [-expected[0][0], -expected[1][0]], rtol=1e-5
  )
  assert found[2] == found[0]
  assert found[3][0] > 0 and found[3][0] != found[0][0]


def test_rounds_end_when_the_task_says_so(adapter):
  heard = []

  def doc_to_text(document, previous_output, round_idx, previous_round_info):
    heard.append((document["question"], round_idx, previous_round_info))
    ended = round_idx == (3 if document["images"] else 1)
    kept = [f"{i}: {text}" for i, text in enumerate(previous_output)]
    if ended:
      return None, None, True, kept, None
    return document["images"], "and now?", False, previous_output, round_idx

  documents = adapter.task_dict["task"]["test"]
  found = adapter.generate_until_multi_round(
    [
      request(
        documents[i]["question"], {}, visuals, doc_to_text, i, "task", "test"
      )
      for i in (0, 3)
    ]
  )
  assert [len(rounds) for rounds in found] == [3, 1]
  assert found[0][0] == f"0: {ask(adapter, 0)[1]}"
  assert found[1] == [f"0: {ask(adapter, 3)[1]}"]
  first = [h[1:] for h in heard if h[0] == documents[0]["question"]]
  assert first == [(1, None), (2, 1), (3, 2)]


@pytest.mark.parametrize(
  ("context", "count", "expected"),
  [
    ("what?", 1, (ImageSpan(0), "what?")),
    ("<image>\nwhat?", 1, (ImageSpan(0), "what?")),
    (
      "first <image> or <image>?",
      2,
      ("first ", ImageSpan(0), " or ", ImageSpan(1), "?"),
    ),
    ("<image> what?", 2, (ImageSpan(0), ImageSpan(1), " what?")),
    ("no <image> here", 0, ("no ", " here")),
    ("what?", 0, ("what?",)),
  ],
)
def test_pictures_stand_where_the_context_says(context, count, expected):
  assert lmms_eval.question_parts(context, count) == expected


def test_pictures_of_every_mode_are_read_as_in_training():
  clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
  assert (lmms_eval._pixels(clear, 4) == 255).all()  # Put on white.
  for mode, value in (("L", 7), ("CMYK", (0, 0, 0, 248)), ("F", 7.0)):
    found = lmms_eval._pixels(Image.new(mode, (8, 8), value), 4)
    assert found.shape == (4, 4, 3) and (found == 7).all(), mode


def test_only_pictures_can_be_shown(adapter):
  adapter.task_dict["video"] = {"test": [{"images": ["film.mp4"]}]}
  with pytest.raises(config_lib.ConfigError, match="only pictures"):
    adapter.generate_until([request("?", {}, visuals, 0, "video", "test")])


def test_stage_one_cannot_answer(tiny):
  with pytest.raises(config_lib.ConfigError, match=r"configs/instruct\.py"):
    lmms_eval.Requests(str(tiny.pretrain))


def test_the_registered_class(tiny):
  if importlib.util.find_spec("lmms_eval") is None:
    with pytest.raises(config_lib.ConfigError, match="pip install lmms-eval"):
      _ = lmms_eval.UniCodeModel
    return
  from lmms_eval.api.model import lmms

  model = lmms_eval.UniCodeModel.create_from_arg_string(
    f"pretrained={tiny.instruct}", {"batch_size": 1, "device": "cpu"}
  )
  assert isinstance(model, lmms)
  assert model.world_size == 1
