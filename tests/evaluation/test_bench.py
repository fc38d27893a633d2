"""What suites have in common: data, questions, distances; by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import config as config_lib, inference, loading
from unicode_jax.data import sequences
from unicode_jax.evaluation import bench as bench_lib, report, suites


def test_kernel_distance_of_pairs_is_not_below_zero(make_bench):
  bench = make_bench(max_images=200)
  images = bench.sets[1].images
  paired = bench.distances("a", images, "b", images, pairs=True)["pixels"]
  naive = bench.distances("a", images, "b", images)["pixels"]
  assert naive["kernel"] < -naive["std"]
  assert abs(paired["kernel"]) < paired["std"]
  assert paired["frechet"] < 1e-6


def test_labels_ask_for_their_caption(make_bench):
  openmoji, easy_vqa = make_bench().sets
  labels = {a.label for a in easy_vqa.train.annotations} - {None}
  assert easy_vqa.label_questions() == {
    label: f"Draw: a {label}" for label in labels
  }
  assert openmoji.label_questions() == {}


def test_asking_is_answering_each_question_alone(tiny, make_bench):
  bench = make_bench(max_images=4)
  held = bench.sets[1]
  questions = [(2, "what color is the shape?"), (0, "is there a circle?")]
  texts = bench.ask(held, [*questions, questions[0]], 4)
  codes = tiny.model.encode(held.images)
  grammar = tiny.model.grammar(images=False)
  for (i, question), text in zip(questions, texts, strict=False):
    ids = tiny.model.prompt(
      inference.Question((sequences.ImageSpan(), question), codes[i][None])
    )
    answer = []
    for _ in range(4):  # Greedy, the whole sequence anew at each step.
      scores = np.where(grammar.text, tiny.logits(ids)[-1], -np.inf)
      token = int(scores.argmax())
      if token in np.asarray(grammar.stop):
        break
      answer.append(token)
      ids = np.concatenate([ids, [[token, -1]]])
    assert tiny.model.loaded.text_tokenizer.decode(answer).strip() == text
  assert texts[2] == texts[0]


@pytest.mark.parametrize(
  ("overrides", "fragments"),
  [
    ({"seed": "1"}, ["--config.seed", "data.*"]),
    ({"data.heldout_fraction": "0.5"}, ["trained on"]),
    (
      {"data.heldout_fraction": "0.5", "data.source": "embedded"},
      ["trained on"],
    ),
    ({"data.validation_fraction": "0.1"}, ["trained on", "set 0"]),
    ({"data.validation_fraction": "ten"}, ["'ten'", "number"]),
    ({"data.source": "imagenet"}, ["'imagenet'", "'folder'"]),
    ({"data.source": "folder", "data.path": "nowhere"}, ["nowhere"]),
  ],
)
def test_what_cannot_be_overridden(tiny, overrides, fragments):
  with pytest.raises(config_lib.ConfigError) as caught:
    bench_lib.load_data(tiny.model.loaded, overrides)
  for fragment in fragments:
    assert fragment in str(caught.value)


def test_pictures_of_another_size(tiny, tmp_path):
  """All that is measured at the run's size is, on as many more positions."""
  loaded = tiny.model.loaded
  size = loaded.config.image_size * 3 // 2
  model = inference.UniCodeModel(loading.at_image_size(loaded, size))
  settings = bench_lib.Settings(
    suites=("reconstruction", "generation", "vqa", "decompression"),
    max_images=8,
    judge_steps=2,
    perceptual=False,
  )
  data = bench_lib.load_data(model.loaded)
  results = suites.evaluate(model, data, settings, tmp_path)["suites"]
  assert all("results" in entry for entry in results.values())
  for found in results["reconstruction"]["results"].values():
    assert found["psnr"] and found["perceptual"] is None
  positions = tiny.model.loaded.model.num_positions * 9 // 4
  assert f"{positions} x" in report.read(tmp_path)["run"]["quantizer"]
  images = data.heldout_images["easy_vqa_test"][:2]
  assert model.encode(images).shape[1] == positions
  assert model.decode(model.encode(images)).shape == images.shape


def test_a_size_that_the_grid_cannot_have(tiny):
  with pytest.raises(config_lib.ConfigError, match="image_size=17"):
    loading.at_image_size(tiny.model.loaded, 17)


def test_spread_takes_both_ends_and_no_picture_twice():
  chosen = bench_lib.spread(1000, 48)
  assert chosen[0] == 0 and chosen[-1] == 999
  assert len(set(chosen.tolist())) == 48
  np.testing.assert_array_equal(bench_lib.spread(3, 48), [0, 1, 2])
  np.testing.assert_array_equal(bench_lib.spread(3, None), [0, 1, 2])


def test_fingerprint_sees_values_names_and_shapes():
  base = {"a": jnp.arange(6.0), "b": jnp.zeros(2)}
  prints = {
    bench_lib.fingerprint(tree)
    for tree in (
      base,
      {"a": jnp.arange(6.0).at[5].set(0), "b": jnp.zeros(2)},
      {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(2)},
      {"c": jnp.arange(6.0), "b": jnp.zeros(2)},
    )
  }
  assert len(prints) == 4
  assert bench_lib.fingerprint({**base}) in prints
