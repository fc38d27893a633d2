"""Train steps beside PyTorch: tokens/s of the LLM, images/s of the tokenizer.

Forward, backward and optimizer, the same data, first parameters and number of
threads in each. The LLM's step is compared with transformers', the tokenizer's
with a twin in both memory formats (jax_steps.py and torch_twins.py say what is
in them); PyTorch runs eagerly and compiled (`torch.compile`, default mode).
Before anything is timed, the losses of the first steps must agree, and the
tokenizer's codes and gradient norm, so that the same thing is timed. Then all
take turns, one step each in a fresh random order, and medians are compared:

  python benchmarks/train_step.py --repeats=15 --markdown
  python benchmarks/train_step.py --workloads llm --model=wide --threads=1
  python benchmarks/train_step.py --workloads tokenizer --model=vqgan --profile
  python benchmarks/train_step.py --device=cuda --model=large --dtype=bfloat16

The figures mean nothing on a busy machine, so the load average is printed with
them, and with several threads least of all: torch's wait for each other where a
core is taken. There, use --threads=1 --cpu-time, which counts the process's CPU
time.

float32 on a GPU is float32 in both, without TF32. --device=cuda and the models
called large were never run.
"""

import argparse
from collections.abc import Callable
import dataclasses
import os
import platform
import resource
import sys
import time

# These settings of some machines slow numpy's (and so torch's users') BLAS.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

import numpy as np  # noqa: E402

LLMS = {
  # The small preset of configs/pretrain.py.
  "small": dict(
    vocab_size=2048,
    embed_dim=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    mlp_dim=512,
    batch=8,
    length=128,
  ),
  "wide": dict(
    vocab_size=4096,
    embed_dim=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    mlp_dim=704,
    batch=8,
    length=512,
  ),
  # SmolLM2-135M's shape.
  "large": dict(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    batch=8,
    length=1024,
  ),
}
# What differs from the default config.
TOKENIZERS = {
  "small": {},
  # VQ-GAN's way: convolutions from the full resolution on.
  "vqgan": {
    "image_size": 64,
    "data.global_batch_size": 16,
    "tokenizer.channels": 64,
    "tokenizer.channel_multipliers": (1, 2, 4),
    "tokenizer.stem_patch": 1,
    "tokenizer.attention": True,
  },
  # The paper's encoder and decoder, with one grid.
  "large": {
    "image_size": 256,
    "data.global_batch_size": 32,
    "tokenizer.channels": 128,
    "tokenizer.channel_multipliers": (1, 2, 4, 4),
    "tokenizer.num_res_blocks": 4,
    "tokenizer.stem_patch": 2,
    "tokenizer.attention": True,
  },
}
MODELS = {"llm": LLMS, "tokenizer": TOKENIZERS}
LLM_OPTIMIZER = dict(learning_rate=1e-3, weight_decay=0.01)
# The tokenizer's learning rate begins at 0, so the third loss is the first to
# show what the optimizers did.
FIRST_STEPS = 4
# Largest relative differences in the first step and of later losses, and the
# smallest share of equal codes. Codes of rounded features differ freely.
TOLERANCES = {
  "float32": dict(loss=1e-4, gradient_norm=1e-2, later=1e-2, codes=0.999),
  "bfloat16": dict(loss=1e-2, gradient_norm=0.1, later=5e-2, codes=0.0),
}
PROFILED_STEPS = 5


@dataclasses.dataclass
class Workload:
  """What is compared.

  Attributes:
    unit: What is counted.
    items: Of them, in a step.
    description: Of model and batch.
    step: `jax_steps.Step`.
    runs: name -> function that does one step and returns metrics; ours is
      "jax".
    codes: int32[B, h, w, D], our codes at the first step; None for none.
    failed: name -> why it could not be run.
    seconds: name -> duration of each timed step.
    faults: name -> pages that each timed step was given by the system.
  """

  unit: str
  items: int
  description: str
  step: object
  runs: dict[str, Callable[[], dict]]
  codes: np.ndarray | None = None
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  faults: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def llm(args) -> Workload:
  """Builds the language model's steps."""
  import jax_steps
  import torch_twins

  from unicode_jax.models import llama

  shape = dict(LLMS[args.model])
  batch, length = shape.pop("batch"), shape.pop("length")
  tokens = np.random.default_rng(0).integers(
    0, shape["vocab_size"], (batch, length + 1), np.int32
  )
  data = tokens[:, :-1], tokens[:, 1:]
  config = llama.LlamaConfig(
    tie_embeddings=True, scan_layers=args.scan, dtype=args.dtype, **shape
  )
  params = jax_steps.llm_parameters(config)
  runs = {
    name: torch_twins.llm_step(
      config,
      params,
      *data,
      **LLM_OPTIMIZER,
      compiled=compiled,
      device=args.device,
    )
    for name, compiled in (("torch eager", False), ("torch compiled", True))
  }
  step = jax_steps.llm_step(config, params, *data, **LLM_OPTIMIZER)
  return Workload(
    unit="tokens",
    items=batch * length,
    description=f"{batch} x {length} tokens, {config}",
    step=step,
    runs={"jax": step.run} | runs,
  )


def tokenizer(args) -> Workload:
  """Builds the visual tokenizer's steps."""
  import jax
  import jax_steps
  import torch_twins

  overrides = TOKENIZERS[args.model] | {"tokenizer.dtype": args.dtype}
  stage, config, state = jax_steps.make_stage(overrides)
  batch, size = config.data.global_batch_size, config.image_size
  image = np.random.default_rng(1).uniform(-1, 1, (batch, size, size, 3))
  image = image.astype(np.float32)
  encode = jax.jit(lambda variables: stage.model.encode(variables, image).codes)
  codes = np.array(encode(state.variables))
  trained = [state.variables.params[name] for name in stage.trained]
  count = sum(leaf.size for leaf in jax.tree.leaves(trained))
  runs = {
    f"torch {how} {layout}": torch_twins.tokenizer_step(
      stage,
      config,
      state.variables.params,
      image,
      channels_last=layout == "channels_last",
      compiled=how == "compiled",
      device=args.device,
    )
    for how in ("eager", "compiled")
    for layout in ("NCHW", "channels_last")
  }
  step = jax_steps.tokenizer_step(stage, state, image)
  return Workload(
    unit="images",
    items=batch,
    description=(
      f"{batch} images, {stage.model.tokenizer}, RQ depth {stage.model.depth} "
      f"of {config.text.vocab_size} ids, {count / 1e6:.2f} M trained parameters"
    ),
    step=step,
    runs={"jax": step.run} | runs,
    codes=codes,
  )


def warm_up(name: str, workload: Workload, tolerances: dict) -> None:
  """Compiles, does the first steps and compares them with ours.

  Args:
    name: Of the workload.
    workload: Changed in place: what cannot be compiled is taken out.
    tolerances: Of TOLERANCES.

  Raises:
    SystemExit: another implementation computes something else.
  """
  ours = None
  for which, run in list(workload.runs.items()):
    try:
      first = [run() for _ in range(FIRST_STEPS)]
    except Exception as error:
      if "compiled" not in which:
        raise
      text, *_ = str(error).partition("Set TORCHDYNAMO_VERBOSE")  # A hint.
      text = " ".join(text.split())[:200]
      workload.failed[which] = f"{type(error).__name__}: {text}"
      del workload.runs[which]
      continue
    losses = " ".join(f"{metrics['loss']:.4f}" for metrics in first)
    print(f"{name}, {which}: first losses {losses}")
    if ours is None:
      ours = first
      continue
    errors = {
      metric: abs(first[0][metric] / ours[0][metric] - 1) for metric in ours[0]
    }
    errors["later"] = max(
      abs(their["loss"] / our["loss"] - 1)
      for their, our in zip(first[1:], ours[1:], strict=True)
    )
    same = 1.0
    if workload.codes is not None:
      same = np.mean(first[0]["codes"].cpu().numpy() == workload.codes)
      print(f"  {same:.3%} of {workload.codes.size} codes are jax's")
    print("  off by", ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    if same < tolerances["codes"] or any(
      not error <= tolerances[metric] for metric, error in errors.items()
    ):
      raise SystemExit(f"{name}, {which} is not jax's step: nothing timed")


def measure(workloads: dict[str, Workload], repeats: int, clock) -> None:
  """Times all in turns, one step each, into their `seconds` and `faults`."""
  turns = [
    (workload, name, run)
    for workload in workloads.values()
    for name, run in workload.runs.items()
  ]
  rng = np.random.default_rng(0)
  for _ in range(repeats):
    for i in rng.permutation(len(turns)):
      workload, name, run = turns[i]
      faults, start = page_faults(), clock()
      run()
      workload.seconds.setdefault(name, []).append(clock() - start)
      workload.faults.setdefault(name, []).append(page_faults() - faults)


def page_faults() -> int:
  """Returns how many pages this process was given so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def rows(name: str, workload: Workload) -> list[list[str]]:
  """Returns a workload's rows of the table."""
  found = []
  ours = np.array(workload.seconds["jax"])
  for which in workload.runs:
    seconds = np.array(workload.seconds[which])
    # Items a second, ours over theirs: above 1 ours is faster.
    ratio = "" if which == "jax" else spread(seconds / ours, 2)
    rate = workload.items / np.median(seconds)
    found.append(
      [
        name,
        which,
        spread(1e3 * seconds, 1),
        f"{rate:.{0 if rate >= 1000 else 1}f} {workload.unit}/s",
        ratio,
        f"{np.median(workload.faults[which]):.0f}",
      ]
    )
  found += [[name, which, "not run", "", "", ""] for which in workload.failed]
  return found


def spread(values: np.ndarray, digits: int) -> str:
  """Formats the median and the 10th to 90th percentile."""
  low, median, high = np.percentile(values, [10, 50, 90])
  return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(header: list[str], lines: list[list[str]], markdown: bool):
  """Prints a table, in columns or as Markdown."""
  if markdown:
    for line in [header, ["---"] * len(header), *lines]:
      print(f"| {' | '.join(line)} |")
    return
  widths = [max(map(len, column)) for column in zip(header, *lines)]
  for line in [header, *lines]:
    cells = (cell.ljust(width) for cell, width in zip(line, widths))
    print("  ".join(cells).rstrip())


def profile(name: str, workload: Workload) -> list[list[str]]:
  """Returns the rows that say where our time goes."""
  import op_times

  seconds = op_times.seconds_by_kind(
    workload.step.run, workload.step.hlo(), PROFILED_STEPS
  )
  total = sum(seconds.values())
  return [
    [name, kind, f"{1e3 * value:.1f}", f"{value / total:.0%}"]
    for kind, value in seconds.items()
  ]


def parse() -> argparse.Namespace:
  """Reads and checks the flags."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--workloads", nargs="+", choices=MODELS, default=[*MODELS]
  )
  models = dict.fromkeys(name for of in MODELS.values() for name in of)
  parser.add_argument("--model", choices=models, default="small")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--cpu-time", action="store_true")
  parser.add_argument(
    "--scan", action="store_true", help="over the LLM's layers"
  )
  parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
  parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
  parser.add_argument("--markdown", action="store_true")
  parser.add_argument(
    "--profile", action="store_true", help="jax's time by kind of operation"
  )
  args = parser.parse_args()
  if missing := [w for w in args.workloads if args.model not in MODELS[w]]:
    rest = [w for w in MODELS if args.model in MODELS[w]]
    parser.error(
      f"--model={args.model} is none of {missing[0]}'s "
      f"({', '.join(MODELS[missing[0]])}); add --workloads {' '.join(rest)}"
    )
  if args.cpu_time and args.device != "cpu":
    parser.error("--cpu-time does not see a GPU's time; leave it out")
  return args


def start(args) -> int:
  """Sets threads, device and precision up; returns the number of threads."""
  # Affinity is what XLA sizes its thread pool by.
  cpus = sorted(os.sched_getaffinity(0))[: args.threads]
  os.sched_setaffinity(0, cpus)
  os.environ["JAX_PLATFORMS"] = args.device
  # Two frameworks share the GPU's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax
  import torch

  torch.set_num_threads(len(cpus))
  if args.device == "cuda":
    try:
      jax.devices()
    except (RuntimeError, AssertionError):  # It asserts that there is one.
      raise SystemExit("this jax sees no GPU: install its CUDA build") from None
    if not torch.cuda.is_available():
      raise SystemExit("this torch sees no GPU: install its CUDA build")
    if args.dtype == "float32":
      jax.config.update("jax_default_matmul_precision", "highest")
      torch.set_float32_matmul_precision("highest")
      torch.backends.cudnn.allow_tf32 = False
  return len(cpus)


def main():
  """Checks, times and prints."""
  args = parse()
  # It takes minutes, and may write to a file.
  sys.stdout.reconfigure(line_buffering=True)
  threads = start(args)

  import jax
  import torch
  import transformers

  make = {"llm": llm, "tokenizer": tokenizer}
  workloads = {name: make[name](args) for name in args.workloads}
  for name, workload in workloads.items():
    warm_up(name, workload, TOLERANCES[args.dtype])
  clock = time.process_time if args.cpu_time else time.perf_counter
  load = os.getloadavg()[0]
  measure(workloads, args.repeats, clock)

  device = jax.devices()[0].device_kind if args.device == "cuda" else "CPU"
  print(
    f"\n{device}, {threads} threads, {args.dtype}, "
    f"{'CPU' if args.cpu_time else 'wall'} time, {args.repeats} repeats; "
    f"Python {platform.python_version()}, jax {jax.__version__}, torch "
    f"{torch.__version__}, transformers {transformers.__version__}; load "
    f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"
  )
  for name, workload in workloads.items():
    print(f"{name}: {args.model}, {workload.description}")
  print("\nMedians, 10th to 90th percentile; jax / it: of items a second.\n")
  print_table(
    ["workload", "", "ms a step", "items a second", "jax / it", "page faults"],
    [row for item in workloads.items() for row in rows(*item)],
    args.markdown,
  )
  for name, workload in workloads.items():
    for which, reason in workload.failed.items():
      print(f"\n{name}, {which}, was not run: {reason}")
  if args.profile:
    print("\njax's operations, summed over threads, under the profiler\n")
    print_table(
      ["workload", "kind", "ms a step", "share"],
      [row for item in workloads.items() for row in profile(*item)],
      args.markdown,
    )


if __name__ == "__main__":
  main()
