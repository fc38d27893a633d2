"""Low-rank adapters of the language model (Hu et al., arXiv 2106.09685).

Every matrix of the layers is W + (alpha / rank) A B, of which A and B alone are
trained: the optimizer's moments are a hundredth of the model's. The token
table, the head and the norms stay as they are.

An adapter has the path of its matrix, and like it a leading axis where layers
are scanned. The sum is formed before the model runs, so that the model knows
nothing of adapters and what is merged computes the same. That costs a copy of
the matrices during a step, and of their gradients: it is the moments that are
saved, and the model that is kept from moving far.
"""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp

_LAYERS, _MATRIX = "layers", "kernel"


def init_adapters(key: jax.Array, params, rank: int):
  """Draws adapters that change nothing yet: A is random, B is 0.

  Args:
    key: PRNG key.
    params: of `Llama`.
    rank: columns of A.

  Returns:
    {path: {"a": float32[..., in, rank], "b": float32[..., rank, out]}} as a
    nested dict.
  """
  adapters = {}
  for i, (path, kernel) in enumerate(_matrices(params).items()):
    *layers, inputs, outputs = kernel.shape
    a = jax.random.normal(jax.random.fold_in(key, i), (*layers, inputs, rank))
    adapters[*path[:-1], "a"] = a * inputs**-0.5
    adapters[*path[:-1], "b"] = jnp.zeros((*layers, rank, outputs))
  return traverse_util.unflatten_dict(adapters)


def merge(params, adapters, scale: float):
  """Adds adapters to a model.

  Args:
    params: of `Llama`.
    adapters: of `init_adapters`.
    scale: alpha / rank.

  Returns:
    Parameters of `Llama`; differentiable in both.
  """
  return _changed(params, adapters, lambda w, a, b: w + scale * (a @ b))


def merge_in_place(params, adapters, scale: float):
  """Merges adapters for good, matrix by matrix, in the model's own memory.

  Args:
    params: of `Llama`; its matrices are given up.
    adapters: of `init_adapters`.
    scale: alpha / rank.

  Returns:
    Parameters of `Llama`.
  """
  # One at a time, lest all products are held at once.
  return _changed(
    params,
    adapters,
    lambda w, a, b: _add(w, a, b, scale).block_until_ready(),
  )


def _changed(params, adapters, change):
  """Replaces every matrix W that has an adapter by change(W, A, B)."""
  flat = traverse_util.flatten_dict(params)
  added = traverse_util.flatten_dict(adapters)
  for path, kernel in _matrices(params).items():
    a, b = (added[*path[:-1], name] for name in "ab")
    flat[path] = change(kernel, a, b)
  return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, donate_argnums=0)
def _add(kernel, a, b, scale):
  return kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _matrices(params):
  """Returns the matrices of the layers by path, in order."""
  return {
    path: leaf
    for path, leaf in sorted(traverse_util.flatten_dict(params).items())
    if path[0].startswith(_LAYERS) and path[-1] == _MATRIX
  }
