r"""The stage II page: what the quickstart's model reads, draws and remembers.

  python -m unicode_jax.main --config=configs/quickstart.py \
    --workdir=runs/quickstart
  python benchmarks/stage2.py --runs runs/quickstart --doc=docs/stage2.md

It trains nothing: it reads the links' metrics.jsonl and stage2/evaluation of
each run and writes tables below a marked line of the page, with the pictures
copied beside; what is above that line stays. A run that has no
stage I of its own (another mixture from the same start) is named by the folder
of its stage II.
"""

import argparse
import json
import pathlib
import shutil

from unicode_jax.training import metrics as metrics_lib

LINKS = ("warmup", "stage1", "reading", "stage2")
MARK = "<!-- tables: benchmarks/stage2.py -->"
PICTURES = ("drawn_easy_vqa_test", "answers_easy_vqa_test", "drawn_openmoji")


def percent(share) -> str:
  """Returns a share in percent, - where it is not known."""
  return "-" if share is None else f"{100 * share:.1f} %"


def share(value: float, count: int) -> str:
  """Returns a share of `count` tries in percent, with its standard error."""
  error = (value * (1 - value) / count) ** 0.5
  return f"{100 * value:.1f} ± {100 * error:.1f} %"


def stage_two(run: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a run's stage II."""
  return run / "stage2" if (run / "stage2").is_dir() else run


def seconds(run: pathlib.Path) -> dict[str, float]:
  """Returns what each link and each suite took, wall seconds."""
  took = {}
  for link in LINKS:
    rows = metrics_lib.read_jsonl(run / link / "metrics.jsonl")
    times = [r["time/train_seconds"] for r in rows if "time/train_seconds" in r]
    if times:
      took[link] = max(times)
  results = json.loads(
    (stage_two(run) / "evaluation/results.json").read_text()
  )["suites"]
  took["evaluation"] = sum(e.get("seconds", 0.0) for e in results.values())
  return took


def tables(run: pathlib.Path) -> list[str]:
  """Returns the lines of one run."""
  folder = stage_two(run)
  suites = json.loads((folder / "evaluation/results.json").read_text())[
    "suites"
  ]
  suites = {k: v["results"] for k, v in suites.items() if "results" in v}
  took = seconds(run)
  config = json.loads((folder / "config.json").read_text())
  steps, earlier = [], config
  while earlier["stage"] == "instruct":
    steps.insert(0, str(earlier["num_steps"]))
    start = pathlib.Path(earlier["init_from"])
    if not start.is_dir():  # Moved, with its links.
      start = folder.parent / start.name
    earlier = json.loads((start / "config.json").read_text())
  lines = [
    f"## {run.name}",
    "",
    f"{' + '.join(steps)} steps of stage II, seed {config['seed']}. Wall "
    "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in took.items()) + ".",
    "",
  ]
  for name, held in suites.get("vqa", {}).items():
    blind = held["blind"]
    lines += [
      f"Questions of {name}, each asked alone, greedy, {held['count']}:",
      "",
      "| | model | blind |",
      "|---|---|---|",
      f"| all | {percent(held['accuracy'])} | {percent(blind['accuracy'])} |",
    ]
    lines += [
      f"| {kind} ({entry['count']}) | {percent(entry['accuracy'])} | "
      f"{percent(blind['by_type'][kind]['accuracy'])} |"
      for kind, entry in held["by_type"].items()
    ]
    lines += [
      "| yes/no, balanced within each question | "
      f"{percent(held['yes_no_unguessed'])} | "
      f"{percent(blind['yes_no_unguessed'])} |",
      "",
    ]
  for name, kinds in suites.get("pope", {}).items():
    lines += [
      f"POPE-style questions about {name}:",
      "",
      "| negatives | accuracy | blind | precision | recall | F1 | yes |",
      "|---|---|---|---|---|---|---|",
    ]
    lines += [
      f"| {kind} | {percent(scores['accuracy'])} | "
      f"{percent(scores['blind']['accuracy'])} | "
      + " | ".join(
        percent(scores[key])
        for key in ("precision", "recall", "f1", "yes_ratio")
      )
      + " |"
      for kind, scores in kinds.items()
    ]
    lines += [""]
  for name, judged in suites.get("generation", {}).get("judged", {}).items():
    lines += [
      f"Pictures of {name}'s captions, {judged['each']} of each of "
      f"{judged['labels']}, as a classifier trained on the real training "
      "pictures sees them:",
      "",
      "| pictures | colour | shape | both |",
      "|---|---|---|---|",
    ]
    lines += [
      "| "
      + " | ".join(
        [
          kind,
          *(
            share(value, seen["count"])
            for value in (
              seen["by_attribute"]["colour"],
              seen["by_attribute"]["shape"],
              seen["all"],
            )
          ),
        ]
      )
      + " |"
      for kind, seen in judged["pictures"].items()
    ]
    lines += [""]
  if "text" in suites:
    lines += [
      "Held-out text perplexity: "
      + ", ".join(
        f"{when} {entry['perplexity']:.0f}"
        for when, entry in suites["text"].items()
        if "perplexity" in entry
      )
      + ".",
      "",
    ]
  for name, held in suites.get("decompression", {}).items():
    lines += [
      f"Decompression of {name}: {percent(held['accuracy'])} of the codes "
      "right, the earlier ones given.",
      "",
      "| turn | after the image's own turns | alone | gain over turns of "
      "another image |",
      "|---|---|---|---|",
    ]
    lines += [
      f"| {turn} | {percent(own)} | {percent(alone)} | "
      f"{100 * gain:+.1f} ± {100 * error:.1f} points |"
      for turn, (own, alone, gain, error) in enumerate(
        zip(
          held["by_turn"],
          held["by_turn_alone"],
          held["gain"],
          held["gain_error"],
          strict=True,
        ),
        start=1,
      )
    ]
    lines += [""]
  return lines


def main() -> None:
  """Writes the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", nargs="+", type=pathlib.Path, required=True)
  parser.add_argument(
    "--doc", type=pathlib.Path, default=pathlib.Path("docs/stage2.md")
  )
  arguments = parser.parse_args()
  written = arguments.doc.read_text(encoding="utf-8")
  if MARK not in written:
    parser.error(f"{arguments.doc} has no line {MARK}: tables go below it")
  lines = [written.partition(MARK)[0] + MARK, ""]
  for run in arguments.runs:
    lines += tables(run)
    pictures = stage_two(run) / "evaluation/pictures"
    for path in sorted(pictures.glob("*.png")):
      if path.stem.startswith(PICTURES):
        name = f"stage2_{run.name}_{path.name}"
        target = arguments.doc.parent / "pictures" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        lines += [f"![{path.stem}](pictures/{name})", ""]
  arguments.doc.write_text("\n".join(lines), encoding="utf-8")
  print(f"wrote {arguments.doc}")


if __name__ == "__main__":
  main()
