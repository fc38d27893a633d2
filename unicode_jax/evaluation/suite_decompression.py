"""Suite: whether later turns of an unrolled image profit from earlier ones.

METHOD section 4's in-context image decompression: the codes of a segment, the
right ones before them given, behind the image's own earlier turns, behind none,
and behind those of another image. Nothing is sampled.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from unicode_jax import inference
from unicode_jax.data import sequences, tasks
from unicode_jax.evaluation import forced
from unicode_jax.evaluation.bench import Bench, Outcome


def _decompressed(
  bench: Bench, codes: np.ndarray, spans: Sequence[sequences.ImageSpan]
) -> tuple[np.ndarray, np.ndarray]:
  """Lets the LLM unroll stretches of images, the right codes before given.

  Args:
    bench: the model.
    codes: int32[N, P, D].
    spans: one turn each, in order.

  Returns:
    Nats and hits of each code, float32[N, positions of the spans, D] each.
  """
  loaded, model = bench.loaded, bench.loaded.model
  first_slot, shift = model.llama.vocab_size, model.codes_shift
  P, D = codes.shape[1:]
  # Every image's conversation is the same but for its codes.
  conversation = sequences.encode_conversation(
    sequences.Conversation(tuple(((span,), (span,)) for span in spans)),
    loaded.text_tokenizer,
    dataclasses.replace(loaded.layout, codes_shift=0),
    sequences.slots(first_slot, 1, P, D),
  )
  flat = codes.reshape(len(codes), -1) + shift
  size = min(inference.BATCH, len(flat))
  nats, hits = [], []

  def fill(ids, rows):
    return np.stack([sequences.fill_slots(ids, r, first_slot) for r in rows])

  for start in range(0, len(flat), size):
    first = min(start, len(flat) - size)  # So that one program serves all.
    rows = flat[first : first + size]
    outputs = forced.nats_and_hits_of_ids(
      model,
      loaded.variables,
      fill(conversation.token_ids, rows),
      fill(conversation.labels, rows),
    )
    for found, values in zip((nats, hits), outputs, strict=True):
      drawn = np.asarray(values)[start - first :, conversation.image_mask]
      found.append(drawn.reshape(len(drawn), -1, D))
  return np.concatenate(nats), np.concatenate(hits)


def decompression(bench: Bench) -> Outcome:
  """Measures whether later turns of an image profit from earlier ones.

  Args:
    bench: the model and the data.
  """
  model = bench.loaded.model
  segments = bench.loaded.config.instruct.segments
  spans = tasks.decompression_spans(model.num_positions, segments)
  results = {}
  for held in bench.sets:
    codes = bench.codes(held)
    nats, together = _decompressed(bench, codes, spans)
    alone = np.concatenate(
      [_decompressed(bench, codes, [span])[1] for span in spans], axis=1
    )
    others = [together[:, : spans[0].stop]]
    for turn, span in enumerate(spans[1:], 2):
      # What comes before is right, but of the next picture.
      mixed = np.roll(codes, -1, axis=0)
      mixed[:, span.start : span.stop] = codes[:, span.start : span.stop]
      _, hits = _decompressed(bench, mixed, spans[:turn])
      others.append(hits[:, span.start : span.stop])
    other = np.concatenate(others, axis=1)

    def by_turn(values):
      """Returns the mean of each image and turn, float[N, segments]."""
      return np.stack(
        [values[:, s.start : s.stop].mean(axis=(1, 2)) for s in spans], axis=1
      )

    gain = by_turn(together) - by_turn(other)
    results[held.name] = {
      "count": len(codes),
      "accuracy": float(together.mean()),
      "nats_per_code": float(nats.mean()),
      "by_turn": by_turn(together).mean(axis=0).tolist(),
      "by_turn_alone": by_turn(alone).mean(axis=0).tolist(),
      "by_turn_other": by_turn(other).mean(axis=0).tolist(),
      "gain": gain.mean(axis=0).tolist(),
      "gain_error": (
        gain.std(axis=0, ddof=min(1, len(gain) - 1)) / math.sqrt(len(gain))
      ).tolist(),
      "by_depth": together.mean(axis=(0, 1)).tolist(),
      "by_depth_alone": alone.mean(axis=(0, 1)).tolist(),
      "by_depth_other": other.mean(axis=(0, 1)).tolist(),
    }
  return Outcome(
    results,
    {
      "segments": segments,
      "decoding": "the likeliest token, the right codes before it given",
      "without earlier turns": "each segment as the first turn of its own "
      "conversation",
      "another picture's": "earlier turns of the next picture of the set",
      "gain": "over another picture's earlier turns, with its standard error",
    },
    ", ".join(
      f"{k} {100 * v['accuracy']:.1f} % of codes" for k, v in results.items()
    ),
    (
      "Training shows later segments behind earlier ones only, so that a "
      "segment alone is unusual as well as alone: another picture's earlier "
      "turns tell the two apart.",
    ),
  )
