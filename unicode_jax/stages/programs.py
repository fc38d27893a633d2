"""The programs that a config runs, with the shapes of what they are given.

No data is read and no array is made: enough to compile them for devices that
are not here.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import config as config_lib, loading, sampling, sharding
from unicode_jax.models import llama as llama_lib
from unicode_jax.nn import fused_attention
from unicode_jax.stages import instruct, pretrain, tokenizer
from unicode_jax.training import phase as phase_lib

# Of the decoding program: rows on every share of the batch, positions of the
# prompt, new ids.
DECODE_ROWS, DECODE_PROMPT, DECODE_NEW = 8, 256, 256
# Groups of a mixture: they change the size of one small sum.
_NUM_GROUPS = 16


@dataclasses.dataclass(frozen=True)
class Program:
  """One program.

  Attributes:
    name: "tokenizer", "llm", "instruct" or "decode".
    function: Jitted; call `trace` with the mesh set.
    arguments: Trees of `jax.ShapeDtypeStruct` with shardings, and what the
      function takes as it is.
    unit: What one run of it takes, "images" or "tokens".
    items: How many of them, all devices together.
    flops: Multiplications and additions of its matrix products by arithmetic,
      nothing computed twice; None where it is not counted.
    num_parameters: Of the model.
    kernel_flops: What attention's kernel does, of which the compiler knows
      nothing; 0 where there is none.
  """

  name: str
  function: Callable
  arguments: tuple[Any, ...]
  unit: str
  items: int
  flops: float | None
  num_parameters: int
  kernel_flops: float = 0.0


def train_programs(config, mesh: jax.sharding.Mesh) -> list[Program]:
  """Lists the train steps of a stage, one for each kind of step.

  Args:
    config: Resolved ConfigDict of any stage.
    mesh: Device mesh; its devices need not be here.

  Returns:
    The programs. Of stage II, with codes from a cache if `data.codes` is set.
  """
  model = loading.build_model(config)
  key = jax.random.key(config.seed)
  valid = np.ones(config.text.vocab_size, bool)
  if config.stage == "instruct":
    phases = [instruct.make_phase(config, model, _NUM_GROUPS)]
    variables = jax.eval_shape(
      model.init, key, jax.ShapeDtypeStruct(valid.shape, valid.dtype)
    )
    init = functools.partial(instruct.initial_state, config, model)
    state = jax.eval_shape(init, key, variables)
  else:
    kinds = {
      "pretrain": pretrain.PretrainStage,
      "tokenizer": tokenizer.TokenizerStage,
    }
    stage = kinds[config.stage](config, None, model, valid)
    # The finetune's step is part of the tokenizer's.
    phases = [p for name, p in stage.phases.items() if name != "finetune"]
    state = jax.eval_shape(stage.init, key, None)
  shardings = sharding.state_shardings(state, mesh)
  everywhere = sharding.replicated(mesh)
  size = sum(x.size for x in jax.tree.leaves(state.variables.params))
  per_token = kernel = 0.0
  if model.llama is not None:
    length = config.text.sequence_length
    per_token = 3 * llm_flops(model.llama, length)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      fused = fused_attention.choose(model.llama.attention, length) is not None
    # Two products forward, once more where nothing of it is kept, and five of
    # gradients (Dao et al., arXiv 2205.14135).
    again = model.llama.remat_policy == "full"
    kernel = fused * (3.5 + again) * attention_flops(model.llama, length)
  return [
    Program(
      name=phase.name,
      function=phase_lib.jit_step(phase, shardings, mesh),
      arguments=(
        sharding.placed_shapes(state, shardings),
        sharding.placed_shapes(
          _batch(config, phase.stream), sharding.batch_sharding(mesh)
        ),
        sharding.placed_shapes(phase.constants, everywhere),
      ),
      unit=phase.unit,
      items=phase.items,
      flops=None if phase.unit == "images" else per_token * phase.items,
      num_parameters=size,
      kernel_flops=kernel * phase.items * (phase.unit == "tokens"),
    )
    for phase in phases
  ]


def decode_program(config, mesh: jax.sharding.Mesh) -> Program:
  """Returns the program that answers prompts: reading them, and the new ids.

  Args:
    config: Resolved ConfigDict of a stage with an LLM.
    mesh: Device mesh.
  """
  llama = dataclasses.replace(
    loading.build_llama(config), scan_layers=False, remat_policy="none"
  )
  params = jax.eval_shape(
    llama_lib.Llama(llama).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1, 1), jnp.int32),
  )["params"]
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(llama.dtype)), params
  )
  rows = DECODE_ROWS * sharding.num_batch_shards(mesh)
  everywhere = sharding.replicated(mesh)
  batch = sharding.batch_sharding(mesh)

  def shape(*sizes, dtype=jnp.int32, place=batch):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  K = llama.vocab_size
  grammar = sampling.Grammar(
    text=shape(K, dtype=jnp.bool_, place=everywhere),
    codes=shape(K, dtype=jnp.bool_, place=everywhere),
    image_start=shape(place=everywhere),
    image_end=shape(place=everywhere),
    stop=shape(1, place=everywhere),
    codes_per_image=config_lib.positions(config) * config.tokenizer.depth,
  )
  key = jax.eval_shape(jax.random.key, 0)
  return Program(
    name="decode",
    function=sampling.decode,
    arguments=(
      llama,
      sampling.SamplingConfig(max_new_tokens=DECODE_NEW),
      sharding.placed_shapes(
        params, sharding.state_shardings({"llm": params}, mesh)["llm"]
      ),
      shape(rows, DECODE_PROMPT, config.tokenizer.depth),
      shape(rows),
      shape(rows),
      shape(rows, dtype=jnp.bool_),
      shape(rows),
      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
      grammar,
      None,
    ),
    unit="tokens",
    items=rows * DECODE_NEW,
    flops=None,
    num_parameters=llama_lib.num_parameters(llama),
  )


def llm_flops(llama: llama_lib.LlamaConfig, length: int) -> float:
  """Counts the work of the forward pass for one token.

  Two for each weight of a matrix (the token table is looked up, the head is
  multiplied), and attention over the half of the sequence that a token sees on
  average. Three times as much with the backward pass (Kaplan et al., arXiv
  2001.08361; Chowdhery et al., arXiv 2204.02311, appendix B, count the whole of
  the sequence).

  Args:
    llama: The model's shape.
    length: Positions of a row.
  """
  E, A = llama.embed_dim, llama.head_dim
  attention = 2 * E * A * (llama.num_heads + llama.num_kv_heads)
  layer = attention + 3 * E * llama.mlp_dim
  weights = llama.num_layers * layer + E * llama.vocab_size
  return 2.0 * weights + attention_flops(llama, length)


def attention_flops(llama: llama_lib.LlamaConfig, length: int) -> float:
  """Counts the part of `llm_flops` that is scores and what they weigh."""
  seen = min(length / 2, llama.sliding_window or length)
  return 4.0 * llama.num_layers * seen * llama.num_heads * llama.head_dim


def _batch(config, stream: str):
  """Returns the shapes of a stream's batches."""
  shape, size = jax.ShapeDtypeStruct, config.image_size
  if stream == "image":
    count = config.data.global_batch_size
    return {"image": shape((count, size, size, 3), jnp.float32)}
  settings = config.instruct if stream == "mixture" else config.text
  rows = settings.global_batch_size, config.text.sequence_length
  depth = config.tokenizer.depth if stream == "mixture" else 1
  batch = {
    "token_ids": shape((*rows, depth), jnp.int32),
    "labels": shape(rows, jnp.int32),
    "positions": shape(rows, jnp.int32),
    "segment_ids": shape(rows, jnp.int32),
    "loss_mask": shape(rows, jnp.float32),
    "image_mask": shape(rows, jnp.bool_),
  }
  if stream == "mixture":
    positions = config_lib.positions(config)
    most = max(1, rows[1] // positions)  # Images that a row has room for.
    codes = shape((rows[0], most, positions * depth), jnp.int32)
    images = shape((rows[0], most, size, size, 3), jnp.uint8)
    batch["group"] = shape(rows[:1], jnp.int32)
    batch |= {"codes": codes} if config.data.codes else {"images": images}
  return batch
