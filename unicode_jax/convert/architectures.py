"""Configs of the LLaMA family: Hugging Face's `config.json` and `LlamaConfig`.

LLaMA 1-3 (with the RoPE scaling of 3.1), Vicuna, SmolLM2, Mistral, Qwen2,
Qwen2.5 and Qwen3. A setting that the model here has not is an error, never
ignored: a checkpoint either means the same here or does not load.
"""

from collections.abc import Mapping
from typing import Any

from unicode_jax import config as config_lib
from unicode_jax.models import llama as llama_lib
from unicode_jax.nn import rope

# Model type -> what distinguishes it here. LLaMA's covers Vicuna and SmolLM2.
FAMILIES = {
  "llama": {},
  "mistral": {},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True},
}
# No model has a larger one; many layers would be listed before they are missed.
_LARGEST_SIZE, _MOST_LAYERS, _LARGEST_NUMBER = 2**24, 4096, 1e30
# What a config of each type leaves out, where it is not LLaMA's.
_RMS_NORM_EPS = 1e-6
# Keys with the only value that this model has; others would be another model.
_REQUIRED = {
  "hidden_act": "silu",
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
}


def from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
  """Translates a `config.json`.

  Args:
    config: its contents.

  Returns:
    Arguments of `LlamaConfig`, with a value for every one that decides what the
    model computes.

  Raises:
    ConfigError: the model type or a setting is none that the model here has;
      names it.
  """
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise config_lib.ConfigError(
      f"model_type={kind!r:.99} is not one that can be imported: "
      f"{', '.join(FAMILIES)}"
    )
  for key, value in _REQUIRED.items():
    if config.get(key, value) != value:
      raise config_lib.ConfigError(
        f"config.json says {key}={config[key]!r:.99}, but only {value!r} can "
        "be imported: choose another checkpoint"
      )
  if config.get("attention_bias", False) and kind != "qwen2":
    raise config_lib.ConfigError(
      f"config.json says attention_bias=true for model_type={kind!r}, which "
      "has a bias on the output projection too: it cannot be imported"
    )
  heads = _needed(config, "num_attention_heads")
  embed_dim = _needed(config, "hidden_size")
  theta, scaling = _rope(config)
  norm_eps = config.get("rms_norm_eps", _RMS_NORM_EPS)
  return {
    "vocab_size": _needed(config, "vocab_size"),
    "embed_dim": embed_dim,
    "num_layers": _needed(config, "num_hidden_layers", most=_MOST_LAYERS),
    "num_heads": heads,
    "num_kv_heads": _needed(config, "num_key_value_heads", heads),
    "mlp_dim": _needed(config, "intermediate_size"),
    # Qwen3's default is not the quotient, so its configs name it.
    "head_dim": _needed(config, "head_dim", embed_dim // heads),
    "rope_theta": theta,
    "rope_scaling": scaling,
    "norm_eps": _number("rms_norm_eps", norm_eps),
    "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    "qkv_bias": FAMILIES[kind].get("qkv_bias", False),
    "qk_norm": FAMILIES[kind].get("qk_norm", False),
    "sliding_window": _window(config, kind),
  }


def to_hugging_face(config: llama_lib.LlamaConfig) -> dict[str, Any]:
  """Translates back: the `config.json` whose model computes the same.

  Args:
    config: of the model.

  Returns:
    The keys that describe the model; not the tokenizer's ids, nor its context.

  Raises:
    ConfigError: no architecture of `FAMILIES` has this set of settings.
  """
  wanted = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm}
  for kind, settings in FAMILIES.items():
    if wanted != {"qkv_bias": False, "qk_norm": False} | settings:
      continue
    if (kind == "mistral") == (config.sliding_window is not None):
      break
    if kind.startswith("qwen"):
      break
  else:
    raise config_lib.ConfigError(
      f"no architecture of {', '.join(FAMILIES)} has llm.qkv_bias="
      f"{config.qkv_bias} with llm.qk_norm={config.qk_norm}: nothing but this "
      "project could load it"
    )
  values = {
    "model_type": kind,
    "architectures": [f"{_CLASS_NAMES[kind]}ForCausalLM"],
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "intermediate_size": config.mlp_dim,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    # Both spellings: transformers renamed it in version 5.
    "rope_theta": config.rope_theta,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": config.rope_theta,
    },
  }
  if config.rope_scaling is not None:
    scaling = {
      "rope_type": "llama3",
      "factor": config.rope_scaling.factor,
      "low_freq_factor": config.rope_scaling.low_freq_factor,
      "high_freq_factor": config.rope_scaling.high_freq_factor,
      "original_max_position_embeddings": (
        config.rope_scaling.original_max_position
      ),
    }
    values["rope_scaling"] = scaling
    values["rope_parameters"] |= scaling
  if config.sliding_window is not None:
    values["sliding_window"] = config.sliding_window
    if kind.startswith("qwen"):
      values |= {"use_sliding_window": True, "max_window_layers": 0}
  elif kind == "mistral":
    values["sliding_window"] = None
  return values


_CLASS_NAMES = {
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
}


def _needed(
  config, key: str, default: int | None = None, most: int = _LARGEST_SIZE
) -> int:
  """Returns a size without which there is no model."""
  value = config.get(key)
  if value is None:
    value = default
  if type(value) is not int or not 1 <= value <= most:
    raise config_lib.ConfigError(
      f"config.json has {key}={value!r:.99}: it must be a whole number from 1 "
      f"to {most}"
    )
  return value


def _number(key: str, value: Any) -> float:
  """Returns a number, as a fraction."""
  # Compared as it is: a whole number may be beyond any fraction.
  if type(value) not in (int, float) or not abs(value) < _LARGEST_NUMBER:
    raise config_lib.ConfigError(
      f"config.json has {key}={value!r:.99}: it must be a number"
    )
  return float(value)


def _section(config, key: str) -> Mapping[str, Any]:
  """Returns an object inside the config, empty if it is not there."""
  value = config.get(key) or {}
  if not isinstance(value, Mapping):
    raise config_lib.ConfigError(
      f"config.json has {key}={value!r:.99}: it must be an object"
    )
  return value


def _rope(config) -> tuple[float, rope.RopeScaling | None]:
  """Returns theta and scaling, from either of the two spellings."""
  parameters = _section(config, "rope_parameters")
  scaling = parameters or _section(config, "rope_scaling")
  theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
  theta = _number("rope_theta", theta)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise config_lib.ConfigError(
      f"config.json scales RoPE by rope_type={kind!r:.99}: only 'llama3' and "
      "none can be imported"
    )
  try:
    return theta, rope.RopeScaling(
      **{
        key: _number(key, scaling[key])
        for key in ("factor", "low_freq_factor", "high_freq_factor")
      },
      original_max_position=scaling["original_max_position_embeddings"],
    )
  except KeyError as error:
    raise config_lib.ConfigError(
      f"config.json scales RoPE by 'llama3' without {error}"
    ) from error


def _window(config, kind: str) -> int | None:
  """Returns the attention span, which Qwen may have for some layers only."""
  window = config.get("sliding_window")
  if kind == "llama":
    return None  # Its model ignores the key.
  if window is not None:
    window = _needed(config, "sliding_window")
  if kind == "mistral":
    return window
  layers = config.get("layer_types")
  if layers is None:
    if not config.get("use_sliding_window", False):
      return None
    first = _number("max_window_layers", config.get("max_window_layers", 28))
    count = config["num_hidden_layers"]
    layers = ["sliding_attention" if i >= first else "" for i in range(count)]
  if not isinstance(layers, list) or not layers:
    raise config_lib.ConfigError(
      f"config.json has layer_types={layers!r:.99}: it must be a list"
    )
  spans = {window if kind == "sliding_attention" else None for kind in layers}
  if len(spans) > 1:
    raise config_lib.ConfigError(
      "config.json has layers with and without sliding attention "
      "(max_window_layers, layer_types): only one kind can be imported"
    )
  return spans.pop()
