"""Stage II: the LLM learns to read and to draw images.

Paper: UniCode, section 3 (arXiv 2403.09072).
Command: python -m unicode_jax.main --config=configs/instruct.py
It starts from a run of stage I, by default runs/pretrain-PRESET; name another
with --config.init_from=RUN, which may also be an earlier run of stage II.
Presets, as in --config=configs/instruct.py:debug

  preset      trains                                   hardware     time
  (none)      all tasks on the embedded data           2 CPU cores  7 minutes
  debug       every code path, learns nothing          2 CPU cores  1 minute
  decompress  decompression alone, as pre-training     2 CPU cores  not measured
  smollm2     SmolLM2-135M, ChatML                     2 CPU cores  25 minutes
  paper       LLaVA JSON, LLaMA-7B, Vicuna's template  TPU v5e-256  not run

"paper" was compiled for TPUs (docs/scaling.md), not run.
Baselines of the paper's tables, as settings of the same code:
  --config.instruct.vision=separate   codes have rows of their own
  --config.instruct.vision=projector --config.data.codes=none   as LLaVA

Expected: not measured; configs/quickstart.py has another mixture, measured in
docs/stage2.md. "smollm2": docs/smollm2.md.
Reported in the paper: VQAv2 53.1, VizWiz 46.2, POPE 71.8, ImageNet FID 6.72.
"""

from ml_collections import ConfigDict

from unicode_jax import config as config_lib

_ONLY_DECOMPRESSION = {
  f"instruct.tasks.{task}": float(task == "decompression")
  for task in config_lib.default_config().instruct.tasks
}

PRESETS = {
  # The embedded data on a CPU.
  "": {
    "num_steps": 1200,
    "eval_every": 400,
    "checkpoint_every": 400,
    "data.codes": "auto",
    "text.sequence_length": 192,
  },
  # Every code path in seconds, for tests; it learns nothing.
  "debug": {
    "num_steps": 8,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 4,
    "text.sequence_length": 64,
    "instruct.segments": 2,
    "instruct.global_batch_size": 8,
  },
  # The paper's image decompression by itself; go on with
  # --config=configs/instruct.py --config.init_from=RUN.
  "decompress": {
    "num_steps": 1200,
    "eval_every": 400,
    "checkpoint_every": 400,
    "data.codes": "auto",
    "text.sequence_length": 192,
    **_ONLY_DECOMPRESSION,
  },
  # SmolLM2-135M-Instruct was trained on ChatML.
  "smollm2": {
    "num_steps": 600,
    "eval_every": 300,
    "checkpoint_every": 150,
    # On a CPU all of them take longer than the training.
    "instruct.heldout_rows": 32,
    "data.codes": "auto",
    "text.sequence_length": 192,
    "instruct.template": "chatml",
    "instruct.global_batch_size": 4,
    "optimizer.instruct.learning_rate": 2e-4,
  },
  # LLaVA's recipe on Mixed-665K (arXiv 2310.03744) with drawing and
  # decompression added; name the data with --config.data.path=DIR
  # --config.data.conversations=FILE --config.data.captions=FILE, and stage I.
  "paper": {
    "num_steps": 15000,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "data.source": "llava",
    "data.flip": False,
    "data.codes": "auto",
    "data.num_workers": 8,
    "text.sequence_length": 2048,
    "instruct.template": "vicuna",
    "instruct.questions_per_image": 10,
    "instruct.global_batch_size": 128,
    "optimizer.instruct.learning_rate": 2e-5,
    "optimizer.instruct.warmup_steps": 450,
    # Elsewhere --config.platform=gpu: not on the processor by mistake.
    "platform": "tpu",
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.tensor": 2,
  },
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  start = "" if preset == "decompress" else preset
  common = {
    "stage": "instruct",
    "init_from": f"runs/pretrain-{start or 'default'}",
  }
  return config_lib.from_presets(
    {name: common | values for name, values in PRESETS.items()}, preset
  )
