"""The suites on a tiny run: against training's numbers and by hand."""

import collections
import dataclasses
import json
import math

from absl import flags
from absl.testing import flagsaver
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import config as config_lib, evaluate, inference, loading
from unicode_jax.data import pipeline, sequences, tasks
from unicode_jax.evaluation import report, suites
from unicode_jax.training import metrics, visual_evaluation

FEW = 24


@pytest.fixture(scope="module")
def data(tiny):
  return tiny.data


@pytest.fixture(scope="module")
def evaluated(tiny, data, tmp_path_factory):
  """Every suite on few pictures."""
  out = tmp_path_factory.mktemp("evaluation")
  said = []
  results = suites.evaluate(
    tiny.model,
    data,
    suites.Settings(max_images=FEW, judge_steps=2),
    out,
    say=said.append,
  )
  return results, out, said


def make_bench(tiny, data, tmp_path, **settings):
  return suites.Bench(tiny.model, data, suites.Settings(**settings), tmp_path)


def last_metrics(workdir):
  values = {}
  for row in metrics.read_jsonl(workdir / "metrics.jsonl"):
    values |= row
  return values


def test_every_suite_has_numbers_and_a_protocol(evaluated):
  results, out, said = evaluated
  assert json.loads((out / report.RESULTS).read_text()) == results
  assert list(results["suites"]) == list(report.SUITES)
  assert [line.split(":")[0] for line in said] == list(report.SUITES)
  text = (out / report.REPORT).read_text()
  for name, entry in results["suites"].items():
    assert "skipped" not in entry, name
    protocol = entry["protocol"]
    assert protocol["suite"] == name
    assert protocol["step"] == 8
    assert protocol["data"]["easy_vqa_test"]["pictures"] == FEW
    assert "16 x 16 pixels" in protocol["images"]
    assert entry["seconds"] > 0
    for picture in entry["pictures"]:
      assert (out / picture["file"]).exists()
      assert f"]({picture['file']})" in text
  assert text.count("\n## ") == len(report.SUITES)
  assert not list(out.glob("*.tmp"))


def test_reconstruction_agrees_with_training(tiny, data, evaluated):
  found = evaluated[0]["suites"]["reconstruction"]["results"]
  for name, images in data.heldout_images.items():
    chosen = images[suites.spread(len(images), FEW)]
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


def test_kernel_distance_of_pairs_is_not_below_zero(tiny, data, tmp_path):
  bench = make_bench(tiny, data, tmp_path, max_images=200)
  images = bench.sets[1].images
  paired = bench.distances("a", images, "b", images, pairs=True)["pixels"]
  naive = bench.distances("a", images, "b", images)["pixels"]
  assert naive["kernel"] < -naive["std"]
  assert abs(paired["kernel"]) < paired["std"]
  assert paired["frechet"] < 1e-6


def labels_of(source):
  return {a.label for a in source.annotations} - {None}


def test_generation_judges_each_label(data, evaluated):
  results = evaluated[0]["suites"]["generation"]["results"]
  judged = results["judged"]["easy_vqa_test"]
  assert list(results["judged"]) == ["easy_vqa_test"]  # OpenMoji has no labels.
  labels = len(labels_of(data.image_sources[1]))
  assert 20 < labels <= FEW
  assert judged["labels"] == labels
  assert judged["guess"] == {"colour": 1 / 8, "shape": 1 / 3}
  pictures = judged["pictures"]
  assert pictures["drawn"]["count"] == labels
  labelled = pictures["real, held out"]["count"]
  assert labelled == pictures["reconstructed"]["count"]
  assert 0.75 * FEW < labelled <= FEW
  assert set(results["distances"]) == {
    "openmoji_heldout",
    "easy_vqa_test",
    "all sets as mixed",
  }
  drawn = results["distances"]["openmoji_heldout"]["drawn of its captions"]
  assert drawn["pixels"]["drawn"] == drawn["pixels"]["real"] == FEW
  assert drawn["pixels"]["note"]


def test_labels_ask_for_their_caption(tiny, data, tmp_path):
  openmoji, easy_vqa = make_bench(tiny, data, tmp_path).sets
  questions = suites._label_questions(easy_vqa)
  assert questions == {
    label: f"Draw: a {label}" for label in labels_of(easy_vqa.train)
  }
  assert suites._label_questions(openmoji) == {}


def test_vqa_counts_every_question_and_the_blind_guess(data, evaluated):
  found = evaluated[0]["suites"]["vqa"]["results"]
  assert list(found) == ["easy_vqa_test"]  # The other has no questions.
  found = found["easy_vqa_test"]
  test, train = data.heldout_sources[1], data.image_sources[1]
  counts = collections.defaultdict(collections.Counter)
  for known in train.annotations:
    for ((question, answer),) in known.dialogues:
      counts[question][answer] += 1
  asked = [
    dialogue[0]
    for i in suites.spread(len(test), FEW)
    for dialogue in test.annotations[i].dialogues
  ]
  right = [counts[q].most_common(1)[0][0] == a for q, a in asked]
  assert found["count"] == len(asked)
  assert sum(share["count"] for share in found["by_type"].values()) == len(
    asked
  )
  np.testing.assert_allclose(found["blind"]["accuracy"], np.mean(right))
  assert set(found["by_type"]) == {
    "color",
    "shape",
    "yes/no: color",
    "yes/no: shape",
  }


def test_asking_is_answering_each_question_alone(tiny, data, tmp_path):
  bench = make_bench(tiny, data, tmp_path, max_images=4)
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


def test_forced_answers_are_those_whose_tokens_are_the_likeliest(
  tiny, data, tmp_path
):
  bench = make_bench(tiny, data, tmp_path, max_images=6)
  held, loaded = bench.sets[1], tiny.model.loaded
  codes = bench.codes(held)

  def likeliest(i, question, answer):
    encoded = sequences.encode_conversation(
      sequences.Conversation(((tasks.show(question), answer),)),
      loaded.text_tokenizer,
      loaded.layout,
      [codes[i]],
    )
    hits = tiny.logits(encoded.token_ids).argmax(-1) == encoded.labels
    return hits[encoded.loss_mask > 0].all()

  # The model has learned little: what it would say counts as right, too.
  asked = suites._questions(held)[:12]
  said = bench.ask(held, [(i, q) for i, q, _ in asked], 8)
  asked = [
    (i, q, text if n % 2 and text else answer)
    for n, ((i, q, answer), text) in enumerate(zip(asked, said, strict=True))
  ]
  expected = [a if likeliest(i, q, a) else "" for i, q, a in asked]
  assert suites._forced_answers(bench, held, asked) == expected


def test_pope_asks_for_what_is_there_and_what_is_not(evaluated):
  found = evaluated[0]["suites"]["pope"]["results"]["easy_vqa_test"]
  assert set(found) == {"random", "popular", "adversarial"}
  for scores in found.values():
    # Two objects that are there and two that are not, of labelled pictures.
    assert scores["count"] % 4 == 0 and scores["count"] <= 4 * FEW
    assert scores["blind"]["accuracy"] == 0.5


def test_captions_are_scored_beside_the_commonest_one(data, evaluated):
  found = evaluated[0]["suites"]["caption"]["results"]
  assert set(found) == {"openmoji_heldout", "easy_vqa_test"}
  commonest = found["easy_vqa_test"]["blind"]["caption"]
  test = data.heldout_sources[1]
  captions = [
    test.annotations[i].captions[0]
    for i in suites.spread(len(test), FEW)
    if test.annotations[i].captions
  ]
  np.testing.assert_allclose(
    found["easy_vqa_test"]["blind"]["exact_match"],
    np.mean([caption == commonest for caption in captions]),
  )


def test_text_perplexity_is_the_runs_own(tiny, evaluated):
  found = evaluated[0]["suites"]["text"]["results"]
  np.testing.assert_allclose(
    found["after stage II"]["perplexity"],
    last_metrics(tiny.instruct)["eval/text_perplexity"],
    rtol=1e-5,
  )
  before = found["before stage II"]
  assert before["tokens"] == found["after stage II"]["tokens"]
  assert before["perplexity"] != found["after stage II"]["perplexity"]
  assert str(tiny.pretrain) in before["run"]


def test_text_before_may_be_gone(tiny, data, tmp_path):
  config = config_lib.apply_overrides(
    tiny.model.loaded.config, {"init_from": str(tmp_path / "gone")}
  )
  loaded = dataclasses.replace(tiny.model.loaded, config=config)
  results = suites.evaluate(
    inference.UniCodeModel(loaded),
    data,
    suites.Settings(suites=("text",)),
    tmp_path,
    say=lambda line: None,
  )
  found = results["suites"]["text"]["results"]
  assert "gone" in found["before stage II"]["missing"]
  assert found["after stage II"]["perplexity"] > 1
  assert "gone" in (tmp_path / report.REPORT).read_text()


def test_decompression_loss_is_the_runs_own(tiny, data, tmp_path):
  outcome = suites._decompression(make_bench(tiny, data, tmp_path))
  measured = last_metrics(tiny.instruct)
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


def test_a_segment_alone_has_no_earlier_turns(tiny, data, tmp_path):
  bench = make_bench(tiny, data, tmp_path, max_images=3)
  loaded = tiny.model.loaded
  codes = bench.codes(bench.sets[0])
  span = sequences.ImageSpan(0, 2, 4)
  nats, hits = suites._decompressed(bench, codes, [span])
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


def test_earlier_turns_are_of_another_picture(tiny, data, tmp_path):
  """Three equal pictures: the next one's turns are one's own."""
  bench = make_bench(tiny, data, tmp_path, max_images=3)
  bench._codes = {
    held.name: np.repeat(tiny.model.encode(held.images[:1]), 3, axis=0)
    for held in bench.sets
  }
  for found in suites._decompression(bench).results.values():
    assert found["gain"] == [0, 0]
    assert found["by_depth_other"] == found["by_depth"]


def test_other_suites_are_kept_until_something_changes(tiny, data, tmp_path):
  def run(*names, **settings):
    said = []
    suites.evaluate(
      tiny.model,
      data,
      suites.Settings(suites=names, max_images=8, **settings),
      tmp_path,
      say=said.append,
    )
    return report.read(tmp_path)["suites"], said

  first, _ = run("text")
  both, said = run("decompression")
  assert both["text"] == first["text"]
  assert len(said) == 1
  again, _ = run("text")
  assert again["text"]["seconds"] != first["text"]["seconds"]
  assert again["decompression"] == both["decompression"]
  other, said = run("text", seed=1)
  assert set(other) == {"text"}
  assert "decompression" in said[0]


def test_stage_one_has_neither_answers_nor_drawings(tiny, tmp_path):
  model = inference.load(tiny.pretrain)
  data = suites.load_data(model.loaded)
  said = []
  results = suites.evaluate(
    model,
    data,
    suites.Settings(suites=("generation", "vqa", "text")),
    tmp_path,
    say=said.append,
  )["suites"]
  assert "stage I" in results["vqa"]["skipped"]
  assert "Skipped: stage I" in (tmp_path / report.REPORT).read_text()
  assert said[0].startswith("generation: skipped")
  stage, state = tiny.stage_one
  sums = [
    stage._heldout_text(state.variables.params["llm"], batch)
    for batch in stage.heldout_text
  ]
  nats, tokens = np.sum(sums, axis=0)
  np.testing.assert_allclose(
    results["text"]["results"]["after stage I"]["perplexity"],
    np.exp(nats / tokens),
    rtol=1e-5,
  )


def test_the_command_takes_a_step_and_other_data(tiny, tmp_path, capsys):
  flags.FLAGS(["evaluate", f"--workdir={tiny.instruct}"])
  with flagsaver.flagsaver(
    workdir=str(tiny.instruct),
    out=str(tmp_path / "out"),
    suites="decompression",
    step=4,
    max_images=8,
  ):
    assert not evaluate.main(
      ["evaluate"], {"data.embedded": "easy_vqa", "data.weights": "1"}
    )
  results = report.read(tmp_path / "out")
  assert results["run"]["step"] == 4
  assert set(results["suites"]) == {"decompression"}
  assert set(results["suites"]["decompression"]["results"]) == {"easy_vqa_test"}
  assert "report.md" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("overrides", "fragments"),
  [
    ({"seed": "1"}, ["--config.seed", "data.*"]),
    ({"data.heldout_fraction": "0.5"}, ["trained on"]),
    ({"data.source": "imagenet"}, ["'imagenet'", "'folder'"]),
    ({"data.source": "folder", "data.path": "nowhere"}, ["nowhere"]),
  ],
)
def test_what_cannot_be_overridden(tiny, overrides, fragments):
  with pytest.raises(config_lib.ConfigError) as caught:
    suites.load_data(tiny.model.loaded, overrides)
  for fragment in fragments:
    assert fragment in str(caught.value)


def test_spread_takes_both_ends_and_no_picture_twice():
  chosen = suites.spread(1000, 48)
  assert chosen[0] == 0 and chosen[-1] == 999
  assert len(set(chosen.tolist())) == 48
  np.testing.assert_array_equal(suites.spread(3, 48), [0, 1, 2])
  np.testing.assert_array_equal(suites.spread(3, None), [0, 1, 2])


def test_fingerprint_sees_values_names_and_shapes():
  base = {"a": jnp.arange(6.0), "b": jnp.zeros(2)}
  prints = {
    suites.fingerprint(tree)
    for tree in (
      base,
      {"a": jnp.arange(6.0).at[5].set(0), "b": jnp.zeros(2)},
      {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(2)},
      {"c": jnp.arange(6.0), "b": jnp.zeros(2)},
    )
  }
  assert len(prints) == 4
  assert suites.fingerprint({**base}) in prints


def test_numbers_that_are_not_finite_stay_json(tmp_path):
  value = {"a": math.inf, "b": (np.float32(1), math.nan), 3: np.arange(2)}
  text = json.dumps(report.plain(value), allow_nan=False)
  assert json.loads(text) == {"a": "inf", "b": [1.0, "nan"], "3": [0, 1]}


@pytest.mark.parametrize("content", ["{", "[]", '{"suites": 3}'])
def test_a_foreign_results_file_is_not_overwritten(tmp_path, content):
  (tmp_path / report.RESULTS).write_text(content)
  with pytest.raises(config_lib.ConfigError, match="move it away"):
    report.read(tmp_path)


def test_a_run_of_another_kind_cannot_be_loaded(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="holds no run"):
    loading.load(tmp_path)
