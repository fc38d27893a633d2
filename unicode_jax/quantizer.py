"""Vector, residual and hierarchical quantization over one shared table.

Implements METHOD.md section 2 and hazards H2, H5 and H6 of section 6:

- "vq" (VQ-GAN, arXiv 2012.09841): one code per position.
- "rq" (RQ-VAE, arXiv 2203.01941): `depth` codes per position, each for what
  the ones before it left over, all from the same table.
- "hq" (after HQ-VAE, arXiv 2401.00365): a cell of 2 x 2 positions has a code
  for its average, and then one for what that left over at each position:

      features   codes of the cell              sum for the LLM
      a b        top = mean(a, b, c, d)
      c d        a-top  b-top  c-top  d-top     F = sum of the 5 rows

  The top is average-pooled, so it lives in the same space as the positions and
  shares their table (pixel-shuffle would make it four times as wide).

At depth d with residual r, the code is argmin_k ||r / g_d - C_k||^2 and g_d C_k
is emitted. Differs from the paper, which has no gains: residuals shrink with
depth and the rows of a shared table do not, so without gains depth can *add*
energy (H2). With rows of unit length the choice is by cosine, for any gain.

Does not do: the table and its updates (`codebook`), or the search itself
(`kernels.nearest_code`).
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from unicode_jax import config as config_lib, sharding
from unicode_jax.kernels import nearest_code as kernel

KINDS = config_lib.QUANTIZERS

# Gains stay positive, since 0 stands for "not fitted yet".
_MIN_GAIN = 1e-6


class Quantized(NamedTuple):
  """Codes, features and statistics of a batch.

  With h' = h, w' = w, or half of them for "hq" (see `grid_shape`).

  Attributes:
    quantized: float32[B, h, w, C], the emitted features; its gradient goes to
      z unchanged (straight through), none to the table.
    codes: int32[B, h', w', D].
    partial: float32[D, B, h, w, C], the features after each depth, with their
      gradient to the table and none to z.
    commitment_loss: float32[], mean over depth ("hq": over the two levels) and
      entries of (z - sg(partial))^2.
    codebook_loss: float32[], mean over the same of (sg(z) - partial)^2.
    residual_energy: float32[D], the share of z's energy that is left after
      each depth.
    counts: float32[D, K], assignments at each depth.
    sums: float32[K, C], what was assigned (r / g), summed over all depths.
    gain_fit: float32[D], each depth's least-squares gain over this batch.
  """

  quantized: jax.Array
  codes: jax.Array
  partial: jax.Array
  commitment_loss: jax.Array
  codebook_loss: jax.Array
  residual_energy: jax.Array
  counts: jax.Array
  sums: jax.Array
  gain_fit: jax.Array


def quantize(z, table, gain, mask, *, kind: str, depth: int) -> Quantized:
  """Quantizes features with a table that all depths share.

  Args:
    z: float32[B, h, w, C].
    table: float32[K, C], `codebook.codebook_table`.
    gain: float32[D], no gradient. Where it is 0 the batch's own fit is used,
      which becomes the first gain (`codebook.fit_gain`).
    mask: bool[K], True where a row may be chosen; None permits all.
    kind: one of `KINDS`.
    depth: D; 1 for "vq" and 5 for "hq".

  Returns:
    A `Quantized`.

  Raises:
    ValueError: on an unknown kind, a depth the kind does not have, shapes that
      do not match, an odd grid for "hq", or a mask that permits nothing.
  """
  _check(kind, depth, gain, table)
  if z.ndim != 4 or z.shape[-1] != table.shape[1]:
    raise ValueError(
      f"z{list(z.shape)} must be [B, h, w, {table.shape[1]}], as the table "
      f"is {list(table.shape)}."
    )
  grid_shape(z.shape[1:3], kind)
  kernel.check_valid(mask, table.shape[0])
  num_codes = table.shape[0]
  target = lax.stop_gradient(z)
  total = jnp.zeros_like(target)
  sums = jnp.zeros(table.shape)
  codes, partial, counts, fits = [], [], [], []
  for d in range(depth):
    residual = _region(target - lax.stop_gradient(total), d, kind)
    code, fit, scale = _choose(residual, table, gain[d], mask)
    total = total + _spread(scale * _rows(table, code), d, kind, z.shape)
    codes.append(code)
    fits.append(fit)
    partial.append(total)
    counts.append(jnp.zeros(num_codes).at[code].add(1.0))
    sums = sums.at[code].add(residual / scale)
  partial = jnp.stack(partial)
  fixed = lax.stop_gradient(partial)
  left = jnp.sum((target - fixed) ** 2, axis=(1, 2, 3, 4))
  # Of "hq", both levels once: its positions do not wait for each other.
  levels = jnp.array([0, depth - 1] if kind == "hq" else range(depth))
  return Quantized(
    quantized=straight_through(z, partial[-1]),
    codes=jnp.stack(codes, axis=-1),
    partial=partial,
    commitment_loss=jnp.mean((z - fixed[levels]) ** 2),
    codebook_loss=jnp.mean((target - partial[levels]) ** 2),
    residual_energy=left / jnp.maximum(jnp.sum(target**2), 1e-30),
    counts=jnp.stack(counts),
    sums=lax.stop_gradient(sums),
    gain_fit=jnp.stack(fits),
  )


def dequantize(codes, table, gain, *, kind: str, depth: int | None = None):
  """Turns codes into the features that `quantize` emitted for them.

  Args:
    codes: int32[B, h', w', D].
    table: float32[K, C].
    gain: float32[D], fitted.
    kind: one of `KINDS`.
    depth: how many of the codes to use, in order; None for all.

  Returns:
    float32[B, h, w, C], equal to `partial[depth - 1]`.

  Raises:
    ValueError: on an unknown kind, or a depth that the codes do not have.
  """
  _check(kind, codes.shape[-1], gain, table)
  depth = codes.shape[-1] if depth is None else depth
  if not 1 <= depth <= codes.shape[-1]:
    raise ValueError(
      f"depth={depth} is not within the {codes.shape[-1]} codes of a "
      "position: use 1 to that."
    )
  factor = 2 if kind == "hq" else 1
  batch, height, width, _ = codes.shape
  shape = (batch, factor * height, factor * width, table.shape[1])
  total = jnp.zeros(shape, table.dtype)
  for d in range(depth):
    rows = gain[d] * _rows(table, codes[..., d])
    total = total + _spread(rows, d, kind, shape)
  return total


def grid_shape(features: tuple[int, int], kind: str) -> tuple[int, int]:
  """Returns the grid of codes that a grid of features has.

  Args:
    features: (h, w).
    kind: one of `KINDS`.

  Returns:
    (h', w').

  Raises:
    ValueError: if the kind is "hq" and the grid is odd.
  """
  height, width = features
  if kind != "hq":
    return height, width
  if height % 2 or width % 2:
    raise ValueError(
      f'A grid of {height} x {width} features is odd, and quantizer="hq" '
      "pools 2 x 2: change image_size or the downsampling."
    )
  return height // 2, width // 2


def straight_through(z, value):
  """Returns `value` to the bit, with the gradient of `z`.

  The estimator of VQ-VAE (arXiv 1711.00937).

  Args:
    z: float[...].
    value: float[...], of the same shape.

  Returns:
    float[...].
  """
  return lax.stop_gradient(value) + (z - lax.stop_gradient(z))


def code_agreement(
  z, table, other, gain, mask, *, kind: str, depth: int
) -> jax.Array:
  """Measures the share of codes that another table leaves as they are (H3).

  Args:
    z: float32[B, h, w, C].
    table: float32[K, C], the codebook's.
    other: float32[K, C], the language's (`codebook.language_table`).
    gain: float32[D].
    mask: bool[K] or None.
    kind: one of `KINDS`.
    depth: D.

  Returns:
    float32[], in [0, 1].
  """
  ours, theirs = (
    quantize(z, t, gain, mask, kind=kind, depth=depth).codes
    for t in (table, other)
  )
  return jnp.mean(ours == theirs)


def _choose(residual, table, gain, mask):
  """Chooses codes for one depth.

  Args:
    residual: float32[B, h', w', C].
    table: float32[K, C].
    gain: float32[]; 0 if it is not fitted.
    mask: bool[K] or None.

  Returns:
    codes int32[B, h', w']; the least-squares gain float32[] of these codes; and
    the gain to emit with, that or the given one.
  """
  table, gain = lax.stop_gradient((table, gain))
  rows = table if mask is None else jnp.where(mask[:, None], table, 0)
  share = 1.0 if mask is None else jnp.maximum(jnp.mean(mask), 1e-12)
  # Before there is a gain, choose at equal root mean squares.
  matched = jnp.sqrt(jnp.mean(residual**2) / (jnp.mean(rows**2) / share))
  scale = jnp.where(gain > 0, gain, jnp.maximum(matched, _MIN_GAIN))
  flat = (residual / scale).reshape(-1, table.shape[1])
  found = kernel.nearest_code(flat, table, valid=mask)
  codes = found.indices.reshape(residual.shape[:-1])
  chosen = _rows(table, codes)
  fit = jnp.sum(residual * chosen) / jnp.sum(chosen**2)
  fit = jnp.maximum(fit, _MIN_GAIN)
  return codes, fit, jnp.where(gain > 0, gain, fit)


def _rows(table, codes):
  """Looks codes int32[B, ...] up, where the images are."""
  rows = sharding.replicate(table)[codes]
  return sharding.constrain(rows, "image", *(None,) * (rows.ndim - 1))


def _region(x, d: int, kind: str):
  """Picks what depth d quantizes: f[B, h, w, C] -> f[B, h', w', C]."""
  if kind != "hq":
    return x
  if d == 0:
    batch, height, width, dim = x.shape
    cells = x.reshape(batch, height // 2, 2, width // 2, 2, dim)
    return jnp.mean(cells, axis=(2, 4))
  row, column = divmod(d - 1, 2)
  return x[:, row::2, column::2]


def _spread(x, d: int, kind: str, shape):
  """Puts what depth d emits in its place: f[B, h', w', C] -> f[B, h, w, C]."""
  if kind != "hq":
    return x
  if d == 0:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  row, column = divmod(d - 1, 2)
  return jnp.zeros(shape, x.dtype).at[:, row::2, column::2].set(x)


def _check(kind, depth, gain, table):
  """Raises unless kind, depth and gains fit together."""
  if kind not in KINDS:
    raise ValueError(
      f"quantizer={kind!r} is unknown: use one of {', '.join(KINDS)}."
    )
  needed = {"vq": 1, "hq": 5}.get(kind, depth)
  if depth != needed or depth < 1:
    raise ValueError(
      f"quantizer={kind!r} cannot have depth={depth}: use {max(needed, 1)}."
    )
  if gain.shape != (depth,):
    raise ValueError(
      f"gain{list(gain.shape)} must have one entry per depth, {depth}."
    )
  if table.ndim != 2:
    raise ValueError(f"table{list(table.shape)} must be [K, C].")
