"""A run's `report.md`: what it was, its numbers, pictures and curves."""

from collections.abc import Mapping, Sequence
import pathlib

from unicode_jax import files
from unicode_jax.training import metrics as metrics_lib


def plot_curves(
  rows: Sequence[Mapping[str, float]],
  groups: Mapping[str, Sequence[str]],
  directory: pathlib.Path,
) -> list[tuple[str, pathlib.Path]]:
  """Draws one picture per group of metrics.

  Args:
    rows: Lines of metrics.jsonl.
    groups: Title -> prefixes of the metrics drawn together.
    directory: Where the PNG files go.

  Returns:
    Title and file of every group that had something to draw.
  """
  import matplotlib  # pylint: disable=g-import-not-at-top

  matplotlib.use("Agg")
  from matplotlib import pyplot  # pylint: disable=g-import-not-at-top

  directory.mkdir(parents=True, exist_ok=True)
  drawn = []
  for title, prefixes in groups.items():
    names = sorted(
      {n for row in rows for n in row if n.startswith(tuple(prefixes))}
    )
    if not names:
      continue
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name in names:
      points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
      axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
    path = directory / f"{title.lower().replace(' ', '_')}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    drawn.append((title, path))
  return drawn


def write_report(
  workdir: pathlib.Path,
  title: str,
  facts: Mapping[str, object],
  groups: Mapping[str, Sequence[str]],
) -> pathlib.Path:
  """Writes `report.md` and its curves from the run folder's own files.

  Args:
    workdir: Run folder with metrics.jsonl and pictures/.
    title: Heading.
    facts: What the run was: name -> value.
    groups: Curves, see `plot_curves`.

  Returns:
    The report's path.
  """
  rows = metrics_lib.read_jsonl(workdir / "metrics.jsonl")
  before: dict[str, float] = {}
  last: dict[str, float] = {}
  for row in rows:
    measured = {n: v for n, v in row.items() if n.startswith("eval/")}
    if row["step"] == 0:
      before |= measured
    last |= measured
  lines = [f"# {title}", ""]
  lines += [f"- {name}: {value}" for name, value in facts.items()]
  lines += ["", "## Held-out data, before and after", ""]
  lines += ["| metric | before | after |", "|---|---|---|"]
  lines += [
    f"| {name} | {_number(before[name]) if name in before else '-'} "
    f"| {_number(last[name])} |"
    for name in sorted(last)
  ]
  lines += ["", *_time(rows)]
  newest: dict[str, pathlib.Path] = {}
  for path in sorted((workdir / "pictures").glob("*.png")):
    newest[path.stem.rsplit("_", 1)[0]] = path
  if newest:
    lines += ["## Pictures", ""]
  for name, path in newest.items():
    lines += [f"{name}: ![{name}](pictures/{path.name})", ""]
  lines += ["## Curves", ""]
  for name, path in plot_curves(rows, groups, workdir / "curves"):
    lines += [f"![{name}](curves/{path.name})", ""]
  report = workdir / "report.md"
  files.write_whole(report, "\n".join(lines))
  return report


def _time(rows: Sequence[Mapping[str, float]]) -> list[str]:
  """Says where the time went, as of the last line that does."""
  prefix, suffix = "goodput/", "_seconds"
  counted = [row for row in rows if f"{prefix}share" in row]
  if not counted:
    return []
  seconds = {
    name.removeprefix(prefix).removesuffix(suffix): value
    for name, value in counted[-1].items()
    if name.startswith(prefix) and name.endswith(suffix)
  }
  total = sum(seconds.values()) or 1.0
  lines = ["## Where the time went", "", "| cause | seconds | share |"]
  lines += ["|---|---|---|"]
  lines += [
    f"| {cause} | {value:.1f} | {value / total:.1%} |"
    for cause, value in seconds.items()
    if value
  ]
  return [*lines, ""]


def _number(value: float | None) -> str:
  return "not finite" if value is None else f"{value:.4g}"
