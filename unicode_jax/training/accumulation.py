"""Loss and gradient of a batch, whole or in parts, where parameters live.

The parts are computed one after the other and the gradients added up, so that a
large batch needs the activations of a small one. The result is that of the
whole batch: each part counts by the weight of its tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unicode_jax import sharding


def value_and_grad(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
  params: Any,
  batch: Any,
  parts: int = 1,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
  """Differentiates a mean over tokens.

  Args:
    loss_fn: (params, batch) -> (loss, aux): the loss is a mean over
      aux["num_tokens"], float32[]; other entries of aux are float32[], which
      add up, or float32[B, ...].
    params: Tree of float32.
    batch: Tree of arrays [B, ...].
    parts: Parts of the batch, a divisor of B.

  Returns:
    (loss, aux) of the whole batch, and the gradient, split like the parameters
    over the mesh that is set.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if parts == 1:
    result, grads = grad_fn(params, batch)
    return result, _like_parameters(grads)

  def split(x):
    # Of each device's rows, so that none of them moves.
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  def join(x):
    if x.ndim == 1:
      return x.sum()
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  def add(carry, part):
    (loss, aux), grads = grad_fn(params, part)
    weight = aux["num_tokens"]
    nats, total = carry
    total = jax.tree.map(lambda t, g: t + weight * g, total, grads)
    return (nats + weight * loss, _like_parameters(total)), aux

  start = jnp.zeros(()), _like_parameters(jax.tree.map(jnp.zeros_like, params))
  (nats, total), aux = jax.lax.scan(add, start, jax.tree.map(split, batch))
  aux = jax.tree.map(join, aux)
  weight = jnp.where(aux["num_tokens"] > 0, aux["num_tokens"], 1.0)
  return (nats / weight, aux), jax.tree.map(lambda t: t / weight, total)


def _like_parameters(grads):
  """Says that gradients live where their parameters do."""
  mesh = sharding.active_mesh()
  if mesh is None:
    return grads
  shardings = sharding.state_shardings(grads, mesh)
  return jax.lax.with_sharding_constraint(grads, shardings)
