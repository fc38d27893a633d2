"""From nothing to a model that answers questions about pictures and draws them.

The whole chain of UniCode (arXiv 2403.09072) on data that ordinary packages
carry: a visual tokenizer warms up, stage I unifies its codebook with the
language model's table, stage II teaches the model to read and to draw, and what
came out is evaluated. Each link has a run folder in the workdir and starts from
the one before; the same command again goes on where it stopped.

Command: python -m unicode_jax.main --config=configs/quickstart.py
--config.LINK.KEY=VALUE sets a key of one link (warmup, stage1, stage2),
--config.KEY=VALUE of all. Presets, as in --config=configs/quickstart.py:debug

  preset   stage II        hardware     time
  (none)   2400 steps      2 CPU cores  about 20 minutes
  long     14000 steps     2 CPU cores  not measured
  debug    8 steps         2 CPU cores  about 2 minutes

Images are 8x8 positions of one code each (VQ): on these few pictures a language
model of this size learns to read and to draw finer positions sooner than
coarser ones of several codes. --config=configs/pretrain.py has the latter.

Expected: see docs/stage2.md.
"""

import pathlib

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

_HERE = pathlib.Path(__file__).parent
_FILES = {"warmup": "tokenizer", "stage1": "pretrain", "stage2": "instruct"}

_SHARED = {"data.weights": (0.35, 0.65)}
# Positions of 4x4 pixels, one code each.
_TOKENIZER = {
  "tokenizer.quantizer": "vq",
  "tokenizer.depth": 1,
  "tokenizer.channel_multipliers": (1,),
  "tokenizer.num_res_blocks": 2,
}
_STAGE1 = _SHARED | {"codebook.embedding_boost": 4.0}
_STAGE2 = {
  # easy-VQA's pictures, mostly: the others have a name each, and no questions.
  "data.weights": (0.1, 0.9),
  "num_steps": 2400,
  "eval_every": 800,
  "checkpoint_every": 400,
  "optimizer.instruct.learning_rate": 2e-3,
  "instruct.questions_per_image": 6,
  # Captions name shape and colour, which no single question does.
  "instruct.tasks.caption": 0.34,
  "instruct.tasks.vqa": 0.36,
  "instruct.tasks.text_to_image": 0.2,
  "instruct.tasks.class_conditional": 0.02,
  "instruct.tasks.unconditional": 0.02,
  "instruct.tasks.decompression": 0.02,
  "instruct.tasks.text": 0.04,
  "evaluate": "all",
}

# Overrides of the presets of each link's own file, by preset and link.
PRESETS = {
  "": {
    "warmup": _SHARED | _TOKENIZER | {"num_steps": 200, "eval_every": 200},
    "stage1": _STAGE1 | {"num_steps": 600, "eval_every": 600},
    "stage2": _STAGE2,
  },
  "long": {
    "warmup": _SHARED | _TOKENIZER | {"num_steps": 400, "eval_every": 400},
    "stage1": _STAGE1 | {"num_steps": 1500, "eval_every": 500},
    "stage2": _STAGE2 | {"num_steps": 14000, "eval_every": 2000},
  },
  "debug": {
    "warmup": {"num_steps": 4},
    "stage1": {},
    "stage2": {"evaluate": "text"},
  },
}


def get_chain(preset: str = "") -> dict[str, ConfigDict]:
  """Returns the configs of a preset's links."""
  if preset not in PRESETS:
    raise config_lib.ConfigError(
      f"there is no preset {preset!r}: choose one of "
      + ", ".join(repr(name) for name in PRESETS)
    )
  base = "debug" if preset == "debug" else ""
  return {
    link: config_lib.apply_overrides(
      config_lib.load(f"{_HERE / _FILES[link]}.py:{base}"),
      {"preset": preset, **overrides},
    )
    for link, overrides in PRESETS[preset].items()
  }
