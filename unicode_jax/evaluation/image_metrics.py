"""Distances between pictures, and between sets of pictures.

PSNR and SSIM compare a reconstruction with its original. Kernel distance (KID)
and Fréchet distance (FID's formula) compare sets by their features: the
generation numbers of METHOD section 5. Both only see features, so a result
means nothing without the name of the network that made them
(`features.FeatureNetwork.name`); "FID" as published is Inception-v3's. Pure
NumPy, float64 throughout.
"""

from typing import NamedTuple

import numpy as np

from unicode_jax import config as config_lib

# Wang et al.: side and width of SSIM's window, and its two constants.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
# Bounds the memory of SSIM's float64 maps.
_CHUNK = 64


class Scores(NamedTuple):
  """A measure of pairs of pictures.

  Attributes:
    mean: over the pairs.
    per_image: float64[N].
  """

  mean: float
  per_image: np.ndarray


class KernelDistance(NamedTuple):
  """A kernel distance and how sure it is.

  Attributes:
    mean: over subsets; around 0, below it too, for sets of one distribution.
    std: between subsets. They overlap: it is not the mean's standard error.
    num_subsets: how many.
    subset_size: features drawn of each set, for each subset.
  """

  mean: float
  std: float
  num_subsets: int
  subset_size: int


class FrechetDistance(NamedTuple):
  """A Fréchet distance and what to know of it.

  Attributes:
    value: non-negative.
    note: why the value is not to be trusted; None where nothing is known.
  """

  value: float
  note: str | None


def psnr(images: np.ndarray, references: np.ndarray) -> Scores:
  """Returns the peak signal-to-noise ratio of each pair of pictures.

  Args:
    images: uint8[N, H, W, C].
    references: uint8[N, H, W, C].

  Returns:
    Decibels; infinite for a pair of equal pictures, and then on average too.

  Raises:
    ConfigError: the arrays are not such pictures, or differ in shape.
  """
  _check_pairs(images, references)
  squared = np.array(
    [
      np.mean(np.square(np.subtract(a, b, dtype=np.float64)))
      for a, b in zip(images, references, strict=True)
    ]
  )
  with np.errstate(divide="ignore"):
    decibels = 10 * np.log10(255.0**2 / squared)
  return Scores(float(np.mean(decibels)), decibels)


def ssim(images: np.ndarray, references: np.ndarray) -> Scores:
  """Returns the structural similarity of each pair of pictures.

  Wang et al., "Image Quality Assessment: From Error Visibility to Structural
  Similarity" (IEEE TIP 2004): a Gaussian window of 11 pixels and sigma 1.5,
  only where it lies inside the picture, population statistics; each channel
  alone, then the mean. Differs from the paper: pictures are not shrunk first.

  Args:
    images: uint8[N, H, W, C], at least 11 pixels a side.
    references: uint8[N, H, W, C].

  Returns:
    At most 1, which means equal.

  Raises:
    ConfigError: the arrays are not such pictures, or differ in shape.
    ConfigError: the pictures are smaller than the window.
  """
  _check_pairs(images, references)
  if min(images.shape[1:3]) < _WINDOW:
    raise config_lib.ConfigError(
      f"pictures of shape {images.shape[1:]} are smaller than SSIM's window of "
      f"{_WINDOW} pixels: use larger pictures, or PSNR alone"
    )
  rows, columns = (_gaussian_rows(size) for size in images.shape[1:3])

  def blur(x):  # float64[n, C, H, W]
    return rows @ x @ columns.T

  c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
  values = []
  for start in range(0, len(images), _CHUNK):
    x, y = (
      np.moveaxis(pictures[start : start + _CHUNK], -1, 1).astype(np.float64)
      for pictures in (images, references)
    )
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    similarity = (
      (2 * mean_x * mean_y + c1)
      * (2 * covariance + c2)
      / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    )
    values.append(similarity.mean(axis=(1, 2, 3)))
  per_image = np.concatenate(values)
  return Scores(float(np.mean(per_image)), per_image)


def _gaussian_rows(size: int) -> np.ndarray:
  """Returns the matrix that slides SSIM's window, float64[size - 10, size]."""
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  window = np.exp(-0.5 * np.square(offsets / _SIGMA))
  window /= window.sum()
  matrix = np.zeros((size - _WINDOW + 1, size))
  for row in range(len(matrix)):
    matrix[row, row : row + _WINDOW] = window
  return matrix


def _check_pairs(images: np.ndarray, references: np.ndarray) -> None:
  for array in (images, references):
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
      raise config_lib.ConfigError(
        f"want pictures uint8[N, H, W, C], got {array.dtype}"
        f"{list(array.shape)}: map pixels to 0..255 first"
      )
  if images.shape != references.shape:
    raise config_lib.ConfigError(
      f"pictures of shape {images.shape} cannot be compared one by one with "
      f"pictures of shape {references.shape}: pass as many, of one size"
    )


def polynomial_mmd2(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the unbiased squared maximum mean discrepancy of two samples.

  Binkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401), equation 4, with
  the kernel (x·y / d + 1)³.

  Args:
    a: float[N, d], N at least 2.
    b: float[M, d], M at least 2.

  Returns:
    Below 0 at times: its expectation is 0 for samples of one distribution.

  Raises:
    ConfigError: the features are not such samples.
  """
  a, b = _check_features(a, b)

  def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3

  def off_diagonal_mean(k):
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

  return float(
    off_diagonal_mean(kernel(a, a))
    + off_diagonal_mean(kernel(b, b))
    - 2 * kernel(a, b).mean()
  )


def kernel_distance(
  a: np.ndarray,
  b: np.ndarray,
  *,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> KernelDistance:
  """Returns the kernel distance (KID): `polynomial_mmd2`, mean over subsets.

  Unbiased at every sample size, unlike the Fréchet distance: a small sample
  makes it uncertain (see `std`), not wrong.

  Args:
    a: float[N, d], features of one set; N at least 4.
    b: float[M, d], features of the other; M at least 4.
    num_subsets: at least 1.
    subset_size: features per subset, drawn without replacement; at most half
      of the smaller set is used, or subsets would hardly differ.
    seed: of the draws.

  Raises:
    ConfigError: the features are not such samples, or a number is too small.
  """
  a, b = _check_features(a, b, least=4)
  if num_subsets < 1 or subset_size < 2:
    raise config_lib.ConfigError(
      f"num_subsets={num_subsets} and subset_size={subset_size} must be at "
      "least 1 and 2"
    )
  subset_size = min(subset_size, len(a) // 2, len(b) // 2)
  rng = np.random.default_rng(seed)
  values = []
  for _ in range(num_subsets):
    subsets = (
      x[rng.choice(len(x), subset_size, replace=False)] for x in (a, b)
    )
    values.append(polynomial_mmd2(*subsets))
  return KernelDistance(
    float(np.mean(values)), float(np.std(values)), num_subsets, subset_size
  )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> FrechetDistance:
  """Returns the Fréchet distance of two Gaussians fitted to the features.

  Dowson and Landau (1982); as FID in Heusel et al. (arXiv 1706.08500):
  |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½), with S over N - 1.

  With S = X'X of centred and scaled features X, the trace of (S_a S_b)^½ is the
  sum of the singular values of X_a X_b': no root of a near-singular matrix is
  ever taken.

  Args:
    a: float[N, d], features of one set; N at least 2.
    b: float[M, d], features of the other; M at least 2.

  Returns:
    The distance, with a note if a set has fewer than 2 d features: the value
    then depends on N more than on the pictures, always upwards.

  Raises:
    ConfigError: the features are not such samples.
  """
  a, b = _check_features(a, b)
  mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
  factor_a, factor_b = (
    _covariance_factor(x - mean) for x, mean in ((a, mean_a), (b, mean_b))
  )
  cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
  value = (
    np.sum(np.square(mean_a - mean_b))
    + np.sum(np.square(factor_a))
    + np.sum(np.square(factor_b))
    - 2 * cross
  )
  fewest, dims = min(len(a), len(b)), a.shape[1]
  note = None
  if fewest < 2 * dims:
    note = (
      f"{fewest} pictures are fewer than twice the {dims} features: biased "
      "upwards, compare at equal numbers only, or read the kernel distance"
    )
  return FrechetDistance(max(float(value), 0.0), note)


def _covariance_factor(centred: np.ndarray) -> np.ndarray:
  """Returns F of at most d rows, where F'F is the covariance."""
  scaled = centred / np.sqrt(len(centred) - 1)
  if len(scaled) > scaled.shape[1]:
    return np.linalg.qr(scaled, mode="r")
  return scaled


def _check_features(
  a: np.ndarray, b: np.ndarray, least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both as float64, or says what is wrong with them."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
    raise config_lib.ConfigError(
      f"want features [N, d] and [M, d], got {a.shape} and {b.shape}: use one "
      "network for both sets"
    )
  if min(len(a), len(b)) < least:
    raise config_lib.ConfigError(
      f"sets of {len(a)} and {len(b)} pictures are too small to compare: use "
      f"{least} or more of each"
    )
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise config_lib.ConfigError(
      "features hold values that are not finite: check the pictures"
    )
  return a, b
