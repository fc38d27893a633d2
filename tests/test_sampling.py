"""Decoding beside full forward passes, transformers and numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from benchmarks import decode as decode_benchmark
from unicode_jax import config as config_lib, sampling
from unicode_jax.models import llama

TINY = llama.LlamaConfig(
  vocab_size=37,
  embed_dim=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=40,
)
PAD, BOS, STOP, START, END = range(5)
FIRST_CODE = 20  # codes are 20..35; 36 is a row that no token has
PER_IMAGE = 4


def make_params(config=TINY, seed=0):
  model = llama.Llama(dataclasses.replace(config, scan_layers=False))
  ids = jnp.zeros((1, 1, 1), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: np.asarray(w) + rng.normal(0, 0.2, w.shape).astype(np.float32),
    params,
  )


@pytest.fixture(scope="module")
def params():
  return make_params()


def draw_prompts(lengths, depth=1, seed=0, vocab=TINY.vocab_size):
  """Returns prompts int32[n, depth] of text and of stacked positions."""
  rng = np.random.default_rng(seed)
  prompts = []
  for n in lengths:
    ids = rng.integers(0, vocab, (n, depth), np.int32)
    ids[rng.random(n) < 0.5, 1:] = -1
    prompts.append(ids)
  return prompts


def free_grammar(vocab=TINY.vocab_size, stop_ids=()):
  """Every id may follow every id."""
  return sampling.make_grammar(
    vocab,
    valid=np.zeros(vocab, bool),
    control_ids=(),
    image_start=None,
    image_end=None,
    stop_ids=stop_ids,
    codes_per_image=0,
    vocab_size=vocab,
    allow_images=False,
  )


def image_grammar(**changes):
  valid = np.zeros(TINY.vocab_size, bool)
  valid[FIRST_CODE:36] = True
  arguments = dict(
    valid=valid,
    control_ids=[PAD, BOS, STOP],
    image_start=START,
    image_end=END,
    stop_ids=[STOP],
    codes_per_image=PER_IMAGE,
    vocab_size=36,
  )
  return sampling.make_grammar(TINY.vocab_size, **(arguments | changes))


def greedy(new, **settings):
  return sampling.SamplingConfig(
    temperature=0.0, max_new_tokens=new, **settings
  )


KEY = jax.random.key(0)


def whole_passes(config, params, size=32):
  """Returns a function: sequence [n, D] -> log-probabilities of what follows.

  No cache, no padding before it: causality hides what is behind.
  """
  model = llama.Llama(config)
  run = jax.jit(lambda params, ids: model.apply({"params": params}, ids)[0])

  def predict(ids):
    padded = np.full((1, size, ids.shape[1]), -1, np.int32)
    padded[0, : len(ids)] = ids
    logits = np.float64(run(params, padded)[0, len(ids) - 1])
    return logits - np.log(np.exp(logits).sum())

  return predict


def append(ids, token):
  row = np.full((1, ids.shape[1]), -1, np.int32)
  row[0, 0] = token
  return np.concatenate([ids, row])


def naive_greedy(predict, ids, steps):
  out = []
  for _ in range(steps):
    out.append(int(np.argmax(predict(ids))))
    ids = append(ids, out[-1])
  return out


@pytest.mark.parametrize(
  ("changes", "depth"),
  [
    ({}, 3),
    ({"tie_embeddings": True, "sliding_window": 5, "scan_layers": True}, 1),
  ],
)
def test_greedy_equals_whole_passes(changes, depth):
  config = dataclasses.replace(TINY, **changes)
  params = make_params(config)
  if config.scan_layers:
    params = llama.stack_layers(params)
  prompts = draw_prompts((3, 17, 1, 9), depth)
  predict = whole_passes(config, params)
  want = [naive_greedy(predict, ids, 8) for ids in prompts]
  assert len({tuple(row) for row in want}) == 4
  assert any(len(set(row)) > 2 for row in want)
  got = sampling.generate(
    config, params, prompts, free_grammar(), greedy(8), KEY
  )
  assert [row.dtype for row in got] == [np.int32] * 4
  assert [row.tolist() for row in got] == want


def test_greedy_equals_transformers():
  """Both end an answer at the same stop id; theirs then pads."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=37,
      hidden_size=24,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      intermediate_size=40,
      rms_norm_eps=1e-5,
      tie_word_embeddings=True,
      pad_token_id=None,
      bos_token_id=None,
      eos_token_id=None,
    )
  ).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight += 0.2 * torch.randn_like(weight)
  config = dataclasses.replace(TINY, tie_embeddings=True)
  prompts = draw_prompts((5, 12, 2, 7), seed=3)
  length = max(map(len, prompts))
  ids, mask = np.zeros((2, len(prompts), length), np.int64)
  for row, prompt in enumerate(prompts):
    ids[row, length - len(prompt) :] = prompt[:, 0]
    mask[row, length - len(prompt) :] = 1

  def theirs(eos):
    out = model.generate(
      torch.tensor(ids),
      attention_mask=torch.tensor(mask),
      max_new_tokens=20,
      do_sample=False,
      eos_token_id=eos,
      pad_token_id=eos or 0,
    )
    return out[:, length:].numpy()

  free = theirs(None)
  stop = int(free[0, 9])
  want = [row[: [*row, stop].index(stop)].tolist() for row in theirs(stop)]
  assert len({len(row) for row in want}) > 1
  for stop_ids, expected in (((), free.tolist()), ((stop,), want)):
    got = sampling.generate(
      config,
      decode_benchmark.jax_params(model),
      prompts,
      free_grammar(stop_ids=stop_ids),
      greedy(20),
      KEY,
    )
    assert [row.tolist() for row in got] == expected


def reference_probabilities(logits, temperature, top_k, top_p):
  """The same rules in float64, by sorting."""
  scaled = np.float64(logits) / temperature
  p = np.exp(scaled - scaled.max())
  order = np.argsort(-p, kind="stable")
  if top_k:
    p[p < p[order[min(top_k, p.size) - 1]]] = 0
  p /= p.sum()
  if top_p < 1:
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    p[p < p[order[count - 1]]] = 0
  return p / p.sum()


FILTERS = [
  (1.0, 0, 1.0),
  (0.6, 0, 1.0),
  (1.7, 7, 1.0),
  (1.0, 1, 1.0),
  (1.0, 1000, 1.0),
  (1.0, 0, 0.9),
  (1.3, 0, 0.01),
  (0.8, 12, 0.75),
]


@pytest.mark.parametrize("settings", FILTERS)
def test_filters_equal_numpy(settings):
  how = sampling.SamplingConfig(*settings[:3])
  logits = np.random.default_rng(0).normal(0, 3, (6, 150)).astype(np.float32)
  logits[1, 10:] = -np.inf
  logits[2, 1:] = -np.inf
  logits[3] = -1e4 + logits[3]
  logits[4] = np.round(logits[4])  # ties
  got = np.asarray(jax.jit(sampling.filtered, static_argnums=1)(logits, how))
  got = got / got.sum(axis=-1, keepdims=True)
  want = np.stack([reference_probabilities(row, *settings) for row in logits])
  np.testing.assert_array_equal(got > 0, want > 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.8, 40, 0.9)])
def test_samples_have_the_distribution(settings):
  """Chi-square; the same draws must refute a slightly other temperature."""
  how = sampling.SamplingConfig(*settings)
  count = 40_000
  logits = np.random.default_rng(1).normal(0, 1, 150).astype(np.float32)
  draw = jax.jit(sampling.sample_token, static_argnums=2)
  keys = jax.random.split(jax.random.key(1), count)
  tokens = draw(np.broadcast_to(logits, (count, 150)), keys, how)
  seen = np.bincount(tokens, minlength=150)

  def surprise(temperature):
    """Returns chi-square in standard deviations from its mean."""
    p = reference_probabilities(logits, temperature, *settings[1:])
    assert not seen[p == 0].any()
    want, got = count * p[p > 0], seen[p > 0]
    free = want.size - 1
    return (((got - want) ** 2 / want).sum() - free) / np.sqrt(2 * free)

  assert abs(surprise(settings[0])) < 4
  if settings[1:] == (0, 1.0):  # else other ids remain
    assert surprise(settings[0] * 1.1) > 10


def test_draws_are_independent(params):
  """A model of zeros knows nothing: all ids, steps and rows are alike."""
  blind = jax.tree.map(np.zeros_like, params)
  how = sampling.SamplingConfig(max_new_tokens=12)
  out = np.stack(
    sampling.generate(
      TINY, blind, draw_prompts([2] * 500), free_grammar(), how, KEY
    )
  )
  share = 1 / TINY.vocab_size
  for event in (
    out[:, 1:] == out[:, :-1],
    out[1:] == out[:-1],
    *(out == id_ for id_ in range(TINY.vocab_size)),
  ):
    deviation = np.sqrt(share * (1 - share) / event.size)
    assert abs(event.mean() - share) < 4.5 * deviation


def test_sampling_edge_cases():
  """Extreme random numbers, one allowed id, ties."""
  weights = np.zeros((3, 5), np.float32)
  weights[:, [1, 3]] = 0.3, 0.7
  for u, want in ((0.0, 1), (0.29, 1), (0.31, 3), (1 - 2**-24, 3)):
    got = sampling._draw(weights, jnp.full(3, u, jnp.float32))
    assert got.tolist() == [want] * 3
  logits = np.full((4, 130), -np.inf, np.float32)
  logits[range(4), [0, 63, 64, 129]] = -50.0
  keys = jax.random.split(KEY, 4)
  how = sampling.SamplingConfig(top_k=3, top_p=0.5)
  draw = jax.jit(sampling.sample_token, static_argnums=2)
  assert draw(logits, keys, how).tolist() == [0, 63, 64, 129]
  tied = np.array([[0, 2, 1, 2], [3, 3, 3, 3]], np.float32)
  assert sampling.sample_token(tied, keys[:2], greedy(1)).tolist() == [1, 0]


def test_guidance_equals_mixed_log_probabilities(params):
  prompts, negatives = draw_prompts((4, 11, 6)), draw_prompts((2, 3, 13), 1, 9)
  predict = whole_passes(TINY, params)

  def naive(scale):
    answers = []
    for ids, negative in zip(prompts, negatives):
      answers.append([])
      for _ in range(7):
        cond, uncond = predict(ids), predict(negative)
        token = int(np.argmax(uncond + scale * (cond - uncond)))
        answers[-1].append(token)
        ids, negative = append(ids, token), append(negative, token)
    return answers

  def ours(scale, negative_prompts=negatives, prompts=prompts):
    got = sampling.generate(
      TINY,
      params,
      prompts,
      free_grammar(),
      greedy(7, guidance=scale),
      KEY,
      negative_prompts=negative_prompts,
    )
    return [row.tolist() for row in got]

  plain = ours(1.0, None)
  assert plain == naive(1.0)
  guided = ours(2.5)
  assert guided == naive(2.5)
  assert guided != plain
  assert ours(0.0) == ours(1.0, None, negatives)
  np.testing.assert_allclose(sampling.guide(3.0, 1.0, 1.0), 3.0)
  np.testing.assert_allclose(sampling.guide(3.0, 1.0, 2.0), 5.0)


def image_prompts():
  """Prompts in every phase; (ids [n, D], codes already drawn or None)."""
  text = [[BOS], [7], [8]]
  read = [[START], [21, 22], [23, 24], [END], [9]]
  kinds = [
    (text, None),
    (text + read, None),
    ([*text, [START]], 0),
    ([*read, [START], [30], [31]], 2),
    ([*text, [START], [20], [21], [22], [23]], 4),
  ]
  prompts = []
  for rows, drawn in kinds:
    ids = np.full((len(rows), 2), -1, np.int32)
    for row, given in zip(ids, rows):
      row[: len(given)] = given
    prompts.append((ids, drawn))
  return prompts


def parse(answer, drawn, grammar, limit):
  """Checks an answer against the rules; returns how many images it opened."""
  text, codes = np.asarray(grammar.text), np.asarray(grammar.codes)
  left = None if drawn is None else PER_IMAGE - drawn
  opened = 0
  for token in answer.tolist():
    if left is None:
      assert text[token] and token != STOP
      if token == START:
        left, opened = PER_IMAGE, opened + 1
    elif left:
      assert codes[token]
      left -= 1
    else:
      assert token == END
      left = None
  assert left is None, "an image is cut short"
  assert len(answer) <= limit
  return opened


def test_grammar_holds_and_batches_do_not_matter(params):
  kinds = image_prompts()
  prompts = [kinds[i % len(kinds)] for i in range(40)]
  grammar, limit = image_grammar(), 16
  how = sampling.SamplingConfig(temperature=2.0, max_new_tokens=limit)

  def run(prompts, batch_size, key=KEY):
    return sampling.generate(
      TINY,
      params,
      [ids for ids, _ in prompts],
      grammar,
      how,
      key,
      batch_size=batch_size,
    )

  answers = run(prompts, None)
  opened = [
    parse(answer, drawn, grammar, limit)
    for answer, (_, drawn) in zip(answers, prompts)
  ]
  assert max(opened) > 0 and min(opened) == 0
  assert min(map(len, answers)) < limit == max(map(len, answers))
  for size in (16, 3):
    for a, b in zip(answers, run(prompts, size)):
      np.testing.assert_array_equal(a, b)
  # The same prompt again and another key draw something else.
  assert answers[0].tolist() != answers[len(kinds)].tolist()
  other = run(prompts, 16, jax.random.key(1))
  assert any(a.tolist() != b.tolist() for a, b in zip(answers, other))


def test_only_text_only_images_or_nothing(params):
  kinds = image_prompts()
  outside = [ids for ids, drawn in kinds if drawn is None] * 10

  def run(limit, prompts=outside, **allow):
    grammar = image_grammar(**allow)
    how = sampling.SamplingConfig(temperature=2.0, max_new_tokens=limit)
    answers = sampling.generate(TINY, params, prompts, grammar, how, KEY)
    text = np.asarray(grammar.text)
    assert not text[[PAD, BOS, END, 36]].any()
    return grammar, answers

  grammar, answers = run(16, allow_images=False)
  assert not grammar.text[START]
  for answer in answers:
    assert not np.isin(answer, [PAD, BOS, STOP, START, END, 36]).any()
  grammar, answers = run(PER_IMAGE + 2, allow_text=False)
  opened = [parse(answer, None, grammar, PER_IMAGE + 2) for answer in answers]
  assert set(opened) == {0, 1}
  assert {len(a) for a in answers} == {0, PER_IMAGE + 2}
  # No room for a new image, no text allowed: nothing but the stop id is left.
  # An open image just fits.
  open_image = kinds[2][0]
  _, answers = run(PER_IMAGE + 1, [*outside, open_image], allow_text=False)
  *others, last = answers
  assert {len(a) for a in others} == {0}
  assert len(last) == PER_IMAGE + 1 and last[-1] == END


def test_one_program_for_similar_calls(params):
  def run(lengths, key=KEY):
    prompts, how = draw_prompts(lengths), greedy(5)
    return sampling.generate(TINY, params, prompts, free_grammar(), how, key)

  run((3, 5))
  compiled = sampling.decode._cache_size()
  run((32, 1), jax.random.key(5))
  run((20, 20))
  assert sampling.decode._cache_size() == compiled
  run((33, 1))
  assert sampling.decode._cache_size() == compiled + 1

  sizes = [sampling._bucket(n) for n in range(1, 4097)]
  assert all(n <= size for n, size in enumerate(sizes, 1))
  assert sizes[31:33] == [32, 64] and sizes[256] == 320
  assert len(set(sizes)) < 32


def test_bfloat16_and_empty_lists(params):
  config = dataclasses.replace(TINY, dtype="bfloat16")
  how = sampling.SamplingConfig(max_new_tokens=5)
  (answer,) = sampling.generate(
    config, params, draw_prompts((4,)), free_grammar(), how, KEY
  )
  assert answer.shape == (5,) and (answer >= 0).all() and answer.max() < 37
  assert sampling.generate(config, params, [], free_grammar(), how, KEY) == []


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"temperature": -0.1}, "temperature=-0.1.*0 is greedy"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1.*0"),
    ({"top_k": 2.5}, "top_k=2.5.*whole"),
    ({"top_p": 0.0}, r"top_p=0.0.*\(0, 1\]"),
    ({"top_p": 1.2}, "top_p=1.2"),
    ({"guidance": float("inf")}, "guidance=inf"),
    ({"max_new_tokens": 0}, "max_new_tokens=0.*at least 1"),
  ],
)
def test_impossible_settings_are_refused(settings, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    sampling.SamplingConfig(**settings)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"valid": np.ones(5, bool)}, r"\(5,\).*37 rows"),
    ({"vocab_size": 38}, "vocab_size=38.*1..37"),
    ({"image_end": None}, "image_end=None.*allow_images=False"),
    ({"codes_per_image": 0}, "codes_per_image=0"),
    ({"valid": np.zeros(37, bool)}, "0 visual codes"),
    ({"stop_ids": [40]}, r"ids \[40\].*37"),
    ({"control_ids": [25]}, r"ids \[25\] are visual codes"),
    ({"image_start": 30}, r"ids \[30\] are visual codes"),
    ({"allow_text": False, "stop_ids": []}, "name a stop id"),
  ],
)
def test_impossible_grammars_are_refused(changes, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    image_grammar(**changes)


def ids_of(*rows):
  return np.array([row if len(row) == 2 else [*row, -1] for row in rows])


@pytest.mark.parametrize(
  ("prompt", "changes", "message"),
  [
    (np.zeros(3, int), {}, r"prompt 0 has shape \(3,\).*ids\[:, None\]"),
    (np.zeros((0, 1), int), {}, r"shape \(0, 1\)"),
    (ids_of([37]), {}, "from -1 to 37.*0..36"),
    (ids_of([-1]), {}, "from -1 to -1"),
    (ids_of([START]), {"new": PER_IMAGE}, "max_new_tokens=4.*at least 5"),
    (ids_of([START], [20, 21]), {}, "image that it reads"),
    (ids_of([5], [START], [7]), {}, "position 1.*id 7.*no visual code"),
    (ids_of([START], *[[20]] * 5), {}, "5 codes.*codes_per_image=4"),
    (ids_of([5]), {"batch_size": 0}, "batch_size=0"),
    (ids_of([5]), {"guidance": 2.0}, "guidance=2.0 and no negative_prompts"),
    (ids_of([5]), {"negative_prompts": [ids_of([5])]}, "guidance=1.0 and neg"),
    (
      ids_of([5]),
      {"guidance": 2.0, "negative_prompts": [ids_of([5])] * 2},
      "2 negative prompts for 1",
    ),
    (
      ids_of([START]),
      {"guidance": 2.0, "negative_prompts": [ids_of([5])]},
      "end differently.*image_start",
    ),
    (ids_of([5]), {"grammar": free_grammar(11)}, "11 ids, the model has 37"),
  ],
)
def test_impossible_prompts_are_refused(params, prompt, changes, message):
  changes = {"new": 9, "guidance": 1.0, "grammar": None} | changes
  how = greedy(changes.pop("new"), guidance=changes.pop("guidance"))
  grammar = changes.pop("grammar") or image_grammar()
  with pytest.raises(config_lib.ConfigError, match=message):
    sampling.generate(TINY, params, [prompt], grammar, how, KEY, **changes)
