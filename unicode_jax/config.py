"""Configuration: the tree of defaults, its checks, overrides and JSON form.

Everything that a run depends on is one locked `ConfigDict`. Config files
(`configs/*.py`), a run's saved `config.json` and `--config.key=value` all pass
through `apply_overrides`, and every run passes through `validate`, so that a
mistake costs one line on the terminal and no waiting. It imports no JAX, and
models never see a `ConfigDict`: stages build frozen dataclasses from it.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import difflib
import fnmatch
import functools
import glob
import json
import math
import os
import pathlib
import re
import runpy
from typing import Any
import warnings

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

STAGES = ("pretrain", "tokenizer", "instruct")
# In the config of an imported language model, which no stage trained.
LLM_STAGE = "llm"
PARADIGMS = ("frozen", "dual", "language_driven", "projected", "private")
QUANTIZERS = ("rq", "vq", "hq")
TEMPLATES = ("plain", "vicuna", "chatml")
VISIONS = ("unified", "separate", "projector")
EMBEDDED_SOURCES = ("openmoji", "easy_vqa")

# Ids that can never be visual codes: 256 byte tokens and the control tokens of
# the BPE that we train (padding, begin, end, image start, image end).
RESERVED_TOKENS = 261
# The embedded text has few words: a larger vocabulary needs its own tokenizer.
MAX_TRAINED_VOCAB = 8192


class ConfigError(ValueError):
  """A config that cannot run; the message names the value and the remedy."""


class RunError(RuntimeError):
  """A run that should not go on; the message says why and what to do."""


def default_config() -> ConfigDict:
  """Returns the defaults: stage I on the embedded data, on a CPU.

  Batch sizes are global (all devices of all processes), periods are in
  optimizer steps, losses are weights of terms that are means over elements.

  Returns:
    A locked ConfigDict. None marks an optional value that is not set.
  """
  config = ConfigDict()
  # What to train: "pretrain" is stage I (tokenizer and LLM in turns, UniCode
  # section 3), "instruct" stage II (the LLM alone, on images and text),
  # "tokenizer" a visual tokenizer alone, with a private codebook.
  config.stage = "pretrain"
  # Run folder to start from, which the model and what is held out are taken
  # from (INHERITED): for "instruct" stage I's, or an earlier one of its own;
  # for "pretrain", if set, a tokenizer's, whose encoder and decoder go on.
  config.init_from = placeholder(str)
  # For "pretrain", a folder whose language model goes on, with its text
  # tokenizer: an imported one (unicode_jax.convert), or an earlier run.
  config.llm_from = placeholder(str)
  # Suites to evaluate when the training is done, separated by commas, or "all";
  # None evaluates nothing beyond the held-out losses.
  config.evaluate = placeholder(str)
  # Name of the preset that these values came from; "" is the default one.
  config.preset = ""
  # Seed of initialisation, data order and dropout.
  config.seed = 0
  # Height and width of the images, pixels.
  config.image_size = 32
  # Steps of the alternation, tokenizer and LLM together. The decoder-only steps
  # after it (schedule.finetune_steps) come on top.
  config.num_steps = 900
  # Parts of a batch of text, or of stage II, that a step computes one after the
  # other: the same step, in less memory.
  config.microbatches = 1
  # Periods, steps. Each also happens once at the end of the run.
  config.log_every = 50
  config.eval_every = 450
  config.picture_every = 450
  config.checkpoint_every = 300
  # Newest checkpoints that stay on disk.
  config.keep_checkpoints = 2
  # Platform to insist on ("cpu", "gpu", "tpu"); None takes JAX's choice.
  config.platform = placeholder(str)

  config.data = data = ConfigDict()
  # "embedded": pictures that installed packages carry; your own: "folder"
  # (images, captions), "llava" (conversations), "tfds", "arrayrecord" (what
  # unicode_jax.prepare wrote); see docs/own_data.md.
  data.source = "embedded"
  # Folder of images of any size and mode, searched recursively; for TFDS the
  # folder of prepared data sets; for "arrayrecord" a prepared folder, or a
  # pattern that matches several.
  data.path = placeholder(str)
  # JSONL with one {"image": path inside the folder, "text": caption} a line.
  data.captions = placeholder(str)
  # LLaVA-format JSON whose images lie in the folder.
  data.conversations = placeholder(str)
  # Name of a TensorFlow data set.
  data.tfds = placeholder(str)
  # Share of the images that may be broken or missing (10 always may): they are
  # named and left out. More stop the run before it begins.
  data.max_broken = 0.1
  # Stage II: folder of codes that `python -m unicode_jax.tokenize` wrote;
  # "auto" takes those of the run it goes on from, or makes one in the run
  # folder; None encodes the images at every step.
  data.codes = placeholder(str)
  # Where decoded images are kept; None is the user's cache folder.
  data.cache_dir = placeholder(str)
  # Images per tokenizer step.
  data.global_batch_size = 64
  # Embedded sets to mix, and the share of each in a batch (need not sum to 1).
  data.embedded = EMBEDDED_SOURCES
  data.weights = (0.5, 0.5)
  # Share of the images that is never trained on. easy-VQA brings its own split.
  data.heldout_fraction = 0.1
  # Share of the training images and texts that is kept from training and
  # evaluated in place of the held-out ones, which stay unseen: to choose
  # settings by.
  data.validation_fraction = 0.0
  # Augmentation: mirror half of the images; move them by up to so many pixels
  # each way, the edge repeated (stage II draws from 8 places, so that their
  # codes can be kept); crop a random square of at least this share of the area
  # (1 crops nothing; not in stage II).
  data.flip = True
  data.shift = 0
  data.crop_scale = 1.0
  # Processes that read data beside the main one.
  data.num_workers = 0

  config.text = text = ConfigDict()
  # Any Hugging Face tokenizer folder or tokenizer.json; None trains a BPE of
  # vocab_size tokens on the embedded text.
  text.tokenizer_path = placeholder(str)
  # K: rows of the LLM's table, hence visual codes before masking.
  text.vocab_size = 2048
  # Tokens in one packed sequence, and sequences per LLM step.
  text.sequence_length = 128
  text.global_batch_size = 8
  # Share of the documents that is never trained on.
  text.heldout_fraction = 0.1
  # Tokens of the vocabulary that open and close an image; never visual codes.
  text.image_start = "<image>"
  text.image_end = "</image>"

  config.tokenizer = tokenizer = ConfigDict()
  # "rq": residual (Lee et al. 2022, RQ-VAE), "vq": one code per position (Esser
  # et al. 2021, VQ-GAN), "hq": two-level (HQ-VAE), one top and four bottom
  # codes per 2x2 cell.
  tokenizer.quantizer = "rq"
  # D: codes per position.
  tokenizer.depth = 4
  # Width of the first grid; its multiple on each further, halved grid.
  tokenizer.channels = 128
  tokenizer.channel_multipliers = (1, 2)
  # Residual blocks on each grid, in the encoder and in the decoder.
  tokenizer.num_res_blocks = 1
  # Side of the patch that the first layer folds into channels, pixels
  # (space-to-depth); 1 folds nothing.
  tokenizer.stem_patch = 4
  # Self-attention on the last grid.
  tokenizer.attention = False
  # Compute type; parameters are float32.
  tokenizer.dtype = "float32"
  # Chance per image that training decodes a random depth d < D.
  tokenizer.depth_dropout = 0.0

  tokenizer.loss = loss = ConfigDict()
  # Mean absolute and mean squared error of pixels in [-1, 1].
  loss.l1 = 1.0
  loss.l2 = 1.0
  # Pulls features to codes (beta of van den Oord et al. 2017), codes to
  # features.
  loss.commitment = 0.25
  loss.codebook = 1.0
  # Distance in features of a fixed network; its weights, None for the
  # installed packages'.
  loss.perceptual = 0.0
  loss.perceptual_weights = placeholder(str)
  # PatchGAN hinge loss, on after disc_start steps of the run; critic width.
  loss.adversarial = 0.0
  loss.disc_start = 0
  loss.disc_channels = 64

  config.codebook = codebook = ConfigDict()
  # How codebook and LLM table relate: "frozen", "dual" and "language_driven"
  # are the paper's, "projected" is ours (C = E P at all times), "private" has
  # no LLM.
  codebook.paradigm = "language_driven"
  # Dimension in which codes are selected; llm.embed_dim is the paper's literal
  # setting.
  codebook.code_dim = 16
  # Map P from the LLM's table to code_dim: "pca", "random" or "identity".
  codebook.projection = "pca"
  # Rows of unit length, hence selection by cosine.
  codebook.l2_normalize = True
  # Language-driven sync, C <- decay C + (1 - decay) V(E), and its period in
  # steps of either kind.
  codebook.sync_decay = 0.9
  codebook.sync_every = 50
  # How the tokenizer trains its table: "gradient" or "ema".
  codebook.update_rule = "gradient"
  # Decays per tokenizer step, of the EMA statistics and of the depths' gains.
  codebook.ema_decay = 0.99
  codebook.gain_decay = 0.99
  # Redraw a private code that was unused for so many steps; 0 never does.
  codebook.restart_dead_after = 0

  config.llm = llm = ConfigDict()
  # Decoder-only transformer of the LLaMA family (Touvron et al. 2023).
  llm.embed_dim = 192
  llm.num_layers = 4
  llm.num_heads = 6
  # Heads of keys and values (grouped-query attention).
  llm.num_kv_heads = 2
  llm.head_dim = 32
  llm.mlp_dim = 512
  # Of the rows of a fresh table; 0.02 is usual for large models.
  llm.embedding_std = 0.02
  llm.rope_theta = 10000.0
  # Llama 3.1's stretch of the low frequencies: a factor of 1 is none; positions
  # before the stretch, and between which wavelengths it blends in.
  llm.rope_scaling = scaling = ConfigDict()
  scaling.factor = 1.0
  scaling.original_max_position = 8192
  scaling.low_freq_factor = 1.0
  scaling.high_freq_factor = 4.0
  llm.norm_eps = 1e-5
  # Positions that it was made for: for whoever serves an export, not for us.
  llm.context_length = 2048
  # Use the input table as the output head too.
  llm.tie_embeddings = True
  # Qwen2's biases, Qwen3's normalisation of queries and keys.
  llm.qkv_bias = False
  llm.qk_norm = False
  # One compiled layer for all (compiles faster) or one each (runs faster).
  llm.scan_layers = False
  # Positions that a token sees (Mistral); None for all before it.
  llm.sliding_window = placeholder(int)
  # Queries that attention takes at a time, which saves memory and, on a CPU,
  # the masked half of the work. 0 takes all at once; None takes an eighth of
  # the sequence (64 at the least) on a CPU and all at once elsewhere.
  llm.attention_block = placeholder(int)
  # What computes attention while training: "xla" everywhere, "splash" a kernel
  # for TPUs, "cudnn" one for GPUs; "auto" takes the kernel on TPUs, for
  # sequences that are multiples of 128.
  llm.attention = "auto"
  # What the backward pass keeps of each layer: "none" recomputes nothing,
  # "full" everything, "attention" all but what attention gave, "dots" all but
  # matrix products.
  llm.remat_policy = "none"
  # Compute type; parameters are float32.
  llm.dtype = "float32"

  config.schedule = schedule = ConfigDict()
  # One cycle of the alternation, steps of each kind.
  schedule.tokenizer_steps = 100
  schedule.llm_steps = 50
  # Steps of the decoder alone after the last hard sync.
  schedule.finetune_steps = 100

  config.instruct = instruct = ConfigDict()
  # Layout of conversations: "plain", "vicuna" (v1), "chatml".
  instruct.template = "plain"
  # "unified" is UniCode. Baselines: "separate" (codes get rows of their own),
  # "projector" (features through an MLP, as LLaVA; cannot draw).
  instruct.vision = "unified"
  # Train low-rank adapters of the layers' matrices instead of the LLM: their
  # rank, 0 for the whole LLM. They are scaled by lora_alpha / lora_rank, and
  # merged wherever the run is loaded.
  instruct.lora_rank = 0
  instruct.lora_alpha = 16.0
  # Segments into which decompression cuts an image, one turn each.
  instruct.segments = 4
  # Questions about one image in a conversation, at most.
  instruct.questions_per_image = 3
  # Of a question that is answered by yes or no, at most so many of the commoner
  # answer are trained on for each of the rarer, lest the wording be enough; 0
  # keeps all.
  instruct.yes_no_ratio = 0.0
  # Share of the images to draw whose condition is dropped, which
  # classifier-free guidance needs.
  instruct.condition_dropout = 0.1
  # Weight of a code of a drawn image in the loss, beside 1 for a word.
  instruct.image_loss_weight = 0.25
  # Packed sequences per step; text.sequence_length positions each.
  instruct.global_batch_size = 16
  # Rows of each held-out task and source that the last evaluation takes at the
  # most; earlier ones take 64, or so many if that is less.
  instruct.heldout_rows = 4096
  # Share of the sequences of each task (need not sum to 1). A task of which the
  # data has no example is left out, and said so.
  instruct.tasks = tasks = ConfigDict()
  tasks.decompression = 0.1
  tasks.caption = 0.1
  tasks.vqa = 0.4
  # Questions about images of which only the caption is shown: for an LLM that
  # is new to questions, the cheap way to learn what they ask.
  tasks.described = 0.0
  tasks.text_to_image = 0.2
  tasks.class_conditional = 0.05
  tasks.unconditional = 0.05
  tasks.text = 0.1

  config.optimizer = optimizer = ConfigDict()
  for name, learning_rate, clip_norm in (
    ("tokenizer", 2e-3, 1.0),
    ("llm", 1e-3, 1.0),
    ("instruct", 1e-3, 1.0),
    ("discriminator", 1e-4, 1.0),
  ):
    optimizer[name] = adamw = ConfigDict()
    # Peak, per step; linear warm-up, then cosine to this share of the peak.
    adamw.learning_rate = learning_rate
    adamw.warmup_steps = 50
    adamw.final_fraction = 0.1
    # Decoupled, on matrices only; decays of the moments, per step.
    adamw.weight_decay = 0.01
    adamw.b1 = 0.9
    adamw.b2 = 0.95
    # Largest global gradient norm.
    adamw.clip_norm = clip_norm
    if name in ("llm", "instruct"):
      # Learning rate of the embedding table, as a multiple of the others'.
      adamw.embedding_factor = 1.0

  config.alarm = alarm = ConfigDict()
  # Collapse alarm at depth 1: share of valid codes in use, perplexity in codes.
  alarm.usage_floor = 0.01
  alarm.perplexity_floor = 8.0
  # Steps below a floor before it sounds, and whether it ends the run.
  alarm.patience = 300
  alarm.stop = False

  config.recovery = recovery = ConfigDict()
  # A step whose loss or gradient is not finite changes nothing. After so many
  # of them in a row the run goes back to its newest checkpoint before them and
  # leaves out the data since; after so many such returns it stops.
  recovery.skip_limit = 20
  recovery.rewind_limit = 3
  # Gradient norms of so many times the median are reported.
  recovery.spike_factor = 10.0
  # Seconds that SIGTERM and Ctrl-C leave for a checkpoint; set it below what
  # the machines grant.
  recovery.grace_seconds = 300.0
  # Without a finished step for so many seconds, the stacks of all threads are
  # written to stalls.txt.
  recovery.stall_seconds = 1800.0

  config.mesh = mesh = ConfigDict()
  # Devices along each axis, of all processes together; one of them may be -1,
  # which takes what the others leave over. "data" splits the batch; "fsdp" the
  # batch, parameters and optimizer state; "tensor" heads, the MLP, the
  # vocabulary and, between layers, the length.
  mesh.data = -1
  mesh.fsdp = 1
  mesh.tensor = 1
  # Join the other processes of a pod or cluster, which start the same command.
  # Cloud TPU, GKE, Slurm and MPI say where they are; elsewhere the environment
  # does (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID).
  config.distributed = False
  return config.lock()


_CHOICES = {
  "stage": (*STAGES, LLM_STAGE),
  "platform": (None, "cpu", "gpu", "tpu"),
  "data.source": ("embedded", "folder", "llava", "tfds", "arrayrecord"),
  "tokenizer.quantizer": QUANTIZERS,
  "tokenizer.dtype": ("float32", "bfloat16"),
  "codebook.paradigm": PARADIGMS,
  "codebook.projection": ("pca", "random", "identity"),
  "codebook.update_rule": ("gradient", "ema"),
  "instruct.template": TEMPLATES,
  "instruct.vision": VISIONS,
  "llm.remat_policy": ("none", "dots", "dots_no_batch", "attention", "full"),
  "llm.dtype": ("float32", "bfloat16"),
  "llm.attention": ("auto", "xla", "splash", "cudnn"),
}

# Steps are counted in int32; float32 must hold sums and squares of fractions.
_MOST, _LARGEST = 10**9, 1e15

# (lowest, highest, key patterns), both ends allowed, first match counts. Other
# whole numbers are from 1 to _MOST, other fractions from 0 to _LARGEST. Sizes
# end well above any model there is, where a mistyped number would ask for all
# the memory of a machine.
_RANGES = (
  (-1, 2**20, ("mesh.*",)),
  (0, 2**31 - 1, ("seed",)),
  (0, 1024, ("data.num_workers",)),
  (0, 64, ("data.shift",)),
  (1, 2**14, ("image_size", "tokenizer.stem_patch")),
  (1, 2**24, ("text.vocab_size", "*.global_batch_size", "microbatches")),
  (1, 2**20, ("text.sequence_length", "llm.mlp_dim", "codebook.code_dim")),
  (1, 2**17, ("llm.embed_dim", "llm.head_dim", "*.channels")),
  (1, 4096, ("llm.num_*", "tokenizer.loss.disc_channels")),
  (
    1,
    256,
    (
      "tokenizer.depth",
      "tokenizer.num_res_blocks",
      "tokenizer.channel_multipliers",
    ),
  ),
  (
    0,
    _MOST,
    (
      "instruct.lora_rank",
      "llm.attention_block",
      "tokenizer.loss.disc_start",
      "codebook.restart_dead_after",
      "schedule.finetune_steps",
      "optimizer.*.warmup_steps",
      "recovery.rewind_limit",
    ),
  ),
  (1, _LARGEST, ("llm.rope_theta", "llm.rope_scaling.factor")),
  (1e-12, 1, ("llm.norm_eps",)),
  (1e-12, 1e3, ("llm.embedding_std",)),
  (
    0,
    1,
    (
      "data.max_broken",
      "tokenizer.depth_dropout",
      "instruct.condition_dropout",
      "codebook.*_decay",
      "optimizer.*.final_fraction",
      "alarm.usage_floor",
    ),
  ),
  (0, 0.99999, ("optimizer.*.b?",)),
  (1e-12, _LARGEST, ("llm.rope_scaling.*_factor", "*.clip_norm")),
  (1, _LARGEST, ("recovery.spike_factor",)),
  (0.1, _LARGEST, ("recovery.*_seconds",)),
  (0.01, 0.9, ("*.heldout_fraction",)),
  (0, 0.9, ("data.validation_fraction",)),
  (0.01, 1, ("data.crop_scale",)),
)

# What an out-of-range value of these probably meant.
_HINTS = {
  "codebook.sync_every": "; never to sync, set codebook.sync_decay=1",
  "schedule.llm_steps": "; to train the tokenizer alone, use "
  "--config=configs/tokenizer.py",
}

# Combinations that cannot be: (whether `c` is broken, message). Messages are
# formatted with c (the config), grid, downsampling and codes. First what no
# model can have, and so no run that is read:
_IMPOSSIBLE_MODELS = (
  (
    lambda c: c.image_size % downsampling(c),
    "image_size={c.image_size} is not a multiple of the tokenizer's "
    "downsampling {downsampling} (tokenizer.stem_patch="
    "{c.tokenizer.stem_patch} times 2 for each but the first of "
    "tokenizer.channel_multipliers={c.tokenizer.channel_multipliers}): set "
    "image_size to a multiple of {downsampling} or change the downsampling",
  ),
  (
    lambda c: (
      c.tokenizer.quantizer == "hq" and (c.image_size // downsampling(c)) % 2
    ),
    "tokenizer.quantizer='hq' needs an even grid for its 2x2 cells, but "
    "image_size={c.image_size} over downsampling {downsampling} gives "
    "{grid}x{grid}: set image_size to a multiple of {twice}",
  ),
  (
    lambda c: c.tokenizer.quantizer == "vq" and c.tokenizer.depth != 1,
    "tokenizer.depth={c.tokenizer.depth} with tokenizer.quantizer='vq', which "
    "has one code per position: set tokenizer.depth=1 or "
    "tokenizer.quantizer='rq'",
  ),
  (
    lambda c: c.tokenizer.quantizer == "hq" and c.tokenizer.depth != 5,
    "tokenizer.depth={c.tokenizer.depth} with tokenizer.quantizer='hq', whose "
    "cells have one top and four bottom codes: set tokenizer.depth=5",
  ),
  (
    lambda c: (c.codebook.paradigm == "private") != (c.stage == "tokenizer"),
    "codebook.paradigm={c.codebook.paradigm!r} with stage={c.stage!r}: a "
    "private codebook belongs to stage 'tokenizer' and no other; use "
    "--config=configs/tokenizer.py for it, and codebook.paradigm="
    "'language_driven' (or frozen, dual, projected) in stage I",
  ),
  (
    lambda c: (
      c.stage in ("pretrain", "instruct")
      and c.codebook.code_dim > c.llm.embed_dim
    ),
    "codebook.code_dim={c.codebook.code_dim} is larger than llm.embed_dim="
    "{c.llm.embed_dim}, from which codes are projected: set codebook.code_dim "
    "to at most {c.llm.embed_dim} (16 to 32 works best)",
  ),
  (
    lambda c: (
      c.stage in ("pretrain", "instruct")
      and c.codebook.projection == "identity"
      and c.codebook.code_dim != c.llm.embed_dim
    ),
    "codebook.projection='identity' with codebook.code_dim="
    "{c.codebook.code_dim} and llm.embed_dim={c.llm.embed_dim}: set "
    "codebook.code_dim={c.llm.embed_dim} or codebook.projection='pca'",
  ),
  (
    lambda c: c.stage != LLM_STAGE and codes(c) <= c.codebook.code_dim,
    "text.vocab_size={c.text.vocab_size} leaves {codes} ids for images, after "
    "about {reserved} control and byte tokens; codebook.code_dim="
    "{c.codebook.code_dim} needs more codes than dimensions: set "
    "text.vocab_size to at least {smallest_vocab}",
  ),
  (
    lambda c: c.llm.num_heads % c.llm.num_kv_heads,
    "llm.num_heads={c.llm.num_heads} is not a multiple of llm.num_kv_heads="
    "{c.llm.num_kv_heads}: each key/value head serves equally many query heads",
  ),
  (
    lambda c: c.llm.head_dim % 2,
    "llm.head_dim={c.llm.head_dim} is odd, but rotary embeddings turn pairs: "
    "set an even llm.head_dim",
  ),
  (
    lambda c: c.instruct.lora_rank > c.llm.embed_dim,
    "instruct.lora_rank={c.instruct.lora_rank} is more than the matrices have, "
    "llm.embed_dim={c.llm.embed_dim}: set it to 4 to 64 or so",
  ),
  (
    lambda c: (
      c.llm.rope_scaling.factor > 1
      and c.llm.rope_scaling.low_freq_factor
      >= c.llm.rope_scaling.high_freq_factor
    ),
    "llm.rope_scaling.low_freq_factor={c.llm.rope_scaling.low_freq_factor} "
    "must be below llm.rope_scaling.high_freq_factor="
    "{c.llm.rope_scaling.high_freq_factor}: between them the stretch blends in",
  ),
)
# And what cannot be trained.
_IMPOSSIBLE = (
  (
    lambda c: c.data.shift >= c.image_size,
    "data.shift={c.data.shift} moves images of image_size={c.image_size} out "
    "of sight: set it to a few pixels",
  ),
  (
    lambda c: c.tokenizer.loss.l1 + c.tokenizer.loss.l2 == 0,
    "tokenizer.loss.l1=0 and tokenizer.loss.l2=0 leave nothing to reconstruct: "
    "set one of them above 0",
  ),
  (
    lambda c: (
      c.codebook.restart_dead_after > 0 and c.codebook.paradigm != "private"
    ),
    "codebook.restart_dead_after={c.codebook.restart_dead_after} would "
    "overwrite rows that the LLM owns: set it to 0, or use "
    "codebook.paradigm='private'",
  ),
  (
    lambda c: (
      c.codebook.update_rule == "ema"
      and c.codebook.paradigm in ("frozen", "projected")
    ),
    "codebook.update_rule='ema' with codebook.paradigm="
    "{c.codebook.paradigm!r}, which trains no table of its own: set "
    "codebook.update_rule='gradient'",
  ),
  (
    lambda c: (
      c.stage not in ("tokenizer", "instruct")
      and c.text.tokenizer_path is None
      and c.text.vocab_size > MAX_TRAINED_VOCAB
    ),
    "text.vocab_size={c.text.vocab_size} without text.tokenizer_path: the "
    "embedded text gives a few thousand tokens at the most; set "
    "text.tokenizer_path=DIR to the Hugging Face tokenizer of that vocabulary",
  ),
  (
    lambda c: (
      c.stage == "pretrain"
      and c.num_steps < c.schedule.tokenizer_steps + c.schedule.llm_steps
    ),
    "num_steps={c.num_steps} ends within the first cycle of "
    "schedule.tokenizer_steps={c.schedule.tokenizer_steps} and "
    "schedule.llm_steps={c.schedule.llm_steps}: train at least one whole cycle",
  ),
  (
    lambda c: c.tokenizer.loss.adversarial > 0 and c.image_size % 8,
    "tokenizer.loss.adversarial={c.tokenizer.loss.adversarial} with image_size="
    "{c.image_size}, which the critic cannot halve three times: set image_size "
    "to a multiple of 8",
  ),
  (
    lambda c: c.tokenizer.loss.perceptual > 0 and c.image_size < 16,
    "tokenizer.loss.perceptual={c.tokenizer.loss.perceptual} with image_size="
    "{c.image_size}, too small for its network: set image_size to at least 16",
  ),
  (
    lambda c: c.text.image_start == c.text.image_end,
    "text.image_start and text.image_end are both {c.text.image_start!r}: name "
    "two different tokens of the vocabulary",
  ),
  (
    lambda c: c.alarm.perplexity_floor > c.text.vocab_size,
    "alarm.perplexity_floor={c.alarm.perplexity_floor} is above the number of "
    "codes, text.vocab_size={c.text.vocab_size}: the alarm would never be "
    "quiet; lower it",
  ),
  *(
    (
      lambda c, axis=axis: c.mesh[axis] == 0,
      f"mesh.{axis}=0: set the number of devices along it, or -1 for all that "
      "the others leave over",
    )
    for axis in ("data", "fsdp", "tensor")
  ),
  (
    lambda c: c.llm.attention == "splash" and c.text.sequence_length % 128,
    "llm.attention='splash' with text.sequence_length={c.text.sequence_length}"
    ": it takes multiples of 128; set llm.attention='auto', or another length",
  ),
  *(
    (
      lambda c, kernel=kernel, platform=platform: (
        c.llm.attention == kernel and c.platform not in (None, platform)
      ),
      f"llm.attention={kernel!r} with platform={{c.platform!r}}: it runs on "
      f"platform={platform!r}; set llm.attention='auto'",
    )
    for kernel, platform in (("splash", "tpu"), ("cudnn", "gpu"))
  ),
  (
    lambda c: c.llm.attention == "cudnn" and c.llm.dtype != "bfloat16",
    "llm.attention='cudnn' with llm.dtype={c.llm.dtype!r}: it takes bfloat16",
  ),
  (
    lambda c: [*c.mesh.values()].count(-1) > 1,
    "mesh.data={c.mesh.data}, mesh.fsdp={c.mesh.fsdp}, mesh.tensor="
    "{c.mesh.tensor}: only one of them can take what the others leave over",
  ),
  *(
    (
      lambda c, source=source, key=key: (
        c.data.source == source and c.data[key] is None
      ),
      f"data.source={source!r} needs {what}: set data.{key}=...",
    )
    for source, key, what in (
      ("folder", "path", "the folder of images"),
      ("llava", "path", "the folder of images"),
      ("llava", "conversations", "the JSON file of conversations"),
      ("tfds", "tfds", "the name of a data set"),
      ("arrayrecord", "path", "the --out of python -m unicode_jax.prepare"),
    )
  ),
  *(
    (
      lambda c, key=key, sources=sources: (
        c.data[key] is not None and c.data.source not in sources
      ),
      f"data.{key} is set, but data.source={{c.data.source!r}} does not read "
      f"it: set data.source={' or '.join(map(repr, sources))}",
    )
    for key, sources in (
      ("path", ("folder", "llava", "tfds", "arrayrecord")),
      ("captions", ("folder", "llava")),
      ("conversations", ("llava",)),
      ("tfds", ("tfds",)),
    )
  ),
  (
    lambda c: c.stage == "instruct" and c.init_from is None,
    "stage 'instruct' starts from a run of stage I: train one with "
    "--config=configs/pretrain.py --workdir=RUN and set init_from=RUN",
  ),
  (
    lambda c: c.stage != "pretrain" and c.llm_from is not None,
    "llm_from={c.llm_from!r} with stage={c.stage!r}: only stage I starts from "
    "a language model; leave it unset",
  ),
  (
    lambda c: c.stage not in INHERITED and c.init_from is not None,
    "init_from={c.init_from!r} is not read by stage {c.stage!r}: leave it "
    "unset",
  ),
  (
    lambda c: c.stage != "instruct" and c.data.codes is not None,
    "data.codes={c.data.codes!r} is not read by stage {c.stage!r}, which "
    "trains the tokenizer: leave it unset",
  ),
  (
    lambda c: c.instruct.vision == "projector" and c.data.codes is not None,
    "data.codes={c.data.codes!r} with instruct.vision='projector', which reads "
    "features, not codes: leave data.codes unset",
  ),
  (
    lambda c: c.instruct.lora_rank and not c.instruct.lora_alpha,
    "instruct.lora_alpha=0 with instruct.lora_rank={c.instruct.lora_rank} "
    "leaves nothing to learn: set it above 0",
  ),
  (
    lambda c: c.instruct.lora_rank and c.instruct.vision == "separate",
    "instruct.lora_rank={c.instruct.lora_rank} with instruct.vision='separate' "
    "would leave the new rows of the token table as they are drawn: set "
    "lora_rank=0",
  ),
  (
    lambda c: c.stage == "instruct" and not any(c.instruct.tasks.values()),
    "instruct.tasks are all 0: give one of them a share",
  ),
  (
    lambda c: 0 < c.instruct.yes_no_ratio < 1,
    "instruct.yes_no_ratio={c.instruct.yes_no_ratio} would leave fewer of the "
    "commoner answer than of the rarer: set it to 1 or more, or to 0 to keep "
    "all questions",
  ),
  (
    lambda c: c.stage == "instruct" and c.instruct.segments > positions(c),
    "instruct.segments={c.instruct.segments} cuts an image of {positions} "
    "positions: set it to at most {positions}",
  ),
  (
    lambda c: (
      set(c.data.embedded) - {*EMBEDDED_SOURCES}
      or len(set(c.data.embedded)) < len(c.data.embedded)
    ),
    "data.embedded={c.data.embedded} must name one or more of "
    f"{EMBEDDED_SOURCES}, each once",
  ),
  (
    lambda c: (
      len(c.data.weights) != len(c.data.embedded)
      or min(c.data.weights) < 0
      or sum(c.data.weights) <= 0
    ),
    "data.weights={c.data.weights} must hold one share, 0 or more and not all "
    "0, for each of data.embedded={c.data.embedded}",
  ),
)

# What a value must be, by the type of its key.
_WANTED = {
  int: "a whole number such as 100",
  float: "a finite number such as 0.1",
  bool: "True or False",
  str: "text",
}

# Paths that must exist when set, and what must be there.
_PATHS = (
  (
    "data.path",
    lambda p: any(map(os.path.isdir, [p, *glob.iglob(p, recursive=True)])),
    "a folder",
  ),
  ("data.captions", os.path.isfile, "a file"),
  ("data.conversations", os.path.isfile, "a file"),
  ("data.codes", lambda p: p == "auto" or os.path.isdir(p), "a folder"),
  ("text.tokenizer_path", os.path.exists, "a file or folder"),
  ("tokenizer.loss.perceptual_weights", os.path.exists, "a file or folder"),
)
# Where "~" is the user's own folder.
FOLDERS = {"init_from", "llm_from", "data.cache_dir", *(p[0] for p in _PATHS)}


def downsampling(config: ConfigDict) -> int:
  """Returns the pixels per side of one position of the tokenizer's grid."""
  tokenizer = config.tokenizer
  return tokenizer.stem_patch * 2 ** (len(tokenizer.channel_multipliers) - 1)


def positions(config: ConfigDict) -> int:
  """Returns the positions that an image takes where the LLM reads it."""
  grid = config.image_size // downsampling(config)
  return (grid // (2 if config.tokenizer.quantizer == "hq" else 1)) ** 2


def total_steps(config: ConfigDict) -> int:
  """Returns the steps of a run, stage I's finetune of the decoder included."""
  finetune = config.schedule.finetune_steps if config.stage == "pretrain" else 0
  return config.num_steps + finetune


def codes(config: ConfigDict) -> int:
  """Returns about how many ids may be visual codes."""
  reserved = 0 if config.codebook.paradigm == "private" else RESERVED_TOKENS
  return config.text.vocab_size - reserved


def validate(config: ConfigDict) -> ConfigDict:
  """Checks everything that can be checked without a device.

  Args:
    config: A config, from `default_config` or a user's own file.

  Returns:
    The same config.

  Raises:
    ConfigError: If a key is unknown or missing, or a value is of the wrong
      type, outside its range or set, or impossible beside another.
  """
  check_model(config)
  _check_choice("stage", config.stage, STAGES)
  _check_possible(config, _IMPOSSIBLE)
  values = flatten(config)
  for key, exists, what in _PATHS:
    if values[key] is not None and not exists(values[key]):
      raise ConfigError(
        f"{key}={_shown(values[key])} is not {what}: correct the path"
      )
  return config


def check_model(config: ConfigDict) -> ConfigDict:
  """Checks every value by itself, and whether there can be such a model.

  That is what can be asked of the config of a run that was trained elsewhere,
  whose data may be gone, before anything is made of it.

  Args:
    config: A config, from anywhere.

  Returns:
    The same config.

  Raises:
    ConfigError: As `validate`, but for data, paths and what only training
      needs.
  """
  values = flatten(config)
  for key, value in values.items():
    _check_type(key, value)
  for key in _schema():
    if key not in values:
      raise ConfigError(
        f"{key} is missing: start from unicode_jax.config.default_config()"
      )
  for key, choices in _CHOICES.items():
    _check_choice(key, values[key], choices)
  for key, value in values.items():
    _check_range(key, value)
  _check_possible(config, _IMPOSSIBLE_MODELS)
  return config


def _check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
  """Raises ConfigError where a value is none of a few."""
  if value not in choices:
    raise ConfigError(
      f"{key}={_shown(value)} must be one of "
      + ", ".join(repr(choice) for choice in choices)
    )


def _check_possible(config: ConfigDict, impossible) -> None:
  """Raises ConfigError where one of some combinations is the config's."""
  scale = downsampling(config)
  for broken, message in impossible:
    if broken(config):
      raise ConfigError(
        message.format(
          c=config,
          downsampling=scale,
          twice=2 * scale,
          grid=config.image_size // scale,
          positions=positions(config),
          codes=codes(config),
          reserved=RESERVED_TOKENS,
          smallest_vocab=1
          + config.codebook.code_dim
          + config.text.vocab_size
          - codes(config),
        )
      )


# What a stage takes from the run that it starts from: the model, and what is
# held out.
INHERITED = {
  "pretrain": (
    "image_size",
    "data.heldout_fraction",
    "data.validation_fraction",
    "tokenizer",
    "codebook.code_dim",
    "codebook.l2_normalize",
  ),
  "instruct": (
    "image_size",
    "data.heldout_fraction",
    "data.validation_fraction",
    "text.tokenizer_path",
    "text.vocab_size",
    "text.heldout_fraction",
    "text.image_start",
    "text.image_end",
    "tokenizer",
    "codebook",
    "llm",
  ),
}
# Stages that a stage can start from, and how such a run is made.
_STARTS = {
  "pretrain": (("tokenizer",), "--config=configs/tokenizer.py"),
  "instruct": (("pretrain", "instruct"), "--config=configs/pretrain.py"),
}
# Of these, what changes speed and memory alone and may differ. The visual
# tokenizer's type is none of them: features that are rounded take other codes.
_RUNTIME = (
  "llm.scan_layers",
  "llm.attention",
  "llm.attention_block",
  "llm.remat_policy",
  "llm.dtype",
)


def inherit(
  config: ConfigDict,
  chosen: Sequence[str] = (),
  start: ConfigDict | None = None,
) -> ConfigDict:
  """Gives a config the model of the run that it starts from.

  Args:
    config: Any config; only one with `init_from` changes.
    chosen: Dotted keys that the user set.
    start: Config of that run; None reads it from `config.init_from`.

  Returns:
    A new, locked config.

  Raises:
    ConfigError: If there is nothing fit to start from, or the user set a key
      that comes from there to another value.
  """
  if config.llm_from is not None and config.stage == "pretrain":
    config = _inherit_llm(config, chosen)
  if config.init_from is None or config.stage not in INHERITED:
    return config
  where = f"init_from={config.init_from!r}"
  if start is None:
    start = read_run(
      config.init_from,
      f"train {_STARTS[config.stage][1]} with --workdir=RUN and set init_from="
      "RUN",
    )
  stages, remedy = _STARTS[config.stage]
  if start.stage not in stages:
    raise ConfigError(
      f"{where} is a run of stage {start.stage!r}, from which stage "
      f"{config.stage!r} cannot start: name a run of {remedy}"
    )
  values = flatten(start)
  if config.stage == "instruct":
    # Files that the start was made from: it has its own copy of the text
    # tokenizer, and no pixels are compared any more.
    values["text.tokenizer_path"] = None
    values["tokenizer.loss.perceptual_weights"] = None
  return _take(config, values, INHERITED[config.stage], chosen, where)


def _inherit_llm(config: ConfigDict, chosen: Sequence[str]) -> ConfigDict:
  """Gives stage I the language model of `llm_from`, and its tokenizer."""
  where = f"llm_from={config.llm_from!r}"
  if not os.path.isfile(os.path.join(config.llm_from, "config.json")):
    raise ConfigError(
      f"{where} holds no language model (no config.json in it): import one "
      "with python -m unicode_jax.convert --path=DIR --out=RUN"
    )
  start = read_run(config.llm_from)
  if start.stage == "tokenizer" or (
    start.stage == "instruct" and start.instruct.vision != "unified"
  ):
    raise ConfigError(
      f"{where} is a run of stage {start.stage!r} with instruct.vision="
      f"{start.instruct.vision!r}, which has no language model to go on with: "
      "name an imported one, or a run of stage I"
    )
  values = flatten(start)
  values["text.tokenizer_path"] = os.path.join(
    config.llm_from, "text_tokenizer"
  )
  keys = ["llm", "text.vocab_size", "text.tokenizer_path"]
  if start.stage in ("pretrain", "instruct"):  # Which know of images.
    keys += ["text.image_start", "text.image_end"]
  return _take(config, values, keys, chosen, where)


def _take(
  config: ConfigDict,
  values: Mapping[str, Any],
  keys: Sequence[str],
  chosen: Sequence[str],
  where: str,
) -> ConfigDict:
  """Takes keys, or all below them, from another config's values."""
  wanted, inherited = flatten(config), {}
  for key, value in values.items():
    if not any(key == k or key.startswith(k + ".") for k in keys):
      continue
    if key not in chosen:
      inherited[key] = value
    elif key not in _RUNTIME and wanted[key] != value:
      raise ConfigError(
        f"{key}={wanted[key]!r}, but the run goes on with the model of "
        f"{where}, where it is {value!r}: leave it unset, or train that model "
        "with it"
      )
  return apply_overrides(config, inherited)


def fill_mesh(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Returns the sizes of a mesh, with what is left over in place of -1."""
  known = math.prod(size for size in sizes.values() if size != -1)
  rest = num_devices // known
  return {axis: rest if n == -1 else n for axis, n in sizes.items()}


def check_devices(
  config: ConfigDict,
  num_devices: int,
  num_processes: int = 1,
  num_slices: int = 1,
) -> None:
  """Checks batches and mesh against the devices there are.

  Args:
    config: A validated config.
    num_devices: Devices of all processes together.
    num_processes: Which have them.
    num_slices: Of which they are, with as many devices each.

  Raises:
    ConfigError: If a batch or the mesh does not split over the devices.
  """
  sizes = dict(config.mesh)
  filled = fill_mesh(sizes, num_devices)
  if math.prod(filled.values()) != num_devices:
    chosen = [f"mesh.{axis}={n}" for axis, n in sizes.items() if n > 1]
    if -1 in sizes.values():
      fitting = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
      remedy = f"use one that divides them ({', '.join(map(str, fitting))})"
      if len(chosen) > 1:
        remedy += ", all of them together"
    else:
      remedy = "set mesh.data=-1, which takes what the others leave over"
    of = f" of {num_processes} processes" if num_processes > 1 else ""
    raise ConfigError(
      f"{' x '.join(chosen) or 'mesh.data=1'} does not cover the {num_devices} "
      f"device{'s' if num_devices > 1 else ''}{of}: {remedy}"
    )
  tensor = filled["tensor"]
  if num_devices // num_slices % tensor:
    raise ConfigError(
      f"mesh.tensor={tensor} does not divide the {num_devices // num_slices} "
      f"devices of each of {num_slices} slices: set it to a divisor of them"
    )
  if config.stage != "tokenizer" and config.llm.num_heads % tensor:
    raise ConfigError(
      f"llm.num_heads={config.llm.num_heads} does not split over mesh.tensor="
      f"{tensor}: set mesh.tensor to a divisor of it"
    )
  shards = num_devices // tensor
  groups = {"instruct": ("instruct",), "tokenizer": ("data",)}
  for name in groups.get(config.stage, ("data", "text")):
    batch = config[name].global_batch_size
    parts = shards * (1 if name == "data" else config.microbatches)
    if batch % parts:
      times = " times microbatches" if parts > shards else ""
      raise ConfigError(
        f"{name}.global_batch_size={batch} does not split over {shards} "
        f"devices (mesh.data x mesh.fsdp{times}): set it to a multiple of "
        f"{parts}, such as {parts * math.ceil(batch / parts)}"
      )


# (setting, lowest, highest, remedy), both ends allowed.
_SAMPLING = (
  ("temperature", 0, 1e6, "use a number of at least 0; 0 is greedy"),
  ("top_k", 0, _MOST, "use 0 (all ids) or more"),
  ("top_p", 1e-9, 1, "use a number in (0, 1]; 1 keeps all ids"),
  ("guidance", 0, 1e6, "use a number of at least 0; 1 is off"),
  ("max_new_tokens", 1, 2**16, "use at least 1, and what memory holds"),
)


def check_sampling(settings: Mapping[str, float]) -> None:
  """Checks settings of `sampling.SamplingConfig`, without importing JAX.

  Args:
    settings: Values by name; others than SamplingConfig's are passed over.

  Raises:
    ConfigError: If one is out of its range, or no whole number where it must.
  """
  for name, low, high, remedy in _SAMPLING:
    value = settings.get(name, high)
    if not low <= value <= high:
      raise ConfigError(f"{name}={value}: {remedy}")
    if name in ("top_k", "max_new_tokens") and value != int(value):
      raise ConfigError(f"{name}={value}: use a whole number")


def apply_overrides(
  config: ConfigDict, overrides: Mapping[str, Any]
) -> ConfigDict:
  """Sets dotted keys, checking names and types.

  Args:
    config: The config to start from; it is not changed.
    overrides: Values by dotted key. Text is read as the key's type, as from a
      command line: `3e-4`, `true`, `1,2,4`, `none` where None is allowed.

  Returns:
    A new, locked config; not yet validated.

  Raises:
    ConfigError: If a key is unknown, naming the nearest ones, or a value has
      the wrong type.
  """
  config = config.copy_and_resolve_references()
  for key, value in overrides.items():
    _check_key(key)
    if isinstance(value, str):
      value = _read(key, value)
    value = _check_type(key, value)
    if isinstance(value, str) and key in FOLDERS:
      check_folder(key, value)
      value = os.path.expanduser(value)
    section, _, leaf = key.rpartition(".")
    holder = functools.reduce(getattr, filter(None, section.split(".")), config)
    with holder.unlocked():
      holder[leaf] = value
  return config.lock()


def check_folder(name: str, value: str) -> None:
  """Refuses the address of a bucket where a file or folder is wanted.

  Args:
    name: Of the flag or setting.
    value: What it was set to.

  Raises:
    ConfigError: If it is an address.
  """
  if "://" in value:
    raise ConfigError(
      f"{name}={value} is no folder: mount the bucket (gcsfuse for gs://) on "
      "every host, and name the folder"
    )


def split_overrides(
  arguments: Sequence[str], flag: str = "config"
) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.key=value` (or `--config.key value`) off a command line.

  Args:
    arguments: A command line.
    flag: Name of the flag that holds the config.

  Returns:
    The other arguments, and the overrides as text by dotted key; the last of
    several for one key counts.

  Raises:
    ConfigError: If an override has no value.
  """
  rest, overrides = [], {}
  remaining = iter(arguments)
  for argument in remaining:
    name, equals, value = argument.partition("=")
    if not name.startswith((f"--{flag}.", f"-{flag}.")):
      rest.append(argument)
      continue
    key = name.lstrip("-").removeprefix(f"{flag}.")
    if not equals:
      value = next(remaining, "--")
      if value.startswith("--"):
        raise ConfigError(f"{name} has no value: write {name}=VALUE")
    overrides[key] = value
  return rest, overrides


def flatten(
  tree: ConfigDict | dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
  """Returns the leaves of a config by dotted key, each with `prefix`."""
  leaves = {}
  for key, value in tree.items():
    if isinstance(value, ConfigDict | dict) and value:
      leaves |= flatten(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves


# Keys that may differ when a run is resumed: they change its numbers by no more
# than rounding.
FREE_KEYS = (
  "log_every",
  "eval_every",
  "picture_every",
  "checkpoint_every",
  "keep_checkpoints",
  "platform",
  "data.cache_dir",
  "data.codes",
  "evaluate",
  "mesh",
  "distributed",
  "data.num_workers",
  "microbatches",
  "llm.attention",
  "llm.attention_block",
  "llm.remat_policy",
  "alarm",
  "recovery",
)


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
  """Compares what decides the numbers of two runs.

  Args:
    old: Of `flatten`, perhaps read from JSON, which knows no tuples.
    new: Of `flatten`.

  Returns:
    Key, old and new value of each that differs; None stands for a missing one.
  """
  old, new = (json.loads(json.dumps(dict(values))) for values in (old, new))
  return [
    (key, old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
    and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
  ]


def to_json(config: ConfigDict) -> str:
  """Returns the resolved config as JSON text that `load` reads back."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def parse_json(text: str) -> Any:
  """Returns what JSON text says.

  Raises:
    ValueError: It is not JSON, or nested so deeply that it cannot be read.
  """
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


# Keys of earlier versions that changed nothing but how a model began.
_RETIRED = ("codebook.embedding_boost",)


def from_json(path: str | os.PathLike[str]) -> ConfigDict:
  """Reads a config that `to_json` wrote.

  Args:
    path: JSON file. Keys that it lacks keep their defaults.

  Returns:
    A locked config, equal to the one written.

  Raises:
    ConfigError: If the file holds no JSON object, or a key or type is wrong.
  """
  with open(path, encoding="utf-8") as file:
    try:
      tree = parse_json(file.read())
    except ValueError as error:
      raise ConfigError(f"{path} is not JSON: {error}") from None
  if not isinstance(tree, dict):
    raise ConfigError(
      f"{path} holds {type(tree).__name__}, not a config object"
    )
  values = flatten(tree)
  for key in _RETIRED:
    values.pop(key, None)
  for key, value in values.items():
    _check_type(key, value)  # Text in JSON is text, not something to read.
  return apply_overrides(default_config(), values)


def read_run(
  workdir: str | os.PathLike[str],
  remedy: str = "name the --workdir of a run of unicode_jax.main",
) -> ConfigDict:
  """Returns the resolved config of a run.

  Args:
    workdir: Run folder.
    remedy: What to do where there is none.

  Raises:
    ConfigError: If the folder holds no run.
  """
  workdir = pathlib.Path(os.path.expanduser(workdir))
  path = workdir / "config.json"
  if not path.is_file():
    links = sorted(
      workdir.glob("*/config.json"), key=lambda found: found.stat().st_mtime
    )
    if links:
      names = ", ".join(str(found.parent) for found in links)
      remedy = f"of its links, name one: {names}"
    raise ConfigError(
      f"{workdir} holds no run (no config.json in it): {remedy}"
    )
  if b'"model_type"' in path.read_bytes():
    raise ConfigError(
      f"{workdir} holds a Hugging Face model, not a run: import its language "
      f"model with python -m unicode_jax.convert --path={workdir} --out=RUN"
    )
  try:
    return check_model(from_json(path))
  except ConfigError as error:
    raise ConfigError(f"{path} describes no run: {error}") from None


def starts(config: ConfigDict) -> Iterator[tuple[pathlib.Path, ConfigDict]]:
  """Yields the runs that a run of stage II goes on from, as far as they exist.

  Args:
    config: Of that run, or of another stage, which yields nothing.

  Yields:
    Run folder and config, the nearest first; that of stage I is the last.
  """
  seen = set()
  while config.stage == "instruct" and config.init_from is not None:
    workdir = pathlib.Path(config.init_from)
    # One that names itself would be followed for ever.
    if workdir in seen or not (workdir / "config.json").is_file():
      return
    seen.add(workdir)
    config = read_run(workdir)
    yield workdir, config


def load(spec: str) -> ConfigDict:
  """Loads `FILE.py`, `FILE.py:PRESET` or a run's `config.json`.

  Args:
    spec: Value of the flag --config.

  Returns:
    A locked config, not yet validated.

  Raises:
    ConfigError: If there is no such file or preset.
  """
  path, preset = _split_spec(spec)
  if path.endswith(".json"):
    return from_json(path)
  get_config = runpy.run_path(path).get("get_config")
  config = get_config(preset) if callable(get_config) else None
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"--config={spec}: {path!r} defines no get_config(preset) that returns a "
      "ConfigDict: write one, as configs/pretrain.py does"
    )
  return config


def _split_spec(spec: str) -> tuple[str, str]:
  """Returns the file that --config names, which is there, and the preset."""
  path, _, preset = spec.partition(":") if ".py:" in spec else (spec, "", "")
  # Nothing but .py is run as a program, and JSON is never.
  if not os.path.isfile(path) or not path.endswith((".py", ".json")):
    what = "no .py or .json" if os.path.isfile(path) else "no file"
    raise ConfigError(
      f"--config={spec}: there is {what} {path!r}; name "
      "configs/quickstart.py, pretrain.py, instruct.py or tokenizer.py there, "
      "or a run's config.json"
    )
  return path, preset


def load_links(spec: str) -> dict[str, ConfigDict]:
  """Loads what --config names: one config, or a chain of them.

  Args:
    spec: As of `load`; the file may define `get_chain(preset)` instead of
      `get_config`, which returns configs by link, each to start from the one
      before.

  Returns:
    Locked configs by link, in order; one under "" where there is no chain.

  Raises:
    ConfigError: As `load`.
  """
  path, preset = _split_spec(spec)
  if path.endswith(".py"):
    get_chain = runpy.run_path(path).get("get_chain")
    if get_chain is not None:
      return dict(get_chain(preset))
  return {"": load(spec)}


def resolve_links(
  links: Mapping[str, ConfigDict],
  overrides: Mapping[str, str],
  workdir: str,
) -> dict[str, ConfigDict]:
  """Applies overrides to a chain, hands models on, and checks every link.

  Args:
    links: Of `load_links`.
    overrides: Text by dotted key; "LINK.KEY" is for one link, any other key for
      all.
    workdir: Run folder; that of a link lies inside.

  Returns:
    Resolved, validated configs by link.

  Raises:
    ConfigError: If one of them cannot run; names the link.
  """
  if "" not in links:  # It is a chain.
    known = {*links, *default_config()}
    for key in overrides:
      section, dot, _ = key.partition(".")
      if dot and section not in known:
        raise ConfigError(
          f"{key}: there is neither a link nor a section {section!r}: links "
          f"are {', '.join(links)}"
        )
  resolved: dict[str, ConfigDict] = {}
  before = None
  for name, config in links.items():
    chosen = {}
    for key, value in overrides.items():
      link, _, rest = key.partition(".")
      if link not in links:
        chosen.setdefault(key, value)
      elif link == name:
        chosen[rest] = value
    try:
      config = apply_overrides(config, chosen)
      if before is not None:
        if f"{name}.init_from" in overrides:
          raise ConfigError(
            f"init_from cannot be set: it is the run of the link {before!r}"
          )
        config = apply_overrides(
          config, {"init_from": os.path.join(workdir, before)}
        )
      config = inherit(config, tuple(chosen), resolved.get(before))
      resolved[name] = validate(config)
    except ConfigError as error:
      if not name:
        raise
      raise ConfigError(f"{name}: {error}") from None
    before = name
  return resolved


def from_presets(
  presets: Mapping[str, Mapping[str, Any]], name: str
) -> ConfigDict:
  """Builds the config of one preset.

  Args:
    presets: Overrides of the defaults by preset name.
    name: The preset.

  Returns:
    A locked config.

  Raises:
    ConfigError: If there is no such preset.
  """
  check_preset(name, presets)
  return apply_overrides(default_config(), {"preset": name, **presets[name]})


def check_preset(name: str, presets: Mapping[str, Any]) -> None:
  """Raises ConfigError unless there is a preset of this name."""
  if name not in presets:
    named = ", ".join(repr(preset) for preset in presets if preset)
    raise ConfigError(
      f"there is no preset {name!r}: choose one of {named}, or FILE.py without "
      "a preset for the default"
    )


@functools.cache
def _schema() -> dict[str, tuple[type, Any]]:
  """Returns the type and default of every dotted key."""
  config = default_config()
  schema = {}
  for key, default in flatten(config).items():
    section, _, leaf = key.rpartition(".")
    holder = functools.reduce(getattr, filter(None, section.split(".")), config)
    schema[key] = holder.get_type(leaf), default
  return schema


def _check_key(key: str) -> None:
  """Raises ConfigError, naming the nearest keys, unless `key` exists."""
  keys = list(_schema())
  if key in keys:
    return
  if inside := [name for name in keys if name.startswith(f"{key}.")]:
    raise ConfigError(
      f"{key} is a section of the config: set one of " + ", ".join(inside)
    )
  leaf = key.rpartition(".")[2]
  same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
  nearest = difflib.get_close_matches(key, same_leaf, n=3, cutoff=0.0)
  nearest += difflib.get_close_matches(key, keys, n=3)
  nearest = list(dict.fromkeys(nearest))[:3]
  raise ConfigError(
    f"there is no config key {key!r}"
    + (
      f": did you mean {' or '.join(nearest)}?"
      if nearest
      else ", nor one like it; unicode_jax/config.py describes them all"
    )
  )


def _read(key: str, text: str) -> Any:
  """Reads command-line text as the type of `key`, as far as it goes."""
  kind, default = _schema()[key]
  if default is None and text.lower() == "none":
    return None
  if kind is str:
    return text
  if kind is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  try:
    with warnings.catch_warnings(action="ignore"):  # Of "1if" and the like.
      value = ast.literal_eval(text)
  # The last three where brackets and signs are stacked, or a key is a list.
  except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError):
    value = tuple(text.split(",")) if kind is tuple else text
  return (value,) if kind is tuple and not isinstance(value, tuple) else value


def _check_type(key: str, value: Any) -> Any:
  """Returns `value` in the type of `key`, or raises ConfigError."""
  _check_key(key)
  kind, default = _schema()[key]
  if value is None and default is None:
    return None
  if kind is tuple:
    element = type(default[0])
    given = value if isinstance(value, tuple | list) else ()
    items = tuple(_convert(item, element) for item in given)
    if 0 < len(items) <= _LONGEST and None not in items:
      for item in items:
        _check_text(key, item)
      return items
  elif (converted := _convert(value, kind)) is not None:
    _check_text(key, converted)
    return converted
  wanted = _WANTED.get(kind) or (
    f"a list of 1 to {_LONGEST} like " + ",".join(map(str, default))
  )
  raise ConfigError(
    f"{key}={_shown(value)} is {type(value).__name__}, but must be {wanted}"
  )


# Of a list; no other than channel_multipliers needs more than two.
_LONGEST = 16


def _check_text(key: str, text: Any) -> None:
  """Raises ConfigError where text cannot name anything."""
  if not isinstance(text, str):
    return
  if not text and key not in _MAY_BE_EMPTY:
    unset = ", or none to unset it" if _schema()[key][1] is None else ""
    raise ConfigError(f"{key}='' is empty: give a value{unset}")
  if "\0" in text or not _is_unicode(text):
    raise ConfigError(
      f"{key}={_shown(text)} is no Unicode text: give one without zero bytes "
      "and halves of characters"
    )
  if len(text) > _MOST_TEXT:
    raise ConfigError(
      f"{key}={_shown(text)} has {len(text)} characters: give at most "
      f"{_MOST_TEXT}"
    )
  # It becomes a part of a folder's name.
  if key == "preset" and not re.fullmatch(r"[\w.-]*", text):
    raise ConfigError(
      f"{key}={_shown(text)} must be letters, digits, dots and dashes"
    )


_MOST_TEXT = 1024
# What a value of "" means something for.
_MAY_BE_EMPTY = ("preset",)


def _is_unicode(text: str) -> bool:
  """Says whether text can be written: JSON can spell half a character."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _shown(value: Any) -> str:
  """Returns a value as a message shows it, however large it is."""
  try:
    text = repr(value).replace("\n", " ")
  except (ValueError, RecursionError):  # Too many digits, or too deep.
    text = f"a {type(value).__name__}"
  return text if len(text) <= 200 else f"{text[:150]}...{text[-20:]}"


def _convert(value: Any, kind: type) -> Any:
  """Returns `value` as `kind`, or None where that would lose its meaning."""
  if kind is float and type(value) in (int, float):
    try:
      return float(value) if math.isfinite(value) else None
    except OverflowError:  # Of a whole number.
      return None
  return value if type(value) is kind else None


def _check_range(key: str, value: Any) -> None:
  """Raises ConfigError unless every number in `value` is in the key's range."""
  for number in value if isinstance(value, tuple) else (value,):
    if type(number) not in (int, float):
      continue
    low, high = next(
      (
        (low, high)
        for low, high, patterns in _RANGES
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
      ),
      (1, _MOST) if isinstance(number, int) else (0, _LARGEST),
    )
    if not low <= number <= high:
      bounds = f"between {low} and {high}"
      if high > 1:  # Where the highest is no more than a limit.
        bounds = f"at least {low}" if number < low else f"at most {high}"
      raise ConfigError(
        f"{key}={_shown(value)} must be {bounds}{_HINTS.get(key, '')}"
      )
