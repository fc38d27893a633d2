"""A trained model in use: it reads images, answers questions and draws.

The Python API behind the commands, METHOD section 4 at work:

  model = unicode_jax.load("runs/quickstart/stage2")
  image = open_image("x.png", model.image_size)
  codes = model.encode(image[None])
  model.answer([Question((IMAGE, "What is this?"), codes)])[0].text
  model.draw(["rooster"], seed=1)  # uint8[1, S, S, 3]

Nothing is trained here, and nothing measured.
"""

from collections.abc import Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import warnings

import jax
import numpy as np
from PIL import Image

from unicode_jax import config as config_lib, loading, sampling as sampling_lib
from unicode_jax.data import sequences, sources, tasks, text_files
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import instruct_step, pictures

BATCH = 64  # Images or prompts at a time.
# A prompt of more rows of training than this has no use, and takes memory for
# each of its positions.
_MAX_ROWS = 16
# What answering and drawing use unless told otherwise.
ANSWER_SAMPLING = sampling_lib.SamplingConfig(temperature=0.0)
DRAW_SAMPLING = sampling_lib.SamplingConfig(top_k=0, top_p=0.95, guidance=2.0)

# The first image of a conversation, whole.
IMAGE = sequences.ImageSpan()
_NO_TURNS = sequences.Conversation(())


class ResolutionWarning(UserWarning):
  """An image has to be enlarged to what the model reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
  """What is asked, and what came before.

  Attributes:
    parts: text, or texts and image spans.
    codes: int32[n, P, D] of the images that the conversation shows, or None.
    history: earlier turns.
  """

  parts: sequences.Parts
  codes: np.ndarray | None = None
  history: sequences.Conversation = _NO_TURNS


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
  """What the model said.

  Attributes:
    parts: texts, and `ImageSpan(i)` for image i of `codes`. A turn of
      `Question.history` takes them too, counted on from the images that were
      shown before.
    codes: int32[n, P, D] of the images that it drew.
  """

  parts: tuple[str | sequences.ImageSpan, ...]
  codes: np.ndarray

  @property
  def text(self) -> str:
    """The texts, joined."""
    return "".join(p for p in self.parts if isinstance(p, str)).strip()


def open_image(file: str | os.PathLike[str], image_size: int) -> np.ndarray:
  """Reads an image file of any size and mode, as training does.

  Args:
    file: path.
    image_size: S; the central square is resized to it. Training and testing at
      different resolutions hurts (reported for UniCode: 256 and 320 px), so an
      image that has to be enlarged brings a `ResolutionWarning`.

  Returns:
    uint8[S, S, 3].

  Raises:
    ConfigError: if there is no such file, or it is no image.
  """
  try:
    size = sources.stored_size(file)
    image = sources.decode_image(file, image_size)
  except (OSError, ValueError, SyntaxError) as error:
    reason = error.strerror if isinstance(error, OSError) else None
    raise config_lib.ConfigError(
      f"cannot read the image {str(file)!r} ({reason or error}): name a file "
      f"of one of the kinds {', '.join(sources.IMAGE_SUFFIXES)}"
    ) from error
  if min(size) < image_size:
    warnings.warn(
      f"{file} has {size[0]}x{size[1]} pixels and is enlarged to the "
      f"{image_size}x{image_size} that the model was trained on: expect worse "
      "answers",
      ResolutionWarning,
      stacklevel=2,
    )
  elif size != (image_size, image_size):
    logging.info("%s: %dx%d, read at %d px", file, *size, image_size)
  return image


def save_image(file: str | os.PathLike[str], image: np.ndarray) -> None:
  """Writes a picture uint8[H, W, 3] as PNG, whole, or leaves what is there."""
  pictures.save_sheet(pathlib.Path(file), Image.fromarray(image))


def load(
  workdir: str | os.PathLike[str],
  step: int | None = None,
  *,
  draws: bool = False,
) -> "UniCodeModel":
  """Loads a run, ready to use.

  Args:
    workdir: Run folder.
    step: Which checkpoint; None for the newest.
    draws: whether to refuse a run that cannot draw, before it is read.

  Returns:
    The model.

  Raises:
    ConfigError: as `loading.load`, or if the run cannot draw.
  """
  path = pathlib.Path(os.path.expanduser(workdir)) / "config.json"
  if draws and path.is_file():
    _check_draws(config_lib.from_json(path), workdir)
  return UniCodeModel(loading.load(workdir, step))


def _check_speaks(config, workdir) -> None:
  """Raises ConfigError unless a run has an LLM."""
  if config.stage == "tokenizer":
    raise config_lib.ConfigError(
      f"{workdir} is a visual tokenizer alone: it can encode and decode "
      "images, but not answer or draw; name a run of "
      "--config=configs/instruct.py"
    )


def _check_draws(config, workdir) -> None:
  """Raises ConfigError unless a run's LLM reads and says codes."""
  _check_speaks(config, workdir)
  if config.stage == "instruct" and config.instruct.vision == "projector":
    raise config_lib.ConfigError(
      f"{workdir} was trained with instruct.vision='projector', which reads "
      "features instead of codes: it cannot draw, and its held-out answers are "
      "measured while it trains (eval/exact in metrics.jsonl); train with "
      "'unified' or 'separate'"
    )


class UniCodeModel:
  """A trained model.

  Attributes:
    loaded: architecture, parameters, config and text tokenizer.
    image_size: S, pixels.
  """

  def __init__(self, loaded: loading.Loaded):
    """Wraps a loaded run; nothing is compiled before it is used."""
    self.loaded = loaded
    self.image_size = loaded.config.image_size
    self._model = loaded.model
    self._llama = loaded.model.llama
    if self._llama is not None:
      self._llama = dataclasses.replace(self._llama, scan_layers=False)

  @functools.cached_property
  def _params(self):
    """The LLM's parameters, unrolled, which decodes faster."""
    params = self.loaded.variables.params["llm"]
    return llama_lib.unstack_layers(params) if "layers" in params else params

  @functools.cached_property
  def _depth_weights(self):
    return self._model.depth_weights(self.loaded.variables)

  @functools.cached_property
  def _encode(self):
    return jax.jit(
      lambda variables, images: (
        self._model.encode(variables, instruct_step.to_float(images)).codes
      )
    )

  @functools.cached_property
  def _decode(self):
    return jax.jit(self._model.decode)

  def encode(self, images: np.ndarray) -> np.ndarray:
    """Quantizes images, exactly.

    Args:
      images: uint8[N, S, S, 3].

    Returns:
      codes int32[N, P, D].

    Raises:
      ConfigError: if the images have another size or type.
    """
    images = np.asarray(images)
    wanted = (self.image_size, self.image_size, 3)
    if images.shape[1:] != wanted or images.dtype != np.uint8:
      raise config_lib.ConfigError(
        f"images are {images.dtype}{list(images.shape)}, not uint8[N, "
        f"{self.image_size}, {self.image_size}, 3]: read them with "
        "unicode_jax.inference.open_image"
      )
    codes = self._in_batches(
      lambda batch: self._encode(self.loaded.variables, batch), images
    )
    return codes.reshape(
      len(images), self._model.num_positions, self._model.depth
    )

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """Turns codes int32[N, P, D] into pictures uint8[N, S, S, 3]."""
    grid = self._model.code_grid
    codes = np.asarray(codes, np.int32).reshape(
      len(codes), *grid, self._model.depth
    )
    return pictures.to_uint8(
      self._in_batches(
        lambda batch: self._decode(self.loaded.variables, batch), codes
      )
    )

  def _in_batches(self, function, rows: np.ndarray) -> np.ndarray:
    """Maps a function over rows, at most two batch sizes being compiled."""
    size = BATCH if len(rows) > 8 else 8
    results = []
    for start in range(0, max(len(rows), 1), size):
      batch = rows[start : start + size]
      fill = [(0, size - len(batch))] + [(0, 0)] * (rows.ndim - 1)
      results.append(np.asarray(function(np.pad(batch, fill)))[: len(batch)])
    return np.concatenate(results)

  def grammar(
    self, *, text: bool = True, images: bool = True
  ) -> sampling_lib.Grammar:
    """Returns which ids may follow which in an answer (H9).

    Args:
      text: whether it may hold text.
      images: whether it may hold images.
    """
    loaded = self.loaded
    _check_speaks(loaded.config, loaded.workdir)
    layout, tokenizer = loaded.layout, loaded.text_tokenizer
    valid = np.asarray(loaded.variables.valid)
    codes = np.zeros(self._llama.vocab_size, bool)
    codes[self._model.codes_shift :][: len(valid)] = valid
    return sampling_lib.make_grammar(
      self._llama.vocab_size,
      valid=codes,
      control_ids=tokenizer.control_ids,
      image_start=tokenizer.token_id(layout.image_start),
      image_end=tokenizer.token_id(layout.image_end),
      stop_ids=[sequences.stop_id(tokenizer, layout.template)],
      codes_per_image=self._model.num_positions * self._model.depth,
      vocab_size=tokenizer.vocab_size,
      allow_images=images and self._model.vision != "projector",
      allow_text=text,
    )

  def prompt(self, question: Question, draw: bool = False) -> np.ndarray:
    """Returns the ids int32[n, D] that the model reads before it answers.

    Raises:
      ConfigError: the question is no text, or far too long.
    """
    _check_speaks(self.loaded.config, self.loaded.workdir)
    if question.codes is not None or draw:
      _check_draws(self.loaded.config, self.loaded.workdir)
    parts = question.parts
    try:
      for part in (parts,) if isinstance(parts, str) else parts:
        if isinstance(part, str):
          text_files.check_text(part)
    except ValueError as error:
      raise config_lib.ConfigError(
        f"the prompt {str(part)[:60]!r} cannot be read: {error}"
      ) from error
    ids = sequences.encode_prompt(
      question.history,
      question.parts,
      self.loaded.text_tokenizer,
      self.loaded.layout,
      () if question.codes is None else list(question.codes),
      draw=draw,
    )
    limit = _MAX_ROWS * self.loaded.config.text.sequence_length
    if len(ids) > limit:
      raise config_lib.ConfigError(
        f"a prompt of {len(ids)} positions is more than {limit}, {_MAX_ROWS} "
        "times what the model was trained on (text.sequence_length): shorten it"
      )
    return ids

  def answer(
    self,
    questions: Sequence[Question],
    sampling: sampling_lib.SamplingConfig = ANSWER_SAMPLING,
    *,
    seed: int = 0,
    images: bool = True,
  ) -> list[Reply]:
    """Answers questions, with text, images or both.

    Args:
      questions: what is asked; each may show images.
      sampling: by default greedy.
      seed: of what is drawn at random.
      images: whether answers may hold images.

    Returns:
      One reply each.
    """
    _check_speaks(self.loaded.config, self.loaded.workdir)
    room = 2 + self._model.num_positions * self._model.depth
    if images and sampling.max_new_tokens < room + 1:
      sampling = dataclasses.replace(sampling, max_new_tokens=room + 1)
    answers = sampling_lib.generate(
      self._llama,
      self._params,
      [self.prompt(question) for question in questions],
      self.grammar(images=images),
      sampling,
      jax.random.key(seed),
      batch_size=BATCH,
      depth_weights=self._depth_weights,
    )
    return [self._reply(ids) for ids in answers]

  def draw(
    self,
    captions: Sequence[str | None],
    sampling: sampling_lib.SamplingConfig = DRAW_SAMPLING,
    *,
    seed: int = 0,
  ) -> np.ndarray:
    """Draws one picture of each caption.

    Args:
      captions: what to draw; None draws whatever comes.
      sampling: how; guidance leads away from the unconditional picture.
      seed: of what is drawn at random. Picture i depends on the seed and i.

    Returns:
      uint8[N, S, S, 3].

    Raises:
      ConfigError: if the model cannot draw.
    """
    questions = [
      tasks.UNCONDITIONAL if c is None else tasks.draw_question(c)
      for c in captions
    ]
    return self.decode(self.draw_codes(questions, sampling, seed=seed))

  def draw_codes(
    self,
    questions: Sequence[str],
    sampling: sampling_lib.SamplingConfig = DRAW_SAMPLING,
    *,
    seed: int = 0,
  ) -> np.ndarray:
    """Answers questions by images: as `draw`, but returns int32[N, P, D]."""
    _check_draws(self.loaded.config, self.loaded.workdir)
    model = self._model
    wanted = model.num_positions * model.depth
    prompts = [self.prompt(Question(q), draw=True) for q in questions]
    negatives = None
    if sampling.guidance != 1:
      empty = self.prompt(Question(tasks.UNCONDITIONAL), draw=True)
      negatives = [empty] * len(prompts)
    answers = sampling_lib.generate(
      self._llama,
      self._params,
      prompts,
      self.grammar(),
      dataclasses.replace(sampling, max_new_tokens=wanted + 1),
      jax.random.key(seed),
      negative_prompts=negatives,
      batch_size=BATCH,
      depth_weights=self._depth_weights,
    )
    codes = np.asarray([ids[:wanted] for ids in answers], np.int32)
    codes = codes.reshape(len(answers), model.num_positions, model.depth)
    return codes - model.codes_shift

  def _reply(self, ids: np.ndarray) -> Reply:
    """Takes an answer apart."""
    tokenizer, layout = self.loaded.text_tokenizer, self.loaded.layout
    start = tokenizer.token_id(layout.image_start)
    wanted = self._model.num_positions * self._model.depth
    parts, images = [], []
    begin = 0
    ids = np.asarray(ids)
    while begin < len(ids):
      opened = np.flatnonzero(ids[begin:] == start)
      stop = begin + int(opened[0]) if len(opened) else len(ids)
      text = tokenizer.decode(ids[begin:stop])
      if begin == 0:  # The layout puts it in front of any answer.
        text = text.removeprefix(layout.template.prefix)
      if text:
        parts.append(text)
      if stop == len(ids):
        break
      parts.append(sequences.ImageSpan(len(images)))
      images.append(ids[stop + 1 : stop + 1 + wanted])
      begin = stop + 2 + wanted
    codes = np.asarray(images, np.int32).reshape(
      len(images), self._model.num_positions, self._model.depth
    )
    return Reply(tuple(parts), codes - self._model.codes_shift)
