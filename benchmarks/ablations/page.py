r"""Writes the tables and plots of the ablations, from the result files alone.

  python benchmarks/ablations/page.py --doc=docs/ablations.md

What stands above the marked line of the page stays. Intervals and p-values:
see `Table`.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import shutil

import collect
import grid
import matplotlib

matplotlib.use("Agg")
from matplotlib import ticker, transforms
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

MARK = "<!-- tables: benchmarks/ablations/page.py -->"
BASE = "base"
_POINTS = {"textcoords": "offset points"}
_TEXT_ALONE = "text, held out, text ids alone"


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column.

  Attributes:
    title: of the column.
    name: in the result files.
    scale: what its values are multiplied by.
    digits: after the point.
    log: whether to compare ratios instead of differences.
    pooled: whether rows spread alike, so that one deviation is all rows'; else
      the least and the greatest seed are shown in its place.
  """

  title: str
  name: str
  scale: float = 1.0
  digits: int = 1
  log: bool = False
  pooled: bool = True


def _percent(title, name):
  return Metric(title, name, 100.0)


READING = (
  _percent("easy-VQA, %", "vqa/all"),
  _percent("colour", "vqa/color"),
  _percent("shape", "vqa/shape"),
  _percent("yes/no: colour", "vqa/yes/no: color"),
  _percent("yes/no: shape", "vqa/yes/no: shape"),
  _percent("yes/no within a question", "vqa/yes/no unguessed"),
  _percent("POPE, random: accuracy", "pope/random/accuracy"),
  _percent("F1", "pope/random/f1"),
  _percent("popular: accuracy", "pope/popular/accuracy"),
  _percent("F1", "pope/popular/f1"),
  _percent("POPE, adversarial: accuracy", "pope/adversarial/accuracy"),
  _percent("F1", "pope/adversarial/f1"),
)
DRAWING = (
  _percent("drawn right, %", "judged/drawn/both"),
  _percent("colour", "judged/drawn/colour"),
  _percent("shape", "judged/drawn/shape"),
  Metric("drawn: kernel distance x 1000", "drawn/kernel distance", 1000.0, 2),
  _percent("decompression, %", "decompression"),
)
LANGUAGE = (
  Metric("text perplexity after stage II", "text/after stage II", log=True),
)
# Of stage I alone: rows that share it have these in common.
STAGE_ONE = (
  Metric("PSNR, dB", "psnr", 1.0, 2),
  Metric(
    "reconstructed: kernel distance x 1000",
    "reconstructed/kernel distance",
    *(1000.0, 2),
  ),
  _percent("reconstructed right, %", "judged/reconstructed/both"),
  Metric("text perplexity before stage II", "text/before stage II", log=True),
  Metric(
    "drift before the snap", "drift before the snap", 1.0, 3, pooled=False
  ),
  Metric(
    "agreement before the snap, %",
    "code_agreement before the snap",
    *(100.0, 0),
    pooled=False,
  ),
  Metric(
    "agreement at the end, %",
    "code_agreement at the end",
    *(100.0, 0),
    pooled=False,
  ),
)
# Compared with the base row, and plotted.
COMPARED = (
  READING[0],
  READING[5],
  READING[10],
  DRAWING[0],
  LANGUAGE[0],
  STAGE_ONE[0],
)
# So little of stage II, and of so large a model, is compared with nothing.
NOT_COMPARED = ("smollm2",)


@dataclasses.dataclass(frozen=True)
class Fit:
  """Least squares of an effect of each row and of each seed.

  Attributes:
    effects: of each row, beside any other.
    covariance: of the effects, for errors of variance 1.
    deviation: of what is left over; None without freedom.
    freedom: of it.
  """

  effects: dict[str, float]
  covariance: np.ndarray
  deviation: float | None
  freedom: int


def fit(values: dict[tuple[str, int], float]) -> Fit:
  """Fits effects of rows and seeds; not every row needs every seed.

  Args:
    values: by row and seed.
  """
  rows = list(dict.fromkeys(row for row, _ in values))
  seeds = sorted({seed for _, seed in values})
  design = np.zeros((len(values), len(rows) + len(seeds) - 1))
  for line, (row, seed) in zip(design, values, strict=True):
    line[rows.index(row)] = 1
    if seed != seeds[0]:
      line[len(rows) + seeds.index(seed) - 1] = 1
  y = np.asarray(list(values.values()))
  effects, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
  freedom = len(y) - int(rank)
  left = np.square(y - design @ effects).sum()
  return Fit(
    dict(zip(rows, effects, strict=False)),
    np.linalg.pinv(design.T @ design),
    float(np.sqrt(left / freedom)) if freedom else None,
    freedom,
  )


class Table:
  """Values of one metric, by row and seed.

  Rows are compared with the base row between runs of the same seed, which begin
  alike: the model has an effect of each row and of each seed, and one standard
  deviation of what is left, from all rows of the grid (rows that share what the
  metric is of count once; those without text in stage II, which lose it each in
  its own way, not for that of text after it). Intervals are Student's, 95 %;
  p-values are two-sided, and Holm's over the rows of a family, the intervals
  are not.
  """

  def __init__(self, results, metric: Metric):
    """Takes what there is of a metric.

    Args:
      results: by row and seed.
      metric: which.
    """
    self.metric, self.values = metric, {}
    for row, seeds in results.items():
      if metric in DRAWING and not grid.ROWS[row].draws:
        continue  # What was never trained.
      for seed, result in seeds.items():
        if metric.name in result["metrics"]:
          value = result["metrics"][metric.name]
          self.values[row, seed] = self._scaled(value)
    distinct, known = {}, set()
    for (row, seed), value in self.values.items():
      entry, key = grid.ROWS[row], row
      if metric in STAGE_ONE:
        key = entry.key(seed, entry.stage1 + 1)
      elif metric in LANGUAGE:
        if not entry.learns_text:
          continue
        key = repr((entry.links, entry.llm))
      if row not in NOT_COMPARED and (key, seed) not in known:
        known.add((key, seed))
        distinct[row, seed] = value
    self._all = fit(distinct) if distinct else None

  def _scaled(self, value: float) -> float:
    return np.log(value) if self.metric.log else self.metric.scale * value

  def of(self, row: str) -> list[float]:
    """Returns the values of a row, as they are fitted."""
    return [value for (name, _), value in self.values.items() if name == row]

  def _quantile(self) -> float:
    return float(stats.t.ppf(0.975, self._all.freedom))

  def cell(self, row: str) -> str:
    """Returns a mean with its interval, geometric where ratios matter."""
    if not (own := self.of(row)):
      return "-"
    mean, digits, half = np.mean(own), self.metric.digits, None
    if not self.metric.pooled:
      least, mean, most = (
        f"{v:.{digits}f}" for v in (min(own), mean, max(own))
      )
      return mean if least == most else f"{mean} ({least} to {most})"
    if self._all and self._all.deviation is not None:
      half = self._quantile() * self._all.deviation / np.sqrt(len(own))
    if self.metric.log:
      text = f"{np.exp(mean):.{digits}f}"
      return text if half is None else f"{text} x/÷ {np.exp(half):.2f}"
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"

  def differences(self, rows) -> dict[str, tuple[float, float, float]]:
    """Returns difference from the base row, half its interval, p, by row.

    Args:
      rows: of a family.
    """
    return _holm(self.contrasts(rows, BASE))

  def contrasts(self, rows, base) -> dict[str, tuple[float, float, float]]:
    """Returns difference from a row, half its interval, p uncorrected, by row.

    Args:
      rows: that are compared.
      base: with which row.
    """
    if self._all is None or self._all.deviation is None:
      return {}
    own = {k: v for k, v in self.values.items() if k[0] in (*rows, base)}
    own = {k: v for k, v in own.items() if k[0] not in NOT_COMPARED}
    if base not in (row for row, _ in own):
      return {}
    model, found = fit(own), {}
    names = list(model.effects)
    for row in names:
      if row == base:
        continue
      contrast = np.zeros(len(model.covariance))
      contrast[names.index(row)], contrast[names.index(base)] = 1, -1
      error = self._all.deviation * np.sqrt(
        contrast @ model.covariance @ contrast
      )
      delta = model.effects[row] - model.effects[base]
      p = 2 * stats.t.sf(abs(delta) / max(error, 1e-12), self._all.freedom)
      found[row] = (delta, self._quantile() * error, p)
    return found

  def said(self, difference: tuple[float, float, float] | None) -> str:
    """Formats one of `differences`."""
    if difference is None:
      return "-"
    delta, half, p = difference
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if self.metric.log:
      return f"x {np.exp(delta):.2f} x/÷ {np.exp(half):.2f}, {chance}"
    digits = self.metric.digits
    return f"{delta:+.{digits}f} ± {half:.{digits}f}, {chance}"

  def points(self, row: str) -> list[float]:
    """Returns a row's values as they are shown."""
    own = self.of(row)
    return [float(np.exp(v)) for v in own] if self.metric.log else own


def _holm(found):
  """Replaces each p by Holm's."""
  most, corrected = 0.0, {}
  order = sorted(found, key=lambda row: found[row][2])
  for rank, row in enumerate(order):
    delta, half, p = found[row]
    most = max(most, min(1.0, p * (len(order) - rank)))
    corrected[row] = (delta, half, most)
  return corrected


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
  """Makes a Markdown table."""
  return [
    f"| {' | '.join(head)} |",
    "|---" * len(head) + "|",
    *(f"| {' | '.join(row)} |" for row in rows),
    "",
  ]


def measured(results, rows, metrics) -> list[str]:
  """Returns a table of means: a line a row, a column a metric."""
  tables = [Table(results, metric) for metric in metrics]
  return markdown(
    ["", *(metric.title for metric in metrics)],
    [
      [grid.ROWS[row].title, *(table.cell(row) for table in tables)]
      for row in rows
    ],
  )


def share_stage_one(rows) -> bool:
  """Says whether rows have one stage I, and so all that is measured of it."""
  keys = {(row := grid.ROWS[name]).key(0, row.stage1 + 1) for name in rows} | {
    grid.ROWS[name].image_size for name in rows
  }
  return len(keys) == 2


def compared(results, rows) -> list[str]:
  """Returns a table of differences from the base row."""
  metrics = [
    m for m in COMPARED if not share_stage_one(rows) or m not in STAGE_ONE
  ]
  tables = [Table(results, metric) for metric in metrics]
  found = [(table, table.differences(rows)) for table in tables]
  return markdown(
    ["less base", *(metric.title for metric in metrics)],
    [
      [
        grid.ROWS[row].title,
        *(table.said(differences.get(row)) for table, differences in found),
      ]
      for row in rows
      if row not in (BASE, *NOT_COMPARED)
    ],
  )


def claimed(results) -> list[str]:
  """Returns a table of the claims: the better row less the worse one."""
  columns = []
  for metric in COMPARED:
    table = Table(results, metric)
    found = {
      claim.title: difference
      for claim in grid.CLAIMS
      if metric not in STAGE_ONE
      or not share_stage_one((claim.better, claim.worse))
      for difference in table.contrasts((claim.better,), claim.worse).values()
    }
    corrected = _holm(found)
    columns.append([table.said(corrected.get(c.title)) for c in grid.CLAIMS])
  cells = zip(*columns, strict=True)
  return markdown(
    ["the first less the second", "reported", *(m.title for m in COMPARED)],
    [
      [claim.title, claim.reported, *line]
      for claim, line in zip(grid.CLAIMS, cells, strict=True)
    ],
  )


def by_depth(results, rows) -> list[str]:
  """Returns a table of what differs in length from row to row."""

  def cell(row, name, scale, digits):
    values = collections.defaultdict(list)
    for result in results[row].values():
      for key, value in result["metrics"].items():
        if key.startswith(f"{name}/"):
          values[int(key.rpartition("/")[2])].append(scale * value)
    means = (np.mean(values[depth]) for depth in sorted(values))
    return " / ".join(f"{mean:.{digits}f}" for mean in means) or "-"

  return markdown(
    ["by depth", "PSNR, dB", "usage, %", "perplexity"],
    [
      [
        grid.ROWS[row].title,
        cell(row, "psnr", 1.0, 1),
        cell(row, "usage", 100.0, 0),
        cell(row, "perplexity", 1.0, 0),
      ]
      for row in rows
    ],
  )


def exposed(counts, rows) -> list[str]:
  """Returns a table of what exposure.py counted."""
  tasks = ("vqa", "described", "caption", "text_to_image", "decompression")
  return markdown(
    [
      "seen in stage II, thousands",
      *(t.replace("_", " ") for t in tasks),
      "text",
    ],
    [
      [
        grid.ROWS[row].title,
        *(
          f"{counts[row].get(task, 0) / 1000:.1f}" for task in (*tasks, "text")
        ),
      ]
      for row in rows
      if row in counts
    ],
  )


def diagnosed(found, rows) -> list[str]:
  """Returns a table of what diagnose.py found, means over seeds."""

  def cell(row, name, digits=2):
    values = [
      entry["values"][name]
      for entry in found.get(row, {}).values()
      if name in entry["values"]
    ]
    return f"{np.mean(values):.{digits}f}" if values else "-"

  def picture(row):
    values = [picture_nats(entry) for entry in found.get(row, {}).values()]
    return "-" if None in values or not values else f"{np.mean(values):.0f}"

  columns = ("text, training", "text, held out")
  if any(cell(row, _TEXT_ALONE) != "-" for row in rows):
    columns += (_TEXT_ALONE,)
  columns += ("drawing, training", "drawing, held out")
  return markdown(
    [
      "nats a token, end of stage II",
      *columns,
      "codes of a picture",
      "nats of a drawn picture, held out",
    ],
    [
      [
        grid.ROWS[row].title,
        *(cell(row, name) for name in columns),
        cell(row, "codes of a picture", 0),
        picture(row),
      ]
      for row in rows
    ],
  )


def cost(results, rows) -> list[str]:
  """Returns a table of what the rows took and read."""

  def total(result, link):
    return result["seconds"][link]["cpu"]

  lines = []
  for row in rows:
    found = list(results[row].values())
    if not found:
      continue
    links = [link.name for link in grid.ROWS[row].links]
    read = found[0]["read"]
    lines.append(
      [
        grid.ROWS[row].title,
        str(len(found)),
        ", ".join(
          f"{link} {np.median([total(result, link) for result in found]):.0f}"
          for link in [*links, "evaluation"]
        ),
        ", ".join(
          f"{sum(r.get(what, 0) for r in read.values()) / 1e6:.2f} M {what}"
          for what in ("images", "tokens")
        ),
      ]
    )
  return markdown(
    ["", "seeds", "median seconds of one core", "read in training"], lines
  )


def plot(results, family: str, target: pathlib.Path) -> None:
  """Draws every run of a family as a point, and means as the tables have."""
  rows = [row for row in grid.FAMILIES[family].rows if results[row]]
  figure, axes = plt.subplots(
    1,
    len(COMPARED),
    figsize=(2.6 * len(COMPARED), 0.9 + 0.32 * len(rows)),
    sharey=True,
  )
  for axis, metric in zip(axes, COMPARED, strict=True):
    table, middle = Table(results, metric), np.mean
    if metric.log:
      middle = stats.gmean
    for place, row in enumerate(rows):
      points = table.points(row)
      if not points:
        continue
      color = "black" if row == BASE else "tab:blue"
      axis.plot(points, [place] * len(points), "o", color=color, alpha=0.45)
      axis.plot([middle(points)], [place], "|", color=color, markersize=16)
    if base := table.points(BASE):
      axis.axvline(middle(base), color="grey", linewidth=0.6)
    if metric.log:
      axis.set_xscale("log")
      least, most = axis.get_xlim()
      axis.xaxis.set_major_locator(
        ticker.MaxNLocator(3, integer=True)
        if most < 10 * least
        else ticker.LogLocator()
      )
      axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
      axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_title(metric.title, fontsize=9)
    axis.tick_params(labelsize=8)
  axes[0].set_yticks(range(len(rows)), [grid.ROWS[row].title for row in rows])
  axes[0].set_ylim(len(rows) - 0.5, -0.5)
  figure.tight_layout()
  target.parent.mkdir(parents=True, exist_ok=True)
  # Tight: the longest titles of rows are wider than the layout leaves them.
  figure.savefig(
    target, dpi=80, bbox_inches="tight", metadata={"Software": None}
  )
  plt.close(figure)


def picture_nats(entry) -> float | None:
  """Returns the nats of a held-out picture drawn of a caption, if any.

  Args:
    entry: of diagnose.py, of a row and seed.
  """
  values = entry["values"]
  if "drawing, held out" not in values:
    return None
  return values["drawing, held out"] * values["codes of a picture"]


_CORNERS = (
  (4, 3, "left"),
  (-5, -9, "right"),
  (-5, 3, "right"),
  (4, -9, "left"),
)


def _label(axis, points) -> None:
  """Writes each point's name at its first corner free of names and points."""
  taken = [
    transforms.Bbox.from_bounds(*(axis.transData.transform(point) - 2), 4, 4)
    for point in points.values()
  ]
  for row, point in sorted(points.items(), key=lambda item: item[1][0]):
    note = axis.annotate(row, point, (0, 0), fontsize=7, **_POINTS)
    for x, y, side in _CORNERS:
      note.set(position=(x, y), ha=side)
      box = note.get_window_extent()
      if not box.count_overlaps(taken):
        break
    taken.append(box)


def plot_nats(results, found, target: pathlib.Path) -> str:
  """Draws what a picture costs the language model against what it draws.

  Args:
    results: by row and seed.
    found: of diagnose.py.
    target: file of the plot.

  Returns:
    Spearman's correlation over rows, with their number.
  """
  points = {}
  for row, seeds in results.items():
    if row in NOT_COMPARED:
      continue
    pairs = [
      (nats, 100 * result["metrics"][DRAWING[0].name])
      for seed, result in seeds.items()
      if (entry := found.get(row, {}).get(str(seed)))
      and (nats := picture_nats(entry)) is not None
    ]
    if pairs and grid.ROWS[row].image_size is None:
      points[row] = np.mean(pairs, axis=0)
  # The others lie around the base row.
  named = {*grid.FAMILIES["quantizer"].rows, *grid.FAMILIES["space"].rows}
  named |= {"projected"}
  figure, axis = plt.subplots(figsize=(10.0, 6.6))
  axis.set_xscale("log")
  for row, (nats, right) in points.items():
    color = "black" if row == BASE else "tab:blue"
    axis.plot([nats], [right], "o", color=color, alpha=0.6)
  axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
  axis.xaxis.set_minor_locator(ticker.NullLocator())
  axis.set_xlabel("nats of a held-out picture, given its caption")
  axis.set_ylabel(DRAWING[0].title)
  figure.tight_layout()
  _label(axis, {row: point for row, point in points.items() if row in named})
  figure.savefig(target, dpi=80, metadata={"Software": None})
  plt.close(figure)
  rank = stats.spearmanr(*np.transpose(list(points.values())))
  return f"{rank.statistic:.2f} over {len(points)} rows"


def total_hours(results) -> str:
  """Says what the whole took: a link that rows share counts once."""
  spent, machines, revisions = {}, set(), set()
  for row, seeds in results.items():
    for seed, result in seeds.items():
      machines.add(f"{result['cores']} cores ({result['machine']})")
      links = grid.ROWS[row].links
      for count, link in enumerate(links, 1):
        key = grid.ROWS[row].key(seed, count)
        spent[key] = result["seconds"][link.name]["cpu"]
        revisions.update(result["seconds"][link.name]["revisions"])
      spent[row, seed] = result["seconds"]["evaluation"]["cpu"]
  hours = sum(spent.values()) / 3600
  count = sum(map(len, results.values()))
  wanted = len(grid.ROWS) * len(grid.SEEDS)
  return (
    f"{count} of {wanted} results ({len(grid.ROWS)} rows, {len(grid.SEEDS)} "
    f"seeds), {hours:.1f} hours of one core; "
    f"{', '.join(sorted(machines))}; revisions {', '.join(sorted(revisions))}."
  )


def page(
  results, counts, found, pictures: pathlib.Path, beside: pathlib.Path
) -> list[str]:
  """Returns what goes below the mark, and puts the pictures beside.

  Args:
    results: by row and seed.
    counts: of exposure.py.
    found: of diagnose.py.
    pictures: folder of the rows' sheets.
    beside: folder of the page's pictures.
  """
  lines = ["", total_hours(results), ""]
  lines += ["## The claims in figures", "", *claimed(results)]
  for family, (title, rows) in (
    (name, (f.title, f.rows)) for name, f in grid.FAMILIES.items()
  ):
    known = [row for row in rows if results[row]]
    if BASE not in known or len(known) < 2:
      continue
    lines += [f"## {title}", ""]
    lines += measured(results, known, READING)
    lines += measured(results, known, (*DRAWING, *LANGUAGE))
    lines += compared(results, known)
    of_stage_one = known[:1] if share_stage_one(known) else known
    lines += measured(results, of_stage_one, STAGE_ONE)
    lines += by_depth(results, of_stage_one)
    lines += exposed(counts, known)
    lines += diagnosed(found, known)
    lines += cost(results, known)
    target = beside / f"ablations_{family}.png"
    plot(results, family, target)
    lines += [f"![{title}]({beside.name}/{target.name})", ""]
  target = beside / "ablations_nats.png"
  rank = plot_nats(results, found, target)
  lines += ["## What a picture costs, and what is drawn", ""]
  lines += [f"A point is a row; Spearman's rank correlation {rank}.", ""]
  lines += [f"![nats and drawings]({beside.name}/{target.name})", ""]
  lines += [f"## Drawings, seed {grid.SEEDS[0]}", ""]
  for row in grid.ROWS:
    source = pictures / f"{row}.png"
    if source.exists() and results[row] and grid.ROWS[row].draws:
      target = beside / f"ablations_drawn_{row}.png"
      shutil.copyfile(source, target)
      lines += [f"{grid.ROWS[row].title}:", ""]
      lines += [f"![{row}]({beside.name}/{target.name})", ""]
  return lines


def main() -> None:
  """Writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--results", type=pathlib.Path, default=collect.RESULTS)
  parser.add_argument(
    "--doc", type=pathlib.Path, default=pathlib.Path("docs/ablations.md")
  )
  args = parser.parse_args()
  results = {
    row: {
      seed: result
      for seed in range(100)
      if (result := collect.read(args.results, row, seed)) is not None
    }
    for row in grid.ROWS
  }
  stale = [
    path.name
    for path in sorted(args.results.glob("*_[0-9]*.json"))
    if (name := path.stem.rpartition("_")[0]) not in results
    or int(path.stem.rpartition("_")[2]) not in results[name]
  ]
  if stale:
    print(f"made with other values than the grid's now: {', '.join(stale)}")
  if not any(results.values()):
    parser.error(f"{args.results} has no result of this grid: see run.py")
  above = args.doc.read_text(encoding="utf-8").partition(MARK)[0]
  beside = {}
  for name, maker in (
    (collect.EXPOSURE, "exposure.py"),
    (collect.DIAGNOSIS, "diagnose.py"),
  ):
    if not (args.results / name).exists():
      parser.error(f"{args.results / name} is not there: run {maker}")
    text = (args.results / name).read_text(encoding="utf-8")
    beside[name] = json.loads(text)
  below = page(
    results,
    beside[collect.EXPOSURE],
    beside[collect.DIAGNOSIS],
    args.results / "pictures",
    args.doc.parent / "pictures",
  )
  args.doc.write_text(f"{above}{MARK}\n" + "\n".join(below), encoding="utf-8")
  print(f"wrote {args.doc}")


if __name__ == "__main__":
  main()
