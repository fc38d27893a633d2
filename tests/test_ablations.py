"""The grid of the ablations, how it is planned, and its statistics."""

import argparse
import importlib
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from unicode_jax import config as config_lib

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks" / "ablations"


@pytest.fixture(name="parts", scope="module")
def parts_fixture():
  """Returns the scripts, which import each other by their bare names."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    names = ("grid", "collect", "run", "page")
    return argparse.Namespace(**{n: importlib.import_module(n) for n in names})


@pytest.fixture(name="args")
def args_fixture(tmp_path):
  """Returns what the command line would say."""
  return argparse.Namespace(
    workdir=tmp_path / "runs",
    results=tmp_path / "results",
    llm={"smollm2": tmp_path},
  )


def test_every_row_can_run(parts):
  for name, row in parts.grid.ROWS.items():
    for link in row.links:
      file = f"{link.file}:{link.preset}".rstrip(":")
      start = {link.start: "somewhere"} if link.start else {}
      values = {**link.values, **start}
      flags = dict(
        flag.removeprefix("--config.").split("=", 1)
        for flag in parts.run.flags(values)
      )
      config = config_lib.apply_overrides(config_lib.load(file), flags)
      config_lib.check_model(config)
      for key, value in config_lib.flatten(config).items():
        if key in values:
          assert value == values[key], (name, link.name, key)


def test_rows_are_in_a_family_and_differ(parts):
  rows = parts.grid.ROWS
  assert {r for f in parts.grid.FAMILIES.values() for r in f.rows} == set(rows)
  assert len({row.key(0) for row in rows.values()}) == len(rows)
  assert rows["base"].key(0) != rows["base"].key(1)


def test_what_rows_share_is_trained_once(parts, args):
  tasks = parts.run.plan(["base", "separate", "test_40", "dual"], [0, 1], args)
  kinds = [key.split("_")[0] for key in tasks]
  assert kinds.count("stage1") == 4  # base and dual, two seeds.
  assert kinds.count("stage2") == 6
  assert kinds.count("measured") == 8
  measured = tasks["measured_test_40_0"]
  assert measured.needs == tasks["measured_base_0"].needs
  assert "--config.image_size=40" in measured.command


def test_a_result_counts_for_its_values_alone(parts, args, monkeypatch):
  row = parts.grid.ROWS["base"]
  args.results.mkdir()
  path = parts.collect.result_file(args.results, "base", 0)
  path.write_text(json.dumps({"key": row.key(0)}))
  assert not parts.run.plan(["base"], [0], args)
  link = row.links[1]
  values = dict(link.values) | {"num_steps": 7}
  other = parts.grid.dataclasses.replace(link, values=values)
  monkeypatch.setitem(
    parts.grid.ROWS,
    "base",
    parts.grid.dataclasses.replace(row, links=(row.links[0], other)),
  )
  assert len(parts.run.plan(["base"], [0], args)) == 3


def made_up(values):
  """Makes results of rows {name: one value a seed}."""
  return {
    row: {s: {"metrics": {"m": v}} for s, v in enumerate(seeds)}
    for row, seeds in values.items()
  }


def test_two_rows_are_compared_as_a_paired_t_test_does(parts):
  base, other = [1.0, 2.5, 2.0, 4.0], [1.5, 3.5, 2.2, 5.1]
  table = parts.page.Table(
    made_up({"base": base, "frozen": other}),
    ("base", "frozen"),
    parts.page.Metric("m", "m", 100.0),
  )
  delta, half, p = table.differences()["frozen"]
  expected = stats.ttest_rel(other, base)
  interval = expected.confidence_interval(0.95)
  assert p == pytest.approx(expected.pvalue)
  assert delta == pytest.approx(100 * np.mean(np.subtract(other, base)))
  assert delta - half == pytest.approx(100 * interval.low)
  assert delta + half == pytest.approx(100 * interval.high)


def test_more_rows_share_their_error_and_holm_corrects(parts):
  rng = np.random.default_rng(0)
  rows = ("base", "frozen", "dual", "projected")
  values = rng.normal(size=(4, 3)) + np.array([[0], [0], [3], [0.5]])
  table = parts.page.Table(
    made_up(dict(zip(rows, values.tolist(), strict=True))),
    rows,
    parts.page.Metric("m", "m"),
  )
  # The same model by least squares: an effect of each row and of each seed.
  design = np.zeros((12, 6))
  for i in range(12):
    row, seed = divmod(i, 3)
    design[i, 0] = 1
    if row:
      design[i, row] = 1
    if seed:
      design[i, 3 + seed] = 1
  fit, rest, *_ = np.linalg.lstsq(design, values.reshape(-1))
  spread = np.sqrt(rest[0] / 6 * np.linalg.inv(design.T @ design).diagonal())
  raw = 2 * stats.t.sf(np.abs(fit / spread), 6)[1:4]
  order = np.argsort(raw)
  holm = np.maximum.accumulate(raw[order] * [3, 2, 1]).clip(max=1)
  found = table.differences()
  for rank, place in enumerate(order):
    delta, _, p = found[rows[1 + place]]
    assert delta == pytest.approx(fit[1 + place])
    assert p == pytest.approx(holm[rank])


def test_intervals_of_means(parts):
  values = {"base": [1.0, 2.0, 4.0], "frozen": [2.0, 2.5, 2.1]}
  table = parts.page.Table(
    made_up(values), ("base", "frozen"), parts.page.Metric("m", "m", 1.0, 4)
  )
  pooled = np.sqrt((np.var(values["base"]) + np.var(values["frozen"])) * 3 / 4)
  half = stats.t.ppf(0.975, 4) * pooled / np.sqrt(3)
  assert table.cell("base") == f"{7 / 3:.4f} ± {half:.4f}"


def test_one_seed_has_no_interval_and_none_no_value(parts):
  results = made_up({"base": [0.5], "frozen": []})
  table = parts.page.Table(
    results, ("base", "frozen"), parts.page.Metric("m", "m")
  )
  assert table.cell("base") == "0.5"
  assert table.cell("frozen") == "-"
  assert not table.differences()
