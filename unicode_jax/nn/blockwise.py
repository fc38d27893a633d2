"""Work on a large array in pieces that fit a CPU's cache."""

from collections.abc import Callable
from typing import Any

import jax

from unicode_jax import sharding

_PIECE_BYTES = 2**21
_WHOLE_BYTES = 2**24


def blockwise(
  function: Callable[[Any], jax.Array], inputs: Any, bytes_per_item: int
) -> jax.Array:
  """Maps a function over the leading axis, in pieces where that is faster.

  A piece's intermediate results stay in the processor's cache, and making them
  again in the backward pass costs less than fetching them from memory. Small
  inputs, and accelerators, take the whole at once and keep the intermediates.

  Args:
    function: acts on every item of the leading axis alone, and is given no
      leading axis.
    inputs: a tree of arrays [N, ...].
    bytes_per_item: size of the intermediates of one item.

  Returns:
    [N, ...], the function's values.
  """
  count = jax.tree.leaves(inputs)[0].shape[0]
  whole = count * bytes_per_item <= _WHOLE_BYTES
  if whole or sharding.platform() != "cpu":
    return jax.vmap(function)(inputs)
  return jax.lax.map(
    jax.checkpoint(function),
    inputs,
    batch_size=max(1, _PIECE_BYTES // bytes_per_item),
  )
