"""What is written of an evaluation, without any model."""

import json
import math

import numpy as np
import pytest

from unicode_jax import config as config_lib
from unicode_jax.evaluation import report


def test_numbers_that_are_not_finite_stay_json(tmp_path):
  value = {"a": math.inf, "b": (np.float32(1), math.nan), 3: np.arange(2)}
  text = json.dumps(report.plain(value), allow_nan=False)
  assert json.loads(text) == {"a": "inf", "b": [1.0, "nan"], "3": [0, 1]}


@pytest.mark.parametrize("content", ["{", "[]", '{"suites": 3}'])
def test_a_foreign_results_file_is_not_overwritten(tmp_path, content):
  (tmp_path / report.RESULTS).write_text(content)
  with pytest.raises(config_lib.ConfigError, match="move it away"):
    report.read(tmp_path)


def test_judged_drawings_have_an_error_and_stand_beside_a_guess():
  judged = {
    "attributes": ["colour", "shape"],
    "labels": 24,
    "each": 8,
    "guess": {"colour": 1 / 8, "shape": 1 / 3},
    "pictures": {
      "drawn": {
        "count": 192,
        "by_attribute": {"colour": 0.75, "shape": 0.5},
        "all": 0.4,
      },
      "real, held out": {
        "count": 100,
        "by_attribute": {"colour": 1.0, "shape": 0.99},
        "all": 0.99,
      },
    },
  }
  entry = {
    "results": {"judged": {"a_set": judged}, "distances": {}},
    "protocol": {},
    "seconds": 1.0,
  }
  lines = report.markdown({"run": {}, "suites": {"generation": entry}}).split(
    "\n"
  )
  first = lines.index(
    "| judged | pictures | colour right | shape right | all right |"
  )
  assert lines[first + 2 : first + 6] == [
    # The root of 0.75 x 0.25 / 192 is 1 / 32.
    "| drawn | 192 | 75.0 ± 3.1 % | 50.0 ± 3.6 % | 40.0 ± 3.5 % |",
    "| real, held out | 100 | 100.0 ± 0.0 % | 99.0 ± 1.0 % | 99.0 ± 1.0 % |",
    "| a guess | - | 12.5 % | 33.3 % | 4.2 % |",
    "",
  ]
