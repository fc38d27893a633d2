"""Metrics keep what belongs to the run and nothing of a lost attempt."""

import io
import json

import jax.numpy as jnp
import numpy as np

from unicode_jax.training import metrics


def test_window_averages_scalars_and_sums_histograms():
  window = metrics.Window()
  window.add(1, {"loss": jnp.float32(1.0), "counts": jnp.array([1.0, 0.0])})
  window.add(2, {"loss": jnp.float32(3.0), "counts": jnp.array([1.0, 2.0])})
  window.add(3, {"other": jnp.float32(5.0)})
  means, steps, _, _ = window.flush()
  assert means["loss"] == 2.0
  assert means["other"] == 5.0
  np.testing.assert_array_equal(means["counts"], [2.0, 2.0])
  assert steps == [1, 2, 3]
  assert not window and window.flush().means == {}


def test_a_window_leaves_out_skipped_steps():
  window = metrics.Window()
  for step, norm, skipped in ((1, 1.0, 0.0), (2, np.nan, 1.0), (3, 5.0, 0.0)):
    window.add(
      step,
      {
        "gradient_norm": jnp.float32(norm),
        "counts": jnp.zeros(2),
        "skipped": jnp.float32(skipped),
      },
    )
  means, steps, skipped, norms = window.flush()
  assert means == {"gradient_norm": 3.0}
  assert (steps, skipped) == ([1, 2, 3], [0.0, 1.0, 0.0])
  assert norms == {"gradient_norm": [(1, 1.0), (3, 5.0)]}


def test_writer_drops_lines_after_the_step_resumed_from(tmp_path):
  writer = metrics.MetricWriter(tmp_path, None)
  for step in (1, 2, 3):
    writer.write(step, {"loss": float(step)})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')  # killed in the middle of a line
  writer = metrics.MetricWriter(tmp_path, 2)
  writer.write(3, {"loss": 30.0})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 2.0},
    {"step": 3, "loss": 30.0},
  ]


def test_a_damaged_line_takes_no_other_with_it(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"st\0p": 2}\n[3]\n{"step": 4}\n{"st')
  assert metrics.read_jsonl(path) == [{"step": 1}, {"step": 4}]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
  writer.close()
  (row,) = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert row == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_progress_redraws_only_in_a_terminal():
  plain = io.StringIO()
  metrics.Progress(10, 0, plain).show(5, "loss 1")
  assert plain.getvalue().startswith("step 5/10  eta ")
  assert "\x1b" not in plain.getvalue()
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  progress = metrics.Progress(10, 0, terminal)
  progress.show(5, "loss 1")
  progress.show(6, "loss 0")
  assert "loss 1\r\x1b[2Kstep 6/10" in terminal.getvalue()
  progress.end()
  assert terminal.getvalue().endswith("loss 0\n")


def test_a_run_without_a_checkpoint_starts_its_lines_again(tmp_path):
  for _ in range(2):
    writer = metrics.MetricWriter(tmp_path, None)
    writer.write(0, {"loss": 1.0})
    writer.close()
  assert len(metrics.read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_progress_is_silent_where_asked():
  stream = io.StringIO()
  metrics.Progress(10, 0, stream, silent=True).show(5, "loss 1")
  assert stream.getvalue() == ""
