"""AdamW with warm-up, cosine decay and gradient clipping."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Settings of one optimizer.

  Attributes:
    learning_rate: Peak learning rate, per step.
    warmup_steps: Steps of linear warm-up from 0.
    final_fraction: Share of the peak that is left at the last step.
    weight_decay: Decoupled decay, applied to matrices only.
    b1: Decay of the first moment, per step.
    b2: Decay of the second moment, per step.
    clip_norm: Largest global gradient norm.
    embedding_factor: Learning rate of an LLM's embedding table, as a multiple
      of the others'. Rows of size 1 need larger steps than matrices do (Yang
      et al., arXiv 2203.03466); a tied head takes them too.
  """

  learning_rate: float
  warmup_steps: int
  final_fraction: float
  weight_decay: float
  b1: float
  b2: float
  clip_norm: float
  embedding_factor: float = 1.0


def learning_rate_schedule(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate as a function of this optimizer's own count."""
  num_steps = max(num_steps, 1)
  warmup = min(config.warmup_steps, num_steps // 2)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup else config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=num_steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Builds the optimizer of one group of parameters.

  Args:
    config: Settings.
    num_steps: Updates that this optimizer will make over the whole run.

  Returns:
    An optax transformation; vectors and scalars are not decayed.
  """
  steps = [
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config, num_steps),
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
  ]
  if config.embedding_factor != 1.0:
    steps.append(
      optax.masked(optax.scale(config.embedding_factor), _embeddings)
    )
  return optax.chain(*steps)


def _embeddings(params):
  """Marks the embedding tables of LLMs."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(
      getattr(key, "key", None) == "embed_tokens" for key in path
    ),
    params,
  )
