import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_against_float64(dtype):
  rng = np.random.default_rng(0)
  x = rng.normal(3.0, 20.0, (2, 5, 8))
  scale = rng.normal(size=8)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * scale
  module = norm.RMSNorm(epsilon=0.5, dtype=dtype)
  got = module.apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
  assert got.dtype == dtype
  rtol = 1e-6 if dtype == "float32" else 1e-2
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol, 1e-6)
