r"""Writes the tables and plots of the ablations, from the result files alone.

  python benchmarks/ablations/page.py --doc=docs/ablations.md

What stands above the marked line of the page stays. Intervals and p-values:
see `Table`.
"""

import argparse
import collections
import dataclasses
import pathlib
import shutil

import collect
import grid
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

MARK = "<!-- tables: benchmarks/ablations/page.py -->"
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column.

  Attributes:
    title: of the column.
    name: in the result files.
    scale: what its values are multiplied by.
    digits: after the point.
    log: whether to compare ratios instead of differences.
  """

  title: str
  name: str
  scale: float = 1.0
  digits: int = 1
  log: bool = False


def _percent(title, name):
  return Metric(title, name, 100.0)


READING = (
  _percent("easy-VQA, %", "vqa/all"),
  _percent("colour", "vqa/color"),
  _percent("shape", "vqa/shape"),
  _percent("yes/no: colour", "vqa/yes/no: color"),
  _percent("yes/no: shape", "vqa/yes/no: shape"),
  _percent("yes/no balanced", "vqa/yes/no balanced"),
  _percent("POPE F1, random", "pope/random/f1"),
  _percent("popular", "pope/popular/f1"),
  _percent("adversarial", "pope/adversarial/f1"),
)
DRAWING = (
  _percent("drawn right, %", "judged/drawn/both"),
  _percent("colour", "judged/drawn/colour"),
  _percent("shape", "judged/drawn/shape"),
  Metric("kernel distance x 1000", "drawn/kernel distance", 1000.0, 2),
  _percent("reconstructed right, %", "judged/reconstructed/both"),
  Metric("PSNR, dB", "psnr", 1.0, 2),
  Metric("kernel distance x 1000", "reconstructed/kernel distance", 1000.0, 3),
  _percent("decompression, %", "decompression"),
)
LANGUAGE = (
  Metric("text perplexity before", "text/before stage II", log=True),
  Metric("after", "text/after stage II", log=True),
  Metric("drift before the snap", "drift before the snap", 1.0, 3),
  _percent("agreement before the snap, %", "code_agreement before the snap"),
  _percent("at the end", "code_agreement at the end"),
)
# Compared with the base row, and plotted.
COMPARED = (
  READING[0],
  READING[5],
  READING[8],
  DRAWING[0],
  DRAWING[5],
  LANGUAGE[1],
)


class Table:
  """Values of one metric in the rows of a family, by seed.

  Intervals are Student's, 95 %, with one standard deviation over seeds for all
  rows of the family, from how the seeds of each row differ. Differences from
  the base row are between runs of the same seed, which begin alike: their
  standard error is from what is left when each row's and each seed's mean are
  taken away (a randomized block design). The p-values are two-sided, and
  Holm's over the family's rows.
  """

  def __init__(self, results, rows, metric: Metric):
    """Takes what there is of a metric, of seeds that all rows have.

    Args:
      results: by row and seed.
      rows: names.
      metric: which.
    """
    self.metric = metric
    self.values = {
      row: [
        result["metrics"][metric.name]
        for result in results[row].values()
        if metric.name in result["metrics"]
      ]
      for row in rows
    }
    self._blocks = {}
    seeds = set.intersection(*(set(results[row]) for row in rows))
    for row in rows:
      found = [
        results[row][s]["metrics"].get(metric.name) for s in sorted(seeds)
      ]
      if found and None not in found:
        self._blocks[row] = self._scaled(found)

  def _scaled(self, values):
    values = np.asarray(values, float)
    return np.log(values) if self.metric.log else self.metric.scale * values

  def cell(self, row: str) -> str:
    """Returns a mean with its interval, geometric where ratios matter."""
    if not (own := self.values[row]):
      return "-"
    mean, digits = self._scaled(own).mean(), self.metric.digits
    each = [self._scaled(v) for v in self.values.values() if len(v) > 1]
    freedom = sum(len(v) - 1 for v in each)
    half = None
    if freedom:
      squares = sum(np.square(v - v.mean()).sum() for v in each)
      deviation = np.sqrt(squares / freedom / len(own))
      half = stats.t.ppf(0.975, freedom) * deviation
    if self.metric.log:
      text = f"{np.exp(mean):.{digits}f}"
      return text if half is None else f"{text} x/÷ {np.exp(half):.2f}"
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"

  def differences(self) -> dict[str, tuple[float, float, float]]:
    """Returns difference from the base row, half its interval, p, by row."""
    if BASE not in self._blocks or len(self._blocks) < 2:
      return {}
    block = np.stack(list(self._blocks.values()))
    count, seeds = block.shape
    freedom = (count - 1) * (seeds - 1)
    if not freedom:
      return {}
    rest = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
    error = np.sqrt(np.square(rest).sum() / freedom * 2 / seeds)
    base, found = self._blocks[BASE].mean(), {}
    for row, values in self._blocks.items():
      if row != BASE:
        delta = values.mean() - base
        p = 2 * stats.t.sf(abs(delta) / max(error, 1e-12), freedom)
        found[row] = (delta, stats.t.ppf(0.975, freedom) * error, p)
    return _holm(found)

  def difference(self, row: str) -> str:
    """Formats what `differences` says of a row."""
    if (known := self.differences().get(row)) is None:
      return "-"
    delta, half, p = known
    said = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if self.metric.log:
      return f"x {np.exp(delta):.2f} x/÷ {np.exp(half):.2f}, {said}"
    digits = self.metric.digits
    return f"{delta:+.{digits}f} ± {half:.{digits}f}, {said}"

  def points(self, row: str) -> list[float]:
    """Returns a row's values as they are shown."""
    return [self.metric.scale * value for value in self.values[row]]


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
  tables = [Table(results, rows, metric) for metric in metrics]
  return markdown(
    ["", *(metric.title for metric in metrics)],
    [
      [grid.ROWS[row].title, *(table.cell(row) for table in tables)]
      for row in rows
    ],
  )


def compared(results, rows) -> list[str]:
  """Returns a table of differences from the base row."""
  tables = [Table(results, rows, metric) for metric in COMPARED]
  return markdown(
    ["less base", *(metric.title for metric in COMPARED)],
    [
      [grid.ROWS[row].title, *(table.difference(row) for table in tables)]
      for row in rows
      if row != BASE
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
  """Draws every run of a family as a point, and the means."""
  rows = [row for row in grid.FAMILIES[family].rows if results[row]]
  figure, axes = plt.subplots(
    1,
    len(COMPARED),
    figsize=(2.6 * len(COMPARED), 0.9 + 0.32 * len(rows)),
    sharey=True,
  )
  for axis, metric in zip(axes, COMPARED, strict=True):
    table = Table(results, rows, metric)
    for place, row in enumerate(rows):
      points = table.points(row)
      if not points:
        continue
      color = "black" if row == BASE else "tab:blue"
      axis.plot(points, [place] * len(points), "o", color=color, alpha=0.45)
      axis.plot([np.mean(points)], [place], "|", color=color, markersize=16)
    if base := table.points(BASE):
      axis.axvline(np.mean(base), color="grey", linewidth=0.6)
    if metric.log:
      axis.set_xscale("log")
    axis.set_title(metric.title, fontsize=9)
    axis.tick_params(labelsize=8)
  axes[0].set_yticks(range(len(rows)), [grid.ROWS[row].title for row in rows])
  axes[0].invert_yaxis()
  figure.tight_layout()
  target.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(target, dpi=80, metadata={"Software": None})
  plt.close(figure)


def total_hours(results) -> str:
  """Says what the whole took: a link that rows share counts once."""
  spent, machines, revisions = {}, set(), set()
  for row, seeds in results.items():
    for seed, result in seeds.items():
      machines.add(f"{result['cores']} cores ({result['machine']})")
      revisions.add(result["revision"])
      links = grid.ROWS[row].links
      for count, link in enumerate(links, 1):
        key = grid.ROWS[row].key(seed, count)
        spent[key] = result["seconds"][link.name]["cpu"]
      spent[row, seed] = result["seconds"]["evaluation"]["cpu"]
  hours = sum(spent.values()) / 3600
  count = sum(map(len, results.values()))
  return (
    f"{count} results of {len(grid.ROWS)} rows, {hours:.1f} hours of one core "
    f"in all; {', '.join(sorted(machines))}; revisions "
    f"{', '.join(sorted(revisions))}."
  )


def page(results, pictures: pathlib.Path, beside: pathlib.Path) -> list[str]:
  """Returns what goes below the mark, and puts the pictures beside.

  Args:
    results: by row and seed.
    pictures: folder of the rows' sheets.
    beside: folder of the page's pictures.
  """
  lines = ["", total_hours(results), ""]
  for family, (title, rows) in (
    (name, (f.title, f.rows)) for name, f in grid.FAMILIES.items()
  ):
    known = [row for row in rows if results[row]]
    if BASE not in known or len(known) < 2:
      continue
    lines += [f"## {title}", ""]
    for metrics in (READING, DRAWING, LANGUAGE):
      lines += measured(results, known, metrics)
    lines += compared(results, known)
    lines += by_depth(results, known)
    lines += cost(results, known)
    target = beside / f"ablations_{family}.png"
    plot(results, family, target)
    lines += [f"![{title}]({beside.name}/{target.name})", ""]
  lines += ["## Drawings, seed 0", ""]
  for row in grid.ROWS:
    source = pictures / f"{row}.png"
    if source.exists() and results[row]:
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
  if not any(results.values()):
    parser.error(f"{args.results} has no result of this grid: see run.py")
  above = args.doc.read_text(encoding="utf-8").partition(MARK)[0]
  below = page(results, args.results / "pictures", args.doc.parent / "pictures")
  args.doc.write_text(f"{above}{MARK}\n" + "\n".join(below), encoding="utf-8")
  print(f"wrote {args.doc}")


if __name__ == "__main__":
  main()
