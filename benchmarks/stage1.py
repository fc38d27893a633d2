r"""The stage I table: every paradigm, several seeds, on held-out data.

  python benchmarks/stage1.py --out=runs/stage1 --doc=docs/stage1.md

It starts `python -m unicode_jax.main --config=configs/pretrain.py` once per
paradigm and seed (a run that is already there is resumed or read), then writes
the table from the runs' own metrics.jsonl. One run at a time: they take all
cores. Baselines (mean image, average pooling) are computed from the same data.
"""

import argparse
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys

import numpy as np

from unicode_jax import config as config_lib
from unicode_jax.stages import tokenizer as tokenizer_stage
from unicode_jax.training import metrics as metrics_lib

PARADIGMS = ("frozen", "dual", "language_driven", "projected")
POOLING_WINDOW = 8


def psnr(image: np.ndarray, other: np.ndarray) -> float:
  """Returns the mean PSNR over images, dB, of uint8[N, S, S, 3] pixels."""
  error = np.square(image.astype(np.float64) - other).mean(axis=(1, 2, 3))
  return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))


def baselines(config) -> dict[str, dict[str, float]]:
  """Measures what needs no model, per held-out set."""
  data = tokenizer_stage.load_data(config, with_text=False)
  train = np.concatenate([source.images() for source in data.image_sources])
  mean = train.mean(axis=0, dtype=np.float64)
  result = {}
  for name, images in data.heldout_images.items():
    count, size = images.shape[:2]
    cells = size // POOLING_WINDOW
    pooled = images.reshape(
      count, cells, POOLING_WINDOW, cells, POOLING_WINDOW, 3
    ).mean(axis=(2, 4))
    blown_up = pooled.repeat(POOLING_WINDOW, 1).repeat(POOLING_WINDOW, 2)
    result[name] = {
      "mean image": psnr(images, mean[None]),
      "8x8 pooling": psnr(images, blown_up),
    }
  return result


def train(paradigm: str, seed: int, out: pathlib.Path, overrides) -> None:
  """Runs stage I in a process of its own."""
  subprocess.run(
    [
      sys.executable,
      "-m",
      "unicode_jax.main",
      "--config=configs/pretrain.py",
      f"--workdir={out / f'{paradigm}_{seed}'}",
      f"--config.codebook.paradigm={paradigm}",
      f"--config.seed={seed}",
      *overrides,
    ],
    check=True,
  )


def read(workdir: pathlib.Path) -> dict[str, float]:
  """Returns a run's numbers: last of each, and some from before the snap."""
  config = config_lib.from_json(workdir / "config.json")
  rows = metrics_lib.read_jsonl(workdir / "metrics.jsonl")
  result: dict[str, float] = {}
  for row in rows:
    if "eval/text_perplexity" in row:
      result.setdefault("text before", row["eval/text_perplexity"])
    if row["step"] < config.num_steps:
      for name in ("drift", "code_agreement"):
        if name in row:
          result[f"{name} before snap"] = row[name]
    result |= row
  return result


def cell(values: list[float], digits: int) -> str:
  """Formats mean +- standard deviation over seeds."""
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def table(runs, rows: list[tuple[str, str, int]]) -> list[str]:
  """Makes a Markdown table: a row per metric, a column per paradigm."""
  lines = ["| | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
  for title, key, digits in rows:
    cells = [cell([r[key] for r in seeds], digits) for seeds in runs.values()]
    lines.append(f"| {title} | " + " | ".join(cells) + " |")
  return lines


def per_depth(title: str, key: str, depth: int, digits: int):
  """Lists one table row per depth."""
  return [
    (f"{title}, d = {d}", f"{key}/depth{d}", digits)
    for d in range(1, depth + 1)
  ]


def write(doc: pathlib.Path, runs, command: str, out: pathlib.Path) -> None:
  """Writes the page and copies one picture per paradigm beside it."""
  first = next(iter(runs))
  config = config_lib.from_json(out / f"{first}_0" / "config.json")
  depth = config.tokenizer.depth
  lines = [
    "# Stage I on the embedded data",
    "",
    f"`{command}`",
    "",
    f"Machine: {platform.processor() or platform.machine()}, 2 cores, CPU. "
    f"Mean ± standard deviation over {len(runs[first])} seeds. "
    f"{config.tokenizer.quantizer.upper()}, D = {depth}, {config.image_size} "
    f"px, K = {config.text.vocab_size}, code_dim = "
    f"{config.codebook.code_dim}, {config.num_steps} + "
    f"{config.schedule.finetune_steps} steps.",
    "",
    "PSNR is in dB over pixels in [-1, 1], averaged over images. Usage is the "
    "share of the ids that may be codes. Drift and agreement are from the last "
    "log line before the final snap.",
    "",
    "## Baselines without a model",
    "",
  ]
  for name, values in baselines(config).items():
    numbers = ", ".join(f"{k} {v:.2f} dB" for k, v in values.items())
    lines.append(f"- {name}: {numbers}")
  heldout = {
    key.split("/")[1]
    for key in runs[first][0]
    if key.startswith("eval/") and key.endswith("/psnr")
  }
  for name in sorted(heldout):
    prefix = f"eval/{name}"
    lines += ["", f"## {name}", ""]
    lines += table(
      runs,
      [
        *per_depth("PSNR", f"{prefix}/psnr", depth, 2),
        *per_depth("usage", f"{prefix}/usage", depth, 3),
        *per_depth("perplexity", f"{prefix}/perplexity", depth, 0),
        *per_depth("residual energy", f"{prefix}/residual_energy", depth, 3),
      ],
    )
  lines += ["", "## Training set, all of it", ""]
  lines += table(
    runs,
    [
      *per_depth("usage", "eval/train/usage", depth, 3),
      *per_depth("perplexity", "eval/train/perplexity", depth, 0),
      *per_depth("residual energy", "eval/train/residual_energy", depth, 3),
    ],
  )
  lines += ["", "## Unity and language", ""]
  lines += table(
    runs,
    [
      ("drift before the snap", "drift before snap", 3),
      ("code agreement before the snap", "code_agreement before snap", 3),
      ("held-out text perplexity before", "text before", 1),
      ("held-out text perplexity after", "eval/text_perplexity", 1),
      ("training seconds", "time/train_seconds", 0),
    ],
  )
  lines += ["", "## Pictures (seed 0)", ""]
  for paradigm in runs:
    folder = out / f"{paradigm}_0" / "pictures"
    for name in sorted(heldout):
      picture = max(folder.glob(f"{name}_*.png"))
      target = doc.parent / "pictures" / f"stage1_{paradigm}_{name}.png"
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(picture, target)
      lines += [f"{paradigm}, {name}:", "", f"![](pictures/{target.name})", ""]
  doc.parent.mkdir(parents=True, exist_ok=True)
  doc.write_text("\n".join(lines))


def main() -> None:
  """Trains what is missing and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default="runs/stage1")
  parser.add_argument("--doc", type=pathlib.Path, default="docs/stage1.md")
  parser.add_argument("--seeds", type=int, default=3)
  args, overrides = parser.parse_known_args()
  for seed in range(args.seeds):
    for paradigm in PARADIGMS:
      train(paradigm, seed, args.out, overrides)
  runs = {
    paradigm: [
      read(args.out / f"{paradigm}_{seed}") for seed in range(args.seeds)
    ]
    for paradigm in PARADIGMS
  }
  command = " ".join(["python benchmarks/stage1.py", *overrides])
  write(args.doc, runs, command, args.out)


if __name__ == "__main__":
  main()
