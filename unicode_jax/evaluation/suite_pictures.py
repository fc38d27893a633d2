"""Suite: sheets for the eye - drawings beside real pictures, and answers.

It scores nothing. What is shown is chosen by the seed alone.
"""

import numpy as np

from unicode_jax.data import tasks
from unicode_jax.evaluation.bench import SHOWN, Bench, HeldOut, Outcome


def pictures(bench: Bench) -> Outcome:
  """Shows drawings beside real pictures, and answers beside questions.

  Args:
    bench: the model and the data.
  """
  seed, sheets, counts = bench.settings.seed, [], {}
  rng = np.random.default_rng(seed)
  for held in bench.sets:
    cells = _wanted_pictures(held, rng)
    if cells:
      drawings = bench.draw([question for question, *_ in cells], seed)
      sheets.append(
        bench.sheet(
          f"drawn_{held.name}",
          f"{held.name}: a real picture, the drawing",
          [
            ((real, drawing), words)
            for (_, real, words), drawing in zip(cells, drawings, strict=True)
          ],
        )
      )
    counts[held.name] = len(cells)
    if answered := _answered(bench, held, rng):
      title = f"{held.name}: what the model says"
      sheets.append(bench.sheet(f"answers_{held.name}", title, answered))
  unconditional = bench.draw([tasks.UNCONDITIONAL] * SHOWN, seed)
  sheets.append(
    bench.sheet(
      "drawn_unconditionally",
      tasks.UNCONDITIONAL,
      [((drawing,), "") for drawing in unconditional],
    )
  )
  return Outcome(
    {"sheets": [sheet["file"] for sheet in sheets], "drawn": counts},
    {
      "sampling": bench.settings.drawing_protocol,
      "chosen": "by the seed alone, before anything was drawn",
    },
    f"{len(sheets)} sheets",
    pictures=tuple(sheets),
  )


def _wanted_pictures(held: HeldOut, rng) -> list[tuple[str, np.ndarray, str]]:
  """Returns question, a real picture and words of what is to be drawn."""
  if asked := held.label_questions():
    examples: dict[str, int] = {}
    for i, annotation in enumerate(held.annotations):
      examples.setdefault(annotation.label, i)
    return [
      (question, held.images[examples[label]], label)
      for label, question in asked.items()
      if label in examples
    ][:24]
  captions = {}
  for i, annotation in enumerate(held.annotations):
    if annotation.captions:
      captions.setdefault(annotation.captions[0], i)
  names = sorted(captions)
  chosen = rng.permutation(len(names))[:SHOWN]
  return [
    (tasks.draw_question(name), held.images[captions[name]], name)
    for name in (names[i] for i in sorted(chosen))
  ]


def _answered(bench: Bench, held: HeldOut, rng):
  """Returns cells of a sheet: pictures with questions, or with captions."""
  asked = held.questions()
  if not asked:
    asked = [
      (i, tasks.CAPTION_QUESTION, a.captions[0])
      for i, a in enumerate(held.annotations)
      if a.captions
    ]
  if not asked:
    return []
  order = rng.permutation(len(asked))
  chosen, seen = [], set()
  for number in order:  # One question a picture.
    if asked[number][0] not in seen:
      seen.add(asked[number][0])
      chosen.append(asked[number])
  chosen = chosen[:SHOWN]
  longest = bench.longest([answer for *_, answer in asked])
  said = bench.ask(held, [(i, q) for i, q, _ in chosen], longest)
  return [
    ((held.images[i],), f"{question}\nmodel: {text}\nright: {answer}")
    for (i, question, answer), text in zip(chosen, said, strict=True)
  ]
