"""The grid of the ablations, how it is planned, and its statistics."""

import argparse
import dataclasses
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
  assert kinds.count("llm") == 2  # Two seeds.
  assert kinds.count("stage1") == 4  # base and dual.
  assert kinds.count("stage2") == 6
  assert kinds.count("measured") == 8
  by_row = {(task.row, task.seed): task for task in tasks.values()}
  measured = by_row["test_40", 0]
  assert measured.needs == by_row["base", 0].needs
  assert "--config.image_size=40" in measured.command


def test_a_result_counts_for_its_values_alone(parts, args, monkeypatch):
  row = parts.grid.ROWS["base"]
  args.results.mkdir()
  path = parts.collect.result_file(args.results, "base", 0)
  path.write_text(json.dumps({"key": row.key(0)}))
  assert not parts.run.plan(["base"], [0], args)
  *links, last = row.links
  values = dict(last.values) | {"num_steps": 7}
  links.append(dataclasses.replace(last, values=values))
  other = dataclasses.replace(row, links=tuple(links))
  monkeypatch.setitem(parts.grid.ROWS, "base", other)
  tasks = parts.run.plan(["base"], [0], args)
  assert len(tasks) == len(links) + 1  # And the evaluation.


@pytest.mark.parametrize(
  "flags",
  [
    ("--hours=0",),
    ("--hours=nan",),
    ("--jobs=0",),
    ("--seeds", "4", "-1"),
    ("--smollm2={tmp}",),
    ("--workdir={tmp}/file/x",),
    ("--results={tmp}/file",),
  ],
)
def test_what_no_run_can_start_with(
  parts, tmp_path, monkeypatch, capsys, flags
):
  (tmp_path / "file").write_text("mine")
  flags = [flag.format(tmp=tmp_path) for flag in flags]
  folders = [f"--workdir={tmp_path}/w", f"--results={tmp_path}/r"]
  monkeypatch.setattr("sys.argv", ["run.py", *folders, *flags])
  monkeypatch.setattr(parts.run, "run", lambda *_: pytest.fail("it started"))
  with pytest.raises(SystemExit) as stopped:
    parts.run.main()
  assert stopped.value.code == 2
  message = capsys.readouterr().err.splitlines()[-1]
  name, _, value = flags[0].partition("=")
  assert f"error: {name}" in message and (value or flags[-1]) in message
  assert (tmp_path / "file").read_text() == "mine"


def made_up(values):
  """Makes results of rows {name: one value a seed}."""
  return {
    row: {s: {"metrics": {"m": v}} for s, v in enumerate(seeds)}
    for row, seeds in values.items()
  }


def test_two_rows_are_compared_as_a_paired_t_test_does(parts):
  base, other = [1.0, 2.5, 2.0, 4.0], [1.5, 3.5, 2.2, 5.1]
  table = parts.page.Table(
    made_up({"base": base, "frozen": other}), parts.page.Metric("m", "m", 100.0)
  )
  delta, half, p = table.differences(["base", "frozen"])["frozen"]
  expected = stats.ttest_rel(other, base)
  interval = expected.confidence_interval(0.95)
  assert p == pytest.approx(expected.pvalue)
  assert delta == pytest.approx(100 * np.mean(np.subtract(other, base)))
  assert delta - half == pytest.approx(100 * interval.low)
  assert delta + half == pytest.approx(100 * interval.high)


def test_all_rows_share_their_error_and_holm_corrects_a_family(parts):
  rng = np.random.default_rng(0)
  rows = ("base", "frozen", "dual", "projected", "vq")
  values = rng.normal(size=(5, 3)) + np.array([[0], [0], [3], [0.5], [9]])
  table = parts.page.Table(
    made_up(dict(zip(rows, values.tolist(), strict=True))),
    parts.page.Metric("m", "m"),
  )
  # Balanced, the model's error is what row and column means leave over.
  rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
  error = np.sqrt(np.square(rest).sum() / 8 * 2 / 3)
  deltas = values.mean(1) - values[0].mean()
  raw = 2 * stats.t.sf(np.abs(deltas / error), 8)[1:4]
  order = np.argsort(raw)
  holm = np.maximum.accumulate(raw[order] * [3, 2, 1]).clip(max=1)
  found = table.differences(rows[:4])
  assert set(found) == set(rows[1:4])
  for rank, place in enumerate(order):
    delta, half, p = found[rows[1 + place]]
    assert delta == pytest.approx(deltas[1 + place])
    assert half == pytest.approx(stats.t.ppf(0.975, 8) * error)
    assert p == pytest.approx(holm[rank])


def test_a_seed_that_is_missing_costs_its_row_alone(parts):
  """Against the normal equations of the same model, by hand."""
  values = {"base": [1.0, 2.0, 4.5], "frozen": [1.5, 2.0, 4.0], "dual": [3.0]}
  table = parts.page.Table(made_up(values), parts.page.Metric("m", "m"))
  design = np.array(
    [
      [1, 0, 0, 0, 0],
      [1, 0, 0, 1, 0],
      [1, 0, 0, 0, 1],
      [0, 1, 0, 0, 0],
      [0, 1, 0, 1, 0],
      [0, 1, 0, 0, 1],
      [0, 0, 1, 0, 0],
    ]
  )
  y = np.concatenate(list(values.values()))
  inverse = np.linalg.inv(design.T @ design)
  effects = inverse @ design.T @ y
  variance = np.square(y - design @ effects).sum() / 2
  found = table.differences(values)
  for place, row in ((1, "frozen"), (2, "dual")):
    contrast = np.zeros(5)
    contrast[place], contrast[0] = 1, -1
    half = np.sqrt(variance * contrast @ inverse @ contrast)
    delta, found_half, _ = found[row]
    assert delta == pytest.approx(effects[place] - effects[0])
    assert found_half == pytest.approx(stats.t.ppf(0.975, 2) * half)


def test_claims_are_compared_pair_by_pair(parts, monkeypatch):
  names = ("vqa/all", "text/after stage II", "psnr")
  rng = np.random.default_rng(1)
  values = {
    row: {
      seed: dict(zip(names, 1 + rng.random(3), strict=True)) for seed in "abc"
    }
    for row in ("hq", "base", "vq", "separate")
  }
  results = {row: {} for row in parts.grid.ROWS} | {
    row: {s: {"metrics": m} for s, m in enumerate(seeds.values())}
    for row, seeds in values.items()
  }

  def table():
    head, _, *lines, last = parts.page.claimed(results)
    assert last == ""
    columns = [c.strip() for c in head.split("|")]
    rows = ([c.strip() for c in line.split("|")] for line in lines)
    return {row[1]: dict(zip(columns, row, strict=True)) for row in rows}

  def mean(row, name):
    return np.mean([seed[name] for seed in values[row].values()])

  found = table()
  assert list(found) == [claim.title for claim in parts.grid.CLAIMS]
  column = "easy-VQA, %"
  for title, better, worse in (
    ("HQ > RQ", "hq", "base"),
    ("RQ > VQ", "base", "vq"),
    ("unified > separate vocabularies", "base", "separate"),
  ):
    delta = 100 * (mean(better, "vqa/all") - mean(worse, "vqa/all"))
    assert found[title][column].startswith(f"{delta:+.1f} ± ")
  assert found["projected > language_driven"][column] == "-"  # No result.
  # One stage I.
  assert found["unified > separate vocabularies"]["PSNR, dB"] == "-"
  delta = mean("hq", "psnr") - mean("base", "psnr")
  assert found["HQ > RQ"]["PSNR, dB"].startswith(f"{delta:+.2f} ± ")
  # Holm's correction is over the claims that a column has.
  claims = [c for c in parts.grid.CLAIMS if c.title == "HQ > RQ"]
  monkeypatch.setattr(parts.grid, "CLAIMS", tuple(claims))
  alone, among = (
    float(rows["HQ > RQ"][column].rpartition("= ")[2])
    for rows in (table(), found)
  )
  assert alone < among <= min(1.0, 3 * alone + 2e-3)


def test_claims_are_of_rows(parts):
  for claim in parts.grid.CLAIMS:
    assert {claim.better, claim.worse} <= set(parts.grid.ROWS)


def test_what_rows_share_counts_once(parts):
  psnr = {"base": [1.0, 2.0, 4.0], "dual": [1.5, 2.0, 5.0]}
  rows = psnr | {"separate": psnr["base"], "text_0": psnr["base"]}

  def cell(values, name):
    results = {
      row: {s: {"metrics": {name: v}} for s, v in enumerate(seeds)}
      for row, seeds in values.items()
    }
    page = parts.page
    metrics = (*page.STAGE_ONE, *page.READING, *page.LANGUAGE)
    metric = {m.name: m for m in metrics}[name]
    return parts.page.Table(results, metric).cell("base")

  text = "text/after stage II"
  language = {
    "base": [0.1, 0.3],
    "frozen": [0.2, 0.5],
    "test_40": [0.1, 0.3],  # Shares all that is trained with the base row.
    "text_0": [7.0, 9.0],  # Learns no text there.
  }
  two = {row: language[row] for row in ("base", "frozen")}
  assert cell(language, text) == cell(two, text)
  assert cell(language, "vqa/all") != cell(two, "vqa/all")
  assert cell(rows, "psnr") == cell(psnr, "psnr")
  assert cell(rows, "vqa/all") != cell(psnr, "vqa/all")
  assert parts.page.share_stage_one(["base", "separate", "text_0"])
  assert not parts.page.share_stage_one(["base", "dual"])
  assert not parts.page.share_stage_one(["base", "test_40"])


def test_ratios_are_geometric(parts):
  values = {"base": [10.0, 20.0, 40.0], "frozen": [20.0, 40.0, 81.0]}
  table = parts.page.Table(
    made_up(values), parts.page.Metric("m", "m", log=True)
  )
  assert table.cell("base").startswith("20.0 x/÷ ")
  delta, _, p = table.differences(values)["frozen"]
  expected = stats.ttest_rel(np.log(values["frozen"]), np.log(values["base"]))
  assert np.exp(delta) == pytest.approx((2 * 2 * 81 / 40) ** (1 / 3))
  assert p == pytest.approx(expected.pvalue)
  assert table.points("base") == pytest.approx(values["base"])


def test_the_kept_results_have_what_the_page_shows(parts):
  metrics = (
    *parts.page.READING,
    *parts.page.DRAWING,
    *parts.page.LANGUAGE,
    *parts.page.STAGE_ONE,
  )
  files = sorted(parts.collect.RESULTS.glob("*_[0-9].json"))
  assert parts.collect.RESULTS / "base_4.json" in files
  for path in files:
    result = json.loads(path.read_text())
    row = parts.grid.ROWS[result["row"]]
    assert path.name == f"{result['row']}_{result['seed']}.json"
    names = {metric.name for metric in metrics}
    if row.links[-1].config()["instruct.vision"] == "projector":
      cannot = ("pope/", "judged/", "drawn/", "decompression")
      names = {name for name in names if not name.startswith(cannot)}
    assert names <= result["metrics"].keys(), path
    assert np.isfinite(list(result["metrics"].values())).all(), path
    links = {link.name for link in row.links}
    assert result["seconds"].keys() == {*links, "evaluation"}
    assert all(s["done"] for s in result["seconds"].values())


def test_every_result_is_diagnosed_by_its_own_run(parts):
  text = (parts.collect.RESULTS / parts.collect.DIAGNOSIS).read_text()
  found = json.loads(text)
  for path in sorted(parts.collect.RESULTS.glob("*_[0-9].json")):
    result = json.loads(path.read_text())
    row, seed = parts.grid.ROWS[result["row"]], result["seed"]
    entry = found[result["row"]][str(seed)]
    last = row.links[-1].name
    assert entry["run"] == f"{last}_{row.key(seed, len(row.links))}", path
    values = entry["values"]
    assert ("text, training" in values) == row.learns_text, path
    assert "text, held out" in values, path
    assert ("drawing, held out" in values) == row.draws, path
    if "text, held out, probed" in values:  # As training itself evaluates it.
      assert values["text, held out, probed"] == pytest.approx(
        values["text, held out"], abs=1e-3
      )
      assert values["text, held out, text ids alone"] < values["text, held out"]


def test_drawings_of_who_never_learnt_to_draw_are_no_result(parts):
  metric = parts.page.DRAWING[0]
  results = {
    row: {s: {"metrics": {metric.name: 0.1 * s}} for s in range(2)}
    for row in ("base", "no_drawing", "projector")
  }
  table = parts.page.Table(results, metric)
  assert {row for row, _ in table.values} == {"base"}
  other = parts.page.Table(results, dataclasses.replace(metric, digits=2))
  assert {row for row, _ in other.values} == set(results)


def test_rows_that_spread_in_their_own_way_show_their_seeds(parts):
  results = made_up({"base": [0.5, 0.7, 0.6], "frozen": [1.0, 1.0]})
  table = parts.page.Table(results, parts.page.Metric("m", "m", pooled=False))
  assert table.cell("base") == "0.6 (0.5 to 0.7)"
  assert table.cell("frozen") == "1.0"


def test_one_seed_has_no_interval_and_none_no_value(parts):
  results = made_up({"base": [0.5], "frozen": []})
  table = parts.page.Table(results, parts.page.Metric("m", "m"))
  assert table.cell("base") == "0.5"
  assert table.cell("frozen") == "-"
  assert not table.differences(["base", "frozen"])
