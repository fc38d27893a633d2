"""Tests of the image metrics, against other formulas, libraries and hands."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics.pairwise import polynomial_kernel

from unicode_jax.config import ConfigError
from unicode_jax.evaluation import image_metrics


def _pictures():
  """Returns three smooth pictures and three distortions, 16 x 20 pixels."""
  x, y = np.meshgrid(np.arange(20), np.arange(16))
  wave = 127 + 100 * np.sin(x / 3) * np.cos(y / 4)
  ramp = 12.0 * x + y
  disc = 200.0 * ((x - 9) ** 2 + (y - 7) ** 2 < 25) + 20
  images = np.stack(
    [
      np.stack([wave, ramp, disc], -1),
      np.stack([disc, wave, wave], -1),
      np.stack([ramp, ramp, disc], -1),
    ]
  ).astype(np.uint8)
  noisy = images[0].astype(int) + ((7 * x + 13 * y) % 41 - 20)[..., None]
  distorted = np.stack(
    [noisy.clip(0, 255), np.roll(images[1], 1, axis=1), images[2] // 2 + 60]
  ).astype(np.uint8)
  return images, distorted


def test_psnr_by_hand():
  black = np.zeros((2, 4, 4, 3), np.uint8)
  other = np.stack([black[0] + 255, black[1]])
  other[1, 0, 0, 0] = 24  # mean square 576 / 48 = 12
  mean, per_image = image_metrics.psnr(other, black)
  np.testing.assert_allclose(per_image, [0.0, 10 * np.log10(65025 / 12)])
  assert mean == pytest.approx(np.mean(per_image))


def test_psnr_of_equal_pictures_is_infinite():
  images, _ = _pictures()
  assert np.isposinf(image_metrics.psnr(images, images).per_image).all()


def test_ssim_as_scikit_image_computes_it():
  # skimage 0.26.0: structural_similarity(a, b, data_range=255,
  # gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
  # channel_axis=-1).
  theirs = [0.906953003691, 0.821674193676, 0.806024632195]
  np.testing.assert_allclose(
    image_metrics.ssim(*_pictures()).per_image, theirs, atol=1e-9
  )


def test_ssim_of_flat_pictures_by_hand():
  # No variance: only the luminance term is left.
  a = np.full((1, 11, 11, 1), 100, np.uint8)
  b = np.full((1, 11, 11, 1), 50, np.uint8)
  c1 = 2.55**2
  assert image_metrics.ssim(a, b).mean == pytest.approx(
    (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
  )


def test_ssim_works_in_chunks(monkeypatch):
  whole = image_metrics.ssim(*_pictures())
  monkeypatch.setattr(image_metrics, "_CHUNK", 2)
  np.testing.assert_allclose(
    image_metrics.ssim(*_pictures()).per_image, whole.per_image
  )


def test_ssim_refuses_pictures_below_its_window():
  small = np.zeros((1, 10, 32, 3), np.uint8)
  with pytest.raises(ConfigError, match="window of 11 pixels"):
    image_metrics.ssim(small, small)


@pytest.mark.parametrize("metric", [image_metrics.psnr, image_metrics.ssim])
def test_pairs_must_be_pictures_of_one_shape(metric):
  images, _ = _pictures()
  with pytest.raises(ConfigError, match="float32"):
    metric(images.astype(np.float32), images)
  with pytest.raises(ConfigError, match="one by one"):
    metric(images[:2], images)


def _features(n, d, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(99).normal(size=(d, d))
  return rng.normal(size=(n, d)) @ mixing + shift


def test_mmd_by_hand():
  # d = 1: k(x, y) = (x y + 1)³.
  a, b = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
  within_a = 1.0  # k(0, 1)
  within_b = 27.0  # k(1, 2)
  between = (1 + 1 + 8 + 27) / 4
  assert image_metrics.polynomial_mmd2(a, b) == pytest.approx(
    within_a + within_b - 2 * between
  )


def test_mmd_with_scikit_learns_kernel():
  a, b = _features(30, 7, 0), _features(40, 7, 1, shift=0.5)
  aa, bb, ab = (
    polynomial_kernel(x, y, degree=3, coef0=1)
    for x, y in ((a, a), (b, b), (a, b))
  )
  np.fill_diagonal(aa, 0)
  np.fill_diagonal(bb, 0)
  expected = aa.sum() / (30 * 29) + bb.sum() / (40 * 39) - 2 * ab.mean()
  assert image_metrics.polynomial_mmd2(a, b) == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
  """Between halves of one sample it averages to 0, of either sign."""
  values = [
    image_metrics.polynomial_mmd2(_features(6, 3, 2 * i), _features(6, 3, i))
    for i in range(100, 1100)
  ]
  standard_error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values)) < 4 * standard_error
  assert min(values) < 0 < max(values)


def test_kernel_distance_over_subsets():
  a, b = _features(300, 5, 0), _features(200, 5, 1, shift=1.0)
  result = image_metrics.kernel_distance(a, b, num_subsets=40, subset_size=60)
  assert (result.num_subsets, result.subset_size) == (40, 60)
  whole = image_metrics.polynomial_mmd2(a, b)
  assert abs(result.mean - whole) < 4 * result.std / np.sqrt(40)
  again = image_metrics.kernel_distance(a, b, num_subsets=40, subset_size=60)
  assert again == result
  other = image_metrics.kernel_distance(
    a, b, num_subsets=40, subset_size=60, seed=1
  )
  assert other != result
  # Half of the smaller set at most.
  assert image_metrics.kernel_distance(a, b, num_subsets=2).subset_size == 100


@pytest.mark.parametrize("sizes", [(60, 50), (8, 50), (5, 6)])
def test_frechet_distance_with_scipys_square_root(sizes):
  a, b = _features(sizes[0], 10, 0), _features(sizes[1], 10, 1, shift=0.3)
  covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
  expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
    covariances[0] + covariances[1] - 2 * root.real
  )
  result = image_metrics.frechet_distance(a, b)
  # sqrtm itself is only good to some 1e-6 where the product is singular.
  assert result.value == pytest.approx(expected, rel=1e-5)
  assert (result.note is None) == (min(sizes) >= 20)


def test_frechet_distance_by_hand():
  # One dimension: (difference of means)² + (difference of deviations)².
  a = np.array([[0.0], [2.0], [4.0]])  # mean 2, deviation 2
  b = np.array([[4.0], [5.0], [6.0]])  # mean 5, deviation 1
  assert image_metrics.frechet_distance(a, b).value == pytest.approx(9 + 1)


def test_frechet_distance_of_equal_sets_is_zero():
  a = _features(50, 10, 0)
  value, _ = image_metrics.frechet_distance(a, a)
  assert 0 <= value < 1e-9


@pytest.mark.parametrize(
  "metric", [image_metrics.kernel_distance, image_metrics.frechet_distance]
)
def test_features_are_checked(metric):
  with pytest.raises(ConfigError, match="one network"):
    metric(np.zeros((9, 3)), np.zeros((9, 4)))
  with pytest.raises(ConfigError, match="too small"):
    metric(np.zeros((9, 3)), np.zeros((1, 3)))
  with pytest.raises(ConfigError, match="finite"):
    metric(np.full((9, 3), np.nan), np.zeros((9, 3)))
