import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unicode_jax.training import losses

B, T, E, K = 3, 7, 5, 11


def make(seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, T, E)).astype(np.float32)
  kernel = rng.normal(size=(E, K)).astype(np.float32)
  labels = rng.integers(0, K, (B, T)).astype(np.int32)
  mask = (rng.random((B, T)) < 0.6).astype(np.float32)
  return hidden, kernel, labels, mask


def reference(hidden, kernel, labels, mask):
  """Loss, correct and both gradients in float64, by the textbook."""
  hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
  logits = hidden @ kernel
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  onehot = np.eye(K)[labels]
  total = mask.sum()
  loss = -(mask * np.log((p * onehot).sum(-1))).sum() / total
  d_logits = (p - onehot) * mask[..., None] / total
  d_kernel = np.einsum("bte,btk->ek", hidden, d_logits)
  correct = (mask * (logits.argmax(-1) == labels)).sum()
  return loss, correct, d_logits @ kernel.T, d_kernel


def value_and_grad(hidden, kernel, labels, mask, chunk, scale=1.0):
  def f(hidden, kernel):
    loss, metrics = losses.next_token_loss(hidden, kernel, labels, mask, chunk)
    return scale * loss, metrics

  return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)


@pytest.mark.parametrize("chunk", [1, 6, 9, 12, 21, 1000])
def test_value_and_gradients_against_float64(chunk):
  batch = make()
  loss, correct, d_hidden, d_kernel = reference(*batch)
  (got, metrics), grads = value_and_grad(*batch, chunk, scale=3.0)
  assert got == pytest.approx(3 * loss, rel=1e-6)
  assert metrics["num_tokens"] == batch[3].sum()
  assert metrics["correct"] == correct
  np.testing.assert_allclose(grads[0], 3 * d_hidden, atol=1e-6)
  np.testing.assert_allclose(grads[1], 3 * d_kernel, atol=1e-6)
  plain, _ = losses.next_token_loss(*batch, chunk)  # the path of evaluation
  assert plain == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 6, 12, 1000])
def test_every_position_by_itself(chunk):
  """Cross entropy and hits, each in its place, whatever the mask says."""
  hidden, kernel, labels, mask = make(2)
  logits = torch.tensor(hidden).double() @ torch.tensor(kernel).double()
  labels[1, 2] = int(logits[1, 2].argmax())  # At least one hit.
  want = torch.nn.functional.cross_entropy(
    logits.reshape(-1, K),
    torch.tensor(labels).long().reshape(-1),
    reduction="none",
  ).reshape(B, T)
  hits = logits.argmax(-1).numpy() == labels
  assert 0 < hits.sum() < hits.size
  weights = mask * np.linspace(0.25, 2.0, T, dtype=np.float32)
  for weight in (mask, 0 * mask, weights):
    (loss, metrics), _ = value_and_grad(hidden, kernel, labels, weight, chunk)
    np.testing.assert_allclose(metrics["nll"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["hits"], hits)
    assert metrics["nll"].dtype == metrics["hits"].dtype == jnp.float32
    total = max(weight.sum(), 1e-9)
    assert loss == pytest.approx(
      (weight * want.numpy()).sum() / total, rel=1e-5
    )
    assert metrics["correct"] == pytest.approx((weight * hits).sum(), rel=1e-6)
  plain = losses.next_token_loss(hidden, kernel, labels, mask, chunk)[1]
  np.testing.assert_allclose(plain["nll"], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(plain["hits"], hits)


def test_a_tie_is_a_hit():
  hidden = np.ones((1, 3, 1), np.float32)
  kernel = np.array([[2.0, 2.0, 1.0]], np.float32)
  labels = np.array([[0, 1, 2]], np.int32)
  _, metrics = losses.next_token_loss(hidden, kernel, labels, np.ones((1, 3)))
  assert metrics["hits"].tolist() == [[1, 1, 0]]


def test_against_torch():
  hidden, kernel, labels, mask = make(1)
  h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, kernel))
  ignored = np.where(mask > 0, labels, -100)
  loss = torch.nn.functional.cross_entropy(
    (h @ w).reshape(-1, K), torch.tensor(ignored).long().reshape(-1)
  )
  loss.backward()
  # The label of a masked position may be anything, -100 included.
  (got, _), grads = value_and_grad(hidden, kernel, ignored, mask, 6)
  assert got == pytest.approx(loss.item(), rel=1e-6)
  np.testing.assert_allclose(grads[0], h.grad, atol=1e-6)
  np.testing.assert_allclose(grads[1], w.grad, atol=1e-6)


def test_masked_positions_have_no_influence():
  hidden, kernel, labels, mask = make()
  mask[1] = 0  # a whole padding row
  want = value_and_grad(hidden, kernel, labels, mask, 6)
  other = np.where(mask[..., None] > 0, hidden, 7.0)
  got = value_and_grad(other, kernel, np.where(mask > 0, labels, 3), mask, 6)
  assert got[0][0] == want[0][0]
  np.testing.assert_array_equal(got[1][1], want[1][1])
  np.testing.assert_array_equal(got[1][0][mask == 0], 0)


def test_all_masked_is_zero():
  hidden, kernel, labels, mask = make()
  (loss, metrics), grads = value_and_grad(hidden, kernel, labels, 0 * mask, 6)
  assert loss == 0 and metrics["num_tokens"] == 0 and metrics["correct"] == 0
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_bfloat16_hidden_keeps_a_float32_head():
  hidden, kernel, labels, mask = make()
  loss, _, d_hidden, d_kernel = reference(hidden, kernel, labels, mask)
  (got, _), grads = value_and_grad(
    jnp.bfloat16(hidden), kernel, labels, mask, 6
  )
  assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
  assert got.dtype == jnp.float32 and got == pytest.approx(loss, rel=0.02)
  np.testing.assert_allclose(np.float32(grads[0]), d_hidden, atol=0.01)
  np.testing.assert_allclose(grads[1], d_kernel, atol=0.01)


def test_logits_are_never_whole():
  hidden, kernel, labels, mask = make()

  def loss(hidden, kernel):
    return losses.next_token_loss(hidden, kernel, labels, mask, 6)[0]

  jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel))
  assert f"f32[{B * T},{K}]" not in jaxpr and f"f32[{B},{T},{K}]" not in jaxpr
  assert f"f32[6,{K}]" in jaxpr


def test_shapes_are_checked():
  hidden, kernel, labels, mask = make()
  with pytest.raises(ValueError, match="head of 5 rows"):
    losses.next_token_loss(hidden, kernel.T, labels, mask)
  with pytest.raises(ValueError, match=r"\(3, 7\)"):
    losses.next_token_loss(hidden, kernel, labels[:, :-1], mask)
