"""The language model: one LLaMA-family decoder on stacked token ids.

Implements METHOD.md section 4's input type. `token_ids[B, T, D]` holds up to D
ids per position, -1 elsewhere, and a position's embedding is the sum of the
rows of its ids: one id for a text token, D for an image input. A plain LLaMA
checkpoint is such a model with D = 1. The settings cover LLaMA 1-3, SmolLM,
Mistral, Qwen2 and Qwen3. Where a mesh is set, activations are split as
`sharding.RULES` say. Loading checkpoints and sampling are elsewhere.

Parameters (float32 always): `embed_tokens/embedding` [K, E], `final_norm`,
`lm_head/kernel` [E, K] if untied, and `layers_0`, `layers_1`, ... or, scanned,
`layers` with a leading axis of num_layers; `stack_layers` and `unstack_layers`
change one into the other.
"""

import dataclasses
import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from unicode_jax import sharding
from unicode_jax.nn import attention, fused_attention, norm, rope
from unicode_jax.nn.blockwise import blockwise


def _with_attention(policy):
  """Keeps what attention gave too, which a kernel's product is not seen in."""
  attention_too = jax.checkpoint_policies.save_only_these_names(
    fused_attention.NAME
  )
  return jax.checkpoint_policies.save_from_both_policies(policy, attention_too)


# What the backward pass may reuse; "none" keeps everything, "full" nothing but
# the layers' inputs, "attention" what attention gave as well.
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(
    fused_attention.NAME
  ),
  "dots": _with_attention(jax.checkpoint_policies.dots_saveable),
  "dots_no_batch": _with_attention(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}
_in_init = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Shape and settings of the model.

  Attributes:
    vocab_size: K, rows of the embedding table.
    embed_dim: E.
    num_layers: decoder layers.
    num_heads: query heads.
    num_kv_heads: key/value heads, a divisor of num_heads.
    head_dim: size of a head; None for embed_dim / num_heads.
    mlp_dim: F, width of the SwiGLU layer.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: Llama 3.1's context stretch, or None.
    norm_eps: of every RMSNorm.
    embedding_std: of the rows of a fresh embedding table. What a layer adds to
      a row is of size 0.1 or so, whatever the row: behind a much smaller one
      the layers above hardly see which token it was.
    tie_embeddings: the head is the embedding table.
    qkv_bias: biases on q, k and v (Qwen2).
    qk_norm: RMSNorm on the heads of q and k (Qwen3).
    sliding_window: attention span in positions, or None.
    scan_layers: one compiled layer in a loop: compiles faster, runs slower on
      CPU.
    remat_policy: a name in REMAT_POLICIES.
    attention: kernel, see `fused_attention.choose`.
    attention_block: queries at a time, see `attention.attend`.
    dtype: compute dtype; parameters and logits are float32.

  Raises:
    ValueError: heads that don't divide, or an unknown remat policy.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_dim: int
  head_dim: int | None = None
  rope_theta: float = 10000.0
  rope_scaling: rope.RopeScaling | None = None
  norm_eps: float = 1e-5
  embedding_std: float = 0.02
  tie_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  scan_layers: bool = False
  remat_policy: str = "none"
  attention: str = "auto"
  attention_block: int | None = None
  dtype: str = "float32"

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}; change one of them"
      )
    if self.head_dim is None:
      if self.embed_dim % self.num_heads:
        raise ValueError(
          f"embed_dim={self.embed_dim} is not a multiple of "
          f"num_heads={self.num_heads}; set head_dim"
        )
      object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
    if self.remat_policy not in REMAT_POLICIES:
      raise ValueError(
        f"remat_policy={self.remat_policy!r} is unknown; use one of "
        f"{sorted(REMAT_POLICIES)}"
      )

  @property
  def out_init(self) -> nn.initializers.Initializer:
    """Keeps the residual stream's variance independent of the depth."""
    return nn.initializers.variance_scaling(
      1 / (2 * self.num_layers), "fan_in", "truncated_normal"
    )


@flax.struct.dataclass
class KVCache:
  """Keys and values of past tokens, in order of arrival.

  One array per layer: on CPU updating them in place is twice as fast as one
  stacked array.

  Attributes:
    layers: per layer, keys and values [B, G, S, A].
    tokens: positions and segment ids [B, S]; S is the capacity.
    length: int32[], slots in use, the same for all rows (pad shorter rows with
      segment id 0).
  """

  layers: list[tuple[jax.Array, jax.Array]]
  tokens: attention.Tokens
  length: jax.Array


def init_cache(config: LlamaConfig, batch: int, max_length: int) -> KVCache:
  """Returns an empty cache for `batch` rows of up to `max_length` tokens.

  Writing past `max_length` is not detected under jit: choose it large enough.
  """
  shape = (batch, config.num_kv_heads, max_length, config.head_dim)
  zeros = functools.partial(jnp.zeros, shape, config.dtype)
  empty = jnp.zeros((batch, max_length), jnp.int32)
  return KVCache(
    layers=[(zeros(), zeros()) for _ in range(config.num_layers)],
    tokens=attention.Tokens(empty, empty),
    length=jnp.zeros((), jnp.int32),
  )


def embed(
  embedding: jax.Array,
  token_ids: jax.Array,
  depth_weights: jax.Array | None = None,
) -> jax.Array:
  """Sums the rows of each position's ids.

  Args:
    embedding: float32[K, E].
    token_ids: int32[B, T, D]; ids outside [0, K) add nothing.
    depth_weights: float32[D], of the rows of each depth; None for 1.

  Returns:
    float32[B, T, E]. The gradient is a scatter-add, with no [N, K] array.
  """
  rows = embedding.at[token_ids].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )
  if depth_weights is None:
    return rows.sum(axis=-2)
  return jnp.einsum("BTDE,D->BTE", rows, depth_weights)


class _Weight(nn.Module):
  """A bare matrix, at the path where nn.Dense or nn.Embed would put it."""

  shape: tuple[int, int]
  init: nn.initializers.Initializer
  leaf: str = "kernel"

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param(self.leaf, self.init, self.shape)


def _swiglu(x, gate_EF, up_EF, down_FE):
  """Maps [..., E] to [..., E]."""
  hidden = jax.nn.silu(x @ gate_EF) * (x @ up_EF)
  if hidden.ndim == 3:
    hidden = sharding.constrain(hidden, "batch", "length", "mlp")
  return hidden @ down_FE


class MLP(nn.Module):
  """SwiGLU (Shazeer, arXiv 2002.05202)."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, T, E] to [B, T, E]."""
    config = self.config
    E, F = config.embed_dim, config.mlp_dim
    gate = _Weight((E, F), _in_init, name="gate_proj")()
    up = _Weight((E, F), _in_init, name="up_proj")()
    down = _Weight((F, E), config.out_init, name="down_proj")()
    weights = [w.astype(config.dtype) for w in (gate, up, down)]
    if sharding.active_mesh() is not None:
      return _swiglu(x, *weights)
    out_NE = blockwise(
      lambda x_E: _swiglu(x_E, *weights),
      x.reshape(-1, E),
      bytes_per_item=4 * F,
    )
    return out_NE.reshape(x.shape)


class DecoderLayer(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x, rope_table, queries, keys=None, start=0, cache=None):
    """See `attention.Attention`; returns x [B, T, E] and the layer's cache."""
    config = self.config
    attend = attention.Attention(
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      qkv_bias=config.qkv_bias,
      qk_norm=config.qk_norm,
      norm_eps=config.norm_eps,
      window=config.sliding_window,
      block=config.attention_block,
      kernel=config.attention,
      dtype=config.dtype,
      out_init=config.out_init,
      name="attention",
    )
    rms_norm = functools.partial(norm.RMSNorm, config.norm_eps, config.dtype)
    y = rms_norm(name="attention_norm")(x)
    y, cache = attend(y, rope_table, queries, keys, start, cache)
    x += _residual(y)
    y = MLP(config, name="mlp")(rms_norm(name="mlp_norm")(x))
    return x + _residual(y), cache


def _split_parameters(variables, num_stacked):
  return sharding.constrain_parameters(variables, num_stacked)


def _residual(x_BTE):
  return sharding.constrain(x_BTE, "batch", "residual", "embed")


class Llama(nn.Module):
  """Token ids to logits (or to the hidden states below the head)."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self,
    token_ids: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    return_hidden: bool = False,
    depth_weights: jax.Array | None = None,
    extra_embedding: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs the decoder.

    Args:
      token_ids: int32[B, T, D], -1 pads D.
      positions: int32[B, T]; None counts from 0, or from the cache's length.
        RoPE is relative, so packed sequences need not restart at 0.
      segment_ids: int32[B, T] of packed sequences, 0 for padding; None for one
        sequence per row.
      cache: past tokens; the T new ones are appended.
      return_hidden: skips the head; `head_kernel` and `next_token_loss` do the
        rest without ever holding [B, T, K].
      depth_weights: float32[D] of `embed`; the first must be 1, so that text
        is what a plain LLaMA reads.
      extra_embedding: float32[B, T, E], added to the embedding; what a baseline
        with a projector reads instead of ids.

    Returns:
      logits float32[B, T, K], or hidden states dtype[B, T, E] after the last
      norm, and the new cache (None without one).

    Raises:
      ValueError: `token_ids` isn't 3-D, or T exceeds the cache.
    """
    config = self.config
    if token_ids.ndim != 3:
      raise ValueError(
        f"token_ids has shape {token_ids.shape}, not [B, T, D]; give plain "
        "ids as token_ids[..., None]"
      )
    B, T, _ = token_ids.shape
    start = 0 if cache is None else cache.length
    if positions is None:
      positions = jnp.broadcast_to(start + jnp.arange(T), (B, T))
    if cache is not None and segment_ids is None:
      segment_ids = jnp.ones((B, T), jnp.int32)
    queries = attention.Tokens(positions, segment_ids)
    keys = None if cache is None else _append(cache, queries)
    frequencies = rope.rope_frequencies(
      config.head_dim, config.rope_theta, config.rope_scaling
    )
    shared = rope.rope_table(positions, frequencies), queries, keys, start

    K, E = config.vocab_size, config.embed_dim
    spread = nn.initializers.normal(config.embedding_std)
    embedding = _Weight((K, E), spread, "embedding", name="embed_tokens")()
    head = embedding.T
    if not config.tie_embeddings:
      head = _Weight((E, K), nn.initializers.normal(0.02), name="lm_head")()
    x_BTE = embed(embedding, token_ids, depth_weights)
    if extra_embedding is not None:
      x_BTE += extra_embedding
    x_BTE = _residual(x_BTE.astype(config.dtype))
    x_BTE, layers = self._decode(x_BTE, shared, cache)
    final_norm = norm.RMSNorm(config.norm_eps, config.dtype, name="final_norm")
    x_BTE = final_norm(x_BTE)
    if cache is not None:
      cache = KVCache(layers, keys, cache.length + T)
    if return_hidden:
      return x_BTE, cache
    logits = jnp.einsum(
      "BTE,EK->BTK",
      x_BTE,
      head.astype(config.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits, cache

  def _decode(self, x_BTE, shared, cache):
    """Runs all layers; returns x [B, T, E] and the layers' caches."""
    config = self.config
    policy = REMAT_POLICIES[config.remat_policy]
    layer = DecoderLayer
    if sharding.active_mesh() is not None and not self.is_initializing():
      num_stacked = config.num_layers if config.scan_layers else 0
      layer = nn.map_variables(
        layer,
        "params",
        functools.partial(_split_parameters, num_stacked=num_stacked),
      )
    if config.remat_policy != "none" and cache is None:
      layer = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
    if config.scan_layers and cache is None:
      scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
      )
      return scanned(config, name="layers")(x_BTE, *shared)
    layers = []
    for i in range(config.num_layers):
      if config.scan_layers:  # a scan would stack the cache, which is slow
        weights = _index(self.variables["params"]["layers"], i)
        run = DecoderLayer(config, parent=None).bind({"params": weights})
      else:
        run = layer(config, name=f"layers_{i}")
      x_BTE, new = run(x_BTE, *shared, cache and cache.layers[i])
      layers.append(new)
    return x_BTE, layers


def _append(cache: KVCache, new: attention.Tokens) -> attention.Tokens:
  """Returns the cache's tokens with the new ones written behind the old."""
  T, S = new.positions.shape[1], cache.tokens.positions.shape[1]
  if T > S:
    raise ValueError(f"{T} tokens don't fit a cache of {S}; make it longer")
  return jax.tree.map(
    lambda old, new: jax.lax.dynamic_update_slice_in_dim(
      old, new, cache.length, axis=1
    ),
    cache.tokens,
    new,
  )


def head_kernel(params: dict, config: LlamaConfig) -> jax.Array:
  """Returns the output table float32[E, K] of `Llama`'s parameters."""
  if config.tie_embeddings:
    return params["embed_tokens"]["embedding"].T
  return params["lm_head"]["kernel"]


def _index(stacked, i):
  return jax.tree.map(lambda w: w[i], stacked)


def stack_layers(params: dict) -> dict:
  """Turns unrolled parameters (`layers_0`, ...) into scanned (`layers`)."""
  params = dict(params)
  count = sum(name.startswith("layers_") for name in params)
  layers = [params.pop(f"layers_{i}") for i in range(count)]
  return params | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *layers)}


def unstack_layers(params: dict) -> dict:
  """Inverts `stack_layers`. Decoding is faster with unrolled parameters."""
  params = dict(params)
  stacked = params.pop("layers")
  count = jax.tree.leaves(stacked)[0].shape[0]
  return params | {f"layers_{i}": _index(stacked, i) for i in range(count)}


def with_layers_as(params: dict, scanned: bool) -> dict:
  """Returns parameters scanned or unrolled, whichever they are."""
  if ("layers" in params) == scanned:
    return params
  return stack_layers(params) if scanned else unstack_layers(params)


def num_parameters(config: LlamaConfig) -> int:
  """Counts the parameters without allocating them."""
  shapes = jax.eval_shape(
    Llama(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1, 1), jnp.int32),
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
