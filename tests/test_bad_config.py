"""Every key of every stage's config, given what nobody should give it.

Whatever is given, there is one of two outcomes: a `ConfigError` of one line
that names the key, or a config that validates and survives being saved. Nothing
may be made on the disk, and no other exception raised.
"""

import contextlib
import functools
import json
import math
import os

from hypothesis import given, settings, strategies as st
import pytest

from configs import instruct, pretrain, tokenizer
from unicode_jax import config as config_lib
from unicode_jax.config import ConfigError, apply_overrides, default_config

DEFAULTS = config_lib.flatten(default_config())
STAGES = {
  "pretrain": pretrain.get_config(""),
  "tokenizer": tokenizer.get_config(""),
  "instruct": apply_overrides(instruct.get_config(""), {"init_from": "."}),
}
HUGE = 10**30
# As a Python config or JSON gives them.
VALUES = (
  *(None, True, 0, -1, 1, 7, HUGE, -HUGE, 10**400, 0.0, -0.5, 0.3, 1e308),
  *(math.nan, math.inf, -math.inf, "", " ", "x", "é😀", "\0", "\ud800"),
  *("../../../etc/passwd", "/", "~nobody/x", "a" * 10_000, "{c.seed}", "%s"),
  *((), [], (1,), [None], ["x"], [0], [-1, 2], [math.nan, 1], [HUGE], [[1]]),
  *({}, {"a": 1}, b"x", object(), 1j, [1] * 1000),
)
# What a tree of an own config file may hold, past its types.
OTHERS = (
  *(None, True, HUGE, 10**400, math.nan, "\0", [None], {}, {"a": 1}, b"x"),
  *(object(), 1j, lambda: 1),
)
# As a command line gives them.
TEXTS = (
  *("", " ", "None", "none", "nan", "inf", "-inf", "1e400", "-1", "0", "1e30"),
  *("0x" + "f" * 10_000, "9" * 5000, "-" * 20_000 + "1", "(" * 20_000),
  *("1,", ",", "1,,2", "[1]", "{[]: 1}", "{{}}", "1if", "'\\d'", "__import__"),
  *("open('x', 'w')", "é", "\0", "\udc80", "true", "x" * 10_000, "../..", "*"),
)
# What no key of this kind can mean.
NONSENSE = {
  int: (*(None, True, -7, HUGE, 10**400, 0.5, math.nan, "x", [1], {}),),
  float: (*(True, -7.0, 1e300, 10**400, math.nan, math.inf, "x", [1], {}),),
  bool: (*(None, 0, 1, "x", [True], {}),),
  str: (*(True, 7, 0.5, ["x"], "\0", "\ud800", {"a": 1}),),
  tuple: (*(None, (), [None], [[1]], [1] * 17, "\0"),),
}


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
  """Runs a test in an empty folder, which must stay empty."""
  monkeypatch.chdir(tmp_path)
  yield
  assert os.listdir(tmp_path) == []


def outcome(make):
  """Returns the config, or the message of the only error there may be."""
  try:
    return make()
  except ConfigError as error:
    message = str(error)
    assert "\n" not in message and 0 < len(message) < 2500, message
    message.encode()
    return message


def check(config, key, value):
  """Sets a value as `main` does, and checks what comes of it."""
  result = outcome(
    lambda: config_lib.validate(apply_overrides(config, {key: value}))
  )
  if not isinstance(result, str):
    saved = json.loads(config_lib.to_json(result))
    again = apply_overrides(default_config(), config_lib.flatten(saved))
    assert config_lib.flatten(again) == config_lib.flatten(result)
    config_lib.validate(again)
  return result


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_with_every_value(stage):
  # Texts are read the same in every stage; of values, those that may be.
  values = VALUES + TEXTS
  if stage != "pretrain":
    values = (None, 0, 1, 7, HUGE, -0.5, 0.3, "x", "../../../etc/passwd", (1,))
  for key in DEFAULTS:
    for value in values:
      result = check(STAGES[stage], key, value)
      if isinstance(result, str):
        assert key in result, (key, value, result)


def accepted_nonsense():
  """Yields (key, value) of what is refused nowhere."""
  for key, default in DEFAULTS.items():
    kind = config_lib._schema()[key][0]
    for value in NONSENSE[kind]:
      if value is None and default is None:
        continue  # It is not set.
      if not isinstance(check(STAGES["pretrain"], key, value), str):
        yield key, value


def test_nonsense_is_refused():
  """No value of another type, size or sign gets to a model."""
  may = {"mesh.data", "mesh.fsdp", "mesh.tensor"}  # -1 is all that are left.
  found = [pair for pair in accepted_nonsense() if pair[0] not in may]
  assert found == []


def test_a_user_s_own_tree_with_any_value():
  """A config file may write anything past the types of its tree."""
  for key in DEFAULTS:
    config = STAGES["pretrain"].copy_and_resolve_references().unlock()
    *sections, leaf = key.split(".")
    holder = functools.reduce(getattr, sections, config)
    for value in OTHERS:
      with holder.ignore_type(), contextlib.suppress(OverflowError):
        holder[leaf] = value  # Of its own, where no float is so large.
      outcome(lambda config=config: config_lib.validate(config))


@pytest.mark.parametrize(
  "text",
  [
    *("", "null", "[]", "7", '"x"', "{", "nan", '{"seed": NaN}', "\ufeff{}"),
    *('{"seed": 1e999}', '{"seed": {}}', '{"": 1}', '{"__class__": {"a": 1}}'),
    *('{"data": 5}', '{"data": []}', '{"seed.x": 1}', '{"llm": {"x": {}}}'),
    *('{"a": ' * 100_000, "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"),
    *('{"data": {"path": "\\u0000"}}', '{"data": {"path": "\\ud800"}}'),
    '{"preset": "../../x"}',
    '{"stage": "os"}',
    '{"llm": {"num_layers": 1000000000000}}',
    '{"llm": {"num_heads": 0}}',
    '{"tokenizer": {"channel_multipliers": []}}',
  ],
  ids=lambda text: text[:30],
)
def test_a_saved_config_of_anybody(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp("run")
  (folder / "config.json").write_text(text, encoding="utf-8")
  assert isinstance(outcome(lambda: config_lib.read_run(folder)), str)
  assert os.listdir(folder) == ["config.json"]


def test_a_saved_config_that_is_no_text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  (folder / "config.json").write_bytes(b"\xff\xfe{}")
  assert "not JSON" in outcome(lambda: config_lib.read_run(folder))


def test_a_run_that_starts_from_itself(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = apply_overrides(STAGES["instruct"], {"init_from": str(folder)})
  (folder / "config.json").write_text(config_lib.to_json(config))
  assert len(list(config_lib.starts(config))) == 1


@pytest.mark.parametrize("name", ["x.txt", "x.zip", "x", "x.pyc"])
def test_only_py_is_run(tmp_path_factory, name):
  file = tmp_path_factory.mktemp("config") / name
  file.write_text("open('made', 'w')")
  result = outcome(lambda: config_lib.load(str(file)))
  assert "no .py or .json" in result and str(file) in result


def test_a_config_file_that_returns_none(tmp_path_factory):
  file = tmp_path_factory.mktemp("config") / "x.py"
  file.write_text("def get_config(preset):\n  return {'seed': preset}\n")
  assert "returns a ConfigDict" in outcome(lambda: config_lib.load(str(file)))


def plausible(key):
  """Returns a strategy of values that a user might try."""
  kind, default = config_lib._schema()[key]
  if key in config_lib._CHOICES:
    return st.sampled_from(config_lib._CHOICES[key])
  if kind is tuple:
    return st.lists(plausible_numbers(default[0]), min_size=1, max_size=3)
  if kind is bool:
    return st.booleans()
  if kind is str:
    return st.sampled_from((default, ".", "x"))
  return plausible_numbers(default)


def plausible_numbers(default):
  if not isinstance(default, int | float):
    return st.sampled_from((default, 64, "openmoji"))
  small = (0, 1, 2, 3, 8, 64) if isinstance(default, int) else (0.0, 0.5, 2.0)
  return st.sampled_from((default, *small, 2 * default))


leaves = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-4, 4),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.lists(st.integers(0, 4) | st.floats(0, 1) | st.text(max_size=3)),
  st.sampled_from(
    sorted(
      {c for choices in config_lib._CHOICES.values() for c in choices} - {None}
    )
  ),
)


PAIRS = st.sampled_from(sorted(DEFAULTS)).flatmap(
  lambda key: st.tuples(st.just(key), plausible(key) | plausible(key) | leaves)
)


@given(st.sampled_from(sorted(STAGES)), st.lists(PAIRS, max_size=5).map(dict))
@settings(deadline=None, max_examples=500)
def test_any_values_together(stage, overrides):
  """What is accepted is equal when it is saved, and accepted again."""

  def make():
    config = config_lib.validate(apply_overrides(STAGES[stage], overrides))
    # What needs a number of devices is asked later, of the same config.
    outcome(lambda: config_lib.check_devices(config, 8))
    return config

  config = outcome(make)
  if not isinstance(config, str):
    saved = json.loads(config_lib.to_json(config))
    again = apply_overrides(default_config(), config_lib.flatten(saved))
    config_lib.validate(again)
    assert config_lib.flatten(again) == config_lib.flatten(config)
    assert config_lib.positions(config) > 0
    assert config_lib.total_steps(config) > 0
    assert config_lib.downsampling(config) >= 1


json_trees = st.recursive(
  leaves.filter(lambda x: not isinstance(x, float) or math.isfinite(x)),
  lambda children: st.dictionaries(
    st.sampled_from(sorted({k for key in DEFAULTS for k in key.split(".")}))
    | st.text(max_size=3),
    children,
    max_size=3,
  ),
  max_leaves=5,
)


@given(json_trees)
@settings(deadline=None, max_examples=200)
def test_any_json_as_a_run(tmp_path_factory, tree):
  folder = tmp_path_factory.getbasetemp() / "any_json"
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(tree))
  outcome(lambda: config_lib.read_run(folder))
