"""Which suites run on a tiny run, and what is kept of them."""

import json

from absl import flags
from absl.testing import flagsaver
import numpy as np

from unicode_jax import evaluate, inference
from unicode_jax.evaluation import bench as bench_lib, report, suites


def test_every_suite_has_numbers_and_a_protocol(evaluated):
  few, results, out, said = evaluated
  assert json.loads((out / report.RESULTS).read_text()) == results
  assert list(results["suites"]) == list(report.SUITES)
  assert [line.split(":")[0] for line in said] == list(report.SUITES)
  text = (out / report.REPORT).read_text()
  for name, entry in results["suites"].items():
    assert "skipped" not in entry, name
    protocol = entry["protocol"]
    assert protocol["suite"] == name
    assert protocol["step"] == 8
    assert protocol["data"]["easy_vqa_test"]["pictures"] == few
    assert "16 x 16 pixels" in protocol["images"]
    assert entry["seconds"] > 0
    for picture in entry["pictures"]:
      assert (out / picture["file"]).exists()
      assert f"]({picture['file']})" in text
  assert text.count("\n## ") == len(report.SUITES)
  assert not list(out.glob("*.tmp"))


def test_other_suites_are_kept_until_something_changes(tiny, tmp_path):
  def run(*names, **settings):
    said = []
    suites.evaluate(
      tiny.model,
      tiny.data,
      bench_lib.Settings(suites=names, max_images=8, **settings),
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
  # What was there is elsewhere, whole.
  kept = tmp_path.with_name(f"{tmp_path.name}_1")
  assert str(kept) in said[0]
  assert report.read(kept)["suites"] == again


def test_stage_one_has_neither_answers_nor_drawings(tiny, tmp_path):
  model = inference.load(tiny.pretrain)
  data = bench_lib.load_data(model.loaded)
  said = []
  results = suites.evaluate(
    model,
    data,
    bench_lib.Settings(suites=("generation", "vqa", "text")),
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
    evaluate.main({"data.embedded": "easy_vqa", "data.weights": "1"})
  results = report.read(tmp_path / "out")
  assert results["run"]["step"] == 4
  assert set(results["suites"]) == {"decompression"}
  assert set(results["suites"]["decompression"]["results"]) == {"easy_vqa_test"}
  assert "report.md" in capsys.readouterr().out
