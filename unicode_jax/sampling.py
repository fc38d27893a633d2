"""Generation: batched sampling from the language model, with a KV cache.

Implements the reading side of METHOD.md section 4 (prompts of stacked ids, one
new id per step) and hazard H9 in the sampler: a grammar masks every step, so
that an image span holds exactly h*w*D visual codes and text holds none of the
control tokens. One row's way through it, with 4 codes an image:

    prompt         | new ids
    User: draw ... | <image>  c   c   c   c  </image>  ok  </s>
    left        -1 |    4     3   2   1   0     -1     -1  stop

`left` counts the codes to come; at 0 the closing delimiter is forced, and
outside (-1) the opening one is only allowed while a whole image still fits.

A step's logits pass the grammar's mask, guidance, temperature, top-k and top-p,
in this order. A row's random numbers depend on the key, the prompt's index and
the step alone, so the batch size changes no result (beyond rounding).

It has no tokenizer and no template: prompts come and answers go as ids. There
is no beam search and no sharding of its own; sharded parameters keep theirs.
"""

from collections.abc import Collection, Sequence
import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.models import llama

_OUTSIDE = -1  # `left` outside of an image span
_LANES = 64  # candidates of the second of two draws


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to choose the next id. Hashable: one compilation for each.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest id (greedy).
    top_k: only the k likeliest ids, ties with the last included; 0 for all.
    top_p: only the likeliest ids that together have this probability, ties with
      the last included; 1 for all.
    guidance: s of classifier-free guidance, uncond + s * (cond - uncond); 1 is
      off and costs nothing. Two distributions are mixed in logits rather than
      log-probabilities: the two differ by a constant per row, which no softmax
      sees, and logits need no second pass.
    max_new_tokens: ids per prompt, delimiters and the final stop id included.

  Raises:
    ConfigError: a value out of its range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  guidance: float = 1.0
  max_new_tokens: int = 64

  def __post_init__(self):
    config_lib.check_sampling(dataclasses.asdict(self))


@flax.struct.dataclass
class Grammar:
  """Which ids may follow which; made by `make_grammar`.

  Attributes:
    text: bool[K], ids allowed outside of an image span, the stop ids and, if
      pictures may be drawn, `image_start` included.
    codes: bool[K], ids allowed inside.
    image_start: id that opens a span; -1 if nothing can be drawn.
    image_end: id that closes one; -1 if nothing can be drawn.
    stop: int32[S], ids that end an answer.
    codes_per_image: h*w*D.
  """

  text: jax.Array
  codes: jax.Array
  image_start: int
  image_end: int
  stop: jax.Array
  codes_per_image: int = flax.struct.field(pytree_node=False)


def make_grammar(
  num_tokens: int,
  *,
  valid: np.ndarray,
  control_ids: Collection[int],
  image_start: int | None,
  image_end: int | None,
  stop_ids: Sequence[int],
  codes_per_image: int,
  vocab_size: int,
  allow_images: bool = True,
  allow_text: bool = True,
) -> Grammar:
  """Builds the masks of one kind of answer.

  Args:
    num_tokens: K, rows of the model's table.
    valid: bool[K], which ids may be visual codes.
    control_ids: ids that text never holds (padding, begin, ...).
    image_start: id that opens an image; None if the model has no images.
    image_end: id that closes one; None if the model has no images.
    stop_ids: ids that end an answer.
    codes_per_image: h*w*D.
    vocab_size: ids that the text tokenizer knows, at most K.
    allow_images: whether the answer may draw. If not, a prompt must not end
      inside an image span either.
    allow_text: whether the answer may hold text. If not, it is pictures and a
      stop id.

  Returns:
    The grammar.

  Raises:
    ConfigError: a shape or id that doesn't fit K, a control token, delimiter or
      stop id among the visual codes, or no id left to say.
  """
  valid = np.asarray(valid, bool)
  if valid.shape != (num_tokens,):
    raise config_lib.ConfigError(
      f"valid has shape {valid.shape}, the table {num_tokens} rows: make the "
      "mask for that table (TextTokenizer.visual_code_mask)"
    )
  if not 0 < vocab_size <= num_tokens:
    raise config_lib.ConfigError(
      f"vocab_size={vocab_size} is not in 1..{num_tokens}, the table's rows: "
      "use the model's own tokenizer"
    )
  delimiters = [id_ for id_ in (image_start, image_end) if id_ is not None]
  if allow_images and len(delimiters) < 2:
    raise config_lib.ConfigError(
      f"image_start={image_start}, image_end={image_end}: a model without "
      "delimiters cannot draw; set allow_images=False"
    )
  if allow_images and not (codes_per_image > 0 and valid.any()):
    raise config_lib.ConfigError(
      f"codes_per_image={codes_per_image} with {valid.sum()} visual codes: "
      "an image needs some of both; or set allow_images=False"
    )
  never = sorted({*map(int, control_ids), *map(int, stop_ids), *delimiters})
  wrong = [id_ for id_ in never if not 0 <= id_ < num_tokens]
  if wrong:
    raise config_lib.ConfigError(
      f"ids {wrong} are not rows of the table ({num_tokens}): use the model's "
      "own tokenizer"
    )
  if valid[never].any():
    raise config_lib.ConfigError(
      f"ids {[i for i in never if valid[i]]} are visual codes and also control "
      "tokens, delimiters or stop ids: leave them out of `valid`"
    )
  text = np.zeros(num_tokens, bool)
  text[:vocab_size] = allow_text
  text[never] = False
  text[list(stop_ids)] = True
  if not text.any():
    raise config_lib.ConfigError(
      f"allow_text={allow_text} and stop_ids={list(stop_ids)} leave nothing to "
      "say outside of an image: name a stop id"
    )
  if allow_images:
    text[image_start] = True
  return Grammar(
    text=jnp.asarray(text),
    codes=jnp.asarray(valid),
    image_start=image_start if allow_images else -1,
    image_end=image_end if allow_images else -1,
    stop=jnp.asarray(list(stop_ids), jnp.int32),
    codes_per_image=int(codes_per_image) if allow_images else 0,
  )


def _threshold(p_BK, weights, target):
  """Finds the largest t such that the ids with p >= t weigh at least `target`.

  Bisects the bits of t: positive floats are ordered as their bits are. On CPU
  its 30 sums take a thirtieth of the time of a sort, and XLA makes one of
  `lax.top_k` in a loop.

  Args:
    p_BK: float32[B, K] in [0, 1].
    weights: [B, K] or a number, not negative.
    target: [B, 1] or a number.

  Returns:
    float32[B, 1]; 0 if all ids together weigh less.
  """
  bits_BK = jax.lax.bitcast_convert_type(p_BK, jnp.int32)

  def try_bit(i, t_B1):
    higher_B1 = t_B1 + (1 << (29 - i))
    kept_BK = jnp.where(bits_BK >= higher_B1, weights, 0)
    enough = kept_BK.sum(axis=-1, keepdims=True) >= target
    return jnp.where(enough, higher_B1, t_B1)

  t_B1 = jnp.zeros((p_BK.shape[0], 1), jnp.int32)
  t_B1 = jax.lax.fori_loop(0, 30, try_bit, t_B1)
  return jax.lax.bitcast_convert_type(t_B1, jnp.float32)


def filtered(logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
  """Applies temperature, then top-k, then top-p to what top-k left.

  Args:
    logits: float32[B, K]; -inf for ids that are not allowed.
    sampling: temperature above 0.

  Returns:
    float32[B, K], probabilities relative to the likeliest id's; 0 for ids that
    are filtered out.
  """
  highest_B1 = logits.max(axis=-1, keepdims=True)
  p_BK = jnp.exp((logits - highest_B1) / sampling.temperature)
  if sampling.top_k:
    lowest_B1 = _threshold(p_BK, 1, sampling.top_k)
    p_BK = jnp.where(p_BK >= lowest_B1, p_BK, 0)
  if sampling.top_p < 1:
    mass_B1 = p_BK.sum(axis=-1, keepdims=True)
    lowest_B1 = _threshold(p_BK, p_BK, sampling.top_p * mass_B1)
    p_BK = jnp.where(p_BK >= lowest_B1, p_BK, 0)
  return p_BK


def _first_where(condition):
  """Returns the first true index; XLA's argmax is several times slower."""
  size = condition.shape[-1]
  first = jnp.where(condition, jnp.arange(size), size).min(axis=-1)
  return jnp.minimum(first, size - 1)


def _draw(weights_BN, u_B):
  """Inverts the cumulative sum at u in [0, 1); never takes a zero weight."""
  sums_BN = jnp.cumsum(weights_BN, axis=-1)
  hit_BN = (sums_BN > u_B[:, None] * sums_BN[:, -1:]) & (weights_BN > 0)
  # Sums may round to a decrease, and then there might be no hit.
  likeliest_BN = weights_BN == weights_BN.max(axis=-1, keepdims=True)
  any_B1 = hit_BN.any(axis=-1, keepdims=True)
  return _first_where(jnp.where(any_B1, hit_BN, likeliest_BN))


def sample_token(
  logits: jax.Array, keys: jax.Array, sampling: SamplingConfig
) -> jax.Array:
  """Draws one id per row.

  A group of 64 ids is drawn first, then one of its ids: two random numbers and
  short sums instead of the K logarithms of the Gumbel trick.

  Args:
    logits: float32[B, K]; -inf for ids that are not allowed.
    keys: one PRNG key per row [B]; not used when greedy.
    sampling: see `SamplingConfig`.

  Returns:
    int32[B]. The lowest of equally likely ids when greedy.
  """
  if sampling.temperature == 0:
    return _first_where(logits == logits.max(axis=-1, keepdims=True))
  p_BK = filtered(logits, sampling)
  B, K = p_BK.shape
  p_BK = jnp.pad(p_BK, ((0, 0), (0, -K % _LANES)))
  p_BNL = p_BK.reshape(B, -1, _LANES)
  u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
  group_B = _draw(p_BNL.sum(axis=-1), u_B2[:, 0])
  p_BL = jnp.take_along_axis(p_BNL, group_B[:, None, None], axis=1)[:, 0]
  return group_B * _LANES + _draw(p_BL, u_B2[:, 1])


def guide(
  conditional: jax.Array, unconditional: jax.Array, scale: float
) -> jax.Array:
  """Mixes two predictions (Ho and Salimans, arXiv 2207.12598).

  Args:
    conditional: float32[B, K] logits.
    unconditional: the same, of the negative prompts.
    scale: 1 gives `conditional`, more exaggerates the difference.

  Returns:
    float32[B, K] logits.
  """
  return unconditional + scale * (conditional - unconditional)


@flax.struct.dataclass
class _State:
  """What one step of the loop passes on to the next.

  Attributes:
    step: int32[], new ids so far.
    token: int32[B], the newest; -1 for rows that are done.
    left: int32[B], codes to come, see the module's docstring.
    done: bool[B].
    out: int32[B, max_new_tokens], -1 from the end of the answer.
  """

  step: jax.Array
  token: jax.Array
  left: jax.Array
  done: jax.Array
  out: jax.Array


def _advance(
  state: _State,
  logits: jax.Array,
  keys: jax.Array,
  grammar: Grammar,
  sampling: SamplingConfig,
) -> _State:
  """Chooses the next id of every row from the (guided) logits [B, K]."""
  left_B, step = state.left, state.step
  outside_B = left_B == _OUTSIDE
  text_K = grammar.text
  if grammar.codes_per_image:
    opens_K = jnp.arange(text_K.size) == grammar.image_start
    needs = 2 + grammar.codes_per_image  # with both delimiters
    text_K &= ~opens_K | (step + needs <= sampling.max_new_tokens)
    allowed_BK = jnp.where((left_B > 0)[:, None], grammar.codes, text_K)
  else:
    allowed_BK = text_K
  # The mask is put on after the mixing, where it means the same and -inf is
  # never subtracted from -inf.
  logits = jnp.where(allowed_BK, logits, -jnp.inf)
  if sampling.temperature > 0:
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
  token_B = sample_token(logits, keys, sampling)
  token_B = jnp.where(left_B == 0, grammar.image_end, token_B)
  stops_B = outside_B & (token_B[:, None] == grammar.stop).any(axis=-1)
  done_B = state.done | stops_B
  token_B = jnp.where(done_B, -1, token_B)
  if grammar.codes_per_image:
    opened_B = outside_B & (token_B == grammar.image_start)
    left_B = jnp.where(
      opened_B,
      grammar.codes_per_image,
      jnp.maximum(left_B - 1, _OUTSIDE),
    )
  return _State(
    step=step + 1,
    token=token_B,
    left=left_B,
    done=done_B,
    out=jax.lax.dynamic_update_slice_in_dim(
      state.out, token_B[:, None], step, axis=1
    ),
  )


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def decode(
  config: llama.LlamaConfig,
  sampling: SamplingConfig,
  params: dict,
  token_ids: jax.Array,
  lengths: jax.Array,
  left: jax.Array,
  done: jax.Array,
  indices: jax.Array,
  key: jax.Array,
  grammar: Grammar,
  depth_weights: jax.Array | None,
) -> jax.Array:
  """Continues one batch of prompts.

  Args:
    config: of the model; not scanned.
    sampling: see `SamplingConfig`.
    params: of the model.
    token_ids: int32[B, P, D], or [2B, P, D] with the negative prompts behind,
      padded with -1 on the left.
    lengths: int32[B or 2B], positions that are not padding.
    left: int32[B], codes to come at the start.
    done: bool[B], rows that only fill the batch.
    indices: int32[B], the prompts' numbers, for their random numbers.
    key: PRNG key.
    grammar: see `Grammar`.
    depth_weights: float32[D] of `llama.embed`, or None.

  Returns:
    int32[B, max_new_tokens], -1 behind the answers.
  """
  rows, P = token_ids.shape[:2]
  B, N = left.shape[0], sampling.max_new_tokens
  model = llama.Llama(config)
  kernel_EK = llama.head_kernel(params, config).astype(config.dtype)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)

  def run(token_ids, positions, segment_ids, cache, weights=None):
    """Appends to the cache; returns the guided logits after the last id."""
    hidden_BTE, cache = model.apply(
      {"params": params},
      token_ids,
      positions,
      segment_ids,
      cache,
      return_hidden=True,
      depth_weights=weights,
    )
    logits = jnp.dot(
      hidden_BTE[:, -1], kernel_EK, preferred_element_type=jnp.float32
    )
    if rows > B:
      logits = guide(logits[:B], logits[B:], sampling.guidance)
    return logits, cache

  positions = jnp.arange(P) - (P - lengths[:, None])
  logits, cache = run(
    token_ids,
    jnp.maximum(positions, 0),
    (positions >= 0).astype(jnp.int32),
    llama.init_cache(config, rows, P),
    depth_weights,
  )
  # The last new id is never read, hence one slot less.
  cache = jax.tree.map(
    lambda a: (
      jnp.pad(a, [(0, 0)] * 2 + [(0, N - 1)] + [(0, 0)] * (a.ndim - 3))
      if a.ndim == 4
      else jnp.pad(a, [(0, 0), (0, N - 1)])
      if a.ndim == 2
      else a
    ),
    cache,
  )
  state = _State(
    step=jnp.zeros((), jnp.int32),
    token=jnp.full(B, -1, jnp.int32),
    left=left,
    done=done,
    out=jnp.full((B, N), -1, jnp.int32),
  )
  state = _advance(state, logits, keys, grammar, sampling)

  def body(carry):
    state, cache = carry
    token_ids = jnp.tile(state.token, rows // B)[:, None, None]
    logits, cache = run(
      token_ids,
      (lengths + state.step - 1)[:, None],
      jnp.ones((rows, 1), jnp.int32),
      cache,
    )
    return _advance(state, logits, keys, grammar, sampling), cache

  def unfinished(carry):
    state, _ = carry
    return (state.step < N) & ~state.done.all()

  return jax.lax.while_loop(unfinished, body, (state, cache))[0].out


def _bucket(length: int) -> int:
  """Rounds up to few sizes: multiples of 32, of 64 above 256, and so on."""
  step = max(32, 2 ** ((length - 1).bit_length() - 3))
  return -(-length // step) * step


def _codes_left(ids: np.ndarray, grammar: Grammar, name: str) -> int:
  """Returns `left` at the end of a prompt int32[n, D]."""
  start, end = int(grammar.image_start), int(grammar.image_end)
  if start < 0:
    return _OUTSIDE
  opened = np.flatnonzero(ids[:, 0] == start)
  if not opened.size or (ids[opened[-1] :, 0] == end).any():
    return _OUTSIDE
  span = ids[opened[-1] + 1 :]
  if (span[:, 1:] >= 0).any():
    raise config_lib.ConfigError(
      f"{name} ends inside an image that it reads (several ids a position): "
      f"close it with image_end={end}; an image to draw has one id a position"
    )
  wrong = span[:, 0][~np.asarray(grammar.codes)[span[:, 0]]]
  if wrong.size:
    raise config_lib.ConfigError(
      f"{name} opens an image at position {opened[-1]} and goes on with "
      f"id {wrong[0]}, which is no visual code: close the image with "
      f"image_end={end}"
    )
  left = grammar.codes_per_image - len(span)
  if left < 0:
    raise config_lib.ConfigError(
      f"{name} has {len(span)} codes in an open image, more than "
      f"codes_per_image={grammar.codes_per_image}: close it with "
      f"image_end={end}"
    )
  return left


def _checked(prompt, name, num_tokens):
  """Returns a prompt as int32[n, D]."""
  ids = np.asarray(prompt)
  if ids.ndim != 2 or not ids.shape[0] or not ids.shape[1]:
    raise config_lib.ConfigError(
      f"{name} has shape {ids.shape}: give int32[n, D] with n > 0, plain ids "
      "as ids[:, None]"
    )
  if ids.max() >= num_tokens or (ids[:, 0] < 0).any():
    raise config_lib.ConfigError(
      f"{name} has ids from {ids.min()} to {ids.max()}: use ids in "
      f"0..{num_tokens - 1}, with -1 only behind a position's first one"
    )
  return ids.astype(np.int32)


def _left_padded(prompts, length, depth):
  """Stacks prompts [n, D] at the right end of int32[B, length, depth]."""
  out = np.full((len(prompts), length, depth), -1, np.int32)
  for row, ids in zip(out, prompts):
    row[length - len(ids) :, : ids.shape[1]] = ids
  return out


def generate(
  llama_config: llama.LlamaConfig,
  params: dict,
  prompts: Sequence[np.ndarray],
  grammar: Grammar,
  sampling: SamplingConfig,
  key: jax.Array,
  *,
  negative_prompts: Sequence[np.ndarray] | None = None,
  batch_size: int | None = None,
  depth_weights: jax.Array | None = None,
) -> list[np.ndarray]:
  """Answers prompts.

  A prompt that ends in an open image (behind `image_start`, or some codes
  later) is continued inside it. A compiled program serves all calls with the
  same settings, rows and rounded length; prompts of similar length share a
  batch.

  Args:
    llama_config: of the model.
    params: its parameters. Scanned ones are copied to unrolled ones in every
      call: for many calls do that once (`llama.unstack_layers`), and set
      `scan_layers=False`.
    prompts: int32[n, D] each, -1 behind a position's ids.
    grammar: which ids may follow, from `make_grammar`.
    sampling: see `SamplingConfig`.
    key: PRNG key, as from `jax.random.key`.
    negative_prompts: what guidance leads away from, one per prompt; needed if,
      and only if, guidance is not 1. The chosen ids follow both.
    batch_size: rows at a time (twice as many with guidance); None for all.
    depth_weights: float32[D], of the rows that a position of a prompt sums, the
      first of them 1; None for 1 each.

  Returns:
    Each prompt's new ids int32[m], image delimiters included, without the stop
    id that ended it. At most `max_new_tokens`.

  Raises:
    ConfigError: a prompt that is empty, of a wrong shape or with ids outside
      the table; negative prompts missing, not needed or not matching; a
      grammar for another table; an open image that is malformed or doesn't fit
      `max_new_tokens`; a batch size below 1.
  """
  K, B = llama_config.vocab_size, batch_size
  if grammar.text.shape != (K,):
    raise config_lib.ConfigError(
      f"the grammar is for {grammar.text.size} ids, the model has {K}: make it "
      f"with num_tokens={K}"
    )
  if B is not None and B < 1:
    raise config_lib.ConfigError(f"batch_size={B}: use at least 1, or None")
  guided = sampling.guidance != 1
  if guided != (negative_prompts is not None):
    raise config_lib.ConfigError(
      f"guidance={sampling.guidance} and "
      f"{'no ' if guided else ''}negative_prompts: give these if, and only "
      "if, guidance is not 1"
    )
  prompts = [_checked(p, f"prompt {i}", K) for i, p in enumerate(prompts)]
  negatives = [
    _checked(p, f"negative prompt {i}", K)
    for i, p in enumerate(negative_prompts or ())
  ]
  if guided and len(negatives) != len(prompts):
    raise config_lib.ConfigError(
      f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one "
      "for each"
    )
  if not prompts:
    return []
  left = [_codes_left(p, grammar, f"prompt {i}") for i, p in enumerate(prompts)]
  for i, p in enumerate(negatives):
    other = _codes_left(p, grammar, f"negative prompt {i}")
    if other != left[i]:
      raise config_lib.ConfigError(
        f"prompt {i} and its negative prompt end differently ({left[i]} and "
        f"{other} codes to come, {_OUTSIDE} outside of an image): end both "
        "with image_start, or neither"
      )
  if max(left) + 1 > sampling.max_new_tokens:
    raise config_lib.ConfigError(
      f"max_new_tokens={sampling.max_new_tokens} cuts the image of prompt "
      f"{int(np.argmax(left))} short: set it to at least {max(left) + 1}"
    )

  if "layers" in params:
    params = llama.unstack_layers(params)
  config = dataclasses.replace(llama_config, scan_layers=False)
  params = jax.tree.map(jnp.asarray, params)
  both = prompts + negatives
  depth = max(ids.shape[1] for ids in both)
  if depth_weights is not None and depth_weights.shape != (depth,):
    raise config_lib.ConfigError(
      f"depth_weights have shape {depth_weights.shape}, the prompts {depth} "
      "ids a position: give one weight for each"
    )
  longest = [
    max(len(both[j]) for j in range(i, len(both), len(prompts)))
    for i in range(len(prompts))
  ]
  order = sorted(range(len(prompts)), key=lambda i: (longest[i], i))
  B = min(B or len(prompts), len(prompts))
  answers = [None] * len(prompts)
  for first in range(0, len(order), B):
    members = order[first : first + B]
    filled = members + members[:1] * (B - len(members))
    rows = filled + [i + len(prompts) for i in filled] * guided
    batch = [both[i] for i in rows]
    out = decode(
      config,
      sampling,
      params,
      _left_padded(batch, _bucket(max(map(len, batch))), depth),
      np.array([len(ids) for ids in batch], np.int32),
      np.array([left[i] for i in filled], np.int32),
      np.arange(B) >= len(members),
      np.array(filled, np.int32),
      key,
      grammar,
      depth_weights,
    )
    for i, row in zip(members, np.asarray(out)):
      answers[i] = row[row >= 0]
  return answers
