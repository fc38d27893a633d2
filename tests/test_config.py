import fnmatch
import json

from hypothesis import given, settings, strategies as st
from ml_collections import ConfigDict
import pytest

from unicode_jax import config as config_lib
from unicode_jax.config import ConfigError, apply_overrides, default_config

DEFAULTS = config_lib.flatten(default_config())
HQ = {"tokenizer.quantizer": "hq", "tokenizer.depth": 5}
PRIVATE = {"stage": "tokenizer", "codebook.paradigm": "private"}


def check(overrides):
  return config_lib.validate(apply_overrides(default_config(), overrides))


@pytest.mark.parametrize(
  "overrides",
  [
    {},
    HQ,
    PRIVATE,
    {"tokenizer.quantizer": "vq", "tokenizer.depth": 1},
    {"codebook.code_dim": 192, "codebook.projection": "identity"},
    {"data.embedded": "openmoji", "data.weights": "1"},
    {"codebook.paradigm": "dual", "codebook.update_rule": "ema"},
    {**PRIVATE, "codebook.restart_dead_after": 10},
    {**PRIVATE, "text.vocab_size": 64},
    {"schedule.finetune_steps": 0, "optimizer.llm.warmup_steps": 0},
    {"codebook.sync_decay": 0},
    {"codebook.sync_decay": 1},
  ],
)
def test_possible(overrides):
  check(overrides)


# Every refusal must name the key, the value and a remedy.
@pytest.mark.parametrize(
  ("overrides", "fragments"),
  [
    ({"image_size": 30}, ["image_size=30", "multiple of 8"]),
    (HQ | {"image_size": 24}, ["'hq'", "24", "3x3", "multiple of 16"]),
    ({"tokenizer.quantizer": "vq"}, ["depth=4", "depth=1", "'rq'"]),
    ({"tokenizer.quantizer": "hq"}, ["depth=4", "depth=5"]),
    (
      {"tokenizer.loss.l1": 0, "tokenizer.loss.l2": 0},
      ["l1=0", "l2=0", "above 0"],
    ),
    ({"codebook.paradigm": "private"}, ["private", "configs/tokenizer.py"]),
    ({"stage": "tokenizer"}, ["language_driven", "private"]),
    ({"codebook.restart_dead_after": 5}, ["restart_dead_after=5", "to 0"]),
    (
      {"codebook.update_rule": "ema", "codebook.paradigm": "projected"},
      ["'ema'", "projected", "'gradient'"],
    ),
    ({"codebook.code_dim": 256}, ["code_dim=256", "embed_dim=192", "at most"]),
    (
      {"codebook.projection": "identity"},
      ["code_dim=16", "embed_dim=192", "'pca'"],
    ),
    ({"text.vocab_size": 270}, ["vocab_size=270", "leaves 9", "at least 278"]),
    ({"text.vocab_size": 200}, ["vocab_size=200", "at least 278"]),
    ({**PRIVATE, "text.vocab_size": 16}, ["vocab_size=16", "at least 17"]),
    ({"text.image_end": "<image>"}, ["'<image>'", "two different"]),
    ({"llm.num_kv_heads": 4}, ["num_heads=6", "num_kv_heads=4", "multiple"]),
    ({"llm.head_dim": 31}, ["head_dim=31", "even"]),
    ({"alarm.perplexity_floor": 5000}, ["5000", "2048", "lower"]),
    ({"mesh.data": 0}, ["mesh.data=0", "-1"]),
    ({"mesh.data": -2}, ["mesh.data=-2", "at least -1"]),
    ({"data.source": "folder"}, ["folder", "data.path=DIR"]),
    ({"data.path": "."}, ["data.path='.'", "data.source='folder'"]),
    (
      {"data.source": "folder", "data.path": "nowhere"},
      ["data.path='nowhere'", "not a folder"],
    ),
    ({"text.tokenizer_path": "nowhere"}, ["'nowhere'", "not a file"]),
    ({"data.embedded": "cifar"}, ["cifar", "openmoji"]),
    ({"data.embedded": "openmoji"}, ["weights=(0.5, 0.5)", "('openmoji',)"]),
    ({"data.weights": "0,0"}, ["weights=(0.0, 0.0)", "not all"]),
    (
      {"codebook.sync_every": 0},
      ["sync_every=0", "at least 1", "sync_decay=1"],
    ),
    ({"schedule.llm_steps": 0}, ["llm_steps=0", "at least 1", "tokenizer.py"]),
    ({"schedule.tokenizer_steps": 0}, ["tokenizer_steps=0", "at least 1"]),
    ({"codebook.sync_decay": 1.5}, ["sync_decay=1.5", "between 0 and 1"]),
    ({"optimizer.llm.learning_rate": -1e-3}, ["-0.001", "at least 0"]),
    ({"codebook.paradigm": "froze"}, ["'froze'", "'frozen'", "'projected'"]),
    ({"tokenizer.channel_multipliers": "1,0"}, ["(1, 0)", "at least 1"]),
  ],
)
def test_impossible(overrides, fragments):
  with pytest.raises(ConfigError) as error:
    check(overrides)
  message = str(error.value)
  assert "\n" not in message
  assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("key", DEFAULTS)
def test_every_number_has_a_lower_end(key):
  default = DEFAULTS[key]
  kind = type(default[0]) if isinstance(default, tuple) else type(default)
  if kind not in (int, float):
    pytest.skip("not a number")
  with pytest.raises(ConfigError, match=key):
    check({key: kind(-7)})


@pytest.mark.parametrize("key", DEFAULTS)
def test_every_type_is_checked(key):
  wrong = 7 if config_lib._schema()[key][0] is str else "7 or so"
  if isinstance(DEFAULTS[key], tuple):
    wrong = ("text", 7)
  with pytest.raises(ConfigError, match=f"{key}=.* must be"):
    apply_overrides(default_config(), {key: wrong})
  config = default_config().copy_and_resolve_references().unlock()
  holder = config
  *sections, leaf = key.split(".")
  for section in sections:
    holder = holder[section]
  with holder.ignore_type():
    holder[leaf] = object()
  with pytest.raises(ConfigError, match=f"{key}=.* must be"):
    config_lib.validate(config)


def test_no_key_hides_behind_a_method():
  # `config.update` would be a method of ConfigDict, whatever was stored there.
  words = {word for key in DEFAULTS for word in key.split(".")}
  assert not {word for word in words if hasattr(ConfigDict, word)}


def test_tables_name_real_keys():
  for table in (config_lib._CHOICES, config_lib._HINTS):
    assert set(table) <= set(DEFAULTS)
  assert {key for key, *_ in config_lib._PATHS} <= set(DEFAULTS)
  for *_, patterns in config_lib._RANGES:
    for pattern in patterns:
      assert fnmatch.filter(DEFAULTS, pattern), pattern


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "", "x", "True"])
def test_numbers_must_be_finite(value):
  with pytest.raises(ConfigError, match="learning_rate"):
    apply_overrides(default_config(), {"optimizer.llm.learning_rate": value})


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("seed", "3", 3),
    ("optimizer.llm.learning_rate", "3e-4", 3e-4),
    ("optimizer.llm.learning_rate", "1", 1.0),
    ("data.flip", "false", False),
    ("data.flip", "True", True),
    ("data.path", "none", None),
    ("data.path", "123", "123"),
    ("llm.attention_block", "128", 128),
    ("llm.remat_policy", "none", "none"),
    ("tokenizer.channel_multipliers", "1,2,4", (1, 2, 4)),
    ("tokenizer.channel_multipliers", "(1, 2)", (1, 2)),
    ("tokenizer.channel_multipliers", "2", (2,)),
    ("data.weights", "1,3", (1.0, 3.0)),
    ("data.embedded", "easy_vqa,openmoji", ("easy_vqa", "openmoji")),
  ],
)
def test_text_is_read_as_the_keys_type(key, text, value):
  start = default_config()
  got = config_lib.flatten(apply_overrides(start, {key: text}))[key]
  assert got == value and type(got) is type(value)
  assert config_lib.flatten(start) == DEFAULTS


@given(st.sampled_from(sorted(DEFAULTS)), st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_misspelt_key_names_the_right_one(key, where):
  where %= len(key)
  misspelt = key[:where] + key[where + 1 :]
  if misspelt in DEFAULTS:
    return
  with pytest.raises(ConfigError) as error:
    apply_overrides(default_config(), {misspelt: "1"})
  assert key in str(error.value)


@pytest.mark.parametrize(
  ("key", "fragments"),
  [
    ("codebok.paradigm", ["codebook.paradigm"]),
    ("paradigm", ["codebook.paradigm"]),
    ("codebook", ["section", "codebook.paradigm", "codebook.sync_every"]),
    ("zzz", ["'zzz'", "config.py"]),
  ],
)
def test_unknown_key(key, fragments):
  with pytest.raises(ConfigError) as error:
    apply_overrides(default_config(), {key: "1"})
  assert all(fragment in str(error.value) for fragment in fragments)


def test_a_users_own_tree_is_checked():
  config = default_config().unlock()
  config.codebook.paradgm = "frozen"
  with pytest.raises(ConfigError, match=r"codebook\.paradigm"):
    config_lib.validate(config)
  config = default_config().unlock()
  del config.mesh.fsdp
  with pytest.raises(ConfigError, match=r"mesh\.fsdp is missing"):
    config_lib.validate(config)


@given(
  st.fixed_dictionaries(
    {},
    optional={
      "seed": st.integers(0, 2**40),
      "data.path": st.none() | st.text(),
      "text.image_start": st.text(),
      "data.flip": st.booleans(),
      "optimizer.llm.learning_rate": st.floats(0, 1),
      "data.weights": st.lists(st.floats(0, 9), min_size=1).map(tuple),
      "llm.sliding_window": st.none() | st.integers(1, 99),
    },
  )
)
@settings(deadline=None)
def test_json_round_trip(tmp_path_factory, values):
  config = default_config().unlock()
  for key, value in values.items():
    *sections, leaf = key.split(".")
    holder = config[sections[0]] if len(sections) == 1 else config
    if len(sections) == 2:
      holder = config[sections[0]][sections[1]]
    holder[leaf] = value
  path = tmp_path_factory.mktemp("json") / "config.json"
  path.write_text(config_lib.to_json(config), encoding="utf-8")
  loaded = config_lib.load(str(path))
  assert config_lib.flatten(loaded) == config_lib.flatten(config)
  assert config_lib.to_json(loaded) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("{", "not JSON"),
    ("[]", "not a config"),
    ('{"sed": 1}', "seed"),
    ('{"seed": "1"}', "whole number"),
  ],
)
def test_bad_json(tmp_path, text, match):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match=match):
    config_lib.load(str(path))


def test_json_keeps_defaults_for_what_it_lacks(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({"seed": 5}))
  assert config_lib.flatten(config_lib.load(str(path))) == {
    **DEFAULTS,
    "seed": 5,
  }


def test_split_overrides():
  rest, overrides = config_lib.split_overrides(
    [
      "main",
      "--config=a.py",
      "--config.seed=1",
      "--workdir",
      "w",
      "-config.data.path",
      "x=y",
      "--config.seed=2",
      "--config.text.a=",
    ]
  )
  assert rest == ["main", "--config=a.py", "--workdir", "w"]
  assert overrides == {"seed": "2", "data.path": "x=y", "text.a": ""}
  for tail in ([], ["--workdir=w"]):
    with pytest.raises(ConfigError, match=r"--config\.seed=VALUE"):
      config_lib.split_overrides(["main", "--config.seed", *tail])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_devices_that_fit(devices):
  config_lib.check_devices(default_config(), devices)
  config_lib.check_devices(check({"mesh.fsdp": devices}), devices)


@pytest.mark.parametrize(
  ("overrides", "devices", "fragments"),
  [
    ({}, 16, ["text.global_batch_size=8", "16 devices", "such as 16"]),
    (
      {"data.global_batch_size": 9},
      4,
      ["data.global_batch_size=9", "such as 12"],
    ),
    ({"mesh.fsdp": 3}, 8, ["mesh.fsdp=3", "8 devices", "divides"]),
    ({"mesh.data": 2}, 8, ["mesh.data=2", "mesh.data=-1"]),
  ],
)
def test_devices_that_do_not_fit(overrides, devices, fragments):
  with pytest.raises(ConfigError) as error:
    config_lib.check_devices(check(overrides), devices)
  assert all(fragment in str(error.value) for fragment in fragments)
