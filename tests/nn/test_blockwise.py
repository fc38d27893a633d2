import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import blockwise as blockwise_lib


@pytest.mark.parametrize("piece", [3, 5, 100])
def test_pieces_equal_the_whole(monkeypatch, piece):
  """Values and gradients, also where the piece doesn't divide the count."""
  monkeypatch.setattr(blockwise_lib, "_WHOLE_BYTES", 0)
  monkeypatch.setattr(blockwise_lib, "_PIECE_BYTES", piece * 8)
  key = jax.random.key(0)
  w_EF = jax.random.normal(key, (4, 6))
  x_NE, c_NF = jax.random.normal(key, (10, 4)), jax.random.normal(key, (10, 6))

  def run(f):
    return jax.jit(lambda w, x: jax.vjp(f, w, x)[1](c_NF))(w_EF, x_NE)

  def blocked(w, x):
    return blockwise_lib.blockwise(lambda x_E: jnp.tanh(x_E @ w), x, 8)

  looped = "scan" in str(jax.make_jaxpr(blocked)(w_EF, x_NE))
  assert looped == (piece < 10)
  for got, want in zip(run(blocked), run(lambda w, x: jnp.tanh(x @ w))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
