"""Which tensor of a LLaMA-family checkpoint is which parameter.

One table serves import and export, and Hugging Face's names as well as GGUF's:

  parameter                          Hugging Face                       shape
  embed_tokens/embedding             model.embed_tokens.weight          [K, E]
  layers_0/attention/q_proj/kernel   model.layers.0.self_attn.q_proj... [HA, E]
  ...

PyTorch stores a linear map as [out, in], Flax as [in, out], so kernels are
transposed. GGUF also reorders the rows of q and k, see `unpermuted`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.models import llama as llama_lib

# Parameter, Hugging Face's name, GGUF's name, shape in theirs. "*" is a layer.
_SHARED = (
  ("embed_tokens/embedding", "model.embed_tokens", "token_embd", "KE"),
  ("final_norm/scale", "model.norm", "output_norm", "E"),
)
_UNTIED = (("lm_head/kernel", "lm_head", "output", "KE"),)
_LAYER = (
  ("attention_norm/scale", "input_layernorm", "attn_norm", "E"),
  ("attention/q_proj/kernel", "self_attn.q_proj", "attn_q", "QE"),
  ("attention/k_proj/kernel", "self_attn.k_proj", "attn_k", "GE"),
  ("attention/v_proj/kernel", "self_attn.v_proj", "attn_v", "GE"),
  ("attention/o_proj/kernel", "self_attn.o_proj", "attn_output", "EQ"),
  ("mlp_norm/scale", "post_attention_layernorm", "ffn_norm", "E"),
  ("mlp/gate_proj/kernel", "mlp.gate_proj", "ffn_gate", "FE"),
  ("mlp/up_proj/kernel", "mlp.up_proj", "ffn_up", "FE"),
  ("mlp/down_proj/kernel", "mlp.down_proj", "ffn_down", "EF"),
)
_QKV_BIAS = (
  ("attention/q_proj/bias", "self_attn.q_proj", "attn_q", "Q"),
  ("attention/k_proj/bias", "self_attn.k_proj", "attn_k", "G"),
  ("attention/v_proj/bias", "self_attn.v_proj", "attn_v", "G"),
)
_QK_NORM = (
  ("attention/q_norm/scale", "self_attn.q_norm", "attn_q_norm", "A"),
  ("attention/k_norm/scale", "self_attn.k_norm", "attn_k_norm", "A"),
)
# Tables that can be computed, which older checkpoints keep all the same.
_DERIVED = re.compile(
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_freqs\.weight"
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor.

  Attributes:
    path: of the parameter, separated by "/".
    key: the tensor's name there.
    shape: its shape there.
    transposed: whether the parameter is its transpose.
  """

  path: str
  key: str
  shape: tuple[int, ...]
  transposed: bool


def table(config: llama_lib.LlamaConfig, gguf: bool = False) -> list[Entry]:
  """Lists every tensor of a model, in the order of its layers.

  Args:
    config: of the model.
    gguf: whether the names are GGUF's.

  Returns:
    One entry for each parameter of the unrolled model.
  """
  sizes = {
    "K": config.vocab_size,
    "E": config.embed_dim,
    "F": config.mlp_dim,
    "A": config.head_dim,
    "Q": config.num_heads * config.head_dim,
    "G": config.num_kv_heads * config.head_dim,
  }

  def entry(row, path="", hf="", blk=""):
    parameter, hf_name, gguf_name, shape = row
    name = blk + gguf_name if gguf else hf + hf_name
    leaf = "bias" if parameter.endswith("bias") else "weight"
    return Entry(
      path + parameter,
      f"{name}.{leaf}",
      tuple(sizes[axis] for axis in shape),
      parameter.endswith("kernel"),
    )

  rows = _LAYER + _QKV_BIAS * config.qkv_bias + _QK_NORM * config.qk_norm
  entries = [
    entry(row) for row in _SHARED + _UNTIED * (not config.tie_embeddings)
  ]
  for i in range(config.num_layers):
    entries += [
      entry(row, f"layers_{i}/", f"model.layers.{i}.", f"blk.{i}.")
      for row in rows
    ]
  return entries


def check(
  entries: Iterable[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
  tied: bool,
) -> None:
  """Compares what a checkpoint has with what the model needs.

  Args:
    entries: of `table`.
    shapes: name -> shape of every tensor that is there.
    where: what to call the checkpoint.
    tied: whether the model has no head of its own; one that is stored all the
      same repeats the embedding table.

  Raises:
    ConfigError: a tensor is missing, unknown, or of another shape; names it.
  """
  wanted = {entry.key: entry.shape for entry in entries}
  repeated = {"lm_head.weight", "output.weight"} if tied else set()
  missing = sorted(wanted.keys() - shapes.keys())
  unknown = sorted(
    key
    for key in shapes.keys() - wanted.keys() - repeated
    if not _DERIVED.fullmatch(key)
  )
  if missing or unknown:
    raise config_lib.ConfigError(
      f"{where} does not have the tensors that its config asks for: "
      + "; ".join(
        f"{len(keys)} {what}, such as {', '.join(keys[:3])}"
        for what, keys in (("missing", missing), ("unknown", unknown))
        if keys
      )
    )
  for key, shape in wanted.items():
    if tuple(shapes[key]) != shape:
      raise config_lib.ConfigError(
        f"{where}: {key} has shape {list(shapes[key])}, but its config asks "
        f"for {list(shape)}"
      )


def unpermuted(tensor: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes the order that GGUF keeps rows of q and k of LLaMA models in.

  There the two channels that RoPE turns together are neighbours; in Hugging
  Face's checkpoints, and here, they are half a head apart.

  Args:
    tensor: [heads * head_dim, ...].
    num_heads: of this tensor: of k, the key heads.

  Returns:
    The same rows in Hugging Face's order.
  """
  pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
  return pairs.swapaxes(1, 2).reshape(tensor.shape)
