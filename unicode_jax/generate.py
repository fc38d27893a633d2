r"""Draws pictures with a trained model.

Four roosters and four cats, a row each:
  python -m unicode_jax.generate --workdir=runs/instruct-default \
    --prompt=rooster --prompt=cat --num=4 --out=grid.png

Of a class that the data names, or whatever comes:
  python -m unicode_jax.generate --workdir=runs/instruct-default \
    --class_label="red circle"
  python -m unicode_jax.generate --workdir=runs/instruct-default

The same command gives the same pictures, and a larger --num the same ones and
more. METHOD section 4's text-to-image, class-conditional and unconditional
tasks; measuring such pictures is another command's work.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import sys

from absl import flags

from unicode_jax import command, config as config_lib

FORMATS = ("grid", "files")
_MAX_SEED = 2**31 - 1
_MAX_NUM = 4096  # All of them are held in memory.
# Pixels: tiles of a grid are at least this large, a caption's line, and a sheet
# of narrow rows as wide as its captions up to this.
_MIN_TILE, _GAP, _LINE, _MIN_SHEET = 96, 2, 15, 480
_MAX_TITLE = 1000  # Characters; no line has room for them.


@dataclasses.dataclass(frozen=True)
class Row:
  """Pictures of one prompt.

  Attributes:
    title: what is written over them.
    question: what the model is asked.
  """

  title: str
  question: str


def main() -> None:
  """Draws what the flags ask for.

  Raises:
    ConfigError: If a flag's value cannot be used.
  """
  values = flags.FLAGS
  paths = draw(
    values.workdir,
    prompts=values.prompt,
    class_labels=values.class_label,
    num=values.num,
    out=values.out,
    form=values.format,
    step=values.step,
    seed=values.seed,
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
    guidance=values.guidance,
  )
  for path in paths:
    print(path)


def draw(
  workdir: str | os.PathLike[str],
  *,
  prompts: Sequence[str] = (),
  class_labels: Sequence[str] = (),
  num: int = 8,
  out: str | os.PathLike[str] | None = None,
  form: str = "grid",
  step: int | None = None,
  seed: int = 0,
  **settings: float,
) -> list[pathlib.Path]:
  """Draws pictures and writes them.

  Args:
    workdir: Run folder of stage II.
    prompts: What to draw; without prompts and classes, whatever comes.
    class_labels: Classes to draw one of.
    num: Pictures of each.
    out: PNG to write, or folder for `form="files"`; None for "drawings.png" and
      "drawings". The folder that it lies in must exist.
    form: "grid" (one PNG, enlarged without smoothing) or "files" (one PNG each,
      pixel for pixel).
    step: Which checkpoint; None for the newest.
    seed: Of what is drawn at random.
    **settings: Of `sampling.SamplingConfig`; `inference.DRAW_SAMPLING` decides
      the others.

  Returns:
    What was written.

  Raises:
    ConfigError: If a value cannot be used, or the run cannot draw.
  """
  for flag, texts in (("prompt", prompts), ("class_label", class_labels)):
    for text in texts:
      if not text.strip():
        raise config_lib.ConfigError(
          f"--{flag}={text!r} is empty: say what to draw; without the flag "
          "whatever comes is drawn"
        )
  if not 1 <= num <= _MAX_NUM:
    raise config_lib.ConfigError(
      f"--num={num}: draw at least 1 picture, and at most {_MAX_NUM}"
    )
  if not 0 <= seed <= _MAX_SEED:
    raise config_lib.ConfigError(
      f"--seed={seed}: use a number from 0 to {_MAX_SEED}"
    )
  out = _checked_out(out, form)
  config_lib.check_sampling(settings)
  config_lib.read_run(workdir)
  rows = [*_rows(prompts, class_labels)]
  # JAX takes seconds to import, so only flags that can work get to it.
  import numpy as np  # pylint: disable=g-import-not-at-top

  from unicode_jax import inference  # pylint: disable=g-import-not-at-top

  sampling = dataclasses.replace(inference.DRAW_SAMPLING, **settings)
  conditional = any(prompts) or any(class_labels)
  if not conditional:  # There is nothing that guidance could lead away from.
    sampling = dataclasses.replace(sampling, guidance=1.0)
  model = inference.load(workdir, step, draws=True)
  if model.loaded.config.stage != "instruct":
    print(
      f"note: {workdir} is a run of stage I, which has learned no drawing yet: "
      "train stage II with --config=configs/instruct.py",
      file=sys.stderr,
    )
  # Random numbers depend on a picture's place: more columns change none.
  codes = model.draw_codes(
    [row.question for _ in range(num) for row in rows], sampling, seed=seed
  )
  images = model.decode(codes)
  images = images.reshape(num, len(rows), *images.shape[1:]).swapaxes(0, 1)
  if form == "grid":
    inference.save_image(out, sheet(images, [row.title for row in rows]))
    return [out]
  out.mkdir(exist_ok=True)
  paths = []
  for r, c in np.ndindex(images.shape[:2]):
    paths.append(out / f"{r + 1}_{_slug(rows[r].title)}_{c + 1}.png")
    inference.save_image(paths[-1], images[r, c])
  return paths


def _rows(prompts, class_labels):
  """Yields the rows that are asked for."""
  from unicode_jax.data import tasks  # pylint: disable=g-import-not-at-top

  for texts, ask in (
    (prompts, tasks.draw_question),
    (class_labels, tasks.class_question),
  ):
    for text in texts:
      title = " ".join(text.split())
      if len(title) > _MAX_TITLE:
        title = f"{title[:_MAX_TITLE]}..."
      yield Row(title, ask(text.strip()))
  if not prompts and not class_labels:
    yield Row("unconditional", tasks.UNCONDITIONAL)


def _checked_out(out, form: str) -> pathlib.Path:
  """Returns where to write; raises ConfigError where that cannot work."""
  if form not in FORMATS:
    raise config_lib.ConfigError(
      f"--format={form!r}: use one of {', '.join(FORMATS)}"
    )
  if out is None:
    out = "drawings.png" if form == "grid" else "drawings"
  path = pathlib.Path(os.path.expanduser(out))
  folder = path.parent
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f"--out={out}: there is no folder {str(folder)!r}; make it, or name "
      "another"
    )
  if form == "grid" and (path.suffix.lower() != ".png" or path.is_dir()):
    raise config_lib.ConfigError(
      f"--out={out}: a grid is a PNG; name a file that ends in .png"
    )
  if form == "files" and path.is_dir():
    folder = path
  elif form == "files" and path.exists():
    raise config_lib.ConfigError(
      f"--out={out} is a file: name a folder for --format=files"
    )
  if not os.access(folder, os.W_OK | os.X_OK):
    raise config_lib.ConfigError(
      f"--out={out}: nothing can be written to {str(folder)!r}; name another "
      "folder"
    )
  return path


def _slug(text: str) -> str:
  """Returns text as a part of a file's name."""
  return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "picture"


def sheet(images, titles: Sequence[str]):
  """Lays out pictures in rows, each under its title.

  Args:
    images: uint8[R, C, H, W, 3]; small ones are enlarged by a whole factor,
      without smoothing.
    titles: One for each row; what has no room ends in "...".

  Returns:
    uint8[height, width, 3].
  """
  import numpy as np  # pylint: disable=g-import-not-at-top
  from PIL import Image, ImageDraw  # pylint: disable=g-import-not-at-top

  factor = -(-_MIN_TILE // images.shape[3])
  images = images.repeat(factor, axis=2).repeat(factor, axis=3)
  rows, cols, height, width, _ = images.shape
  longest = max(_text_width(title) for title in titles)
  total = max(cols * (width + _GAP), min(longest + 2 * _GAP, _MIN_SHEET))
  step = _LINE + height + _GAP
  canvas = Image.new("RGB", (total, rows * step), "white")
  pen = ImageDraw.Draw(canvas)
  for r, title in enumerate(titles):
    shown = next(
      short
      for end in itertools.count()
      if _text_width(short := _shortened(title, end)) + 2 * _GAP <= total
    )
    pen.text((_GAP, r * step + 1), shown, fill="black", font=_font())
    for c in range(cols):
      tile = Image.fromarray(np.ascontiguousarray(images[r, c]))
      canvas.paste(tile, (c * (width + _GAP), r * step + _LINE))
  return np.asarray(canvas)


def _shortened(text: str, cut: int) -> str:
  """Returns text, or its start where `cut` characters have no room."""
  return f"{text[:-cut]}..." if cut else text


def _text_width(text: str) -> int:
  """Returns pixels of a line."""
  return int(_font().getlength(text)) + 1


@functools.cache
def _font():
  """Returns a font that knows more letters than Pillow's own."""
  import matplotlib  # pylint: disable=g-import-not-at-top
  from PIL import ImageFont  # pylint: disable=g-import-not-at-top

  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf"
  return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), 11)


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  # Defined here, so that another command's flags can be beside them.
  flags.DEFINE_string("workdir", None, "Run folder of stage II.", required=True)
  flags.DEFINE_multi_string(
    "prompt", [], "What to draw; again for another row. None: whatever comes."
  )
  flags.DEFINE_multi_string(
    "class_label", [], "Class to draw one of; again for another row."
  )
  flags.DEFINE_integer("num", 8, "Pictures of each prompt.")
  flags.DEFINE_string(
    "out",
    None,
    "PNG to write, or folder with --format=files; by default drawings.png or "
    "drawings.",
  )
  flags.DEFINE_string(
    "format",
    "grid",
    "grid: one PNG, a row per prompt, enlarged; files: one PNG per picture, "
    "pixel for pixel.",
  )
  flags.DEFINE_integer(
    "step", None, "Checkpoint; by default the newest.", lower_bound=0
  )
  flags.DEFINE_integer("seed", 0, "Seed of what is drawn at random.")
  flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
  flags.DEFINE_integer("top_k", 0, "Only the k likeliest codes; 0 for all.")
  flags.DEFINE_float(
    "top_p", 0.95, "Only the likeliest codes of this probability; 1 for all."
  )
  flags.DEFINE_float(
    "guidance", 2.0, "Scale of classifier-free guidance; 1 is off."
  )
  command.run(main, "nothing was written")


if __name__ == "__main__":
  run()
