"""Runs of ours under lmms-eval, whose tasks hold the published benchmarks.

VQAv2, VizWiz, POPE and ScienceQA (METHOD section 5) are tasks of the package
lmms-eval. With it installed, and this package's entry point with it:

  python -m lmms_eval --model unicode_jax --model_args pretrained=runs/mine \
    --tasks pope,vizwiz_vqa_val

`Requests` answers what it asks and needs nothing of it; `UniCodeModel`, made
when it is first looked up, is the class that lmms-eval registers. Pictures
only: no video, no audio, no drawing, and no benchmark's data comes with it.
Written for the interface of versions 0.2 to 0.7.
"""

from collections.abc import Callable, Sequence
import functools
import io
import logging
from typing import Any

import numpy as np

from unicode_jax import config as config_lib, inference, sampling
from unicode_jax.data import sequences
from unicode_jax.evaluation import forced

_PLACEHOLDER = "<image>"  # Of lmms-eval's contexts.
_CHUNK = 512  # Requests whose pictures are in memory together.
_BATCH = 32  # Continuations scored at a time.
_LENGTH_STEP = 64  # Lengths are rounded up to it: few programs are compiled.

# Key of a document: (id, task, split), and perhaps a round.
_Key = tuple[Any, Any, Any]


class Requests:
  """Answers requests of lmms-eval.

  A request is an object whose `args` are those of lmms-eval's `Instance`.
  Documents are found in `task_dict[task][split][id]`.

  Attributes:
    is_simple: what lmms-eval calls the form of these requests.
    task_dict: documents; lmms-eval fills it.
    unicode: the model.
  """

  is_simple = True

  def __init__(
    self,
    pretrained: str,
    step: int | None = None,
    batch_size: int | str = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    device: str | None = None,
  ):
    """Loads a run.

    Args:
      pretrained: run folder of stage II.
      step: checkpoint; None for the newest.
      batch_size: not used: requests share batches of `inference.BATCH`.
      max_new_tokens: of an answer, where the task says nothing.
      seed: of what is sampled, where a task samples.
      device: not used: JAX takes what there is.

    Raises:
      ConfigError: there is no such run, or it has no LLM.
    """
    super().__init__()
    del batch_size, device
    self.unicode = inference.load(pretrained, step)
    if self.unicode.loaded.config.stage != "instruct":
      raise config_lib.ConfigError(
        f"pretrained={pretrained} is a run of stage "
        f"{self.unicode.loaded.config.stage!r}: name one of "
        "configs/instruct.py, which answers questions"
      )
    self._max_new_tokens, self._seed = int(max_new_tokens), int(seed)
    if not hasattr(self, "task_dict"):
      self.task_dict: dict[str, Any] = {}

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Answers questions.

    Args:
      requests: args (context, gen_kwargs, doc_to_visual, id, task, split). Of
        gen_kwargs, until, max_new_tokens, do_sample, temperature and top_p
        count. Pictures stand where the context says `<image>`, else before it.

    Returns:
      One answer each, cut before the first `until`.
    """
    asked = []
    for request in requests:
      context, settings, doc_to_visual, *key = request.args
      asked.append((context, settings, tuple(key), doc_to_visual))
    answers = self._answer(asked)
    for (context, settings, *_), answer in zip(asked, answers, strict=True):
      self._remember("generate_until", (context, settings), answer)
    return answers

  def generate_until_multi_round(
    self, requests: Sequence[Any]
  ) -> list[list[str]]:
    """Answers in rounds: the task makes the next question of the answers.

    Args:
      requests: args (context, gen_kwargs, doc_to_visual, doc_to_text, id, task,
        split). After each round `doc_to_text(doc, previous_output=...,
        round_idx=..., previous_round_info=...)` returns pictures, context,
        whether that was all, the answers to keep, and what it wants back.

    Returns:
      The answers of all rounds, for each request.
    """
    answers: list[list[str]] = [[] for _ in requests]
    state = {}
    for i, request in enumerate(requests):
      context, settings, doc_to_visual, doc_to_text, *key = request.args
      state[i] = (context, settings, tuple(key), doc_to_visual, doc_to_text)
    info: dict[int, Any] = {}
    number = 0
    while state:
      said = self._answer([s[:4] for s in state.values()])
      number += 1
      following = {}
      for (i, (_, settings, key, _, ask)), text in zip(
        state.items(), said, strict=True
      ):
        visuals, context, ended, kept, info[i] = ask(
          self._document(key),
          previous_output=[*answers[i], text],
          round_idx=number,
          previous_round_info=info.get(i),
        )
        answers[i] = list(kept)
        if not ended:
          # Pictures of a round are its own, whatever the document's were.
          following[i] = (
            context,
            settings,
            (*key, number),
            lambda _, v=visuals: v,
            ask,
          )
      state = following
    return answers

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Scores continuations, as lmms-eval's tasks want them: as a loss.

    Args:
      requests: args (context, continuation, doc_to_visual, id, task, split), or
        (context, continuation) alone; a continuation is text, or a function of
        the document.

    Returns:
      Minus the log-likelihood, nats summed over the continuation's tokens, and
      whether greedy decoding would say it. The sign is what multiple choice in
      lmms-eval takes (it picks the smallest, since most of its models return
      losses); `log_likelihoods` has the true one.
    """
    asked = []
    for request in requests:
      context, continuation, *rest = request.args
      doc_to_visual, key = (rest[0], tuple(rest[1:])) if rest else (None, ())
      if callable(continuation):
        continuation = continuation(self._document(key))
      asked.append((context, str(continuation), key, doc_to_visual))
    results = []
    for start in range(0, len(asked), _CHUNK):
      chunk = asked[start : start + _CHUNK]
      questions = self._questions([(c, k, v) for c, _, k, v in chunk])
      results += self.log_likelihoods(
        questions, [text for _, text, *_ in chunk]
      )
    return [(-nats, greedy) for nats, greedy in results]

  def log_likelihoods(
    self,
    questions: Sequence[inference.Question],
    continuations: Sequence[str],
  ) -> list[tuple[float, bool]]:
    """Returns how likely the model is to answer so.

    Args:
      questions: what is asked.
      continuations: one each; spaces around them do not count, since the
        template decides them. The answer's end is not scored.

    Returns:
      The log-likelihood, nats summed over tokens, and whether each token is the
      likeliest.
    """
    loaded = self.unicode.loaded
    prefix = loaded.layout.template.prefix
    encode = loaded.text_tokenizer.encode
    pairs = []
    for question, text in zip(questions, continuations, strict=True):
      prompt = self.unicode.prompt(question)
      answer = np.asarray(encode(prefix + text.strip()), np.int32)
      pairs.append((prompt, answer))
    order = sorted(
      range(len(pairs)), key=lambda i: sum(map(len, pairs[i])), reverse=True
    )
    results: list[Any] = [None] * len(pairs)
    for start in range(0, len(order), _BATCH):
      members = order[start : start + _BATCH]
      longest = max(sum(map(len, pairs[i])) for i in members)
      T = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
      D = pairs[members[0]][0].shape[1]
      token_ids = np.full((_BATCH, T, D), -1, np.int32)
      labels = np.zeros((_BATCH, T), np.int32)
      mask = np.zeros((_BATCH, T), np.float32)
      for row, i in enumerate(members):
        prompt, answer = pairs[i]
        n, m = len(prompt), len(answer)
        token_ids[row, :n] = prompt
        token_ids[row, n : n + m, 0] = answer
        labels[row, n - 1 : n + m - 1] = answer
        mask[row, n - 1 : n + m - 1] = 1
      nats, hits = forced.nats_and_hits_of_ids(
        loaded.model,
        loaded.variables,
        token_ids,
        labels,
      )
      total = (np.asarray(nats) * mask).sum(axis=1)
      greedy = ((np.asarray(hits) > 0) | (mask == 0)).all(axis=1)
      for row, i in enumerate(members):
        results[i] = (-float(total[row]), bool(greedy[row]))
    return results

  def _answer(self, asked: Sequence[tuple[str, dict, _Key, Callable]]):
    """Answers (context, gen_kwargs, key, doc_to_visual)."""
    answers: list[Any] = [None] * len(asked)
    for start in range(0, len(asked), _CHUNK):
      chunk = range(start, min(start + _CHUNK, len(asked)))
      questions = self._questions(
        [(asked[i][0], asked[i][2], asked[i][3]) for i in chunk]
      )
      groups: dict[sampling.SamplingConfig, list[int]] = {}
      for i in chunk:
        groups.setdefault(self._sampling(asked[i][1]), []).append(i)
      for settings, members in groups.items():
        replies = self.unicode.answer(
          [questions[i - start] for i in members],
          settings,
          seed=self._seed + start,
          images=False,
        )
        for i, reply in zip(members, replies, strict=True):
          answers[i] = _until(reply.text, asked[i][1].get("until"))
    return answers

  def _sampling(self, settings: dict) -> sampling.SamplingConfig:
    """Reads lmms-eval's gen_kwargs."""
    temperature = settings.get("temperature") or 0.0
    if "do_sample" in settings:
      # Hugging Face samples at 1 where nothing else is said.
      default = settings.get("temperature")
      temperature = (1.0 if default is None else default) * bool(
        settings["do_sample"]
      )
    if (settings.get("num_beams") or 1) > 1:
      logging.warning(
        "num_beams=%s: there is no beam search here, answers are greedy",
        settings["num_beams"],
      )
    top_p = settings.get("top_p")
    return sampling.SamplingConfig(
      temperature=float(temperature),
      top_p=float(top_p) if temperature and top_p else 1.0,
      max_new_tokens=int(
        settings.get("max_new_tokens") or self._max_new_tokens
      ),
    )

  def _document(self, key: _Key) -> Any:
    """Finds a document; a round's number behind the key does not matter."""
    task, split = key[1:3]
    return self.task_dict[task][split][key[0]]

  def _questions(
    self, asked: Sequence[tuple[str, _Key, Callable | None]]
  ) -> list[inference.Question]:
    """Turns contexts into questions; each picture is encoded once."""
    size = self.unicode.image_size
    pictures: dict[_Key, range] = {}
    arrays: list[np.ndarray] = []
    for _, key, doc_to_visual in asked:
      if key in pictures:
        continue
      visuals = doc_to_visual(self._document(key)) if doc_to_visual else None
      first = len(arrays)
      arrays += [_pixels(visual, size) for visual in visuals or ()]
      pictures[key] = range(first, len(arrays))
    codes = self.unicode.encode(np.stack(arrays)) if arrays else None
    questions = []
    for context, key, _ in asked:
      shown = pictures[key]
      questions.append(
        inference.Question(
          question_parts(context, len(shown)),
          codes[shown.start : shown.stop] if shown else None,
        )
      )
    return questions

  def _remember(self, kind: str, key: tuple, answer: str) -> None:
    """Tells lmms-eval's cache of answers, where there is one."""
    hook = getattr(self, "cache_hook", None)
    if hook is not None:
      hook.add_partial(kind, key, answer)


def question_parts(context: str, count: int) -> sequences.Parts:
  """Puts pictures into a context.

  Args:
    context: with or without `<image>`s.
    count: of pictures. Those without a place come first, as in training; a
      place without a picture is dropped.

  Returns:
    Texts and image spans.
  """
  pieces = context.split(_PLACEHOLDER)
  before = max(0, count - (len(pieces) - 1))
  parts: list[str | sequences.ImageSpan] = [
    sequences.ImageSpan(i) for i in range(before)
  ]
  number = before
  for i, piece in enumerate(pieces):
    if i and number < count:
      parts.append(sequences.ImageSpan(number))
      number += 1
    if i or count:  # Training has no line break between picture and question.
      piece = piece.strip("\n")
    if piece:
      parts.append(piece)
  return tuple(parts)


def _pixels(visual: Any, image_size: int) -> np.ndarray:
  """Reads a picture of Pillow, or a file, as uint8[S, S, 3]."""
  if hasattr(visual, "save") and hasattr(visual, "convert"):
    stream = io.BytesIO()
    mode = visual.mode
    keeps = mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    (visual if keeps else visual.convert("RGB")).save(stream, "PNG")
    return inference.open_image(stream, image_size)
  if isinstance(visual, str) and not visual.endswith((".mp4", ".avi", ".wav")):
    return inference.open_image(visual, image_size)
  raise config_lib.ConfigError(
    f"a document shows {type(visual).__name__} {str(visual)[:60]!r}: only "
    "pictures can be read; choose a task of images"
  )


def _until(text: str, until: str | Sequence[str] | None) -> str:
  """Cuts a text before the first of some strings."""
  for end in [until] if isinstance(until, str) else until or ():
    if end:
      text = text.split(end)[0]
  return text.strip()


@functools.cache
def _model_class() -> type:
  """Makes the class that lmms-eval knows.

  Raises:
    ConfigError: lmms-eval is not installed.
  """
  try:
    from lmms_eval.api.model import lmms  # pylint: disable=g-import-not-at-top
    from lmms_eval.api.registry import register_model  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise config_lib.ConfigError(
      f"lmms-eval cannot be imported ({error}): run `pip install lmms-eval`; "
      "without it use python -m unicode_jax.evaluate"
    ) from error

  # Requests comes first: its methods are the ones that lmms leaves open.
  return register_model("unicode_jax")(
    type(
      "UniCodeModel",
      (Requests, lmms),
      {"__doc__": Requests.__doc__, "__module__": __name__},
    )
  )


def manifest() -> Any:
  """Tells lmms-eval 0.6 and later of the model: its entry point."""
  from lmms_eval.models.registry_v2 import ModelManifest  # pylint: disable=g-import-not-at-top

  return ModelManifest(
    model_id="unicode_jax",
    simple_class_path=f"{__name__}.UniCodeModel",
  )


def __getattr__(name: str) -> Any:
  """Makes `UniCodeModel` when it is first asked for."""
  if name == "UniCodeModel":
    return _model_class()
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
