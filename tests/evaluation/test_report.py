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
