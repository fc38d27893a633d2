r"""A real language model through both stages: what it gains and forgets.

  python -m unicode_jax.convert --path=FILE.gguf --out=runs/smollm2-135m
  python benchmarks/smollm2.py --llm=runs/smollm2-135m --out=runs/smollm2 \
    --doc=docs/smollm2.md

It starts stage I (configs/pretrain.py:smollm2) once per paradigm, stage II
(configs/instruct.py:smollm2) from the first of them, once with every parameter
and once with adapters alone, evaluates, and writes the tables from the runs'
own files below a marked line of the page, with pictures beside. A run that is
there is resumed or read. One run at a time: they take all cores.

The texts of training are conversations, and so are the held-out ones: to learn
their manner looks like learning language. What was known before is measured on
another text, which no step is trained on: documentation of Python's standard
library, in rows of 256 tokens.
"""

import argparse
import importlib
import inspect
import json
import pathlib
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import config as config_lib, loading
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import losses, metrics as metrics_lib

PARADIGMS = ("language_driven", "projected", "dual")
# Runs of stage II, and what each sets.
STAGE_TWO = {
  "stage2": (),
  "stage2_lora": (
    "--config.instruct.lora_rank=16",
    "--config.optimizer.instruct.learning_rate=1e-3",
  ),
}
MARK = "<!-- tables: benchmarks/smollm2.py -->"
MODULES = (
  *("argparse", "collections", "difflib", "fractions", "functools"),
  *("heapq", "json", "logging", "pathlib", "random", "statistics"),
  *("string", "subprocess", "textwrap", "threading", "unittest"),
)
ROWS, ROW_LENGTH = 32, 256
# Of a held-out set: to ask all takes longer than to train.
PICTURES = 32
SUITES = "vqa,text,pictures"


def command(module: str, *flags: str) -> None:
  """Runs a command of the package in a process of its own."""
  subprocess.run(
    [sys.executable, "-m", f"unicode_jax.{module}", *flags], check=True
  )


def documentation() -> str:
  """Returns what modules, classes and functions say of themselves."""
  texts = []
  for name in MODULES:
    module = importlib.import_module(name)
    members = [module, *(getattr(module, n) for n in sorted(module.__all__))]
    texts += [inspect.getdoc(member) or "" for member in members]
  return "\n\n".join(dict.fromkeys(filter(None, texts)))


def other_perplexity(run: pathlib.Path) -> float:
  """Measures the language model of a run on `documentation`."""
  llm = loading.load_llm(run)
  ids = llm.text_tokenizer.encode(documentation())[: ROWS * ROW_LENGTH]
  rows = jnp.asarray(np.reshape(ids, (ROWS, ROW_LENGTH)), jnp.int32)

  @jax.jit
  def nats(params, row):
    hidden, _ = llama_lib.Llama(llm.llama).apply(
      {"params": params}, row[None, :-1, None], return_hidden=True
    )
    return losses.next_token_loss(
      hidden,
      llama_lib.head_kernel(params, llm.llama),
      row[None, 1:],
      jnp.ones((1, ROW_LENGTH - 1)),
    )[0]

  return float(np.exp(np.mean([nats(llm.params, row) for row in rows])))


def logged(rows, key: str) -> list[float]:
  """Returns the values of a key, in order."""
  return [row[key] for row in rows if key in row]


def first_and_last(rows, key: str, digits: int) -> str:
  """Formats what a key was first, and last; - where it is not there."""
  if not (values := logged(rows, key)):
    return "-"
  return f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
  """Makes a Markdown table."""
  return [
    f"| {' | '.join(head)} |",
    "|---" * len(head) + "|",
    *(f"| {' | '.join(row)} |" for row in rows),
    "",
  ]


def stage_one(runs: dict[str, pathlib.Path]) -> list[str]:
  """Returns the tables of stage I: a column per paradigm."""
  read = {
    name: metrics_lib.read_jsonl(run / "metrics.jsonl")
    for name, run in runs.items()
  }
  config = config_lib.from_json(next(iter(runs.values())) / "config.json")
  depth = config.tokenizer.depth
  shown = [
    ("loss of images, training", "tokenizer/loss", 3),
    ("loss of text, training", "text/loss", 3),
    *(
      row
      for name in ("easy_vqa_test", "openmoji_heldout")
      for row in (
        (f"PSNR of {name}, dB", f"eval/{name}/psnr", 2),
        (
          f"residual energy of {name}, d = {depth}",
          f"eval/{name}/residual_energy/depth{depth}",
          3,
        ),
      )
    ),
    ("usage, d = 1, easy_vqa_test", "eval/easy_vqa_test/usage/depth1", 4),
    ("held-out text perplexity", "eval/text_perplexity", 2),
  ]
  lines = table(
    ["first → last", *runs],
    [
      [title, *(first_and_last(rows, key, digits) for rows in read.values())]
      for title, key, digits in shown
    ],
  )
  perplexities, seconds = (
    {name: logged(rows, key) for name, rows in read.items()}
    for key in ("eval/text_perplexity", "time/train_seconds")
  )
  return [
    *lines,
    "Text perplexity against the untouched model: "
    + ", ".join(
      f"{name} {100 * (values[-1] / values[0] - 1):+.1f} %"
      for name, values in perplexities.items()
    )
    + ". Wall seconds: "
    + ", ".join(f"{name} {values[-1]:.0f}" for name, values in seconds.items())
    + ".",
    "",
  ]


def stage_two(run: pathlib.Path) -> list[str]:
  """Returns the tables of one run of stage II."""
  rows = metrics_lib.read_jsonl(run / "metrics.jsonl")
  config = config_lib.from_json(run / "config.json")
  keys = {
    f"{task}, {kind}": f"{kind}_loss/{task}"
    for task, weight in config.instruct.tasks.items()
    for kind in ("text", "image")
    if weight and logged(rows, f"{kind}_loss/{task}")
  }
  lines = table(
    ["loss, first → last", "training", "held out"],
    [
      [
        title,
        first_and_last(rows, key, 2),
        first_and_last(rows, f"eval/{key}", 2),
      ]
      for title, key in keys.items()
    ],
  )
  suites = json.loads((run / "evaluation/results.json").read_text())["suites"]
  for name, held in suites["vqa"]["results"].items():
    lines += [
      f"Questions of {name}: {100 * held['accuracy']:.1f} % right (blind "
      f"{100 * held['blind']['accuracy']:.1f} %), yes/no balanced within each "
      f"question {100 * held['yes_no_unguessed']:.1f} % (blind 50 %).",
      "",
    ]
  perplexities = ", ".join(
    f"{when} {found['perplexity']:.1f}"
    for when, found in suites["text"]["results"].items()
  )
  return [
    *lines,
    f"Held-out text perplexity, in stage II's template: {perplexities}. Wall "
    f"seconds: {logged(rows, 'time/train_seconds')[-1]:.0f}.",
    "",
  ]


def main() -> None:
  """Trains what is missing and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--llm", required=True, help="run of unicode_jax.convert")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--doc", type=pathlib.Path)
  parser.add_argument("--paradigms", nargs="+", default=PARADIGMS)
  args = parser.parse_args()
  runs = {name: args.out / name for name in args.paradigms}
  for name, run in runs.items():
    command(
      "main",
      *("--config=configs/pretrain.py:smollm2", f"--workdir={run}"),
      *(f"--config.llm_from={args.llm}", f"--config.codebook.paradigm={name}"),
    )
  for name, flags in STAGE_TWO.items():
    run = args.out / name
    # All of them see the same codes, which the first of them makes.
    codes = "auto" if not flags else args.out / "stage2" / "codes"
    command(
      "main",
      *("--config=configs/instruct.py:smollm2", f"--workdir={run}"),
      f"--config.init_from={runs[args.paradigms[0]]}",
      f"--config.data.codes={codes}",
      *flags,
    )
    command(
      "evaluate",
      *(f"--workdir={run}", f"--suites={SUITES}", f"--max_images={PICTURES}"),
    )
  if args.doc is None:
    return
  above = args.doc.read_text(encoding="utf-8").partition(MARK)[0]
  lines = [above + MARK, "", "## Stage I", "", *stage_one(runs)]
  for name, flags in STAGE_TWO.items():
    title = ", ".join(flag.removeprefix("--config.") for flag in flags)
    lines += [f"## Stage II: {title or 'every parameter'}", ""]
    lines += stage_two(args.out / name)
  found = {
    name: other_perplexity(path)
    for name, path in (
      ("untouched", pathlib.Path(args.llm)),
      *((f"after stage I, {name}", path) for name, path in runs.items()),
      *((f"after {name}", args.out / name) for name in STAGE_TWO),
    )
  }
  lines += [
    "## Another text",
    "",
    f"{ROWS} rows of {ROW_LENGTH} tokens of the documentation in Python "
    f"{platform.python_version()}'s standard library.",
    "",
    *table(
      ["language model", "perplexity", "against the untouched model"],
      [
        [
          name,
          f"{value:.2f}",
          f"{100 * (value / found['untouched'] - 1):+.1f} %",
        ]
        for name, value in found.items()
      ],
    ),
  ]
  for run in STAGE_TWO:
    for path in sorted((args.out / run / "evaluation/pictures").glob("*.png")):
      name = f"smollm2_{run}_{path.name}"
      shutil.copyfile(path, args.doc.parent / "pictures" / name)
      lines += [f"![{run}, {path.stem}](pictures/{name})", ""]
  args.doc.write_text("\n".join(lines), encoding="utf-8")
  print(f"wrote {args.doc}")


if __name__ == "__main__":
  main()
