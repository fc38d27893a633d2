"""From nothing to a model that answers questions about pictures and draws them.

The whole chain of UniCode (arXiv 2403.09072) on data that ordinary packages
carry: a visual tokenizer warms up, stage I unifies its codebook with the
language model's table, stage II teaches the model to read and to draw, and what
came out is evaluated.

Command: python -m unicode_jax.main --config=configs/quickstart.py
"""

import pathlib

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

_HERE = pathlib.Path(__file__).parent

# Overrides of the presets of the same name, by preset and link.
PRESETS = {
  "": {
    "warmup": {"num_steps": 200},
    "stage1": {"num_steps": 750},
    "stage2": {},
  },
  "long": {
    "warmup": {"num_steps": 200},
    "stage1": {"num_steps": 900},
    "stage2": {},
  },
  "debug": {
    "warmup": {"num_steps": 4},
    "stage1": {},
    "stage2": {},
  },
}


def get_chain(preset: str = "") -> dict[str, ConfigDict]:
  """Returns the configs of a preset's links."""
  if preset not in PRESETS:
    raise config_lib.ConfigError(
      f"there is no preset {preset!r}: choose one of "
      + ", ".join(repr(name) for name in PRESETS)
    )
  files = {"warmup": "tokenizer", "stage1": "pretrain", "stage2": "instruct"}
  start = "" if preset == "long" else preset
  chain = {}
  for link, overrides in PRESETS[preset].items():
    config = config_lib.load(f"{_HERE / files[link]}.py:{start}")
    chain[link] = config_lib.apply_overrides(
      config, {"preset": preset, **overrides}
    )
  return chain
