"""Perplexity of texts: that of training's own evaluation."""

import dataclasses

import numpy as np

from unicode_jax import config as config_lib, inference
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


def found_from(tiny, init_from, out):
  """Returns the suite's results of the run, had it started there."""
  config = config_lib.apply_overrides(
    tiny.model.loaded.config, {"init_from": str(init_from)}
  )
  loaded = dataclasses.replace(tiny.model.loaded, config=config)
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
