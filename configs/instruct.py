"""Stage II: the LLM learns to read and to draw images.

Paper: UniCode, section 3 (arXiv 2403.09072).
Command: python -m unicode_jax.main --config=configs/instruct.py \
  --config.init_from=runs/pretrain-default
"""

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

_COMMON = {
  "stage": "instruct",
  "init_from": "runs/pretrain-default",
}

PRESETS = {
  "": {
    "num_steps": 1200,
    "eval_every": 400,
    "checkpoint_every": 400,
    "text.sequence_length": 192,
  },
  "debug": {
    "init_from": "runs/pretrain-debug",
    "num_steps": 8,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 4,
    "text.sequence_length": 64,
    "instruct.segments": 2,
    "instruct.global_batch_size": 8,
  },
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  return config_lib.from_presets(
    {name: _COMMON | values for name, values in PRESETS.items()}, preset
  )
