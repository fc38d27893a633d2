"""What a model of stage II finds likely where the right tokens are given.

Held-out examples in rows, as training's own evaluation makes them, and one pass
over each: nats and hits of every token, without any sampling. So the language
suite reads texts, and the VQA suite a model that cannot be sampled from.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp

from unicode_jax import loading
from unicode_jax.data import mixture as mixture_lib, sequences, sources, tasks
from unicode_jax.evaluation.bench import Bench, HeldOut
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import instruct_step, losses as losses_lib


@functools.partial(jax.jit, static_argnums=0)
def nats_and_hits(model, variables, batch):
  """Returns nats and hits of every position of a batch of `data.mixture`."""
  groups = {
    name: variables.params[name] for name in instruct_step.trained_groups(model)
  }
  _, aux = instruct_step.instruct_loss(model, groups, variables, batch)
  return aux["nll"], aux["hits"]


@functools.partial(jax.jit, static_argnums=0)
def nats_and_hits_of_ids(model, variables, token_ids, labels):
  """Returns nats and hits of next tokens that are at hand as ids.

  Args:
    model: `models.unicode.UniCode`.
    variables: its variables.
    token_ids: int32[B, T, D], of single conversations.
    labels: int32[B, T].

  Returns:
    float32[B, T] each.
  """
  params = variables.params["llm"]
  hidden, _ = llama_lib.Llama(model.llama).apply(
    {"params": params},
    token_ids,
    return_hidden=True,
    depth_weights=model.depth_weights(variables),
  )
  _, aux = losses_lib.next_token_loss(
    hidden,
    llama_lib.head_kernel(params, model.llama),
    labels,
    jnp.ones(labels.shape, jnp.float32),
  )
  return aux["nll"], aux["hits"]


def answers(
  bench: Bench, held: HeldOut, asked: Sequence[tuple[int, str, str]]
) -> list[str]:
  """Says the right answer where greedy decoding would, nothing elsewhere.

  For a model that sampling does not serve: with the right answer before it,
  every token must be the likeliest.
  """
  examples = [
    tasks.Example(i, ((question, answer),), reads=True)
    for i, question, answer in asked
  ]
  batches, rows = _batches(bench, examples, held.source)
  exact = []
  for batch in batches:
    _, hits = nats_and_hits(bench.loaded.model, bench.loaded.variables, batch)
    exact += instruct_step.exact_answers(batch, hits).tolist()
  packed = [rows.examples[i] for row in rows.rows for i in row]
  right = {
    (example.item, *example.turns[0]): hit
    for example, hit in zip(packed, exact, strict=True)
  }
  return [a if right.get((i, q, a), False) else "" for i, q, a in asked]


def _batches(
  bench: Bench,
  examples: Sequence[tasks.Example],
  source: sources.ImageSource,
):
  """Packs examples into batches as training does; also returns the rows."""
  loaded = bench.loaded
  config = mixture_config(loaded, loaded.layout, loaded.config)
  mixture = mixture_lib.Mixture(
    [source],
    bench.data.heldout_texts,
    loaded.text_tokenizer,
    dataclasses.replace(config, source_weights=(1.0,)),
  )
  rows = mixture_lib.TaskRows(
    "vqa", examples, loaded.text_tokenizer, config, source
  )
  mixture.groups = [rows]
  mixture.max_images = max(1, rows.max_images)
  size = loaded.config.instruct.global_batch_size
  return mixture_lib.fixed_batches(mixture, 0, size), rows


def mixture_config(
  loaded: loading.Loaded, layout: sequences.SequenceFormat, config
) -> mixture_lib.MixtureConfig:
  """Returns how held-out rows are made, as training's own evaluation does."""
  return mixture_lib.MixtureConfig(
    weights={"text": 1.0},
    source_weights=(),
    layout=dataclasses.replace(layout, codes_shift=0),
    sequence_length=config.text.sequence_length,
    positions=loaded.model.num_positions,
    first_slot=loaded.model.llama.vocab_size,
    questions_per_image=1,
  )
