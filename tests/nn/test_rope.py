import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax.nn import rope


def rotate(x, positions, frequencies):
  table = rope.rope_table(jnp.asarray(positions), frequencies)
  return np.asarray(rope.apply_rope(jnp.float32(x), table))


def test_rotation_by_complex_numbers():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 8))
  positions = rng.integers(0, 50, (2, 3))
  frequencies = rope.rope_frequencies(8, 100.0)
  angles = positions[..., None, None] * 100.0 ** -(np.arange(4) / 4)
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  want = np.concatenate([z.real, z.imag], axis=-1)
  np.testing.assert_allclose(rotate(x, positions, frequencies), want, atol=2e-5)


def test_scores_depend_on_distance_only():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 1, 1, 1, 16))
  frequencies = rope.rope_frequencies(16, 1e4)

  def score(i, j):
    q_i = rotate(q, np.array([[i]]), frequencies).ravel()
    return q_i @ rotate(k, np.array([[j]]), frequencies).ravel()

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_llama3_scaling_bounds():
  scaling = rope.RopeScaling(8.0, 1.0, 4.0, 8192)
  plain = rope.rope_frequencies(128, 5e5)
  scaled = rope.rope_frequencies(128, 5e5, scaling)
  wavelength = 2 * np.pi / plain
  short, long = wavelength < 8192 / 4, wavelength > 8192
  assert short.any() and long.any() and (~short & ~long).any()
  np.testing.assert_allclose(scaled[short], plain[short])
  np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
  between = (scaled / plain)[~short & ~long]
  assert ((between > 1 / 8) & (between < 1)).all()


def test_odd_head_dim_is_refused():
  with pytest.raises(ValueError, match="head_dim=7"):
    rope.rope_frequencies(7, 1e4)
