"""A visual tokenizer alone, with a codebook of its own that no LLM shares.

The baseline that unification is measured against, and the plain VQ-GAN
(arXiv 2012.09841), RQ-VAE (arXiv 2203.01941) or HQ-VAE tokenizer.

Command: python -m unicode_jax.main --config=configs/tokenizer.py
Presets: those of configs/pretrain.py, with the same images, tokenizer and
number of codes; hardware as there, time not measured.

Expected: not measured.
"""

import pathlib

from ml_collections import ConfigDict

from unicode_jax import config as config_lib


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  pretrain = config_lib.load(
    f"{pathlib.Path(__file__).with_name('pretrain.py')}:{preset}"
  )
  return config_lib.apply_overrides(
    pretrain,
    {
      "stage": "tokenizer",
      "codebook.paradigm": "private",
      # Rows of a private codebook may be redrawn: no LLM reads them.
      "codebook.restart_dead_after": max(pretrain.num_steps // 10, 1),
    },
  )
