"""Checksums of arrays, wherever their parts are.

A checkpoint's files pass through caches, networks and buckets, and formats
check only some of their bytes. These sums are of the values themselves, taken
on the devices before they are written and again after they were read.
"""

from collections.abc import Mapping
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from unicode_jax import sharding

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
  """Sums every array of a tree up.

  Each word is multiplied by an odd number that depends on its place, and the
  products are added modulo 2^32. So the sum is the same however the array is
  split over devices, and a change of one word always changes it.

  Args:
    tree: Tree of arrays, of 1, 2 or 4 bytes an element.

  Returns:
    Sums in 0..2^32 - 1 by path, as "variables/params/decoder/kernel".
  """
  # One after the other: of arrays in files, each takes memory while it is read.
  return {name: int(_checksum(leaf)) for name, leaf in _named(tree).items()}


def changed(tree: Any, expected: Mapping[str, int]) -> list[str]:
  """Names the arrays of a tree whose checksum is another.

  Args:
    tree: Tree of jax.Array.
    expected: Sums of `checksums`, perhaps of a larger tree.
  """
  return [
    name
    for name, value in checksums(tree).items()
    if expected.get(name) != value
  ]


def record_checksum(text: str) -> int:
  """Returns the CRC-32 of a text."""
  return zlib.crc32(text.encode())


def _named(tree: Any) -> dict[str, jax.Array]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """Returns the sum of an array, uint32[], on every device."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place += index * jnp.uint32(stride)
  # Knuth's multiplicative hash (TAOCP 6.4): neighbours get unlike factors.
  place *= jnp.uint32(2654435761)
  factors = (place ^ (place >> 15)) | 1
  total = jnp.sum(words.astype(jnp.uint32) * factors, dtype=jnp.uint32)
  return sharding.replicate(total)
