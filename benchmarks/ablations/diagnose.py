r"""Says why rows of the ablations differ: what runs logged, and one probe.

  python benchmarks/ablations/diagnose.py --workdir=runs/ablations

Reads the runs that run.py left in --workdir, and writes diagnosis.json in
--results, for page.py: for every row and seed the nats of a token of text and
of a code of a drawn picture at the end of stage II, in training and held out,
and, where pictures have a vocabulary of their own, what held-out text costs if
their ids cannot come. Rows whose runs are gone keep what is known of them.
"""

import argparse
import json
import pathlib

import collect
import grid
import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import config as config_lib, data as data_lib, loading
from unicode_jax.data import mixture as mixture_lib
from unicode_jax.evaluation import forced
from unicode_jax.models import llama as llama_lib

# Lines of metrics at the end that are averaged.
_LAST = 5


def logged(run: pathlib.Path) -> dict[str, float]:
  """Returns what a run's metrics say of its end.

  Args:
    run: folder of a link of stage II that has ended.
  """
  lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]

  def last(name, count=1):
    values = [row[name] for row in rows if name in row][-count:]
    return float(np.mean(values)) if values else None

  config = config_lib.load(str(run / "config.json"))
  found = {
    "text, training": last("text_loss/text", _LAST),
    "text, held out": last("eval/text_loss/text"),
    "drawing, training": last("image_loss/text_to_image", _LAST),
    "drawing, held out": last("eval/image_loss/text_to_image"),
    "codes of a picture": float(
      config_lib.positions(config) * config.tokenizer.depth
    ),
  }
  return {name: value for name, value in found.items() if value is not None}


def text_without_pictures(run: pathlib.Path) -> dict[str, float]:
  """Returns the nats of a held-out text token if no id of a picture can come.

  Args:
    run: folder of stage II with `instruct.vision=separate`.
  """
  loaded = loading.load(str(run))
  config, params = loaded.config, loaded.variables.params["llm"]
  text = {**config.text, "tokenizer_path": str(run / loading.TEXT_TOKENIZER)}
  data = data_lib.load_data(
    data_lib.DataConfig(**config.data),
    data_lib.TextConfig(**text),
    config.image_size,
  )
  mixture = mixture_lib.Mixture(
    data.heldout_sources,
    data.heldout_texts,
    loaded.text_tokenizer,
    forced.mixture_config(loaded, loaded.layout, config),
  )
  kernel = llama_lib.head_kernel(params, loaded.model.llama)
  sums = np.zeros(3)
  for batch in mixture_lib.fixed_batches(
    mixture, 0, config.instruct.global_batch_size, config.instruct.heldout_rows
  ):
    hidden, _ = llama_lib.Llama(loaded.model.llama).apply(
      {"params": params},
      jnp.asarray(batch["token_ids"]),
      positions=batch["positions"],
      segment_ids=batch["segment_ids"],
      return_hidden=True,
      depth_weights=loaded.model.depth_weights(loaded.variables),
    )
    logits = hidden @ kernel
    labels = jnp.asarray(batch["labels"])[..., None]
    right = jnp.take_along_axis(logits, labels, -1)[..., 0]
    for place, some in enumerate(
      (logits, logits[..., : config.text.vocab_size])
    ):
      nats = jax.nn.logsumexp(some, axis=-1) - right
      sums[place] += float(jnp.sum(nats * batch["loss_mask"]))
    sums[2] += batch["loss_mask"].sum()
  return {
    "text, held out, probed": float(sums[0] / sums[2]),
    "text, held out, text ids alone": float(sums[1] / sums[2]),
  }


def main() -> None:
  """Reads all runs that are there, and writes the file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/ablations")
  parser.add_argument("--results", type=pathlib.Path, default=collect.RESULTS)
  args = parser.parse_args()
  target = args.results / collect.DIAGNOSIS
  known = json.loads(target.read_text()) if target.exists() else {}
  for name, row in grid.ROWS.items():
    for seed in grid.SEEDS:
      key = f"{row.links[-1].name}_{row.key(seed, len(row.links))}"
      if not collect.is_there(args.results, name, seed):
        known.get(name, {}).pop(str(seed), None)
        continue
      entry = known.setdefault(name, {}).get(str(seed))
      run = args.workdir / key
      if (entry and entry["run"] == key) or not run.exists():
        continue
      found = logged(run)
      if row.links[-1].values.get("instruct.vision") == "separate":
        found |= text_without_pictures(run)
      known[name][str(seed)] = {"run": key, "values": found}
      print(name, seed, {k: round(v, 2) for k, v in found.items()}, flush=True)
  text = json.dumps(known, indent=1, sort_keys=True) + "\n"
  target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
