"""The UniCode model: its visual codebook is the LLM's own token table.

Implements METHOD sections 1-3: it ties the encoder and decoder, the quantizer,
the codebook of one paradigm and the LLM together as pure functions over one
tree of parameters. It holds no training logic.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from unicode_jax import (
  codebook as codebook_lib,
  quantizer as quantizer_lib,
  sharding,
)
from unicode_jax.models import (
  llama as llama_lib,
  lora as lora_lib,
  projector as projector_lib,
  tokenizer as tokenizer_lib,
)


@struct.dataclass
class Variables:
  """Everything that a forward pass needs.

  Attributes:
    params: {"encoder", "decoder", "codebook", "llm"}: what optimizers train
      ("llm" is absent when the codebook is private, "projector" is there for
      that baseline only, "lora" where adapters are trained).
    codebook_state: Gains, fixed projection or table, statistics.
    valid: bool[K], ids that may be visual codes.
  """

  params: Any
  codebook_state: Any
  valid: jax.Array


@dataclasses.dataclass(frozen=True)
class UniCode:
  """Architecture of one model.

  Attributes:
    tokenizer: Encoder and decoder.
    codebook: Paradigm, code_dim and update rules.
    quantizer: "vq", "rq" or "hq".
    llama: The LLM, or None where the codebook is private.
    vision: How the LLM reads images: "unified", or a baseline of METHOD section
      5: "separate" (codes have K rows of their own behind the K of the text) or
      "projector" (features through an MLP; cannot draw).
    lora_rank: of the adapters that are trained in place of the LLM, 0 without.
    lora_alpha: adapters are scaled by this over their rank.
  """

  tokenizer: tokenizer_lib.TokenizerConfig
  codebook: codebook_lib.CodebookConfig
  quantizer: str
  llama: llama_lib.LlamaConfig | None
  vision: str = "unified"
  lora_rank: int = 0
  lora_alpha: float = 16.0

  @property
  def depth(self) -> int:
    """Codes per position, D."""
    return self.codebook.depth

  @property
  def codes_shift(self) -> int:
    """Id of code 0 in the LLM's vocabulary; 0 where codes are tokens."""
    if self.vision != "separate":
      return 0
    return self.llama.vocab_size // 2

  @property
  def code_grid(self) -> tuple[int, int]:
    """Positions that an image has for the LLM, rows and columns."""
    size = self.tokenizer.grid_size
    return quantizer_lib.grid_shape((size, size), self.quantizer)

  @property
  def num_positions(self) -> int:
    """P, positions that an image takes where it is read."""
    height, width = self.code_grid
    return height * width

  def init(self, key: jax.Array, valid: jax.Array, given=None) -> Variables:
    """Draws the initial parameters.

    Args:
      key: PRNG key.
      valid: bool[K], ids that may be visual codes.
      given: groups of parameters to take instead, such as {"llm": ...}; the
        codebook is made for these.

    Returns:
      Variables with float32 parameters.
    """
    keys = jax.random.split(key, 4)
    size, grid = self.tokenizer.image_size, self.tokenizer.grid_size
    image = jnp.zeros((1, size, size, 3))
    features = jnp.zeros((1, grid, grid, self.tokenizer.code_dim))
    params = dict(given or {})
    encoder = tokenizer_lib.Encoder(self.tokenizer)
    decoder = tokenizer_lib.Decoder(self.tokenizer)
    if "encoder" not in params:
      params["encoder"] = encoder.init(keys[0], image)["params"]
    if "decoder" not in params:
      params["decoder"] = decoder.init(keys[1], features)["params"]
    if self.llama is not None and "llm" not in params:
      ids = jnp.zeros((1, 2, 1), jnp.int32)
      params["llm"] = llama_lib.Llama(self.llama).init(keys[2], ids)["params"]
    if self.vision == "projector":
      params["projector"] = self._projector().init(
        jax.random.fold_in(key, 4), features
      )["params"]
    if self.lora_rank:
      params["lora"] = lora_lib.init_adapters(
        jax.random.fold_in(key, 5), params["llm"], self.lora_rank
      )
    params["codebook"], state = codebook_lib.init_codebook(
      keys[3], self.embedding(params), valid, self.codebook
    )
    return Variables(params=params, codebook_state=state, valid=valid)

  def llm(self, params):
    """Returns the LLM's parameters with the adapters, if any, merged.

    Where there are adapters, the LLM itself gets no gradient.
    """
    if not self.lora_rank:
      return params["llm"]
    base = jax.lax.stop_gradient(params["llm"])
    scale = self.lora_alpha / self.lora_rank
    return lora_lib.merge(base, params["lora"], scale)

  def embedding(self, params) -> jax.Array | None:
    """Returns the LLM's token table float32[K, d_llm], None without an LLM.

    Rows behind K are a baseline's own: codes that share no row with text.
    """
    if self.llama is None:
      return None
    rows = params["llm"]["embed_tokens"]["embedding"]
    return rows[: self.codes_shift or None]

  def table(self, variables: Variables) -> jax.Array:
    """Returns the table that codes index, float32[K, code_dim]."""
    return codebook_lib.codebook_table(
      variables.params["codebook"],
      variables.codebook_state,
      self.embedding(variables.params),
      variables.valid,
      self.codebook,
    )

  def language_table(self, variables: Variables) -> jax.Array:
    """Returns what the table would be if it were the LLM's, [K, code_dim]."""
    return codebook_lib.language_table(
      variables.params["codebook"],
      variables.codebook_state,
      self.embedding(variables.params),
      variables.valid,
      self.codebook,
    )

  def depth_weights(self, variables: Variables) -> jax.Array:
    """Returns what the LLM weighs the rows of a position's ids by, float32[D].

    The aggregated embedding of METHOD section 4 sums what the quantizer emits,
    g_d C_k at depth d, so the LLM sums g_d / g_1 E_k: later codes are
    corrections of earlier ones, and unweighted they would drown them.
    """
    gain = variables.codebook_state["gain"]
    fitted = gain[0] > 0
    return jnp.where(fitted, gain / jnp.where(fitted, gain[0], 1.0), 1.0)

  def features(self, variables: Variables, image: jax.Array) -> jax.Array:
    """Maps float32[B, H, W, 3] to features float32[B, h, w, code_dim]."""
    params = sharding.whole_parameters(variables.params["encoder"])
    return tokenizer_lib.Encoder(self.tokenizer).apply(
      {"params": params}, image
    )

  def _projector(self) -> projector_lib.Projector:
    return projector_lib.Projector(self.llama.embed_dim)

  def project(self, variables: Variables, image: jax.Array) -> jax.Array:
    """Returns what the projector's LLM reads of images.

    Args:
      variables: With a projector.
      image: float32[B, H, W, 3] in [-1, 1].

    Returns:
      float32[B, P, d_llm]; the encoder gets no gradient.
    """
    z = jax.lax.stop_gradient(self.features(variables, image))
    B, X, Y, C = z.shape
    height, width = self.code_grid
    z = z.reshape(B, height, X // height, width, Y // width, C).mean((2, 4))
    return self._projector().apply(
      {"params": variables.params["projector"]}, z.reshape(B, -1, C)
    )

  def quantize(
    self, variables: Variables, z: jax.Array, table: jax.Array | None = None
  ) -> quantizer_lib.Quantized:
    """Quantizes features float32[B, h, w, code_dim] with the current table."""
    return quantizer_lib.quantize(
      z,
      self.table(variables) if table is None else table,
      variables.codebook_state["gain"],
      variables.valid,
      kind=self.quantizer,
      depth=self.depth,
    )

  def encode(
    self, variables: Variables, image: jax.Array
  ) -> quantizer_lib.Quantized:
    """Maps pixels in [-1, 1], float32[B, H, W, 3], to codes and features."""
    return self.quantize(variables, self.features(variables, image))

  def decode_features(
    self, variables: Variables, quantized: jax.Array
  ) -> jax.Array:
    """Maps quantized features float32[B, h, w, code_dim] to pixels."""
    params = sharding.whole_parameters(variables.params["decoder"])
    return tokenizer_lib.Decoder(self.tokenizer).apply(
      {"params": params}, quantized
    )

  def decode(self, variables: Variables, codes: jax.Array) -> jax.Array:
    """Maps codes int32[B, h, w, D] to pixels float32[B, H, W, 3]."""
    quantized = quantizer_lib.dequantize(
      codes,
      self.table(variables),
      variables.codebook_state["gain"],
      kind=self.quantizer,
    )
    return self.decode_features(variables, quantized)
