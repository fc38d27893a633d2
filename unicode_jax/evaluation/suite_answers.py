"""Suites: what a model says of pictures - VQA, POPE and captions.

METHOD section 5. The model answers greedily and in text alone, or is `forced`
where it cannot be sampled from; the rules of the scores are in `vqa_accuracy`,
`pope` and `caption_metrics`. Each score stands beside that of a guess that has
not seen the picture.
"""

import collections
from typing import Any

import numpy as np

from unicode_jax.data import tasks
from unicode_jax.evaluation import (
  caption_metrics,
  forced,
  pope as pope_lib,
  vqa_accuracy,
)
from unicode_jax.evaluation.bench import Bench, HeldOut, Outcome, spread

_POPE_IMAGES = 500  # As many as the published suite.


def _training_pairs(held: HeldOut) -> tuple[list[str], list[str]]:
  """Returns the training questions that stand first, and their answers."""
  pairs = [d[0] for a in held.train.annotations for d in a.dialogues if d]
  return [q for q, _ in pairs], [a for _, a in pairs]


def vqa(bench: Bench) -> Outcome:
  """Measures accuracy over every held-out question, beside a blind guess.

  Args:
    bench: the model and the data.
  """
  results, longest = {}, {}
  projector = bench.loaded.model.vision == "projector"
  for held in bench.sets:
    asked = held.questions()
    questions, answers = _training_pairs(held)
    if not asked or not questions:
      continue
    longest[held.name] = bench.longest(answers)
    if projector:
      predictions = forced.answers(bench, held, asked)
    else:
      predictions = bench.ask(
        held, [(i, q) for i, q, _ in asked], longest[held.name]
      )
    kind = None
    if held.name.startswith("easy_vqa"):
      kind = vqa_accuracy.easy_vqa_type
    texts, truth = [q for _, q, _ in asked], [a for *_, a in asked]
    blind = vqa_accuracy.BlindBaseline(questions, answers)

    def score(said, exactly=truth, texts=texts, truth=truth, kind=kind):
      scores = vqa_accuracy.evaluate_answers(
        said, [[answer] for answer in truth], texts, kind
      )
      exact = np.mean([a == b for a, b in zip(said, exactly, strict=True)])
      return _named(scores) | {"exact_match": float(exact)}

    results[held.name] = score(predictions) | {
      # It says normalised answers, so these are what it can match.
      "blind": score(
        blind.predict(texts), [*map(vqa_accuracy.normalize_answer, truth)]
      ),
      "distinct_questions": len(set(texts)),
    }
  return Outcome(
    results,
    {
      "question": "asked alone after its picture; of a dialogue the first turn",
      "decoding": "right where each of its tokens is the likeliest"
      if projector
      else "greedy, text only",
      "max_new_tokens": longest,
      "accuracy": "VQA v2's rule and normalisation, one answer a question",
      "blind": "the commonest training answer to the same question",
    },
    ", ".join(
      f"{k} {100 * v['accuracy']:.1f} % (blind "
      f"{100 * v['blind']['accuracy']:.1f} %)"
      for k, v in results.items()
    ),
  )


def _named(value: Any) -> Any:
  """Returns named tuples as dictionaries, at any depth."""
  if isinstance(value, tuple) and hasattr(value, "_asdict"):
    return {k: _named(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {k: _named(v) for k, v in value.items()}
  return value


def objects_of(held: HeldOut) -> list[tuple[int, frozenset[str]]]:
  """Returns what is in each picture, where that is known."""
  if not held.name.startswith("easy_vqa"):
    return []
  return [
    (i, pope_lib.easy_vqa_objects(a.label))
    for i, a in enumerate(held.annotations)
    if a.label is not None
  ]


def pope(bench: Bench) -> Outcome:
  """Measures whether the model says that there is what is not.

  Args:
    bench: the model and the data.
  """
  results = {}
  for held in bench.sets:
    objects = objects_of(held)
    objects = [objects[i] for i in spread(len(objects), _POPE_IMAGES)]
    if not objects:
      continue
    vocabulary = frozenset().union(
      *(
        pope_lib.easy_vqa_objects(a.label)
        for a in held.train.annotations
        if a.label is not None
      )
    )
    blind = vqa_accuracy.BlindBaseline(*_training_pairs(held))
    suites = {
      kind: pope_lib.build_pope(
        [(str(i), present) for i, present in objects],
        vocabulary=vocabulary,
        negatives=kind,
        per_image=2,
        seed=bench.settings.seed,
        ask=pope_lib.ask_as_easy_vqa,
      )
      for kind in pope_lib.NEGATIVES
    }
    asked = [(int(q.image_key), q.question) for s in suites.values() for q in s]
    said = iter(bench.ask(held, asked, bench.longest(["yes", "no"])))
    results[held.name] = {}
    for kind, questions in suites.items():
      guessed = blind.predict([q.question for q in questions])
      scores = pope_lib.score_pope([next(said) for _ in questions], questions)
      results[held.name][kind] = scores._asdict() | {
        "blind": pope_lib.score_pope(guessed, questions)._asdict()
      }
  return Outcome(
    results,
    {
      "pictures": f"at most {_POPE_IMAGES} of a set, evenly spread",
      "objects": "easy-VQA's 3 shapes and 8 'colour shape's; 2 that are there "
      "and 2 that are not of each picture",
      "decoding": "greedy, text only",
      "blind": "the commonest training answer to the same question",
    },
    ", ".join(
      f"{kind} {100 * r['accuracy']:.1f} %"
      for kinds in results.values()
      for kind, r in kinds.items()
    ),
    ("Not the published suite, which asks about 500 pictures of COCO.",),
  )


def caption(bench: Bench) -> Outcome:
  """Measures how much captions are like those that people wrote.

  Args:
    bench: the model and the data.
  """
  results, longest = {}, {}
  for held in bench.sets:
    chosen = [i for i, a in enumerate(held.annotations) if a.captions]
    written = [c for a in held.train.annotations for c in a.captions]
    if not chosen or not written:
      continue
    references = [held.annotations[i].captions for i in chosen]
    longest[held.name] = bench.longest(written)
    said = bench.ask(
      held, [(i, tasks.CAPTION_QUESTION) for i in chosen], longest[held.name]
    )
    counts = collections.Counter(written)
    commonest = max(sorted(counts), key=counts.get)

    def score(captions, references=references):
      return {
        "bleu": list(caption_metrics.bleu(captions, references)),
        "cider": caption_metrics.cider(captions, references)[0],
        "exact_match": float(
          np.mean(
            [c in texts for c, texts in zip(captions, references, strict=True)]
          )
        ),
      }

    results[held.name] = score(said) | {
      "count": len(chosen),
      "blind": score([commonest] * len(chosen)) | {"caption": commonest},
    }
  return Outcome(
    results,
    {
      "question": tasks.CAPTION_QUESTION,
      "decoding": "greedy, text only",
      "max_new_tokens": longest,
      "scores": "BLEU without smoothing (0 where no caption has so many "
      "words), CIDEr-D with this set's frequencies",
      "blind": "the commonest training caption for every picture",
    },
    ", ".join(f"{k} CIDEr-D {v['cider']:.3f}" for k, v in results.items()),
  )
