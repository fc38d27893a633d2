"""The loss of split rows and split vocabularies, against float64."""

import subprocess
import sys

CODE = """
import jax
import jax.numpy as jnp
import numpy as np
from unicode_jax import sharding
from unicode_jax.training import losses

rng = np.random.default_rng(0)


def reference(hidden, kernel, labels, mask):
  # Loss and gradients by hand, in float64.
  hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
  logits = hidden @ kernel
  logits -= logits.max(-1, keepdims=True)
  p = np.exp(logits)
  p /= p.sum(-1, keepdims=True)
  hot = np.eye(kernel.shape[1])[labels]
  loss = -np.sum(mask * np.log((p * hot).sum(-1))) / mask.sum()
  d = mask[..., None] * (p - hot) / mask.sum()
  return loss, d @ kernel.T, np.einsum("bte,btk->ek", hidden, d)


for B, T, E, K in ((8, 37, 32, 264), (8, 37, 31, 263), (6, 5, 32, 264)):
  hidden = rng.normal(size=(B, T, E)).astype(np.float32)
  kernel = rng.normal(size=(E, K)).astype(np.float32)
  labels = rng.integers(0, K, (B, T))
  mask = rng.random((B, T)).astype(np.float32)
  expected = reference(hidden, kernel, labels, mask)
  for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)):

    @jax.jit
    def run(hidden, kernel):
      function = lambda h, k: losses.next_token_loss(h, k, labels, mask, 64)
      return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(
        hidden, kernel
      )

    with jax.set_mesh(sharding.make_mesh(*shape)):
      text = run.lower(hidden, kernel).compile().as_text()
      (loss, aux), grads = run(hidden, kernel)
    for found, wanted in zip((loss, *grads), expected, strict=True):
      error = np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()
      assert error < 3e-6, (shape, error)
    # Nobody has the logits of all tokens, nor those of all ids where split.
    assert f"f32[{B},{T},{K}]" not in text
    if K % 8 == 0 and shape[2] > 1:
      assert f",{K}]" not in text.replace(f"f32[{E},{K}]", "")
print("done")
"""


def test_split_losses(host_devices):
  done = subprocess.run(
    [sys.executable, "-c", CODE],
    env=host_devices(8),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith("done\n")
