r"""The stage I table: every paradigm, several seeds, on held-out data.

  python benchmarks/stage1.py --out=runs/stage1 --doc=docs/stage1.md

It starts `python -m unicode_jax.main --config=configs/pretrain.py` once per
paradigm and seed (a run that is already there is resumed or read), then writes
the table from the runs' own metrics.jsonl. One run at a time: they take all
cores. Baselines (mean image, average pooling) are computed from the same data.
"""

import argparse
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys

import jax
import numpy as np

import unicode_jax
from unicode_jax import config as config_lib
from unicode_jax.stages import runner
from unicode_jax.training import metrics as metrics_lib

PARADIGMS = ("frozen", "dual", "language_driven", "projected")
POOLING_WINDOWS = (8, 4)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
  """Returns the mean PSNR over images, dB, of uint8[N, S, S, 3] pixels."""
  error = np.square(image.astype(np.float64) - other).mean(axis=(1, 2, 3))
  return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))


def blown_up_averages(images: np.ndarray, window: int) -> np.ndarray:
  """Averages uint8[N, S, S, 3] over windows and repeats each average."""
  count, size = images.shape[:2]
  cells = size // window
  pooled = images.reshape(count, cells, window, cells, window, 3)
  return pooled.mean(axis=(2, 4)).repeat(window, 1).repeat(window, 2)


def baselines(config) -> dict[str, dict[str, float]]:
  """Measures what needs no model, per held-out set."""
  data = runner.load_data(config, with_text=False)
  train = np.concatenate([source.images() for source in data.image_sources])
  mean = train.mean(axis=0, dtype=np.float64)
  result = {}
  for name, images in data.heldout_images.items():
    size = images.shape[1]
    result[name] = {
      "mean image": psnr(images, mean[None]),
      **{
        f"{size // window}x{size // window} averages of {window}x{window} "
        "pixels": psnr(images, blown_up_averages(images, window))
        for window in POOLING_WINDOWS
      },
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
  """Returns a run's numbers: the last of each, and some of earlier steps."""
  config = config_lib.from_json(workdir / "config.json")
  result: dict[str, float] = {}
  for row in metrics_lib.read_jsonl(workdir / "metrics.jsonl"):
    if row["step"] == 0:
      result["text before"] = row["eval/text_perplexity"]
    if row["step"] < config.num_steps:
      for name in ("drift", "code_agreement"):
        if name in row:
          result[f"{name} before snap"] = row[name]
          result["last step before snap"] = row["step"]
    if row["step"] == config.eval_every:
      result |= {
        f"halfway {name}": value
        for name, value in row.items()
        if name.endswith("code_agreement")
      }
    result |= row
  return result


def revision() -> str:
  """Names the code that this script belongs to."""
  done = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or unicode_jax.__version__


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
    f"{os.cpu_count()} CPU cores ({platform.machine()}), jax "
    f"{jax.__version__}, revision {revision()}. {len(runs[first])} seeds: mean "
    "± standard deviation over seeds.",
    "",
    f"{config.tokenizer.quantizer.upper()}, D = {depth}, {config.image_size} "
    f"px, K = {config.text.vocab_size}, code_dim = "
    f"{config.codebook.code_dim}; {config.num_steps} steps of the alternation "
    f"and {config.schedule.finetune_steps} of the decoder alone.",
    "",
    "PSNR is in dB over pixels in [-1, 1], averaged over images. Usage is the "
    "share of the ids that may be codes. Residual energy is the share of the "
    "encoder's energy that the first d codes leave over.",
    "",
    "## Baselines without a model",
    "",
  ]
  without_model = baselines(config)
  for name, values in without_model.items():
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
        ("code agreement halfway", f"halfway {prefix}/code_agreement", 3),
        ("code agreement at the end", f"{prefix}/code_agreement", 3),
      ],
    )
    lines += ["", "PSNR above the baselines, all depths:", ""]
    for baseline, value in without_model[name].items():
      margins = ", ".join(
        f"{paradigm} {cell([r[f'{prefix}/psnr'] - value for r in seeds], 2)} dB"
        for paradigm, seeds in runs.items()
      )
      lines.append(f"- {baseline}: {margins}")
  lines += ["", "## Training set, all of it", ""]
  lines += table(
    runs,
    [
      *per_depth("usage", "eval/train/usage", depth, 3),
      *per_depth("perplexity", "eval/train/perplexity", depth, 0),
      *per_depth("residual energy", "eval/train/residual_energy", depth, 3),
    ],
  )
  at = runs[first][0]["last step before snap"]
  lines += [
    "",
    "## Unity and language",
    "",
    f"Step {at} is the last log line with images before the alternation ends; "
    "`dual` writes back when a turn of image steps ends, and at the end of the "
    "alternation `dual` and `language_driven` snap to the table.",
    "",
  ]
  lines += table(
    runs,
    [
      (f"drift at step {at}", "drift before snap", 3),
      (f"code agreement at step {at}", "code_agreement before snap", 3),
      ("held-out text perplexity before", "text before", 1),
      ("held-out text perplexity after", "eval/text_perplexity", 1),
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
  command = " ".join(
    ["python benchmarks/stage1.py", f"--seeds={args.seeds}", *overrides]
  )
  write(args.doc, runs, command, args.out)


if __name__ == "__main__":
  main()
