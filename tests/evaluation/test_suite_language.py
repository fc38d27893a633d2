"""Perplexity of texts: that of training's own evaluation."""

import dataclasses

import numpy as np

from unicode_jax import config as config_lib, inference, loading
from unicode_jax.evaluation import bench as bench_lib, report, suites


def test_text_perplexity_is_the_runs_own(tiny, evaluated):
  found = evaluated.found("text")
  np.testing.assert_allclose(
    found["after stage II"]["perplexity"],
    tiny.metrics()["eval/text_perplexity"],
    rtol=1e-5,
  )
  before = found["before stage II"]
  assert before["tokens"] == found["after stage II"]["tokens"]
  assert before["perplexity"] != found["after stage II"]["perplexity"]
  assert str(tiny.pretrain) in before["run"]


def found_from(tiny, init_from, out, loaded=None, key="init_from"):
  """Returns the suite's results of a run, had it started there."""
  loaded = loaded or tiny.model.loaded
  config = config_lib.apply_overrides(loaded.config, {key: str(init_from)})
  loaded = dataclasses.replace(loaded, config=config)
  results = suites.evaluate(
    inference.UniCodeModel(loaded),
    tiny.data,
    bench_lib.Settings(suites=("text",)),
    out,
    say=lambda line: None,
  )
  return results["suites"]["text"]["results"]


def test_text_before_may_be_gone(tiny, tmp_path):
  found = found_from(tiny, tmp_path / "gone", tmp_path)
  assert "gone" in found["before stage II"]["missing"]
  assert found["after stage II"]["perplexity"] > 1
  assert "gone" in (tmp_path / report.REPORT).read_text()


def test_text_before_a_second_run_of_stage_two(tiny, evaluated, tmp_path):
  """Is that of the run of stage I, however many runs lie between."""
  found = found_from(tiny, tiny.instruct, tmp_path)
  expected = evaluated.found("text")["before stage II"]
  assert found["before stage II"] == expected


def test_text_before_stage_one_is_that_of_the_imported_model(tiny, tmp_path):
  loaded = loading.load(tiny.pretrain)
  same, other, gone = (
    found_from(tiny, start, tmp_path, loaded, "llm_from")
    for start in (tiny.pretrain, tiny.instruct, tmp_path / "gone")
  )
  assert list(same) == ["before stage I", "after stage I"]
  after = same["after stage I"]["perplexity"]
  assert same["before stage I"]["perplexity"] == after
  assert other["before stage I"]["perplexity"] != after
  assert other["after stage I"] == same["after stage I"]
  assert str(tiny.instruct) in other["before stage I"]["run"]
  assert "gone" in gone["before stage I"]["missing"]
