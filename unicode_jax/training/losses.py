"""Next-token cross entropy that never holds all logits.

With 32000 codes the logits are the largest array of a train step. Here they are
made for a few hundred tokens at a time, and the gradient of hidden states and
head comes out of the same pass over them. The image losses are elsewhere.
"""

import functools

import jax
import jax.numpy as jnp


def next_token_loss(
  hidden: jax.Array,
  head_kernel: jax.Array,
  labels: jax.Array,
  loss_mask: jax.Array,
  chunk: int = 1024,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Averages the cross entropy of the labels over the unmasked positions.

  Differentiable once, in `hidden` and `head_kernel` only, and only the loss.
  Chunks run along T, so that a batch axis split over devices stays split.

  Args:
    hidden: [B, T, E], the model's last hidden states, any float dtype; the
      products are in that dtype with float32 sums.
    head_kernel: float32[E, K].
    labels: int32[B, T], the target of position t itself (already shifted); any
      value where the mask is 0.
    loss_mask: float32[B, T], the weight of each position.
    chunk: tokens at a time, over the whole batch.

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
  total, nll, hits = _summed_loss(
    max(1, chunk // B), hidden, head_kernel, labels, loss_mask
  )
  loss = total / jnp.where(num_tokens > 0, num_tokens, 1.0)
  return loss, {
    "num_tokens": num_tokens,
    "correct": jnp.sum(loss_mask * hits),
    "nll": nll,
    "hits": hits,
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(length, hidden, kernel, labels, mask):
  """Returns the masked sum of cross entropy; it and hits by position."""
  return _scan_chunks(length, hidden, kernel, labels, mask, False)[0]


def _scan_chunks(length, hidden, kernel, labels, mask, with_gradient):
  """Returns (loss, nll, hits), and (d_hidden, d_kernel) if asked."""
  B, T, E = hidden.shape
  count = -(-T // length)
  length = -(-T // count)

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, count * length - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, length, *x.shape[2:]), 1, 0)

  kernel_EK = kernel.astype(hidden.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]

  def one_chunk(carry, inputs):
    loss, d_kernel_EK = carry
    x_NE, labels_N, mask_N = jax.tree.map(
      lambda x: x.reshape(B * length, *x.shape[2:]), inputs
    )
    logits_NK = product("NE,EK->NK", x_NE, kernel_EK)
    is_label_NK = labels_N[:, None] == jnp.arange(kernel.shape[1])
    label_N = jnp.where(is_label_NK, logits_NK, 0).sum(axis=1)
    highest_N = logits_NK.max(axis=1)
    exp_NK = jnp.exp(logits_NK - highest_N[:, None])
    total_N = exp_NK.sum(axis=1)
    nll_N = jnp.log(total_N) + highest_N - label_N
    loss += jnp.sum(mask_N * nll_N)
    hits_N = (label_N >= highest_N).astype(jnp.float32)
    d_x = None
    if with_gradient:
      d_logits_NK = (
        exp_NK * (mask_N / total_N)[:, None] - is_label_NK * mask_N[:, None]
      ).astype(hidden.dtype)
      d_kernel_EK += product("NE,NK->EK", x_NE, d_logits_NK)
      d_x = product("NK,EK->NE", d_logits_NK, kernel_EK)
      d_x = d_x.astype(hidden.dtype).reshape(B, length, E)
    by_position = nll_N.reshape(B, length), hits_N.reshape(B, length)
    return (loss, d_kernel_EK), (by_position, d_x)

  start = jnp.zeros(()), jnp.zeros(kernel.shape) if with_gradient else None
  (loss, d_kernel), (by_position, d_hidden) = jax.lax.scan(
    one_chunk, start, tuple(map(split, (hidden, labels, mask)))
  )
  if with_gradient:
    d_hidden = join(d_hidden)
    d_kernel = d_kernel.astype(kernel.dtype)
  return (loss, *map(join, by_position)), (d_hidden, d_kernel)


def _forward(length, hidden, kernel, labels, mask):
  return _scan_chunks(length, hidden, kernel, labels, mask, True)


def _backward(length, gradients, cotangents):
  del length
  d_hidden, d_kernel = gradients
  scale = cotangents[0]
  d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
  return d_hidden, scale * d_kernel, None, None


_summed_loss.defvjp(_forward, _backward)
