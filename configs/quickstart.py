"""From nothing to a model that answers questions about pictures and draws them.

The whole chain of UniCode (arXiv 2403.09072) on data that ordinary packages
carry: a visual tokenizer warms up, stage I unifies its codebook with the
language model's table, stage II teaches the model to read and to draw, and what
came out is evaluated. Each link has a run folder in the workdir and starts from
the one before; the same command again goes on where it stopped.

Stage II has two links: "reading" asks about pictures, "stage2" goes on and
learns to draw them. To compare a question with a picture is learned late, or
never, where much is drawn at the same time.

Command: python -m unicode_jax.main --config=configs/quickstart.py
--config.LINK.KEY=VALUE sets a key of one link (warmup, stage1, reading,
stage2), --config.KEY=VALUE of all. Presets, as in
--config=configs/quickstart.py:debug

  preset   stage II           hardware     time
  (none)   2600 + 1800 steps  2 CPU cores  18 minutes
  long     30000 steps        2 CPU cores  2 hours, in one link ("stage2")
  debug    8 + 8 steps        2 CPU cores  about a minute

Images are 8x8 positions of one code each (VQ): on these few pictures a language
model of this size learns to read and to draw finer positions sooner than
coarser ones of several codes. --config=configs/pretrain.py has the latter.

Expected: 89 % of the easy-VQA test questions right, and 77 % of the drawings;
"long" 98 and 85 %. docs/stage2.md has more.
"""

import pathlib

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

_HERE = pathlib.Path(__file__).parent
_FILES = {
  "warmup": "tokenizer",
  "stage1": "pretrain",
  "reading": "instruct",
  "stage2": "instruct",
}

_SHARED = {"data.weights": (0.2, 0.8)}
# Positions of 4x4 pixels, one code each.
_TOKENIZER = {
  "tokenizer.quantizer": "vq",
  "tokenizer.depth": 1,
  "tokenizer.channel_multipliers": (1,),
  "tokenizer.num_res_blocks": 2,
}
# What 4x4 pixels of flat shapes need: 2048 codes lie dense in six dimensions.
_FINER = {"codebook.code_dim": 6}
# What an LLM that starts from nothing needs to learn fast: tokens that stand
# out behind the first layer, and sharp attention.
_LLM = {
  "llm.embedding_std": 0.5,
  "llm.tie_embeddings": False,
  "llm.num_kv_heads": 6,
  "llm.qk_norm": True,
}
_STAGE1 = _SHARED | _LLM
_STAGE2 = {
  # easy-VQA's pictures, mostly: the others have a name each, and no questions.
  "data.weights": (0.1, 0.9),
  # Pictures are few: moved a little, their edges take other codes.
  "data.shift": 3,
  # Room for a decompressed image, and just two captioned ones.
  "text.sequence_length": 172,
  # Small steps, many of them.
  "instruct.global_batch_size": 8,
  "optimizer.instruct.learning_rate": 2e-3,
  "optimizer.instruct.embedding_factor": 10.0,
  "instruct.questions_per_image": 8,
  "instruct.yes_no_ratio": 3.0,
  "instruct.tasks.class_conditional": 0.01,
  "instruct.tasks.unconditional": 0.01,
  "instruct.tasks.decompression": 0.02,
  "instruct.tasks.text": 0.04,
}
# Captions name shape and colour, which no single question does; to compare a
# question with a picture is learned from descriptions first.
_READING = _STAGE2 | {
  "num_steps": 2600,
  "eval_every": 2600,
  "checkpoint_every": 1300,
  "optimizer.instruct.final_fraction": 0.5,
  "instruct.image_loss_weight": 0.15,
  "instruct.tasks.caption": 0.22,
  "instruct.tasks.vqa": 0.40,
  "instruct.tasks.described": 0.24,
  "instruct.tasks.text_to_image": 0.06,
}
_DRAWING = _STAGE2 | {
  "num_steps": 1800,
  "eval_every": 1800,
  "checkpoint_every": 900,
  "instruct.image_loss_weight": 0.5,
  "instruct.tasks.caption": 0.13,
  "instruct.tasks.vqa": 0.30,
  "instruct.tasks.described": 0.03,
  "instruct.tasks.text_to_image": 0.46,
  "evaluate": "all",
}

# Overrides of the presets of each link's own file, by preset and link.
PRESETS = {
  "": {
    "warmup": _SHARED | _TOKENIZER | {"num_steps": 200, "eval_every": 200},
    "stage1": _STAGE1 | {"num_steps": 600, "eval_every": 600},
    "reading": _READING,
    "stage2": _DRAWING,
  },
  "long": {
    "warmup": _SHARED
    | _TOKENIZER
    | _FINER
    | {"num_steps": 400, "eval_every": 400},
    # The text is little, and learned by heart when it is read more often.
    "stage1": _STAGE1
    | _FINER
    | {"num_steps": 1500, "eval_every": 500, "schedule.llm_steps": 25},
    # With time to read, there is time to draw.
    "stage2": _STAGE2
    | {
      "num_steps": 30000,
      "eval_every": 5000,
      "checkpoint_every": 2500,
      "instruct.image_loss_weight": 0.3,
      "instruct.tasks.caption": 0.2,
      "instruct.tasks.vqa": 0.38,
      "instruct.tasks.described": 0.08,
      "instruct.tasks.text_to_image": 0.22,
      "evaluate": "all",
    },
  },
  "debug": {
    "warmup": {"num_steps": 4},
    "stage1": {},
    "reading": {"data.codes": "auto"},
    "stage2": {"data.codes": "auto", "evaluate": "text"},
  },
}


def get_chain(preset: str = "") -> dict[str, ConfigDict]:
  """Returns the configs of a preset's links."""
  config_lib.check_preset(preset, PRESETS)
  base = "debug" if preset == "debug" else ""
  return {
    link: config_lib.apply_overrides(
      config_lib.load(f"{_HERE / _FILES[link]}.py:{base}"),
      {"preset": preset, **overrides},
    )
    for link, overrides in PRESETS[preset].items()
  }
