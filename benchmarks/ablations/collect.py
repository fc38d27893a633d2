"""Makes one small file of what a row's runs and their evaluation left.

The files that it makes are all that page.py needs; a result counts as long as
the grid's values for its row and seed are those that it was made with.
"""

import json
import pathlib
import shutil
from typing import Any

import grid

RESULTS = pathlib.Path(__file__).parent / "results"
# What exposure.py counted, among them.
EXPOSURE = "exposure.json"
# What diagnose.py found.
DIAGNOSIS = "diagnosis.json"
# The test pictures that every row is evaluated on.
HELD_OUT = "easy_vqa_test"
_SHEET = f"drawn_{HELD_OUT}.png"


def spent(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a task took so far, and whether it was done."""
  if not path.exists():
    return {"wall": 0.0, "cpu": 0.0, "done": False, "revisions": []}
  return json.loads(path.read_text(encoding="utf-8"))


def result_file(results: pathlib.Path, row: str, seed: int) -> pathlib.Path:
  """Returns where the result of a row and seed is."""
  return results / f"{row}_{seed}.json"


def read(results: pathlib.Path, row: str, seed: int) -> dict[str, Any] | None:
  """Returns a result, None where there is none of the grid's values."""
  path = result_file(results, row, seed)
  if not path.exists():
    return None
  result = json.loads(path.read_text(encoding="utf-8"))
  return result if result["key"] == grid.ROWS[row].key(seed) else None


def is_there(results: pathlib.Path, row: str, seed: int) -> bool:
  """Says whether a result is there, of the grid's values."""
  return read(results, row, seed) is not None


def _rows(run: pathlib.Path) -> list[dict[str, Any]]:
  lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def _unity(run: pathlib.Path) -> dict[str, float]:
  """Returns drift and code agreement: before the last snap, at the end.

  Before is the last line of metrics that is of images and not of the end.
  """
  steps = json.loads((run / "config.json").read_text())["num_steps"]
  found = {}
  for row in _rows(run):
    if row["step"] < steps and "code_agreement" in row:
      found["step before the snap"] = row["step"]
      for name in ("drift", "code_agreement"):
        found[f"{name} before the snap"] = row[name]
    if f"eval/{HELD_OUT}/code_agreement" in row and row["step"] >= steps:
      found["code_agreement at the end"] = row[
        f"eval/{HELD_OUT}/code_agreement"
      ]
    if row["step"] >= steps and "drift" in row:
      found["drift at the end"] = row["drift"]
  return found


def _depths(name: str, values) -> dict[str, float]:
  return {f"{name}/{d}": value for d, value in enumerate(values, 1)}


def _measured(suites: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of an evaluation, by a flat name."""
  found: dict[str, float] = {}
  if held := suites.get("vqa", {}).get(HELD_OUT):
    found["vqa/all"] = held["accuracy"]
    found["vqa/yes/no unguessed"] = held["yes_no_unguessed"]
    found["vqa/blind"] = held["blind"]["accuracy"]
    for kind, entry in held["by_type"].items():
      found[f"vqa/{kind}"] = entry["accuracy"]
  for kind, scores in suites.get("pope", {}).get(HELD_OUT, {}).items():
    found[f"pope/{kind}/f1"] = scores["f1"]
    found[f"pope/{kind}/accuracy"] = scores["accuracy"]
  generation = suites.get("generation", {})
  if judged := generation.get("judged", {}).get(HELD_OUT):
    for kind, seen in judged["pictures"].items():
      found[f"judged/{kind}/both"] = seen["all"]
      for attribute, value in seen["by_attribute"].items():
        found[f"judged/{kind}/{attribute}"] = value
    distance = generation["distances"][HELD_OUT]["drawn of its captions"]
    found["drawn/kernel distance"] = distance["pixels"]["kernel"]
  if held := suites.get("reconstruction", {}).get(HELD_OUT):
    found["psnr"] = held["psnr"]
    found["reconstructed/kernel distance"] = held["distances"]["pixels"][
      "kernel"
    ]
    found |= _depths("psnr", held["psnr_by_depth"])
    found |= _depths("usage", held["usage"])
    found |= _depths("perplexity", held["perplexity"])
  for when, entry in suites.get("text", {}).items():
    if "perplexity" in entry:
      found[f"text/{when}"] = entry["perplexity"]
  if held := suites.get("decompression", {}).get(HELD_OUT):
    found["decompression"] = held["accuracy"]
  return found


def _tokens(run: pathlib.Path) -> dict[str, int]:
  """Returns what a link read: images and tokens, those of padding too."""
  config = json.loads((run / "config.json").read_text())
  text = config["text"]
  if config["stage"] == "instruct":
    size = config["instruct"]["global_batch_size"]
    return {"tokens": config["num_steps"] * size * text["sequence_length"]}
  turn, pause = (
    config["schedule"][k] for k in ("tokenizer_steps", "llm_steps")
  )
  cycles, rest = divmod(config["num_steps"], turn + pause)
  image_steps = cycles * turn + min(rest, turn)
  text_steps = config["num_steps"] - image_steps
  image_steps += config["schedule"]["finetune_steps"]
  return {
    "images": image_steps * config["data"]["global_batch_size"],
    "tokens": text_steps * text["global_batch_size"] * text["sequence_length"],
  }


def keep(
  workdir: pathlib.Path,
  results: pathlib.Path,
  name: str,
  seed: int,
  about: dict[str, Any],
) -> None:
  """Writes the result of a row and seed.

  Args:
    workdir: the runs.
    results: folder of results.
    name: of the row.
    seed: of its runs.
    about: what it ran on.
  """
  row = grid.ROWS[name]
  evaluation = f"measured_{row.key(seed)}"
  folders = {
    link.name: workdir / f"{link.name}_{row.key(seed, count)}"
    for count, link in enumerate(row.links, 1)
  }
  written = json.loads((workdir / evaluation / "results.json").read_text())
  suites = {
    suite: entry["results"]
    for suite, entry in written["suites"].items()
    if "results" in entry
  }
  result = {
    "row": name,
    "seed": seed,
    "key": row.key(seed),
    **about,
    "seconds": {
      **{k: spent(workdir / f"{f.name}.json") for k, f in folders.items()},
      "evaluation": spent(workdir / f"{evaluation}.json"),
    },
    "read": {name: _tokens(folder) for name, folder in folders.items()},
    "metrics": _unity(folders["stage1"]) | _measured(suites),
  }
  results.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1, sort_keys=True) + "\n"
  result_file(results, name, seed).write_text(text, encoding="utf-8")
  sheet = workdir / evaluation / "pictures" / _SHEET
  if sheet.exists() and seed == grid.SEEDS[0]:
    (results / "pictures").mkdir(exist_ok=True)
    shutil.copyfile(sheet, results / "pictures" / f"{name}.png")
