"""Stage I: alternate visual tokenizer and LLM, and unify their codebooks.

Paper: UniCode, section 3 (arXiv 2403.09072).
Command: python -m unicode_jax.main --config=configs/pretrain.py
Presets, as in --config=configs/pretrain.py:debug

  preset   model                                  hardware     time
  (none)   32 px, RQ 4x4x4, 2048 tokens, d 192    2 CPU cores  about 5 minutes
  debug    16 px, RQ 2x2x2, tiny                  2 CPU cores  about 1 minute
  smollm2  32 px, RQ 4x4x4, SmolLM2-135M          2 CPU cores  about 10 minutes
  paper    256 px, HQ 8x8 + 16x16, LLaMA-7B       TPU v5e-256  not run

"paper" was compiled for TPUs (docs/scaling.md), not run.
Expected: PSNR 20.1 dB on held-out OpenMoji and 28.6 dB on the easy-VQA test
images, 86 % of the codes in use at depth 1 over the training set, held-out text
perplexity 213 (docs/stage1.md) with the defaults. "smollm2": docs/smollm2.md.
Reported in the paper for its full training: VQAv2 53.1, ImageNet FID 6.72.
"""

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

PRESETS = {
  # The defaults: embedded data on a CPU.
  "": {},
  # Every code path in seconds, for tests; it learns nothing.
  "debug": {
    "image_size": 16,
    "num_steps": 8,
    "log_every": 2,
    "eval_every": 4,
    "picture_every": 4,
    "checkpoint_every": 4,
    "data.global_batch_size": 8,
    "text.vocab_size": 384,
    "text.sequence_length": 32,
    "text.global_batch_size": 8,
    "tokenizer.depth": 2,
    "tokenizer.channels": 8,
    "tokenizer.loss.disc_channels": 8,
    "codebook.code_dim": 8,
    "codebook.sync_every": 2,
    "llm.embed_dim": 32,
    "llm.num_layers": 2,
    "llm.num_heads": 2,
    "llm.num_kv_heads": 1,
    "llm.head_dim": 16,
    "llm.mlp_dim": 64,
    "schedule.tokenizer_steps": 2,
    "schedule.llm_steps": 2,
    "schedule.finetune_steps": 2,
    "alarm.perplexity_floor": 1.0,
    "alarm.patience": 4,
  },
  # SmolLM2-135M (Allal et al. 2025). Import it with unicode_jax.convert, and
  # name what that made: --config.llm_from=DIR.
  "smollm2": {
    "text.vocab_size": 49152,
    # Two of its 17 special tokens that ordinary text never holds.
    "text.image_start": "<jupyter_start>",
    "text.image_end": "<empty_output>",
    "llm.embed_dim": 576,
    "llm.num_layers": 30,
    "llm.num_heads": 9,
    "llm.num_kv_heads": 3,
    "llm.head_dim": 64,
    "llm.mlp_dim": 1536,
    "llm.rope_theta": 100000.0,
    "llm.tie_embeddings": True,
    "llm.scan_layers": True,
    # It knows its language: few steps and small ones, to go on knowing it.
    "num_steps": 660,
    "eval_every": 220,
    "checkpoint_every": 220,
    "text.global_batch_size": 4,
    "schedule.llm_steps": 10,
    "optimizer.llm.learning_rate": 2e-5,
  },
  # The paper's size: a tokenizer of 104 M parameters, LLaMA-7B, 32000 tokens.
  # Name images and tokenizer too: --config.data.path=DIR
  # --config.text.tokenizer_path=DIR. The paper selects codes in all 4096
  # dimensions, where nearest-neighbour search collapses; that literal setting
  # is --config.codebook.code_dim=4096 --config.codebook.projection=identity.
  "paper": {
    "image_size": 256,
    "num_steps": 150000,
    "eval_every": 5000,
    "picture_every": 5000,
    "checkpoint_every": 5000,
    "data.source": "folder",
    "data.global_batch_size": 256,
    "data.crop_scale": 0.8,
    "data.num_workers": 8,
    "text.vocab_size": 32000,
    "text.sequence_length": 2048,
    "text.global_batch_size": 128,
    # Byte tokens of control characters, which text never holds: STX and ETX.
    "text.image_start": "<0x02>",
    "text.image_end": "<0x03>",
    "tokenizer.quantizer": "hq",
    "tokenizer.depth": 5,
    "tokenizer.channels": 128,
    "tokenizer.channel_multipliers": (1, 2, 4, 4),
    "tokenizer.num_res_blocks": 4,
    "tokenizer.stem_patch": 2,
    "tokenizer.attention": True,
    "tokenizer.dtype": "bfloat16",
    "tokenizer.loss.perceptual": 1.0,
    "tokenizer.loss.adversarial": 0.75,
    "tokenizer.loss.disc_start": 50000,
    "codebook.code_dim": 32,
    "llm.embed_dim": 4096,
    "llm.num_layers": 32,
    "llm.num_heads": 32,
    "llm.num_kv_heads": 32,
    "llm.head_dim": 128,
    "llm.mlp_dim": 11008,
    "llm.tie_embeddings": False,
    "llm.scan_layers": True,
    "llm.remat_policy": "dots_no_batch",
    "llm.dtype": "bfloat16",
    "schedule.tokenizer_steps": 1000,
    "schedule.llm_steps": 500,
    "schedule.finetune_steps": 5000,
    "optimizer.tokenizer.learning_rate": 1e-4,
    "optimizer.tokenizer.warmup_steps": 2000,
    "optimizer.llm.learning_rate": 2e-5,
    "optimizer.llm.warmup_steps": 2000,
    "alarm.perplexity_floor": 100.0,
    "alarm.patience": 5000,
    # Elsewhere --config.platform=gpu: not on the processor by mistake.
    "platform": "tpu",
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.tensor": 2,
  },
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  return config_lib.from_presets(PRESETS, preset)
