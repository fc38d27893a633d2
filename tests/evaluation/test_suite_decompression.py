"""Unrolled images of a tiny run: training's numbers, and by hand."""

import numpy as np

from unicode_jax.data import sequences
from unicode_jax.evaluation import suite_decompression


def test_decompression_loss_is_the_runs_own(tiny, make_bench):
  outcome = suite_decompression.decompression(make_bench())
  measured = tiny.metrics()
  for name, found in outcome.results.items():
    np.testing.assert_allclose(
      found["nats_per_code"],
      measured[f"eval/image_loss/decompression/{name}"],
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      found["accuracy"],
      measured[f"eval/image_accuracy/decompression/{name}"],
      atol=1e-6,
    )
    np.testing.assert_allclose(np.mean(found["by_depth"]), found["accuracy"])
    np.testing.assert_allclose(np.mean(found["by_turn"]), found["accuracy"])
    np.testing.assert_allclose(
      found["gain"],
      np.subtract(found["by_turn"], found["by_turn_other"]),
      atol=1e-6,
    )
    assert found["gain"][0] == 0
    assert found["by_turn"][0] == found["by_turn_alone"][0]
    assert len(found["by_turn"]) == len(found["by_depth"]) == 2


def test_a_segment_alone_has_no_earlier_turns(tiny, make_bench):
  bench = make_bench(max_images=3)
  loaded = tiny.model.loaded
  codes = bench.codes(bench.sets[0])
  span = sequences.ImageSpan(0, 2, 4)
  nats, hits = suite_decompression._decompressed(bench, codes, [span])
  encoded = sequences.encode_conversation(
    sequences.Conversation((((span,), (span,)),)),
    loaded.text_tokenizer,
    loaded.layout,
    [codes[1]],
  )
  logits = tiny.logits(encoded.token_ids)[encoded.image_mask]
  wanted = codes[1, 2:4].reshape(-1)
  normalizer = np.log(np.exp(logits).sum(axis=1))
  expected = normalizer - logits[np.arange(4), wanted]
  np.testing.assert_allclose(nats[1].reshape(-1), expected, rtol=1e-4)
  np.testing.assert_array_equal(
    hits[1].reshape(-1), logits.argmax(axis=1) == wanted
  )
  assert nats.shape == (3, 2, 2)


def test_earlier_turns_are_of_another_picture(tiny, make_bench):
  """Three equal pictures: the next one's turns are one's own."""
  bench = make_bench(max_images=3)
  bench._codes = {
    held.name: np.repeat(tiny.model.encode(held.images[:1]), 3, axis=0)
    for held in bench.sets
  }
  for found in suite_decompression.decompression(bench).results.values():
    assert found["gain"] == [0, 0]
    assert found["by_depth_other"] == found["by_depth"]
