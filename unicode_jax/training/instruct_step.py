"""The optimizer step of stage II: next-token prediction on text and images.

METHOD section 4. The rows of a batch hold slots where codes belong (`data`); a
step fills them with the codes of the batch's images, which come from the frozen
tokenizer or from a cache, and trains the LLM on what is left: plain sequences
of ids. The baselines of METHOD section 5 differ in what fills the slots.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unicode_jax import sharding
from unicode_jax.models import llama as llama_lib, unicode as unicode_lib
from unicode_jax.training import (
  accumulation,
  losses as losses_lib,
  state as state_lib,
)


def trained_groups(model: unicode_lib.UniCode) -> tuple[str, ...]:
  """Names the parameters that stage II trains."""
  language = "lora" if model.lora_rank else "llm"
  if model.vision == "projector":
    return language, "projector"
  return (language,)


def to_float(images: jax.Array) -> jax.Array:
  """Maps pixels from uint8 0..255 to float32 [-1, 1], in any shape."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def batch_codes(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  batch: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns the codes that a batch shows, int32[B, M P D].

  Args:
    model: The model.
    variables: Its parameters.
    batch: "codes" int32[B, M, P D], or "images" uint8[B, M, S, S, 3].
  """
  if "codes" in batch:
    return batch["codes"].reshape(batch["codes"].shape[0], -1)
  B, M, *shape = batch["images"].shape
  images = to_float(batch["images"].reshape(B * M, *shape))
  images = sharding.constrain(images, "image", None, None, None)
  return model.encode(variables, images).codes.reshape(B, -1)


def _fill(ids, codes, first_slot):
  """Replaces slots int32[B, ...] by codes int32[B, n]."""
  flat = ids.reshape(ids.shape[0], -1)
  index = jnp.clip(flat - first_slot, 0, codes.shape[1] - 1)
  found = jnp.take_along_axis(codes, index, axis=1)
  return jnp.where(flat >= first_slot, found, flat).reshape(ids.shape)


def _read(model, params, batch, codes):
  """Returns token_ids [B, T, D], labels [B, T], and what a projector adds."""
  first_slot = model.llama.vocab_size
  token_ids = batch["token_ids"]
  if model.vision != "projector":
    codes = codes + model.codes_shift
    labels = _fill(batch["labels"], codes, first_slot)
    return _fill(token_ids, codes, first_slot), labels, None
  images = batch["images"]
  B, M, *shape = images.shape
  variables = params["variables"].replace(
    params={**params["variables"].params, "projector": params["projector"]}
  )
  read = model.project(variables, to_float(images.reshape(B * M, *shape)))
  read = read.reshape(B, -1, read.shape[-1])
  shown = token_ids[..., 0] - first_slot
  place = jnp.clip(shown // model.depth, 0, read.shape[1] - 1)
  extra = jnp.take_along_axis(read, place[..., None], axis=1)
  extra = jnp.where(shown[..., None] >= 0, extra, 0.0)
  token_ids = jnp.where(token_ids >= first_slot, -1, token_ids)
  return (
    token_ids,
    jnp.where(batch["labels"] >= first_slot, 0, batch["labels"]),
    extra,
  )


def instruct_loss(
  model: unicode_lib.UniCode,
  groups: Mapping[str, jax.Array],
  variables: unicode_lib.Variables,
  batch: Mapping[str, jax.Array],
  image_loss_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Averages the cross entropy over the answers of a batch.

  Args:
    model: The model.
    groups: Parameters that are trained, by `trained_groups`.
    variables: All parameters; those of `groups` are not read from here.
    batch: Of `data.mixture`.
    image_loss_weight: Of a code of a drawn image, beside 1 for other tokens.

  Returns:
    The loss, float32[] in nats per weighted token; and "num_tokens", float32[],
    the sum of weights, and float32[B, T] each "nll", "hits" and "weight" (the
    loss mask).
  """
  codes = None
  if model.vision != "projector":
    codes = jax.lax.stop_gradient(batch_codes(model, variables, batch))
  token_ids, labels, extra = _read(
    model, {**groups, "variables": variables}, batch, codes
  )
  llm = model.llm({**variables.params, **groups})
  hidden, _ = llama_lib.Llama(model.llama).apply(
    {"params": llm},
    token_ids,
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
    return_hidden=True,
    depth_weights=model.depth_weights(variables),
    extra_embedding=extra,
  )
  weight = batch["loss_mask"] * jnp.where(
    batch["image_mask"], image_loss_weight, 1.0
  )
  loss, aux = losses_lib.next_token_loss(
    hidden, llama_lib.head_kernel(llm, model.llama), labels, weight
  )
  return loss, {
    "nll": aux["nll"],
    "hits": aux["hits"],
    "num_tokens": aux["num_tokens"],
    "weight": batch["loss_mask"],
  }


def loss_sums(
  batch: Mapping[str, jax.Array], aux: Mapping[str, jax.Array], num_groups: int
) -> dict[str, jax.Array]:
  """Adds up what a batch's answers cost, by group of rows and kind of token.

  Args:
    batch: Of `data.mixture`.
    aux: Of `instruct_loss`.
    num_groups: Groups of the mixture.

  Returns:
    float32[num_groups, 2, 3]: for text and image tokens, the sums of nats, hits
    and tokens.
  """
  kind = jax.nn.one_hot(batch["image_mask"].astype(jnp.int32), 2)
  kind *= aux["weight"][..., None]
  values = jnp.stack(
    [aux["nll"], aux["hits"], jnp.ones_like(aux["nll"])], axis=-1
  )
  by_row = jnp.einsum("BTk,BTv->Bkv", kind, values)
  return jnp.zeros((num_groups, 2, 3)).at[batch["group"]].add(by_row)


def exact_answers(batch, hits: np.ndarray) -> np.ndarray:
  """Says of every conversation whether all its answers' tokens were hit.

  Args:
    batch: Of `data.mixture`.
    hits: float32[B, T], of `instruct_loss`.

  Returns:
    bool[n], one for each conversation of the batch, row by row.
  """
  exact = []
  all_missed = (np.asarray(batch["loss_mask"]) > 0) & (np.asarray(hits) < 0.5)
  for segments, missed in zip(
    np.asarray(batch["segment_ids"]), all_missed, strict=True
  ):
    for segment in range(1, segments.max() + 1):
      exact.append(not missed[segments == segment].any())
  return np.asarray(exact, bool)


def make_instruct_step(
  model: unicode_lib.UniCode,
  optimizer: optax.GradientTransformation,
  *,
  num_groups: int,
  image_loss_weight: float,
  microbatches: int = 1,
) -> Callable:
  """Makes the step of stage II.

  Args:
    model: The model, its tokenizer frozen.
    optimizer: Updates the LLM and, for that baseline, the projector.
    num_groups: Groups of the mixture.
    image_loss_weight: See `instruct_loss`.
    microbatches: Parts of the batch, see `accumulation`.

  Returns:
    (state, batch of `data.mixture`, unused) -> (state, metrics).
  """
  trained = trained_groups(model)

  def step(state: state_lib.TrainState, batch, constants=None):
    del constants
    variables = state.variables
    groups = {name: variables.params[name] for name in trained}
    (loss, aux), grads = accumulation.value_and_grad(
      lambda groups, batch: instruct_loss(
        model, groups, variables, batch, image_loss_weight
      ),
      groups,
      batch,
      microbatches,
    )
    updates, opt_state = optimizer.update(
      grads, state.opt_state["instruct"], groups
    )
    groups = optax.apply_updates(groups, updates)
    state = state.replace(
      step=state.step + 1,
      variables=variables.replace(params={**variables.params, **groups}),
      opt_state={"instruct": opt_state},
    )
    return state, {
      "loss": loss,
      "gradient_norm": optax.tree.norm(grads),
      "sums": loss_sums(batch, aux, num_groups),
    }

  return step
