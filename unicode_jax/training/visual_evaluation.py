"""Measures reconstruction on a set of images, at every depth.

PSNR is in dB on pixels in [-1, 1] (peak-to-peak 2), clipped, averaged over
images. Everything is exact over the whole set: sums on the device, one
division at the end. Held-out sets are small, so every process measures all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import codebook as codebook_lib
from unicode_jax.data import pipeline
from unicode_jax.models import unicode as unicode_lib
from unicode_jax.training import reconstruction_loss


def decode_prefixes(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  partial: jax.Array,
) -> jax.Array:
  """Decodes the sums of the first 1..D codes: -> float32[D, B, H, W, 3]."""
  return jax.lax.map(
    lambda features: model.decode_features(variables, features), partial
  )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _batch_sums(model, variables, image, weight, with_pixels):
  z = model.features(variables, image)
  output = model.quantize(variables, z)
  codes = output.codes
  depth = jnp.broadcast_to(jnp.arange(model.depth), codes.shape)
  counts = jnp.zeros((model.depth, variables.valid.shape[0]))
  left = jnp.sum(jnp.square(z - output.partial), axis=(2, 3, 4))
  sums = {
    "counts": counts.at[depth, codes].add(weight[:, None, None, None]),
    "energy": jnp.sum(jnp.square(z), axis=(1, 2, 3)) @ weight,
    "left": left @ weight,
  }
  if model.llama is not None:
    other = model.quantize(variables, z, model.language_view(variables)).codes
    sums["agree"] = jnp.mean(other == codes, axis=(1, 2, 3)) @ weight
  if with_pixels:
    decoded = decode_prefixes(model, variables, output.partial)
    psnr = jax.vmap(reconstruction_loss.psnr, in_axes=(0, None))(decoded, image)
    sums["psnr"] = psnr @ weight
  return sums


def _evaluate(model, variables, images, with_pixels, batch_size=64):
  sums = None
  for start in range(0, len(images), batch_size):
    chunk = images[start : start + batch_size]
    fill = batch_size - len(chunk)
    weight = np.r_[np.ones(len(chunk)), np.zeros(fill)].astype(np.float32)
    chunk = np.concatenate(
      [chunk, np.zeros((fill, *chunk.shape[1:]), np.uint8)]
    )
    batch = _batch_sums(
      model, variables, pipeline.to_float(chunk), weight, with_pixels
    )
    sums = batch if sums is None else jax.tree.map(jnp.add, sums, batch)
  sums = jax.device_get(sums)
  per_depth = {
    "residual_energy": sums["left"] / sums["energy"],
    **codebook_lib.codebook_statistics(sums["counts"], variables.valid),
  }
  result = {}
  if "psnr" in sums:
    per_depth["psnr"] = sums["psnr"] / len(images)
    result["psnr"] = float(per_depth["psnr"][-1])
  if "agree" in sums:
    result["code_agreement"] = float(sums["agree"]) / len(images)
  for name, values in per_depth.items():
    for d, value in enumerate(np.asarray(values), start=1):
      result[f"{name}/depth{d}"] = float(value)
  return result


def evaluate_codes(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  images: np.ndarray,
) -> dict[str, float]:
  """Measures how a whole set uses the codebook, without decoding it.

  Args:
    model: The model.
    variables: Its parameters.
    images: uint8[N, S, S, 3].

  Returns:
    "code_agreement" (share of ids that the LLM's table would choose too; only
    with an LLM) and, for every depth, "usage/depthd", "perplexity/depthd",
    "residual_energy/depthd".
  """
  return _evaluate(model, variables, images, with_pixels=False)


def evaluate_reconstruction(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  images: np.ndarray,
) -> dict[str, float]:
  """Measures codes and reconstructions of a whole set.

  Args:
    model: The model.
    variables: Its parameters.
    images: uint8[N, S, S, 3].

  Returns:
    What `evaluate_codes` returns, and "psnr" (all depths) and "psnr/depthd".
  """
  return _evaluate(model, variables, images, with_pixels=True)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model, variables, image):
  return decode_prefixes(
    model, variables, model.encode(variables, image).partial
  )


def reconstruction_columns(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  images: np.ndarray,
) -> tuple[list[np.ndarray], list[str]]:
  """Returns the columns of a picture grid: originals, then d = 1..D.

  Args:
    model: The model.
    variables: Its parameters.
    images: uint8[N, S, S, 3].

  Returns:
    Arrays float32[N, S, S, 3] in [-1, 1] and their titles.
  """
  image = pipeline.to_float(images)
  decoded = np.asarray(_reconstruct(model, variables, image))
  titles = ["original", *(f"d={d + 1}" for d in range(len(decoded)))]
  return [image, *decoded], titles
