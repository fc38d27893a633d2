"""Suite: the language that is left, as perplexity of held-out texts.

METHOD section 4's check that language is kept: the texts are read by the model
as it is, as it was before stage II and, of an imported one, before stage I,
where these are still there.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import numpy as np

from unicode_jax import config as config_lib, data as data_lib, loading
from unicode_jax.data import mixture as mixture_lib, pipeline
from unicode_jax.evaluation import forced
from unicode_jax.evaluation.bench import Bench, Outcome
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import steps


@functools.partial(jax.jit, static_argnums=0)
def _stage_one_text(model, params, batch):
  loss, aux = steps.text_loss(model, params, batch)
  return loss * aux["num_tokens"], aux["num_tokens"]


def _text_sums(
  loaded: loading.Loaded, data: data_lib.Data, config, layout
) -> tuple[float, int]:
  """Returns nats and answer tokens of the held-out texts.

  Args:
    loaded: whose LLM reads them.
    data: the texts.
    config: whose rows they are packed into; of stage I, its own way.
    layout: of stage II.
  """
  nats = tokens = 0.0
  if config.stage != "instruct":
    for batch in pipeline.heldout_text_batches(
      data.heldout_texts,
      loaded.text_tokenizer,
      sequence_length=config.text.sequence_length,
      global_batch_size=config.text.global_batch_size,
    ):
      sums = _stage_one_text(
        loaded.model, loaded.variables.params["llm"], batch
      )
      nats, tokens = nats + float(sums[0]), tokens + float(sums[1])
    return nats, int(tokens)
  mixture = mixture_lib.Mixture(
    data.heldout_sources,
    data.heldout_texts,
    loaded.text_tokenizer,
    forced.mixture_config(loaded, layout, config),
  )
  for batch in mixture_lib.fixed_batches(
    mixture, 0, config.instruct.global_batch_size, config.instruct.heldout_rows
  ):
    nll, _ = forced.nats_and_hits(loaded.model, loaded.variables, batch)
    nats += float(np.sum(np.asarray(nll) * batch["loss_mask"], dtype=float))
    tokens += float(batch["loss_mask"].sum())
  return nats, int(tokens)


def _stage_one(config) -> loading.Loaded:
  """Loads the run that stage II began from, be it in several runs."""
  start = config.init_from
  for _, earlier in config_lib.starts(config):
    if earlier.stage == "instruct":
      start = earlier.init_from
  return loading.load(start)


def _untouched(stage_one: loading.Loaded) -> loading.Loaded:
  """Puts the language model that stage I began from in its place."""
  llm = loading.load_llm(stage_one.config.llm_from)
  params = stage_one.variables.params | {
    "llm": llama_lib.with_layers_as(
      llm.params, stage_one.model.llama.scan_layers
    )
  }
  return dataclasses.replace(
    stage_one,
    variables=stage_one.variables.replace(params=params),
    workdir=llm.workdir,
    step=llm.step,
  )


def text(bench: Bench) -> Outcome:
  """Measures held-out perplexity, after stage II and before it (H10).

  Args:
    bench: the model and the data.
  """
  loaded, config = bench.loaded, bench.loaded.config

  def measured(load):
    """Returns a run, None where it is gone, and what is said of it."""
    try:
      run = load()
    except (config_lib.ConfigError, OSError) as error:
      return None, {"missing": str(error)}
    nats, tokens = _text_sums(run, bench.data, config, loaded.layout)
    return run, {
      "perplexity": math.exp(nats / tokens),
      "nats_per_token": nats / tokens,
      "tokens": tokens,
      "run": f"{run.workdir}, step {run.step}",
    }

  results, stage_one, stage = {}, loaded, "I"
  if config.stage == "instruct":
    stage = "II"
    stage_one, results["before stage II"] = measured(lambda: _stage_one(config))
  if stage_one is not None and stage_one.config.llm_from is not None:
    _, untouched = measured(lambda: _untouched(stage_one))
    results = {"before stage I": untouched} | results
  _, results[f"after stage {stage}"] = measured(lambda: loaded)
  return Outcome(
    results,
    {
      "texts": len(bench.data.heldout_texts),
      "sha256": hashlib.sha256(
        repr(bench.data.heldout_texts).encode()
      ).hexdigest()[:16],
      "counted": "tokens of answers and their ends",
      "sequence_length": config.text.sequence_length,
      "template": loaded.layout.template.name,
    },
    ", ".join(
      f"{k} {v['perplexity']:.1f}"
      for k, v in results.items()
      if "perplexity" in v
    ),
  )
