"""Where an evaluation's numbers go: results.json, report.md and picture sheets.

`suites` measures (METHOD sections 2, 4 and 5); this file keeps each suite's
numbers beside the protocol that they mean something under, and lays them out
for a reader. It measures nothing, and imports neither JAX nor a model.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import os
from pathlib import Path
import textwrap
from typing import Any

import numpy as np

from unicode_jax import config as config_lib, files
from unicode_jax.training import pictures

# In the order in which they run and are reported.
SUITES = (
  "reconstruction",
  "generation",
  "vqa",
  "pope",
  "caption",
  "text",
  "decompression",
  "pictures",
)
RESULTS, REPORT = "results.json", "report.md"

_TITLES = {
  "reconstruction": "Reconstruction",
  "generation": "Generation",
  "vqa": "Questions about pictures",
  "pope": "Objects that are not there (POPE)",
  "caption": "Captions",
  "text": "Language",
  "decompression": "Decompression",
  "pictures": "Pictures",
}
_TILE, _GAP, _LINE = 64, 6, 13  # of picture sheets, pixels


def parse_suites(text: str, flag: str = "--suites") -> tuple[str, ...]:
  """Reads a list of suites, separated by commas; "all" is every one.

  Args:
    text: as of the flag.
    flag: its name, for the error.

  Returns:
    Their names, in the order of `SUITES`.

  Raises:
    ConfigError: there is no such suite, or none is named.
  """
  names = [name.strip() for name in text.split(",") if name.strip()]
  if names == ["all"]:
    return SUITES
  wrong = [name for name in names if name not in SUITES]
  if wrong or not names:
    raise config_lib.ConfigError(
      f"{flag}={text}: name some of {', '.join(SUITES)}, or all"
    )
  return tuple(name for name in SUITES if name in names)


FEATURES = ("pixels", "efficientnet-lite0")


def check_feature_network(name: str) -> None:
  """Checks the name of a network of `features`, without importing it.

  Args:
    name: one of FEATURES, or "clip:FOLDER".

  Raises:
    ConfigError: there is no such network, or folder.
  """
  if name in FEATURES:
    return
  if name.startswith("clip:"):
    folder = os.path.expanduser(name.removeprefix("clip:"))
    if not os.path.isfile(os.path.join(folder, "config.json")):
      raise config_lib.ConfigError(
        f"{name} has no readable config.json: give the folder of a CLIP in "
        "transformers' layout; nothing is downloaded"
      )
    return
  if "inception" in name.lower() or name.lower() in ("fid", "kid"):
    raise config_lib.ConfigError(
      f"feature network {name!r} is missing: standard FID needs the "
      "Inception-v3 of 2015 in its TensorFlow form; neither its layers nor its "
      "weights (pt_inception-2015-12-05-6726825d.pth) come with this package "
      "or one that it can use. Take efficientnet-lite0, whose numbers compare "
      "with each other only, or score saved pictures with pytorch-fid"
    )
  raise config_lib.ConfigError(
    f"no feature network {name!r}: choose pixels, efficientnet-lite0 or "
    "clip:FOLDER"
  )


def read(out: Path) -> dict[str, Any]:
  """Returns what `write` wrote, {"run": {}, "suites": {}} where nothing is.

  Args:
    out: folder of an evaluation.

  Raises:
    ConfigError: the file there is no results.json of ours.
  """
  path = out / RESULTS
  if not path.exists():
    return {"run": {}, "suites": {}}
  try:
    results = config_lib.parse_json(path.read_text(encoding="utf-8"))
    if not all(isinstance(v, dict) for v in results["suites"].values()):
      raise TypeError("suites")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise config_lib.ConfigError(
      f"{path} cannot be read ({error!r}): move it away, or name another --out"
    ) from error
  return results


def write(out: Path, results: Mapping[str, Any]) -> None:
  """Writes results.json and report.md; each is whole at every moment.

  Args:
    out: folder, made where it is missing.
    results: {"run": facts, "suites": {suite: entry}}; see `suites.evaluate`.
  """
  out.mkdir(parents=True, exist_ok=True)
  for name, text in (
    (RESULTS, json.dumps(plain(results), indent=2) + "\n"),
    (REPORT, markdown(results)),
  ):
    files.write_whole(out / name, text)


def plain(value: Any) -> Any:
  """Returns a value as JSON knows it; a number that is not finite is text."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    return plain(value.item())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def markdown(results: Mapping[str, Any]) -> str:
  """Returns report.md: one section per suite.

  Args:
    results: as of `write`.
  """
  lines = ["# Evaluation", ""]
  lines += [f"- {name}: {_text(v)}" for name, v in results["run"].items()]
  lines += ["", "Held-out data only, unless a column says otherwise.", ""]
  for suite in SUITES:
    entry = results["suites"].get(suite)
    if entry is None:
      continue
    lines += [f"## {_TITLES[suite]}", ""]
    if "skipped" in entry:
      lines += [f"Skipped: {entry['skipped']}", ""]
      continue
    lines += _SECTIONS[suite](entry["results"])
    lines += [f"> {note}\n" for note in entry.get("notes", ())]
    for picture in entry.get("pictures", ()):
      lines += [
        f"{picture['title']}:",
        "",
        f"![{picture['title']}]({picture['file']})",
        "",
      ]
    lines += _protocol(entry)
  return "\n".join(lines)


def _protocol(entry: Mapping[str, Any]) -> list[str]:
  """Folds away what a reader needs only to repeat the measurement."""
  lines = ["<details><summary>Protocol</summary>", ""]
  lines += [f"- {k}: {_text(v)}" for k, v in entry["protocol"].items()]
  return [*lines, f"- seconds: {entry['seconds']:.1f}", "", "</details>", ""]


def _text(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(map(_text, value))
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f} %"


def _share_of(value: float, count: int) -> str:
  """Returns a share of `count` cases with its binomial standard error."""
  error = math.sqrt(value * (1 - value) / count)
  return f"{100 * value:.1f} ± {100 * error:.1f} %"


def _number(value: float | str | None, digits: int = 3) -> str:
  if value is None:
    return "-"
  return value if isinstance(value, str) else f"{value:.{digits}f}"


def table(
  columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> list[str]:
  """Returns the lines of a Markdown table, and an empty one."""
  lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
  lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
  return [*lines, ""]


def _distance_cells(distance: Mapping[str, Any] | None) -> list[str]:
  if distance is None:
    return ["-", "-", "-"]
  kernel = f"{1000 * distance['kernel']:.2f} ± {1000 * distance['std']:.2f}"
  frechet = _number(distance["frechet"], 2)
  if distance["note"]:
    frechet += " *"
  return [kernel, frechet, f"{distance['drawn']} / {distance['real']}"]


_DISTANCE_COLUMNS = ("network", "kernel x 1000", "Fréchet", "pictures / real")


def _distance_note(rows: Sequence[Sequence[str]]) -> list[str]:
  if any("*" in cell for row in rows for cell in row):
    return [
      "\\* fewer pictures than twice the features: biased upwards; read the "
      "kernel distance. ± is the deviation between subsets.",
      "",
    ]
  return ["± is the deviation between subsets.", ""]


def _reconstruction(results) -> list[str]:
  rows, depths, distances = [], [], []
  for name, r in results.items():
    rows.append(
      [
        name,
        r["count"],
        f"{_number(r['psnr'], 2)} dB",
        _number(r["ssim"]),
        _number(r["perceptual"]),
        f"{r['bits_per_pixel']:.2f}",
      ]
    )
    for depth, values in enumerate(
      zip(r["psnr_by_depth"], r["usage"], r["perplexity"], strict=True), 1
    ):
      psnr, usage, perplexity = values
      depths.append(
        [name, depth, _number(psnr, 2), _share(usage), f"{perplexity:.0f}"]
      )
    distances += [
      [name, network, *_distance_cells(d)]
      for network, d in r["distances"].items()
    ]
  return [
    *table(
      ("set", "pictures", "PSNR", "SSIM", "LPIPS-like", "bits / pixel"), rows
    ),
    *table(
      ("set", "codes up to depth", "PSNR", "in use", "perplexity"), depths
    ),
    "Reconstructions against originals:",
    "",
    *table(("set", *_DISTANCE_COLUMNS), distances),
    *_distance_note(distances),
  ]


def _generation(results) -> list[str]:
  lines = []
  for name, judged in results["judged"].items():
    attributes = judged["attributes"]
    rows = [
      [kind, values["count"]]
      + [
        _share_of(right, values["count"])
        for right in (
          *(values["by_attribute"][a] for a in attributes),
          values["all"],
        )
      ]
      for kind, values in judged["pictures"].items()
    ]
    guess = [judged["guess"][a] for a in attributes]
    rows.append(["a guess", "-", *map(_share, (*guess, math.prod(guess)))])
    columns = ("judged", "pictures", *(f"{a} right" for a in attributes))
    lines += [
      f"{name}: drawings of each of {judged['labels']} captions, judged by a "
      "classifier trained on the real training pictures; what it says of real "
      "and of reconstructed pictures is the ceiling, a guess among the values "
      "of each attribute the floor. ± is the binomial standard error, 0 where "
      "all or none are right.",
      "",
      *table((*columns, "all right"), rows),
    ]
  rows = [
    [name, kind, network, *_distance_cells(d)]
    for name, kinds in results["distances"].items()
    for kind, networks in kinds.items()
    for network, d in networks.items()
  ]
  if rows:
    lines += table(("real pictures", "against", *_DISTANCE_COLUMNS), rows)
    lines += _distance_note(rows)
  return lines


def _vqa(results) -> list[str]:
  lines = []
  for name, r in results.items():
    blind = r["blind"]

    def row(kind, count, accuracy, guessed):
      gain = "-"
      if accuracy is not None and guessed is not None:
        gain = f"{100 * (accuracy - guessed):+.1f}"
      return [kind, count, _share(accuracy), _share(guessed), gain]

    rows = [row("all", r["count"], r["accuracy"], blind["accuracy"])]
    rows.append(row("exact match", "", r["exact_match"], blind["exact_match"]))
    for kind, share in r["by_type"].items():
      guessed = blind["by_type"][kind]["accuracy"]
      rows.append(row(kind, share["count"], share["accuracy"], guessed))
    for key, title in (
      ("yes_no_balanced", "yes/no, balanced"),
      ("yes_no_unguessed", "yes/no, balanced in each question"),
    ):
      if r[key] is not None:
        rows.append(row(title, "", r[key], blind[key]))
    lines += [f"{name}, each question asked alone:", ""]
    lines += table(("questions", "number", "accuracy", "blind", "gain"), rows)
  return lines


def _pope(results) -> list[str]:
  rows = []
  for name, kinds in results.items():
    for kind, r in kinds.items():
      rows.append(
        [name, kind, r["count"]]
        + [_share(r[k]) for k in ("accuracy", "precision", "recall", "f1")]
        + [
          _share(r["yes_ratio"]),
          r["unparsable"],
          _share(r["blind"]["accuracy"]),
        ]
      )
  columns = ("set", "negatives", "questions", "accuracy", "precision", "recall")
  return table((*columns, "F1", "says yes", "neither", "blind accuracy"), rows)


def _caption(results) -> list[str]:
  rows = [
    [name, who, r["count"]]
    + [_number(v) for v in values["bleu"]]
    + [_number(values["cider"]), _share(values["exact_match"])]
    for name, r in results.items()
    for who, values in (("model", r), ("commonest caption", r["blind"]))
  ]
  bleu = (f"BLEU-{n}" for n in range(1, 5))
  return table(
    ("set", "captions by", "pictures", *bleu, "CIDEr-D", "same caption"), rows
  )


def _language(results) -> list[str]:
  rows = [
    [title, _number(r["perplexity"], 1), r["tokens"], r["run"]]
    for title, r in results.items()
    if "perplexity" in r
  ]
  missing = [
    f"{title}: {r['missing']}" for title, r in results.items() if "missing" in r
  ]
  return [
    *table(("", "held-out perplexity", "answer tokens", "run"), rows),
    *(line + "\n" for line in missing),
  ]


def _decompression(results) -> list[str]:
  lines = []
  for name, r in results.items():
    rows = [
      [turn, *map(_share, shares), f"{100 * gain:+.2f} ± {100 * error:.2f}"]
      for turn, (*shares, gain, error) in enumerate(
        zip(
          r["by_turn"],
          r["by_turn_alone"],
          r["by_turn_other"],
          r["gain"],
          r["gain_error"],
          strict=True,
        ),
        1,
      )
    ]
    depths = range(1, len(r["by_depth"]) + 1)
    lines += [
      f"{name}, {r['count']} pictures: {_share(r['accuracy'])} of the codes "
      f"right, {r['nats_per_code']:.3f} nats a code. Gain: what the earlier "
      "turns of the very picture bring, over those of another.",
      "",
      *table(
        (
          "turn",
          "codes right",
          "no earlier turns",
          "another picture's",
          "gain, points",
        ),
        rows,
      ),
      *table(
        ("codes right", *(f"depth {d}" for d in depths)),
        [
          ["with earlier turns", *map(_share, r["by_depth"])],
          ["without", *map(_share, r["by_depth_alone"])],
          ["with another picture's", *map(_share, r["by_depth_other"])],
        ],
      ),
    ]
  return lines


def _nothing(results) -> list[str]:
  del results
  return []


_SECTIONS: dict[str, Callable[[Any], list[str]]] = {
  "reconstruction": _reconstruction,
  "generation": _generation,
  "vqa": _vqa,
  "pope": _pope,
  "caption": _caption,
  "text": _language,
  "decompression": _decompression,
  "pictures": _nothing,
}


def save_sheet(
  path: Path,
  cells: Sequence[tuple[Sequence[np.ndarray], str]],
  columns: int = 4,
) -> None:
  """Writes a sheet of pictures, each with words under it.

  Args:
    path: PNG file; it is replaced atomically.
    cells: pictures uint8[S, S, 3] that stand side by side, and the words; as
      many pictures in each. Small pictures are enlarged by a whole factor.
    columns: cells in a row.
  """
  from PIL import Image, ImageDraw, ImageFont  # pylint: disable=g-import-not-at-top

  size = cells[0][0][0].shape[0]
  factor = -(-_TILE // size)
  side = size * factor
  width = max(len(cells[0][0]) * (side + 2), 132)
  font = ImageFont.load_default(size=10)
  wrapped = [
    [
      line
      for part in words.splitlines()
      for line in textwrap.wrap(part, max(12, width // 6)) or [""]
    ]
    for _, words in cells
  ]
  height = side + 4 + _LINE * max(map(len, wrapped))
  columns = min(columns, len(cells))
  rows = -(-len(cells) // columns)
  sheet = Image.new(
    "RGB",
    (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP),
    "white",
  )
  draw = ImageDraw.Draw(sheet)
  for i, ((tiles, _), lines) in enumerate(zip(cells, wrapped, strict=True)):
    left = _GAP + (i % columns) * (width + _GAP)
    top = _GAP + (i // columns) * (height + _GAP)
    for j, tile in enumerate(tiles):
      x = left + j * (side + 2)
      enlarged = tile.repeat(factor, axis=0).repeat(factor, axis=1)
      sheet.paste(Image.fromarray(enlarged), (x, top))
      draw.rectangle((x - 1, top - 1, x + side, top + side), outline="#cccccc")
    for j, line in enumerate(lines):
      draw.text((left, top + side + 2 + j * _LINE), line, "black", font=font)
  pictures.save_sheet(path, sheet)
