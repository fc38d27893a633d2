r"""Counts what each row of the ablations sees in stage II, without training.

  python benchmarks/ablations/exposure.py

All rows of the grid read as many positions, but pictures of more codes take
more of them, so that fewer examples share a packed row. Writes examples seen,
by task, to exposure.json in --results, for page.py: steps x rows a step x share
of the task x turns in a packed row (of questions and captions), or pictures.
"""

import argparse
import json
import pathlib

import collect
import grid

from unicode_jax import config as config_lib, data as data_lib
from unicode_jax.data import mixture as mixture_lib
from unicode_jax.stages import instruct

# Of stage I, what stage II's model is made of.
_MODEL = ("tokenizer.", "codebook.", "llm.", "text.vocab_size", "image_size")


def stage_two(row: grid.Row) -> config_lib.ConfigDict:
  """Returns the config of a row's last link, its model that of stage I."""
  one, link = row.links[row.stage1].config(), row.links[-1]
  spec = f"{link.file}:{link.preset}".rstrip(":")
  model = {k: v for k, v in one.items() if k.startswith(_MODEL)}
  return config_lib.apply_overrides(
    config_lib.load(spec), model | dict(link.values) | {"data.codes": None}
  )


def seen(config, data: data_lib.Data) -> dict[str, float]:
  """Returns how many examples of each task a run sees.

  Args:
    config: of stage II.
    data: its data.
  """
  settings = instruct.mixture_config(config, data.image_weights)
  mixture = mixture_lib.Mixture(
    data.image_sources, data.train_texts, data.text_tokenizer, settings
  )
  weights = {
    group.name: settings.weights[group.name] for group in mixture.groups
  }
  rows = config.num_steps * config.instruct.global_batch_size
  found = {}
  for group in mixture.groups:
    whole = group.name in ("decompression", "text_to_image")
    examples = sum(1 if whole else len(e.turns) for e in group.examples)
    share = weights[group.name] / sum(weights.values())
    found[group.name] = rows * share * examples / len(group.rows)
  return found


def main() -> None:
  """Counts, and writes the file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--results", type=pathlib.Path, default=collect.RESULTS)
  args = parser.parse_args()
  counted, data = {}, None
  for name, row in grid.ROWS.items():
    if row.llm is not None:  # Its tokens are others, and need its tokenizer.
      continue
    config = stage_two(row)
    if data is None:  # The same for all of them.
      data = data_lib.load_data(
        data_lib.DataConfig(**config.data),
        data_lib.TextConfig(**config.text),
        config.image_size,
      )
    counted[name] = seen(config, data)
    first = row.links[row.stage1 + 1]
    if first.name == "decompress":
      config = config_lib.apply_overrides(config, first.values)
      counted[name] |= seen(config, data)
    print(name, {task: round(n) for task, n in counted[name].items()})
  args.results.mkdir(parents=True, exist_ok=True)
  text = json.dumps(counted, indent=1, sort_keys=True) + "\n"
  (args.results / collect.EXPOSURE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
