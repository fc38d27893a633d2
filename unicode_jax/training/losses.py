"""Next-token cross entropy that never holds all logits.

With 32000 codes the logits are the largest array of a train step. Here they are
made for a few hundred tokens at a time, and the gradient of hidden states and
head comes out of the same pass over them. On several devices each makes those
of its own rows and, where the mesh has an axis `tensor`, of its own part of the
vocabulary: what travels is a few numbers per token and, once, the gradients.
The image losses are elsewhere.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unicode_jax import sharding


def next_token_loss(
  hidden: jax.Array,
  head_kernel: jax.Array,
  labels: jax.Array,
  loss_mask: jax.Array,
  chunk: int = 1024,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Averages the cross entropy of the labels over the unmasked positions.

  Differentiable once, in `hidden` and `head_kernel` only, and only the loss.
  On the mesh that is set, B is split over its axes `data` and `fsdp`, and K
  over `tensor`, where they divide.

  Args:
    hidden: [B, T, E], the model's last hidden states, any float dtype; the
      products are in that dtype with float32 sums.
    head_kernel: float32[E, K].
    labels: int32[B, T], the target of position t itself (already shifted); any
      value where the mask is 0.
    loss_mask: float32[B, T], the weight of each position.
    chunk: tokens at a time, on one device.

  Returns:
    The loss, float32[] in nats per unmasked token (0 if all are masked), and
    metrics: `num_tokens`, float32[], the mask's sum; `correct`, float32[], the
    part of it whose label had the largest logit (a tie counts); `nll` and
    `hits`, float32[B, T], each position's cross entropy and whether its label
    had the largest logit, whatever the mask.

  Raises:
    ValueError: the shapes don't fit each other.
  """
  B, T, E = hidden.shape
  if not labels.shape == loss_mask.shape == (B, T) or head_kernel.shape[0] != E:
    raise ValueError(
      f"hidden {hidden.shape} needs labels and loss_mask of shape {(B, T)} "
      f"and a head of {E} rows, not {labels.shape}, {loss_mask.shape} and "
      f"{head_kernel.shape}"
    )
  num_tokens = loss_mask.astype(jnp.float32).sum()
  total, nll, hits = _summed_loss(chunk, hidden, head_kernel, labels, loss_mask)
  loss = total / jnp.where(num_tokens > 0, num_tokens, 1.0)
  return loss, {
    "num_tokens": num_tokens,
    "correct": jnp.sum(loss_mask * hits),
    "nll": nll,
    "hits": hits,
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(chunk, hidden, kernel, labels, mask):
  """Returns the masked sum of cross entropy; it and hits by position."""
  return _on_mesh(chunk, hidden, kernel, labels, mask, False)[0]


def _on_mesh(chunk, hidden, kernel, labels, mask, with_gradient):
  """Shares `_scan_chunks` out; returns what it returns, of the whole batch."""
  operands = hidden, kernel.astype(hidden.dtype), labels, mask
  scan = functools.partial(_scan_chunks, chunk, with_gradient=with_gradient)
  mesh = sharding.active_mesh()
  if mesh is None:
    return scan(*operands)
  spec = functools.partial(sharding.RULES.spec, mesh=mesh)
  rows = spec(("batch", None), labels.shape)
  columns = spec((None, "vocab"), kernel.shape)
  batch_axes = tuple(jax.tree.leaves(rows[0]))
  # Of the head's gradient each device keeps its share, as of parameters.
  E, fsdp = kernel.shape[0], mesh.shape.get("fsdp", 1)
  scattered = "fsdp" if "fsdp" in batch_axes and E % fsdp == 0 else None
  scan = functools.partial(
    scan, batch_axes=batch_axes, vocab_axis=columns[1], scattered=scattered
  )
  gradients = (rows, PartitionSpec(scattered, columns[1]))
  return jax.shard_map(
    scan,
    mesh=mesh,
    in_specs=(rows, columns, rows, rows),
    out_specs=(
      (PartitionSpec(), rows, rows),
      gradients if with_gradient else (None, None),
    ),
    check_vma=False,
  )(*operands)


def _scan_chunks(
  chunk,
  hidden,
  kernel_EK,
  labels,
  mask,
  *,
  with_gradient,
  batch_axes=(),
  vocab_axis=None,
  scattered=None,
):
  """Returns (loss, nll, hits), and (d_hidden, d_kernel) if asked.

  Args:
    chunk: tokens at a time.
    hidden: [B, T, E].
    kernel_EK: of hidden's dtype; of a device, its columns.
    labels: int32[B, T].
    mask: float32[B, T].
    with_gradient: whether gradients are made.
    batch_axes: mesh axes that the batch is split over.
    vocab_axis: mesh axis that K is split over.
    scattered: mesh axis of `batch_axes` over which d_kernel's rows are left
      split.
  """
  B, T, E = hidden.shape
  count = -(-T // max(1, chunk // B))
  length = -(-T // count)
  K = kernel_EK.shape[1]

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, count * length - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, length, *x.shape[2:]), 1, 0)

  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  first = 0
  everywhere = highest_everywhere = lambda x: x
  if vocab_axis is not None:
    first = lax.axis_index(vocab_axis) * K
    everywhere = functools.partial(lax.psum, axis_name=vocab_axis)
    highest_everywhere = functools.partial(lax.pmax, axis_name=vocab_axis)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]

  def one_chunk(carry, inputs):
    loss, d_kernel_EK = carry
    x_NE, labels_N, mask_N = jax.tree.map(
      lambda x: x.reshape(B * length, *x.shape[2:]), inputs
    )
    logits_NK = product("NE,EK->NK", x_NE, kernel_EK)
    is_label_NK = labels_N[:, None] == first + jnp.arange(K)
    label_N = everywhere(jnp.where(is_label_NK, logits_NK, 0).sum(axis=1))
    highest_N = highest_everywhere(logits_NK.max(axis=1))
    exp_NK = jnp.exp(logits_NK - highest_N[:, None])
    total_N = everywhere(exp_NK.sum(axis=1))
    nll_N = jnp.log(total_N) + highest_N - label_N
    loss += jnp.sum(mask_N * nll_N)
    hits_N = (label_N >= highest_N).astype(jnp.float32)
    d_x = None
    if with_gradient:
      d_logits_NK = (
        exp_NK * (mask_N / total_N)[:, None] - is_label_NK * mask_N[:, None]
      ).astype(hidden.dtype)
      d_kernel_EK += product("NE,NK->EK", x_NE, d_logits_NK)
      d_x = everywhere(product("NK,EK->NE", d_logits_NK, kernel_EK))
      d_x = d_x.astype(hidden.dtype).reshape(B, length, E)
    by_position = nll_N.reshape(B, length), hits_N.reshape(B, length)
    return (loss, d_kernel_EK), (by_position, d_x)

  start = jnp.zeros(()), jnp.zeros(kernel_EK.shape) if with_gradient else None
  (loss, d_kernel), (by_position, d_hidden) = lax.scan(
    one_chunk, start, tuple(map(split, (hidden, labels, mask)))
  )
  loss = lax.psum(loss, batch_axes) if batch_axes else loss
  if with_gradient:
    d_hidden = join(d_hidden)
    for axis in batch_axes:
      if axis == scattered:
        d_kernel = lax.psum_scatter(d_kernel, axis, tiled=True)
      else:
        d_kernel = lax.psum(d_kernel, axis)
  return (loss, *map(join, by_position)), (d_hidden, d_kernel)


def _forward(chunk, hidden, kernel, labels, mask):
  primal, (d_hidden, d_kernel) = _on_mesh(
    chunk, hidden, kernel, labels, mask, True
  )
  return primal, (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(chunk, gradients, cotangents):
  del chunk
  d_hidden, d_kernel = gradients
  scale = cotangents[0]
  d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
  return d_hidden, scale * d_kernel, None, None


_summed_loss.defvjp(_forward, _backward)
