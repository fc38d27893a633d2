r"""Talks with a trained model about pictures, and lets it draw.

One answer:
  python -m unicode_jax.chat --workdir=runs/instruct-default \
    --image=x.png --prompt="what shape is it?"

A conversation, from the terminal or a pipe:
  python -m unicode_jax.chat --workdir=runs/instruct-default
    /image x.png             shows another picture, and begins anew
    what shape is it?        asks about it
    draw a red circle        saves drawing_1.png, and asks go on about it
    draw: red circle         the same in exactly these words
    draw one of: red circle  of a class that the data names
    /reset                   forgets all, the picture too
    /quit                    or the end of input

The prompt holds what was said, as in the multi-turn conversations of METHOD
section 4, and as they are in training: one picture, before the first question.
So what was said about another picture is forgotten, and a drawing is told as
any picture is. With a picture in the middle, or the codes of a drawing in an
answer, models of the embedded data answer much worse. Nothing is measured here.
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import sys
import warnings

from absl import flags
import numpy as np

from unicode_jax import command, config as config_lib
from unicode_jax.data import sequences, tasks

HELP = (
  "/image PATH shows another picture, /reset forgets all, /quit ends; a "
  "message that begins with 'draw' draws"
)
_MAX_SEED = 2**31 - 1

# "Draw ...", politely or not; what follows is the caption.
_DRAW = re.compile(
  r"\s*(?:please[\s,]+)?draw(?=[\s:,.!?]|$)(?P<rest>.*)",
  re.IGNORECASE | re.DOTALL,
)
# "Draw: ..." and "Draw one of: ..." are what the model was trained on.
_EXACT = re.compile(
  r"\s*(?P<class>one\s+of\s*)?:(?P<text>.*)", re.IGNORECASE | re.DOTALL
)
_PREAMBLE = re.compile(
  r"\s*(?:(?:me|us)\s+)?"
  r"(?:(?:an?|the)\s+)?(?:(?:picture|image|drawing|sketch|photo)\s+of\s+)?",
  re.IGNORECASE,
)
_PLEASE = re.compile(r"\bplease$", re.IGNORECASE)
_ANYTHING = re.compile(
  r"\s*(?:(?:me|us)\b\s*)?"
  r"(?:something|anything|whatever|(?:an?\s+)?(?:picture|image|drawing))?",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Turn:
  """What was said once.

  Attributes:
    question: text.
    answer: text.
    about_picture: whether a picture was in view.
  """

  question: str
  answer: str
  about_picture: bool


def drawing_question(message: str) -> str | None:
  """Returns what to ask the model for a message that wants a drawing.

  Args:
    message: "draw a red circle", "Draw: rooster", "please draw me a cat!", ...

  Returns:
    A question of a drawing task; None if the message does not begin so.
  """
  found = _DRAW.fullmatch(message)
  if found is None:
    return None
  rest = found["rest"]
  exact = _EXACT.fullmatch(rest)
  if exact is not None:
    text = exact["text"].strip()
    ask = tasks.class_question if exact["class"] else tasks.draw_question
    return ask(text) if text else tasks.UNCONDITIONAL
  rest = _without_ending(rest)
  if _ANYTHING.fullmatch(rest):
    return tasks.UNCONDITIONAL
  preamble = _PREAMBLE.match(rest)
  # "a picture of a cat" is "a cat", but "a cat" stays "a cat".
  if re.search(r"\sof\s+$", preamble[0], re.IGNORECASE):
    rest = rest[preamble.end() :]
  rest = re.sub(r"^[\s,]*(?:(?:me|us)\s+)?", "", rest, flags=re.IGNORECASE)
  return tasks.draw_question(rest) if rest else tasks.UNCONDITIONAL


def _without_ending(text: str) -> str:
  """Takes away what ends a request: a "please" and punctuation."""
  spaces = "".join(filter(str.isspace, set(text)))
  text = text.rstrip(f"{spaces}.!?")
  if (please := _PLEASE.search(text, max(len(text) - 7, 0))) is not None:
    text = text[: please.start()]
  return text.rstrip(f"{spaces},")


class Chat:
  """A conversation with a model, which remembers it."""

  def __init__(
    self,
    model,
    out_dir: str | os.PathLike[str] = ".",
    *,
    answering=None,
    drawing=None,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
  ):
    """Begins a conversation.

    Args:
      model: `inference.UniCodeModel` that draws.
      out_dir: folder for drawings, which must exist.
      answering: `sampling.SamplingConfig` of answers; None for the default.
      drawing: that of drawings; None for the default.
      seed: of what is drawn at random, with the number of the message.
      note: is told what the user should know beside the answers.
    """
    from unicode_jax import inference  # pylint: disable=g-import-not-at-top

    self._model = model
    self._out_dir = pathlib.Path(os.path.expanduser(out_dir))
    self._answering = answering or inference.ANSWER_SAMPLING
    self._drawing = drawing or inference.DRAW_SAMPLING
    self._seed = seed
    self._note = note
    self._messages = 0
    self.reset()

  def reset(self) -> None:
    """Forgets what was said and shown."""
    self._turns: list[Turn] = []
    self._codes: np.ndarray | None = None  # int32[P, D] of the picture in view.
    self._said_dropped = False

  def show(self, file: str | os.PathLike[str]) -> None:
    """Shows another picture; what was said about the last one is forgotten.

    Args:
      file: an image of any size and mode.

    Raises:
      ConfigError: if it cannot be read.
    """
    from unicode_jax import inference  # pylint: disable=g-import-not-at-top

    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      image = inference.open_image(file, self._model.image_size)
    for warning in caught:
      self._note(str(warning.message))
    self._look_at(self._model.encode(image[None])[0])

  def _look_at(self, codes: np.ndarray) -> None:
    self._codes = codes
    self._turns = [turn for turn in self._turns if not turn.about_picture]

  def reply(self, message: str) -> list[str]:
    """Answers a message.

    Args:
      message: what the user says; begins with "draw" for a drawing.

    Returns:
      Texts and paths of drawings, in order.
    """
    message = message.strip()
    seed = (self._seed + self._messages) % (_MAX_SEED + 1)
    self._messages += 1
    wanted = drawing_question(message)
    if wanted is not None:
      sampling = self._drawing
      if wanted == tasks.UNCONDITIONAL:  # Nothing to lead away from.
        sampling = dataclasses.replace(sampling, guidance=1.0)
      codes = self._model.draw_codes([wanted], sampling, seed=seed)
      return [self._save(codes[0])]
    reply = self._model.answer(
      [self._question(message)], self._answering, seed=seed
    )[0]
    if not reply.parts:
      self._note("the answer is empty")
    said = [
      part.strip()
      if isinstance(part, str)
      else self._save(reply.codes[part.index])
      for part in reply.parts
    ]
    if reply.text:
      turn = Turn(message, reply.text, about_picture=self._codes is not None)
      self._turns.append(turn)
    return said

  def _save(self, codes: np.ndarray) -> str:
    """Saves a drawing, and looks at it from now on."""
    from unicode_jax import inference  # pylint: disable=g-import-not-at-top

    taken = [
      int(found[1])
      for path in self._out_dir.iterdir()
      if (found := re.fullmatch(r"drawing_(\d+)\.png", path.name))
    ]
    path = self._out_dir / f"drawing_{max(taken, default=0) + 1}.png"
    inference.save_image(path, self._model.decode(codes[None])[0])
    self._look_at(codes)
    return str(path)

  def _question(self, message: str):
    """Returns the `inference.Question`, the oldest turns dropped if need be."""
    limit = self._model.loaded.config.text.sequence_length
    # Some of what was trained on is for the answer.
    limit -= min(self._answering.max_new_tokens, limit // 4)
    while True:
      question = self._render(message)
      length = len(self._model.prompt(question))
      if length <= limit or not self._turns:
        break
      del self._turns[0]
      if not self._said_dropped:
        self._said_dropped = True
        self._note(
          "the conversation has grown longer than what the model was trained "
          "on (text.sequence_length): its oldest turns are forgotten"
        )
    if length > limit and not self._said_dropped:
      self._said_dropped = True
      self._note(
        f"the question takes {length} positions, more than the {limit} that "
        "the model was trained on leave beside an answer: expect worse answers"
      )
    return question

  def _render(self, message: str):
    """Returns the turns and a message, the picture before the first of them."""
    from unicode_jax import inference  # pylint: disable=g-import-not-at-top

    turns: list[tuple[sequences.Parts, sequences.Parts]] = [
      *((turn.question, turn.answer) for turn in self._turns),
      (message, ""),
    ]
    if self._codes is not None:
      turns[0] = (tasks.show(turns[0][0]), turns[0][1])
    return inference.Question(
      turns[-1][0],
      None if self._codes is None else self._codes[None],
      sequences.Conversation(tuple(turns[:-1])),
    )


def converse(
  chat: Chat,
  read: Callable[[], str],
  say: Callable[[str], None],
  complain: Callable[[str], None],
) -> None:
  """Talks until the input ends or says /quit.

  Args:
    chat: the conversation.
    read: gives the next line; raises EOFError behind the last.
    say: is told every answer.
    complain: is told what cannot be done; the conversation goes on.
  """
  while True:
    try:
      line = read().strip()
    except EOFError:
      return
    command, _, argument = line.partition(" ")
    argument = argument.strip().strip("\"'")
    try:
      if line in ("/quit", "exit", "quit"):
        return
      elif command == "/reset":
        chat.reset()
      elif command == "/image" and argument:
        chat.show(_checked_image(argument))
      elif command == "/image":
        complain("/image needs a path: /image PATH")
      elif command == "/help":
        say(HELP)
      elif command.startswith("/"):
        complain(f"there is no command {command}: {HELP}")
      elif line:
        for text in chat.reply(line):
          say(text)
    except config_lib.ConfigError as error:
      complain(str(error))


def _checked_image(file: str) -> pathlib.Path:
  """Returns the path of a file; raises ConfigError if there is none."""
  path = pathlib.Path(os.path.expanduser(file))
  try:
    found = path.is_file()
  except OSError:  # Such as a name that is too long to be one.
    found = False
  if not found:
    raise config_lib.ConfigError(
      f"there is no image {file!r}: name a file that Pillow can open"
    )
  return path


def main() -> None:
  """Answers the prompt, or what the input says.

  Raises:
    ConfigError: If a flag's value cannot be used.
  """
  values = flags.FLAGS
  prompt = values.prompt
  if prompt is not None and not prompt.strip():
    raise config_lib.ConfigError(
      f"--prompt={prompt!r} is empty: say something, or leave it out for a "
      "conversation"
    )
  if not 0 <= values.seed <= _MAX_SEED:
    raise config_lib.ConfigError(
      f"--seed={values.seed}: use a number from 0 to {_MAX_SEED}"
    )
  image = _checked_image(values.image) if values.image is not None else None
  out_dir = pathlib.Path(os.path.expanduser(values.out_dir))
  if not out_dir.is_dir() or not os.access(out_dir, os.W_OK | os.X_OK):
    raise config_lib.ConfigError(
      f"--out_dir={values.out_dir} is no folder that can be written to: make "
      "it, or name another"
    )
  config_lib.check_sampling(values.flag_values_dict())
  config_lib.read_run(values.workdir)
  # JAX takes seconds to import, so only flags that can work get to it.
  from unicode_jax import inference  # pylint: disable=g-import-not-at-top

  answering = dataclasses.replace(
    inference.ANSWER_SAMPLING,
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
    max_new_tokens=values.max_new_tokens,
  )
  drawing = dataclasses.replace(
    inference.DRAW_SAMPLING, guidance=values.guidance
  )
  model = inference.load(values.workdir, values.step, draws=True)
  if model.loaded.config.stage != "instruct":
    _note(
      f"{values.workdir} is a run of stage I, which has learned no pictures "
      "yet: train stage II with --config=configs/instruct.py"
    )
  chat = Chat(
    model,
    out_dir,
    answering=answering,
    drawing=drawing,
    seed=values.seed,
    note=_note,
  )
  if image is not None:
    chat.show(image)
  if prompt is not None:
    print("\n".join(chat.reply(prompt)))
    return
  # Bytes that are not UTF-8 are a mistake in one line, not the end.
  sys.stdin.reconfigure(errors="surrogateescape")
  asks = sys.stdin.isatty()
  if asks:
    import readline  # noqa: F401  # pylint: disable=g-import-not-at-top

    print(HELP, file=sys.stderr)
  converse(
    chat,
    lambda: input("> " if asks else ""),
    lambda text: print(text, flush=True),
    lambda text: print(f"error: {text}", file=sys.stderr, flush=True),
  )


def _note(text: str) -> None:
  print(f"note: {text}", file=sys.stderr, flush=True)


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  # Defined here, so that another command's flags can be beside them.
  flags.DEFINE_string("workdir", None, "Run folder of stage II.", required=True)
  flags.DEFINE_string("image", None, "Picture to talk about, of any size.")
  flags.DEFINE_string(
    "prompt", None, "What to say; without it the input is a conversation."
  )
  flags.DEFINE_string("out_dir", ".", "Folder for drawing_1.png, ...")
  flags.DEFINE_integer(
    "step", None, "Checkpoint; by default the newest.", lower_bound=0
  )
  flags.DEFINE_integer("seed", 0, "Seed of what is drawn at random.")
  flags.DEFINE_float(
    "temperature", 0.0, "Of answers: divides the logits; 0 is greedy."
  )
  flags.DEFINE_integer(
    "top_k", 0, "Of answers: only the k likeliest tokens; 0 for all."
  )
  flags.DEFINE_float(
    "top_p",
    1.0,
    "Of answers: only the likeliest tokens of this probability; 1 for all.",
  )
  flags.DEFINE_integer(
    "max_new_tokens",
    64,
    "Of an answer, at most; raised to what a picture takes.",
  )
  flags.DEFINE_float(
    "guidance",
    2.0,
    "Scale of classifier-free guidance of drawings; 1 is off.",
  )
  command.run(main, "drawings that were made are kept")


if __name__ == "__main__":
  run()
