"""Train steps of this package, to be timed by train_step.py.

`tokenizer_step` is `training.steps.make_tokenizer_step` as stage I builds it:
encoder, residual quantization with rows of the LLM's token table
(language_driven, 4 codes a position, 16 dimensions, 2048 ids of which 261 are
reserved), decoder, L1, L2, commitment and codebook losses, backward, clipping,
AdamW, gains and what is measured for the log. `llm_step` is the decoder with
the loss of every token and AdamW. What they begin with is made here, too, for
the others to copy. PyTorch's side is torch_twins.py.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unicode_jax import config as config_lib, loading
from unicode_jax.models import llama as llama_lib, tokenizer as tokenizer_lib
from unicode_jax.stages import tokenizer as tokenizer_stage
from unicode_jax.training import losses


@dataclasses.dataclass(frozen=True)
class Step:
  """One train step and its program.

  Attributes:
    run: Does one step, waits for it, and returns metrics as floats.
    hlo: Returns the compiled program as text.
  """

  run: Callable[[], dict[str, float]]
  hlo: Callable[[], str]


def llm_parameters(config: llama_lib.LlamaConfig) -> dict:
  """Draws the parameters of a language model, with key 0."""
  ids = jnp.zeros((1, 1, 1), jnp.int32)
  init = jax.jit(llama_lib.Llama(config).init)
  return init(jax.random.key(0), ids)["params"]


def llm_step(
  config: llama_lib.LlamaConfig,
  params: dict,
  ids: np.ndarray,
  labels: np.ndarray,
  learning_rate: float,
  weight_decay: float,
) -> Step:
  """Makes the train step of a language model.

  Args:
    config: Of the model.
    params: Of `llm_parameters`; they are donated.
    ids: int32[B, T].
    labels: int32[B, T], the next ids.
    learning_rate: Of AdamW, per step.
    weight_decay: Of AdamW, for every parameter.

  Returns:
    A step whose metrics hold the loss.
  """
  model = llama_lib.Llama(config)
  optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

  def loss_fn(params, token_ids, labels):
    hidden, _ = model.apply({"params": params}, token_ids, return_hidden=True)
    mask = jnp.ones(labels.shape)
    kernel = llama_lib.head_kernel(params, config)
    return losses.next_token_loss(hidden, kernel, labels, mask)[0]

  @jax.jit(donate_argnums=(0, 1))
  def step(params, state, token_ids, labels):
    loss, grads = jax.value_and_grad(loss_fn)(params, token_ids, labels)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  batch = jnp.asarray(ids[..., None]), jnp.asarray(labels)
  state = (params, optimizer.init(params))

  def run():
    nonlocal state
    *state, loss = jax.block_until_ready(step(*state, *batch))
    return {"loss": float(loss)}

  return Step(run, lambda: step.lower(*state, *batch).compile().as_text())


def random_parameters(
  config: tokenizer_lib.TokenizerConfig, seed: int = 0
) -> dict:
  """Draws parameters of encoder and decoder without a zero among them."""
  size, grid = config.image_size, config.grid_size
  encoder = tokenizer_lib.Encoder(config)
  decoder = tokenizer_lib.Decoder(config)
  shapes = {
    "encoder": jax.eval_shape(
      encoder.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
    )["params"],
    "decoder": jax.eval_shape(
      decoder.init,
      jax.random.key(0),
      jnp.zeros((1, grid, grid, config.code_dim)),
    )["params"],
  }
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    name, shape = path[-1].key, shape.shape
    noise = rng.normal(size=shape).astype(np.float32)
    if name == "kernel":
      return noise / math.sqrt(math.prod(shape[:-1]))
    return (name == "scale") + 0.1 * noise

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_stage(overrides: dict):
  """Builds the tokenizer's half of stage I, without its data.

  Args:
    overrides: What differs from the default config.

  Returns:
    The stage, its config, and its first state with `random_parameters`.
  """
  config = config_lib.apply_overrides(config_lib.default_config(), overrides)
  # Only its token table matters.
  llama = llama_lib.LlamaConfig(
    vocab_size=config.text.vocab_size,
    embed_dim=config.llm.embed_dim,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    mlp_dim=8,
    tie_embeddings=True,
  )
  valid = np.arange(config.text.vocab_size) >= config_lib.RESERVED_TOKENS
  model = dataclasses.replace(loading.build_model(config), llama=llama)
  stage = tokenizer_stage.TokenizerStage(config, None, model, valid)
  state = jax.jit(stage.init)(jax.random.key(0))
  drawn = jax.tree.map(jnp.array, random_parameters(model.tokenizer))
  variables = state.variables.replace(
    params={**state.variables.params, **drawn}
  )
  return stage, config, state.replace(variables=variables)


def tokenizer_step(
  stage: tokenizer_stage.TokenizerStage, state, image: np.ndarray
) -> Step:
  """Makes the train step of the visual tokenizer.

  Args:
    stage: Of `make_stage`.
    state: Its first state, which is donated.
    image: float32[B, H, W, 3].

  Returns:
    A step whose metrics hold the loss and the gradient's norm.
  """
  phase = stage.phase(0)
  step = jax.jit(phase.step, donate_argnums=0)
  batch = {"image": jnp.asarray(image)}

  def run():
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, batch, phase.constants))
    return {
      "loss": float(metrics["tokenizer/loss"]),
      "gradient_norm": float(metrics["tokenizer/gradient_norm"]),
    }

  return Step(
    run, lambda: step.lower(state, batch, phase.constants).compile().as_text()
  )
