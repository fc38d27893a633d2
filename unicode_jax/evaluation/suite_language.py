"""Suite: the language that is left, as perplexity of held-out texts.

METHOD section 4's check that stage II keeps what stage I had learned: the texts
are read by the model before stage II, where it is still there, and after.
"""

import functools
import hashlib
import math

import jax
import numpy as np

from unicode_jax import config as config_lib, data as data_lib, loading
from unicode_jax.data import mixture as mixture_lib, pipeline
from unicode_jax.evaluation import forced
from unicode_jax.evaluation.bench import Bench, Outcome
from unicode_jax.training import steps

_TEXT_ROWS = 4096  # As training's last evaluation.


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
    mixture, 0, config.instruct.global_batch_size, _TEXT_ROWS
  ):
    nll, _ = forced.nats_and_hits(loaded.model, loaded.variables, batch)
    nats += float(np.sum(np.asarray(nll) * batch["loss_mask"], dtype=float))
    tokens += float(batch["loss_mask"].sum())
  return nats, int(tokens)


def _stage_one(config) -> str:
  """Returns the run that stage II began from, be it in several runs."""
  while config.stage == "instruct":
    start = config.init_from
    config = loading.read_config(start)
  return start


def text(bench: Bench) -> Outcome:
  """Measures held-out perplexity, after stage II and before it (H10).

  Args:
    bench: the model and the data.
  """
  loaded, config = bench.loaded, bench.loaded.config

  def measured(run):
    nats, tokens = _text_sums(run, bench.data, config, loaded.layout)
    return {
      "perplexity": math.exp(nats / tokens),
      "nats_per_token": nats / tokens,
      "tokens": tokens,
      "run": f"{run.workdir}, step {run.step}",
    }

  results = {}
  if config.stage == "instruct":
    try:
      results["before stage II"] = measured(loading.load(_stage_one(config)))
    except (config_lib.ConfigError, OSError) as error:
      results["before stage II"] = {"missing": str(error)}
    results["after stage II"] = measured(loaded)
  else:
    results["after stage I"] = measured(loaded)
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
