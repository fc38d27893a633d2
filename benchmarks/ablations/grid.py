"""The grid of the ablations: which runs are compared, and what each sets.

A row is a chain of runs and how its last one is evaluated: a language model
learns text and to answer questions about descriptions, stage I goes on from it,
stage II from there. Everything that a row
does not say is the base row's. Rows share the runs that their chains have in
common. A family is a question and the rows that answer it.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any

from unicode_jax import config as config_lib

# Seeds 0 to 3 are what the sizes below were chosen with.
SEEDS = (4, 5, 6)
# An outside language model (run.py's --smollm2), and the presets made for it.
SMOLLM2 = "smollm2"

_NEVER = 10**6
# From nothing: configs/quickstart.py has the reasons. Smaller than there, for
# more steps in the same time.
_LLM = {
  "llm.embed_dim": 128,
  "llm.num_heads": 4,
  "llm.head_dim": 32,
  "llm.mlp_dim": 384,
  "llm.embedding_std": 0.5,
  "llm.tie_embeddings": False,
  "llm.num_kv_heads": 4,
  "llm.qk_norm": True,
  # Rows as large as these move as far as small ones do with larger steps; else
  # the table would stay where it began, and all paradigms would be `frozen`.
  "optimizer.llm.embedding_factor": 10.0,
}
_PERIODS = {
  "eval_every": _NEVER,
  "picture_every": _NEVER,
  "checkpoint_every": _NEVER,
}
_STAGE1 = (
  _PERIODS
  | _LLM
  | {
    "data.weights": (0.2, 0.8),
    "tokenizer.channels": 64,
    "num_steps": 450,
    # The last line with images before the last snap, step 420, is between two
    # syncs. `dual` has written back at step 400.
    "log_every": 30,
    "schedule.finetune_steps": 50,
  }
)
_STAGE2 = _PERIODS | {
  "num_steps": 2000,
  "data.codes": "auto",
  "data.embedded": ("easy_vqa",),
  "data.weights": (1.0,),
  "data.shift": 3,
  # Room for a decompressed picture of RQ with D = 8, and for two pictures of
  # all others that are drawn.
  "text.sequence_length": 200,
  "optimizer.instruct.learning_rate": 2e-3,
  "optimizer.instruct.embedding_factor": 10.0,
  "instruct.global_batch_size": 8,
  "instruct.heldout_rows": 64,
  "instruct.questions_per_image": 8,
  "instruct.yes_no_ratio": 3.0,
  "instruct.image_loss_weight": 1.0,
  "instruct.tasks.decompression": 0.15,
  "instruct.tasks.caption": 0.06,
  "instruct.tasks.vqa": 0.38,
  "instruct.tasks.described": 0.06,
  "instruct.tasks.text_to_image": 0.30,
  "instruct.tasks.class_conditional": 0.0,
  "instruct.tasks.unconditional": 0.0,
  "instruct.tasks.text": 0.05,
}


@dataclasses.dataclass(frozen=True)
class Link:
  """One run of a chain.

  Attributes:
    name: of the stage, for a reader.
    file: config file of the stage.
    values: by dotted config key, over the file's default preset.
    start: config key that names the run before; None for the first.
    preset: of the file.
  """

  name: str
  file: str
  values: Mapping[str, Any]
  start: str | None = None
  preset: str = ""

  def config(self) -> dict[str, Any]:
    """Returns all values by dotted key, but for seed and start."""
    spec = f"{self.file}:{self.preset}".rstrip(":")
    config = config_lib.apply_overrides(config_lib.load(spec), self.values)
    values = config_lib.flatten(config)
    return {k: v for k, v in values.items() if k not in ("init_from", "seed")}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the tables.

  Attributes:
    title: what it differs in.
    links: its chain, at least stage I and stage II; the last is evaluated.
    image_size: of the pictures that it is evaluated on, where that is not the
      run's own.
    llm: outside run that the first link's `llm_from` names, if any.
  """

  title: str
  links: tuple[Link, ...]
  image_size: int | None = None
  llm: str | None = None

  @property
  def stage1(self) -> int:
    """Number of the link that trains the tokenizer."""
    return [link.name for link in self.links].index("stage1")

  @property
  def draws(self) -> bool:
    """Whether its last link learns to draw."""
    return self.links[-1].values["instruct.tasks.text_to_image"] > 0

  @property
  def learns_text(self) -> bool:
    """Whether its last link learns text."""
    return self.links[-1].values["instruct.tasks.text"] > 0

  def key(self, seed: int, count: int | None = None) -> str:
    """Returns a name of what the first `count` links make.

    Equal chains have equal keys, and any change of a value or of a default
    makes another.

    Args:
      seed: of all links.
      count: None for the row with how it is evaluated.
    """
    links = [
      (sorted(link.config().items()), link.start) for link in self.links[:count]
    ]
    size = self.image_size if count is None else None
    text = json.dumps([links, self.llm, size, seed], default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Family:
  """Rows that answer a question.

  Attributes:
    title: of its tables.
    rows: names, in order.
  """

  title: str
  rows: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
  """Two rows, of which one is said to be better.

  Attributes:
    title: which claim.
    better: row.
    worse: row.
    reported: the paper's figures of both.
  """

  title: str
  better: str
  worse: str
  reported: str


_TEXT_STEPS = 300
_LLM_LINK = Link(
  "llm",
  "configs/pretrain.py",
  _STAGE1
  | {
    "num_steps": _TEXT_STEPS,
    "schedule.tokenizer_steps": 1,
    "schedule.llm_steps": _TEXT_STEPS - 1,
    "schedule.finetune_steps": 0,
  },
)
# Whether a word of the question is one of the description takes a small model
# a thousand steps to see, and then it sees it at once: in stage II that would
# come early with one seed and not at all with another. The paper's knows it.
_QUESTIONS_LINK = Link(
  "questions",
  "configs/instruct.py",
  _STAGE2
  | {key: 0.0 for key in _STAGE2 if key.startswith("instruct.tasks.")}
  | {
    "instruct.tasks.described": 0.95,
    "instruct.tasks.text": 0.05,
    "num_steps": 1800,
    "data.codes": None,
  },
  "init_from",
)
# Stage I's steps of the tokenizer, in turns of 100 with one of text.
_NO_TEXT = {"num_steps": 303, "schedule.llm_steps": 1}


def _row(title, stage1=None, stage2=None, *, llm=True, between=None, **more):
  """Makes a row of what it sets.

  Args:
    title: of the row.
    stage1: values of stage I.
    stage2: values of stage II.
    llm: whether the language model learns text and questions before stage I.
    between: a link between the stages.
    **more: of `Row`.
  """
  links = [
    _LLM_LINK,
    _QUESTIONS_LINK,
    Link("stage1", "configs/pretrain.py", _STAGE1 | (stage1 or {}), "llm_from"),
    Link(
      "stage2", "configs/instruct.py", _STAGE2 | (stage2 or {}), "init_from"
    ),
  ]
  if between is not None:
    links.insert(-1, between)
  if not llm:
    links = [dataclasses.replace(links[2], start=None), *links[3:]]
  return Row(title, tuple(links), **more)


def _rq(depth: int) -> dict[str, Any]:
  return {"tokenizer.depth": depth}


_VQ = {
  "tokenizer.quantizer": "vq",
  "tokenizer.depth": 1,
  "tokenizer.channel_multipliers": (1,),
  "tokenizer.num_res_blocks": 2,
}


def _rest(*tasks: str) -> int:
  """Returns the steps in which the other tasks have as many rows as ever."""
  shares = {k: v for k, v in _STAGE2.items() if k.startswith("instruct.tasks.")}
  left = sum(v for k, v in shares.items() if k.split(".")[-1] not in tasks)
  return round(_STAGE2["num_steps"] * left / sum(shares.values()))


# The paper's literal space: all of the table's dimensions, rows as they are.
_LITERAL = {
  "codebook.code_dim": 128,
  "codebook.projection": "identity",
  "codebook.l2_normalize": False,
}
_NO_DRAWING = {
  "instruct.tasks.decompression": 0.0,
  "instruct.tasks.text_to_image": 0.0,
  "num_steps": _rest("decompression", "text_to_image"),
}
# Decompression's rows of the base, before the others.
_DECOMPRESS_STEPS = _STAGE2["num_steps"] - _rest("decompression")
_DECOMPRESS = Link(
  "decompress",
  "configs/instruct.py",
  _STAGE2
  | {key: 0.0 for key in _STAGE2 if key.startswith("instruct.tasks.")}
  | {"instruct.tasks.decompression": 1.0, "num_steps": _DECOMPRESS_STEPS},
  "init_from",
)
# A model a hundred times as large learns in a tenth of the steps what a CPU has
# time for, and small ones, lest it forget; the rest is as in the base.
_SMOLLM2_STAGE1 = {k: v for k, v in _STAGE1.items() if k not in _LLM} | _NO_TEXT
_SMOLLM2_STAGE2 = _STAGE2 | {
  "num_steps": 200,
  "text.sequence_length": 224,
  "optimizer.instruct.learning_rate": 2e-4,
  "optimizer.instruct.embedding_factor": 1.0,
  "instruct.global_batch_size": 4,
}

ROWS: dict[str, Row] = {
  "base": _row("base"),
  # Paradigms.
  "frozen": _row("frozen", {"codebook.paradigm": "frozen"}),
  "dual": _row("dual", {"codebook.paradigm": "dual"}),
  "projected": _row("projected", {"codebook.paradigm": "projected"}),
  "decay_50": _row("language_driven, λ = 0.5", {"codebook.sync_decay": 0.5}),
  "decay_99": _row("language_driven, λ = 0.99", {"codebook.sync_decay": 0.99}),
  "sync_10": _row("language_driven, every 10", {"codebook.sync_every": 10}),
  "sync_150": _row("language_driven, every 150", {"codebook.sync_every": 150}),
  # How the language model sees pictures.
  "projector": _row(
    "visual encoder + text tokens, cannot draw",
    stage2=_NO_DRAWING | {"instruct.vision": "projector", "data.codes": None},
  ),
  "no_drawing": _row("unified, nothing drawn", stage2=_NO_DRAWING),
  "separate": _row(
    "separate vocabularies", stage2={"instruct.vision": "separate"}
  ),
  # Quantizers. The base is RQ, D = 4, on a grid of 4x4.
  "vq": _row("VQ, 8x8", _VQ),
  # See exposure.py.
  "vq_more": _row(
    "VQ, 8x8, 1.3 times the steps: as many examples",
    _VQ,
    {
      "instruct.tasks.vqa": _STAGE2["instruct.tasks.vqa"] * 1.592,
      "instruct.tasks.caption": _STAGE2["instruct.tasks.caption"] * 2.5,
      "num_steps": round(1.315 * _STAGE2["num_steps"]),
    },
  ),
  "rq_1": _row("RQ, 4x4, D = 1", _rq(1)),
  "rq_2": _row("RQ, 4x4, D = 2", _rq(2)),
  "rq_5": _row("RQ, 4x4, D = 5", _rq(5)),
  "rq_8": _row("RQ, 4x4, D = 8", _rq(8)),
  "hq": _row(
    "HQ, 4x4 + 8x8",
    {
      "tokenizer.quantizer": "hq",
      "tokenizer.depth": 5,
      "tokenizer.channel_multipliers": (1,),
      "tokenizer.num_res_blocks": 2,
    },
  ),
  # Decompression.
  "no_decompression": _row(
    "without, more of the rest", stage2={"instruct.tasks.decompression": 0.0}
  ),
  "decompression_first": _row(
    "as pre-training, with a schedule of its own",
    stage2={
      "instruct.tasks.decompression": 0.0,
      "num_steps": _rest("decompression"),
    },
    between=_DECOMPRESS,
  ),
  # Two of its pictures fit into a row, one of the others'.
  "segments_1": _row(
    "T = 1",
    stage2={"instruct.segments": 1, "instruct.tasks.decompression": 0.075},
  ),
  "segments_2": _row("T = 2", stage2={"instruct.segments": 2}),
  "segments_8": _row("T = 8", stage2={"instruct.segments": 8}),
  # The space in which codes are chosen.
  "dim_4": _row("code_dim 4", {"codebook.code_dim": 4}),
  "dim_64": _row("code_dim 64", {"codebook.code_dim": 64}),
  "no_l2": _row("code_dim 16, no l2", {"codebook.l2_normalize": False}),
  "dim_128": _row("code_dim 128", {"codebook.code_dim": 128}),
  "literal": _row("128, identity, no l2: as the paper", _LITERAL),
  "literal_frozen": _row(
    "the same, frozen", _LITERAL | {"codebook.paradigm": "frozen"}
  ),
  "literal_dual": _row(
    "the same, dual", _LITERAL | {"codebook.paradigm": "dual"}
  ),
  # Whether more is written back if the codebook moves faster, or for longer.
  "literal_dual_rate": _row(
    "the same, dual, learning rate x 10",
    _LITERAL
    | {
      "codebook.paradigm": "dual",
      "optimizer.tokenizer.learning_rate": 2e-2,
    },
  ),
  "literal_dual_turns": _row(
    "the same, dual, turns of 400 steps",
    _LITERAL
    | {
      "codebook.paradigm": "dual",
      "schedule.tokenizer_steps": 400,
      # The last line before the last write-back: step 1260.
      "num_steps": 1350,
      "log_every": 90,
    },
  ),
  # The table that stage I begins with.
  "alternated": _row("random; text in stage I alone", llm=False),
  "random_table": _row("random; 3 steps of text", _NO_TEXT, llm=False),
  "text_first": _row("of the trained LLM; 3 steps of text", _NO_TEXT),
  "smollm2": Row(
    "of SmolLM2-135M (a tenth of the steps, half the batch)",
    (
      Link(
        "stage1",
        "configs/pretrain.py",
        _SMOLLM2_STAGE1,
        "llm_from",
        SMOLLM2,
      ),
      Link(
        "stage2", "configs/instruct.py", _SMOLLM2_STAGE2, "init_from", SMOLLM2
      ),
    ),
    llm=SMOLLM2,
  ),
  # Text in stage II.
  "text_0": _row("no text", stage2={"instruct.tasks.text": 0.0}),
  "text_15": _row("text 15 %", stage2={"instruct.tasks.text": 0.168}),
  # Pictures of another size than in training.
  "test_24": _row("tested at 24 px", image_size=24),
  "test_40": _row("tested at 40 px", image_size=40),
}

FAMILIES = {
  "paradigm": Family(
    "How the codebook is unified",
    (
      *("base", "frozen", "dual", "projected"),
      *("decay_50", "decay_99", "sync_10", "sync_150"),
    ),
  ),
  "vocabulary": Family(
    "What the language model reads",
    ("base", "separate", "no_drawing", "projector"),
  ),
  "quantizer": Family(
    "Quantizer", ("base", "vq", "vq_more", "rq_1", "rq_2", "rq_5", "rq_8", "hq")
  ),
  "decompression": Family(
    "Image decompression",
    (
      *("base", "no_decompression", "decompression_first"),
      *("segments_1", "segments_2", "segments_8"),
    ),
  ),
  "space": Family(
    "The space in which codes are chosen",
    (
      *("base", "no_l2", "dim_4", "dim_64", "dim_128"),
      *("literal", "literal_frozen", "literal_dual"),
      *("literal_dual_rate", "literal_dual_turns"),
    ),
  ),
  "table": Family(
    "The table that stage I begins with",
    ("base", "alternated", "random_table", "text_first", "smollm2"),
  ),
  "text": Family("Text in stage II", ("base", "text_0", "text_15")),
  "resolution": Family(
    "Pictures of another size than in training",
    ("base", "test_24", "test_40"),
  ),
}

# The paper's but for the last. Its figures: docs/ablations.md.
CLAIMS = (
  Claim(
    "unified > separate vocabularies",
    "base",
    "separate",
    "VQAv2 53.1, 49.0; POPE 71.8, 65.4; FID 6.72, 9.82",
  ),
  Claim(
    "unified > encoder with a projector, nothing drawn",
    "no_drawing",
    "projector",
    "VQAv2 53.1, 52.3; POPE 71.8, 69.7",
  ),
  Claim(
    "language_driven > frozen",
    "base",
    "frozen",
    "VQAv2 53.1, 44.2; FID 6.72, 34.45",
  ),
  Claim(
    "language_driven > dual",
    "base",
    "dual",
    "VQAv2 53.1, 9.3; FID 6.72, 8.87",
  ),
  Claim("HQ > RQ", "hq", "base", "VQAv2 53.1, 49.8"),
  Claim("RQ > VQ", "base", "vq", "VQAv2 49.8, 49.1"),
  Claim(
    "decompression > none",
    "base",
    "no_decompression",
    "FID 6.72, 7.08",
  ),
  Claim("projected > language_driven", "projected", "base", "not the paper's"),
)
