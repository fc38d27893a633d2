"""Measures reconstruction on a set of images, at every depth.

PSNR is in dB on pixels in [-1, 1] (peak-to-peak 2), clipped, averaged over
images. Everything is exact over the whole set: sums on the device, one
division at the end. Held-out sets are small, so every process measures all.
"""

from collections.abc import Iterable, Mapping
import functools

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import codebook as codebook_lib, sharding
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
  image, weight = sharding.constrain_batch((image, weight))
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
    other = model.quantize(variables, z, model.language_table(variables)).codes
    sums["agree"] = jnp.mean(other == codes, axis=(1, 2, 3)) @ weight
  if with_pixels:
    decoded = decode_prefixes(model, variables, output.partial)
    psnr = jax.vmap(reconstruction_loss.psnr, in_axes=(None, 0))(image, decoded)
    sums["psnr"] = psnr @ weight
  return sharding.replicate(sums)


def _evaluate(model, variables, batches, with_pixels):
  sums, count = None, 0
  for batch in batches:
    batch_sums = _batch_sums(
      model, variables, batch["image"], batch["weight"], with_pixels
    )
    count += int(np.sum(batch["weight"]))
    if sums is None:
      sums = batch_sums
    else:
      sums = jax.tree.map(jnp.add, sums, batch_sums)
  sums = jax.device_get(sums)
  per_depth = {
    "residual_energy": sums["left"] / sums["energy"],
    **codebook_lib.codebook_statistics(sums["counts"], variables.valid),
  }
  result = {}
  if "psnr" in sums:
    per_depth["psnr"] = sums["psnr"] / count
    result["psnr"] = float(per_depth["psnr"][-1])
  if "agree" in sums:
    result["code_agreement"] = float(sums["agree"]) / count
  for name, values in per_depth.items():
    for d, value in enumerate(np.asarray(values), start=1):
      result[f"{name}/depth{d}"] = float(value)
  return result


def evaluate_codes(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """Measures how a whole set uses the codebook, without decoding it.

  Args:
    model: The model.
    variables: Its parameters.
    batches: "image" float32[b, S, S, 3] in [-1, 1] and "weight" float32[b], 0
      for what only fills a batch up.

  Returns:
    "code_agreement" (share of ids that the LLM's table would choose too; only
    with an LLM) and, for every depth, "usage/depthd", "perplexity/depthd",
    "residual_energy/depthd".
  """
  return _evaluate(model, variables, batches, with_pixels=False)


def evaluate_reconstruction(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """Measures codes and reconstructions of a whole set.

  Args:
    model: The model.
    variables: Its parameters.
    batches: As of `evaluate_codes`.

  Returns:
    What `evaluate_codes` returns, and "psnr" (all depths) and "psnr/depthd".
  """
  return _evaluate(model, variables, batches, with_pixels=True)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model, variables, image):
  partial = model.encode(variables, image).partial
  return sharding.replicate(decode_prefixes(model, variables, partial))


def reconstruction_columns(
  model: unicode_lib.UniCode,
  variables: unicode_lib.Variables,
  image: np.ndarray,
) -> tuple[list[np.ndarray], list[str]]:
  """Returns the columns of a picture grid: originals, then d = 1..D.

  Args:
    model: The model.
    variables: Its parameters.
    image: float32[N, S, S, 3] in [-1, 1].

  Returns:
    Arrays float32[N, S, S, 3] in [-1, 1] and their titles.
  """
  decoded = np.asarray(_reconstruct(model, variables, image))
  titles = ["original", *(f"d={d + 1}" for d in range(len(decoded)))]
  return [image, *decoded], titles
