"""Runs the evaluation suites: what a trained model is worth on held-out data.

METHOD sections 2 (reconstruction, use of the codes), 4 (drawing, decompression,
language kept) and 5 (VQA, POPE, Fréchet distance). `evaluate` runs the suites
that are asked for and keeps each one's numbers beside their protocol, in the
form that `report` writes. The suites are in files of their own (`suite_*`), as
are the rules of the scores (`vqa_accuracy`, `pope`, `caption_metrics`,
`image_metrics`, `judge`) and what suites have in common (`bench`). Nothing is
trained, but the judge of drawn pictures.
"""

from collections.abc import Callable
import itertools
from pathlib import Path
import time
from typing import Any

from unicode_jax import data as data_lib, inference
from unicode_jax.evaluation import (
  report,
  suite_answers,
  suite_decompression,
  suite_generation,
  suite_language,
  suite_pictures,
  suite_reconstruction,
)
from unicode_jax.evaluation.bench import Bench, Outcome, Settings

_SUITES: dict[str, Callable[[Bench], Outcome]] = {
  "reconstruction": suite_reconstruction.reconstruction,
  "generation": suite_generation.generation,
  "vqa": suite_answers.vqa,
  "pope": suite_answers.pope,
  "caption": suite_answers.caption,
  "text": suite_language.text,
  "decompression": suite_decompression.decompression,
  "pictures": suite_pictures.pictures,
}


def evaluate(
  model: inference.UniCodeModel,
  data: data_lib.Data,
  settings: Settings,
  out: Path,
  say: Callable[[str], None] = print,
  *,
  again: bool = True,
) -> dict[str, Any]:
  """Runs suites and writes results.json and report.md as each is done.

  Args:
    model: what to evaluate.
    data: from `bench.load_data`.
    settings: what and how.
    out: folder for the results. Suites that were not asked for stay in it, if
      they were measured with this checkpoint, data and settings; otherwise the
      folder is renamed, and nothing of it is lost.
    say: gets a line as each suite ends.
    again: whether to measure anew what is there with this checkpoint, data and
      settings.

  Returns:
    What results.json holds: {"run": facts, "suites": {suite: entry}}. An entry
    has "identity" and either "skipped" (a reason) or "results", "protocol",
    "seconds", "notes" and "pictures".

  Raises:
    ConfigError: a feature network that cannot be had, or a file in `out` that
      is not ours.
  """
  bench = Bench(model, data, settings, out)
  if {"reconstruction", "generation"} & set(settings.suites):
    _ = bench.networks  # An error is better known before the first suite.
  identity = bench.identity()
  suites = report.read(out)["suites"]
  if any(entry.get("identity") != identity for entry in suites.values()):
    suites = {}
    numbers = itertools.count(1)
    kept = next(p for n in numbers if not (p := Path(f"{out}_{n}")).exists())
    out.rename(kept)
    say(
      f"{out} was of another checkpoint, data, settings or version: it is "
      f"{kept} now"
    )
  results = {"run": bench.facts, "suites": suites}
  for suite in settings.suites:
    if suite in suites and not again:
      say(f"{suite}: measured already")
      continue
    reason = _cannot(bench, suite)
    if reason is not None:
      suites[suite] = {"identity": identity, "skipped": reason}
      say(f"{suite}: skipped, {reason}")
      report.write(out, results)
      continue
    start = time.perf_counter()
    outcome = _SUITES[suite](bench)
    seconds = time.perf_counter() - start
    suites[suite] = {
      "identity": identity,
      "protocol": {"suite": suite, **bench.protocol(), **outcome.protocol},
      "seconds": seconds,
      "results": outcome.results,
      "notes": list(outcome.notes),
      "pictures": list(outcome.pictures),
    }
    say(f"{suite}: {outcome.headline} ({seconds:.0f} s)")
    report.write(out, results)
  return report.plain(results)


def _cannot(bench: Bench, suite: str) -> str | None:
  """Says why a suite makes no sense here."""
  stage, vision = bench.loaded.config.stage, bench.loaded.model.vision
  known = [a for held in bench.sets for a in held.annotations]
  if stage == "tokenizer" and suite != "reconstruction":
    return "a visual tokenizer alone has no LLM"
  if stage == "pretrain" and suite not in ("reconstruction", "text"):
    return "stage I has learned neither to answer about pictures nor to draw"
  if vision == "projector" and suite not in ("reconstruction", "text", "vqa"):
    return (
      "instruct.vision='projector' cannot draw, and sampling reads codes, not "
      "its features"
    )
  if suite == "vqa" and not any(a.dialogues for a in known):
    return "the held-out pictures have no questions"
  if suite == "caption" and not any(a.captions for a in known):
    return "the held-out pictures have no captions"
  if suite == "pope" and not any(map(suite_answers.objects_of, bench.sets)):
    return "what is in the pictures is known for easy-VQA only"
  return None
