"""The tiny run as tests of what evaluates a run need it, and its evaluation."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from unicode_jax.evaluation import bench as bench_lib, suites
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import metrics


class Tiny:
  """The tiny run of stage II, and its LLM without any cache.

  Attributes: those of `TinyRun`, in the conftest.py above.
  """

  def __init__(self, run):
    self.pretrain, self.stage_one, self.instruct, self.data, self.model = run

  def logits(self, token_ids):
    """Runs the LLM on int32[n, D] without any cache, float64[n, K]."""
    loaded, n = self.model.loaded, len(token_ids)
    padded = np.pad(token_ids, [(0, 160 - n), (0, 0)], constant_values=-1)
    logits = _logits(loaded.model, loaded.variables, padded[None])
    return np.asarray(logits[0, :n], np.float64)

  def metrics(self):
    """Returns the last value of each of stage II's metrics."""
    values = {}
    for row in metrics.read_jsonl(self.instruct / "metrics.jsonl"):
      values |= row
    return values


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, token_ids):
  logits, _ = llama_lib.Llama(model.llama).apply(
    {"params": variables.params["llm"]},
    token_ids,
    depth_weights=model.depth_weights(variables),
  )
  return logits


@pytest.fixture(scope="session")
def tiny(tiny_run):
  return Tiny(tiny_run)


@pytest.fixture
def make_bench(tiny, tmp_path):
  """Returns a function from settings to a bench of the tiny run."""

  def make(**settings):
    return bench_lib.Bench(
      tiny.model, tiny.data, bench_lib.Settings(**settings), tmp_path
    )

  return make


class Evaluated(NamedTuple):
  """Every suite on few pictures of the tiny run.

  Attributes:
    few: pictures of each set, and drawings of each kind.
    results: what `suites.evaluate` returned.
    out: the folder that it wrote.
    said: the lines that it said.
  """

  few: int
  results: dict[str, Any]
  out: pathlib.Path
  said: list[str]

  def found(self, suite):
    """Returns the numbers of one suite."""
    return self.results["suites"][suite]["results"]


@pytest.fixture(scope="session")
def evaluated(tiny, tmp_path_factory):
  few, said = 24, []
  out = tmp_path_factory.mktemp("evaluation")
  settings = bench_lib.Settings(max_images=few, judge_steps=2)
  results = suites.evaluate(
    tiny.model, tiny.data, settings, out, say=said.append
  )
  return Evaluated(few, results, out, said)
