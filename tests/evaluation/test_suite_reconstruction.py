"""Reconstructions of a tiny run, against training's numbers."""

import math

import numpy as np

from unicode_jax.data import pipeline
from unicode_jax.evaluation import bench as bench_lib
from unicode_jax.training import visual_evaluation


def test_reconstruction_agrees_with_training(tiny, evaluated):
  found = evaluated.found("reconstruction")
  for name, images in tiny.data.heldout_images.items():
    chosen = images[bench_lib.spread(len(images), evaluated.few)]
    loaded = tiny.model.loaded
    expected = visual_evaluation.evaluate_reconstruction(
      loaded.model, loaded.variables, pipeline.heldout_image_batches(chosen)
    )
    for depth in (1, 2):
      for kind in ("usage", "perplexity"):
        np.testing.assert_allclose(
          found[name][kind][depth - 1],
          expected[f"{kind}/depth{depth}"],
          rtol=1e-5,
        )
    originals = pipeline.to_float(chosen)
    columns, _ = visual_evaluation.reconstruction_columns(
      loaded.model, loaded.variables, originals
    )
    for psnr, pictures in zip(
      found[name]["psnr_by_depth"], columns[1:], strict=True
    ):
      error = np.square(np.clip(pictures, -1, 1) - originals).mean((1, 2, 3))
      # Pixels are rounded to 256 values.
      np.testing.assert_allclose(
        psnr, np.mean(10 * np.log10(4 / error)), atol=0.02
      )
    assert found[name]["psnr"] == found[name]["psnr_by_depth"][-1]
    # 2 x 2 positions of 2 codes of 384 - 261 ids, on 16 x 16 pixels.
    np.testing.assert_allclose(
      found[name]["bits_per_pixel"], 8 * math.log2(123) / 256
    )
