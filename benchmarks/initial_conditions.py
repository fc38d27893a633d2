r"""Where a codebook starts when it is a real language model's token table.

  python -m unicode_jax.convert --path=FILE.gguf --out=runs/smollm2-135m
  python benchmarks/initial_conditions.py --llm=runs/smollm2-135m \
    --doc=docs/initial_conditions.md

Hazards H1 and H2 of METHOD section 6 on the embedded pictures: how many codes
are used, and how much energy they leave, at every depth, for each number of
dimensions in which codes are chosen, before any training and after --steps of
the visual tokenizer alone. "pca" and "random" project the table to that many
dimensions and stay so (paradigm `frozen`); "learned" starts as "pca" and is
trained (`projected`). Everything else is configs/pretrain.py's. Measured on
--images training pictures, which are also what short runs see first.

It writes a table and a plot below a marked line of the page.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configs import pretrain as pretrain_config
from unicode_jax import codebook as codebook_lib, config as config_lib, loading
from unicode_jax.data import pipeline
from unicode_jax.stages import runner, tokenizer as tokenizer_stage
from unicode_jax.training import reconstruction_loss

MARK = "<!-- tables: benchmarks/initial_conditions.py -->"
# Name -> paradigm, projection.
PROJECTIONS = {
  "pca": ("frozen", "pca"),
  "random": ("frozen", "random"),
  "learned": ("projected", "pca"),
}


@functools.partial(jax.jit, static_argnums=0)
def _measure(model, variables, images):
  """Returns usage, perplexity and residual energy [D], and PSNR."""
  output = model.encode(variables, images)
  reconstruction = model.decode_features(variables, output.quantized)
  return {
    **codebook_lib.codebook_statistics(output.counts, variables.valid),
    "residual_energy": output.residual_energy,
    "psnr": jnp.mean(reconstruction_loss.psnr(images, reconstruction)),
  }


def run(config, data, embedding, valid, images, args) -> dict[str, dict]:
  """Trains a short while.

  Args:
    config: Resolved ConfigDict of stage I.
    data: what it names.
    embedding: float32[K, E], the language model's table.
    valid: bool[K].
    images: uint8[N, S, S, 3], training pictures in random order.
    args: of the command line.

  Returns:
    What `_measure` finds "before" and "after", and "seconds" of training.
  """
  # No step of this run has an LLM: its table is what it is.
  model = loading.build_model(config)
  stage = tokenizer_stage.TokenizerStage(config, data, model, valid.copy())
  step = jax.jit(stage.phases["tokenizer"].step, donate_argnums=0)
  state = stage.init(
    jax.random.key(config.seed),
    # A copy, for steps take what they are given.
    {"llm": {"embed_tokens": {"embedding": jnp.array(embedding)}}},
  )
  shown = pipeline.to_float(images[: args.images])
  found = {"before": jax.device_get(_measure(model, state.variables, shown))}
  start, size = time.perf_counter(), config.data.global_batch_size
  for i in range(args.steps):
    rows = np.arange(i * size, (i + 1) * size) % len(images)
    state, metrics = step(
      state, {"image": pipeline.to_float(images[rows])}, None
    )
  jax.block_until_ready(metrics)
  found["seconds"] = time.perf_counter() - start
  found["after"] = jax.device_get(_measure(model, state.variables, shown))
  return found


def label(dim: int, projection: str, normalized: bool) -> str:
  """Names a row."""
  return f"{dim}, {projection}" + (", l2" if normalized else "")


def write(doc: pathlib.Path, rows: dict, depth: int, args) -> None:
  """Writes tables and plot below the page's mark."""
  lines = [
    "",
    f"`--dims {' '.join(map(str, args.dims))} --steps={args.steps} "
    f"--batch={args.batch} --images={args.images}`, seed 0.",
  ]
  for when, title in (
    ("before", "Before any training"),
    ("after", f"After {args.steps} steps of the tokenizer"),
  ):
    lines += [
      "",
      f"## {title}",
      "",
      f"Depths 1 to {depth}, separated by slashes.",
      "",
      "| dim, projection | codes in use, % | perplexity | residual energy |"
      " PSNR, dB |",
      "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
      found = row[when]
      cells = [
        " / ".join(f"{100 * x:.1f}" for x in found["usage"]),
        " / ".join(f"{x:.0f}" for x in found["perplexity"]),
        " / ".join(f"{x:.3f}" for x in found["residual_energy"]),
        f"{found['psnr']:.2f}",
      ]
      lines.append(f"| {name} | {' | '.join(cells)} |")
  figure, axes = plt.subplots(1, 3, figsize=(13, 4))
  for axis, (key, d) in zip(
    axes, (("usage", 0), ("residual_energy", 0), ("residual_energy", -1))
  ):
    for projection in PROJECTIONS:
      for normalized in (True, False):
        names = [label(dim, projection, normalized) for dim in args.dims]
        values = [rows[name]["after"][key][d] for name in names]
        axis.plot(
          args.dims,
          values,
          "o-" if normalized else "o--",
          color=f"C{list(PROJECTIONS).index(projection)}",
          label=projection + (", l2" if normalized else ""),
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(args.dims, [str(dim) for dim in args.dims])
    axis.set_xlabel("code_dim")
    axis.set_ylabel(f"{key.replace('_', ' ')}, depth {d % depth + 1}")
    axis.set_ylim(bottom=0)
  axes[0].legend()
  picture = doc.parent / "pictures" / "initial_conditions.png"
  figure.tight_layout()
  figure.savefig(picture, dpi=80)
  lines += ["", f"![usage and energy after training](pictures/{picture.name})"]
  above = doc.read_text().partition(MARK)[0] if doc.is_file() else ""
  doc.write_text(above + MARK + "\n" + "\n".join(lines) + "\n")


def main() -> None:
  """Measures what is missing and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--llm", required=True, help="run of unicode_jax.convert")
  parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 192, 576])
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--images", type=int, default=512)
  parser.add_argument(
    "--out", type=pathlib.Path, help="JSON, kept and added to"
  )
  parser.add_argument("--doc", type=pathlib.Path)
  args = parser.parse_args()
  base = {
    "data.global_batch_size": args.batch,
    "llm_from": args.llm,
  }
  config = config_lib.apply_overrides(
    pretrain_config.get_config("smollm2"), base
  )
  config = config_lib.inherit(config)
  llm = loading.load_llm(args.llm)
  data = runner.load_data(config, with_text=True)
  valid = loading.valid_codes(config, data.text_tokenizer)
  embedding = np.array(llm.params["embed_tokens"]["embedding"])
  del llm
  images = np.concatenate([source.images() for source in data.image_sources])
  images = images[np.random.default_rng(0).permutation(len(images))]
  rows = {}
  if args.out and args.out.is_file():
    rows = json.loads(args.out.read_text())
  for dim in args.dims:
    for normalized in (True, False):
      for name, (paradigm, projection) in PROJECTIONS.items():
        key = label(dim, name, normalized)
        if key in rows:
          continue
        overrides = {
          "num_steps": args.steps,
          "codebook.code_dim": dim,
          "codebook.paradigm": paradigm,
          "codebook.projection": projection,
          "codebook.l2_normalize": normalized,
        }
        found = run(
          config_lib.apply_overrides(config, overrides),
          *(data, embedding, valid, images, args),
        )
        rows[key] = jax.tree.map(lambda x: np.asarray(x).tolist(), found)
        after = rows[key]["after"]
        print(
          f"{key}: usage {after['usage'][0]:.3f}, energy "
          f"{after['residual_energy']}, {after['psnr']:.2f} dB, "
          f"{rows[key]['seconds']:.0f} s",
          flush=True,
        )
        if args.out:
          args.out.write_text(json.dumps(rows))
  if args.doc:
    write(args.doc, rows, config.tokenizer.depth, args)


if __name__ == "__main__":
  main()
