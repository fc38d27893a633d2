"""The tiny run, as tests of what evaluates a run need it."""

import functools

import jax
import numpy as np
import pytest

from unicode_jax.models import llama as llama_lib


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
