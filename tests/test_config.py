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
INSTRUCT = {"stage": "instruct", "init_from": "."}
NO_TASKS = {key: 0 for key in DEFAULTS if key.startswith("instruct.tasks.")}


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
    INSTRUCT,
    INSTRUCT | {"instruct.segments": 16, "data.codes": "."},
    INSTRUCT | HQ | {"instruct.vision": "projector"},
    INSTRUCT | NO_TASKS | {"instruct.tasks.text": 1},
    NO_TASKS,  # Read by stage II alone.
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
    ({"mesh.fsdp": -1}, ["mesh.data=-1", "mesh.fsdp=-1", "only one"]),
    ({"mesh.tensor": 0}, ["mesh.tensor=0"]),
    (
      {"llm.attention": "splash", "text.sequence_length": 100},
      ["llm.attention='splash'", "text.sequence_length=100", "128"],
    ),
    (
      {"llm.attention": "cudnn", "platform": "cpu"},
      ["llm.attention='cudnn'", "platform='cpu'", "auto"],
    ),
    ({"llm.attention": "cudnn"}, ["llm.dtype='float32'", "bfloat16"]),
    ({"data.source": "folder"}, ["'folder'", "folder of images", "data.path="]),
    ({"data.source": "llava"}, ["'llava'", "data.path="]),
    (
      {"data.source": "llava", "data.path": "."},
      ["'llava'", "data.conversations="],
    ),
    ({"data.source": "tfds"}, ["'tfds'", "data.tfds="]),
    (
      {"data.path": "."},
      [
        "data.path is set",
        "source='embedded'",
        "'folder' or 'llava' or 'tfds'",
      ],
    ),
    (
      {"data.conversations": __file__},
      ["data.conversations is set", "data.source='llava'"],
    ),
    (
      {"data.source": "folder", "data.path": ".", "data.tfds": "x"},
      ["data.tfds is set", "source='folder'", "data.source='tfds'"],
    ),
    (
      INSTRUCT | {"init_from": None},
      ["'instruct'", "pretrain.py", "init_from"],
    ),
    (PRIVATE | {"init_from": "."}, ["init_from='.'", "'tokenizer'", "unset"]),
    ({"data.codes": "."}, ["data.codes='.'", "'pretrain'", "unset"]),
    (
      INSTRUCT | {"data.codes": ".", "instruct.vision": "projector"},
      ["data.codes='.'", "'projector'", "features", "unset"],
    ),
    (INSTRUCT | NO_TASKS, ["instruct.tasks", "all 0", "share"]),
    (
      INSTRUCT | {"instruct.segments": 17},
      ["instruct.segments=17", "16 positions", "at most 16"],
    ),
    (
      INSTRUCT | HQ | {"instruct.segments": 5},
      ["instruct.segments=5", "4 positions", "at most 4"],
    ),
    (INSTRUCT | {"instruct.segments": 0}, ["segments=0", "at least 1"]),
    (
      INSTRUCT | {"instruct.condition_dropout": 1.1},
      ["condition_dropout=1.1", "between 0 and 1"],
    ),
    (INSTRUCT | {"instruct.tasks.vqa": -0.1}, ["tasks.vqa=-0.1", "at least 0"]),
    ({"instruct.vision": "unify"}, ["'unify'", "'separate'", "'projector'"]),
    ({"instruct.template": "llama"}, ["'llama'", "'plain'", "'chatml'"]),
    (
      {"data.source": "folder", "data.path": "nowhere"},
      ["data.path='nowhere'", "not a folder"],
    ),
    ({"text.tokenizer_path": "nowhere"}, ["'nowhere'", "not a file"]),
    ({"data.embedded": "cifar"}, ["cifar", "openmoji"]),
    ({"data.embedded": "openmoji"}, ["weights=(0.5, 0.5)", "('openmoji',)"]),
    ({"data.shift": 32}, ["data.shift=32", "image_size=32", "few pixels"]),
    (
      {"data.validation_fraction": 0.95},
      ["validation_fraction=0.95", "between 0 and 0.9"],
    ),
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


# Halves of characters are refused.
NAMES = st.text(
  st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)


@given(
  st.fixed_dictionaries(
    {},
    optional={
      "seed": st.integers(0, 2**40),
      "data.path": st.none() | NAMES,
      "text.image_start": NAMES,
      "data.flip": st.booleans(),
      "optimizer.llm.learning_rate": st.floats(0, 1),
      "data.weights": st.lists(st.floats(0, 9), min_size=1, max_size=16).map(
        tuple
      ),
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


def start_run(folder, **overrides):
  """Writes the config of a run to start from."""
  folder.mkdir(exist_ok=True)
  start = apply_overrides(default_config(), overrides)
  (folder / "config.json").write_text(config_lib.to_json(start))
  return str(folder)


def stage_two(run, **overrides):
  return apply_overrides(
    default_config(), {"stage": "instruct", "init_from": run, **overrides}
  )


# One value in every section that comes from the start, unlike the default.
STARTED = {
  "image_size": 64,
  "data.heldout_fraction": 0.2,
  "text.tokenizer_path": "configs",
  "text.vocab_size": 4096,
  "text.heldout_fraction": 0.3,
  "text.image_start": "<a>",
  "text.image_end": "<b>",
  "tokenizer.channel_multipliers": (1, 2, 2),
  "tokenizer.loss.l1": 0.5,
  "codebook.paradigm": "projected",
  "codebook.code_dim": 24,
  "llm.embed_dim": 64,
  "llm.sliding_window": 7,
  "llm.rope_scaling.factor": 2.0,
}
# What comes of it: the start has its own copy of the text tokenizer, and what
# the start itself was made from may be gone by now.
TAKEN = STARTED | {"text.tokenizer_path": None}
# And some that stage II decides for itself.
OWN = {
  "seed": 5,
  "num_steps": 7,
  "data.global_batch_size": 12,
  "text.sequence_length": 99,
  "optimizer.llm.learning_rate": 0.5,
  "instruct.segments": 2,
}


def test_stage_two_takes_the_model_of_its_start(tmp_path):
  run = start_run(tmp_path / "run", **STARTED, **OWN, preset="smollm2")
  mine = {"text.sequence_length": 50, "instruct.vision": "separate"}
  config = stage_two(run, **mine)
  before = config_lib.flatten(config)
  # What a preset says of the model is not what a user chose.
  config = apply_overrides(config, {"llm.embed_dim": 999})
  inherited = config_lib.inherit(config, tuple(mine))
  assert config_lib.flatten(inherited) == before | TAKEN
  assert inherited.is_locked
  config_lib.validate(inherited)
  # Nothing changes the second time, nor the config that was given.
  again = config_lib.inherit(inherited, tuple(mine))
  assert config_lib.flatten(again) == config_lib.flatten(inherited)
  assert config.llm.embed_dim == 999
  # A run of stage II may be the start of another, to the same model.
  (tmp_path / "two").mkdir()
  path = tmp_path / "two" / "config.json"
  path.write_text(config_lib.to_json(inherited))
  third = config_lib.inherit(stage_two(str(path.parent)))
  flat = config_lib.flatten(third)
  assert {key: flat[key] for key in TAKEN} == TAKEN
  assert third.instruct.vision == "unified" and third.seed == 0


@pytest.mark.parametrize("key", ["image_size", "codebook.code_dim"])
def test_the_model_of_the_start_cannot_be_chosen(tmp_path, key):
  run = start_run(tmp_path, **STARTED)
  with pytest.raises(ConfigError) as error:
    config_lib.inherit(stage_two(run, **{key: 8}), (key,))
  for fragment in (f"{key}=8", run, str(STARTED[key]), "leave it unset"):
    assert fragment in str(error.value)
  # Saying what it is anyway is no contradiction.
  same = stage_two(run, **{key: STARTED[key]})
  flat = config_lib.flatten(config_lib.inherit(same, (key,)))
  assert {k: flat[k] for k in TAKEN} == TAKEN


def test_rounding_of_the_visual_tokenizer_cannot_be_chosen(tmp_path):
  """It decides the codes."""
  run = start_run(tmp_path)
  mine = {"tokenizer.dtype": "bfloat16"}
  with pytest.raises(ConfigError, match="dtype='bfloat16'"):
    config_lib.inherit(stage_two(run, **mine), tuple(mine))


def test_files_that_only_the_start_needed_may_be_gone(tmp_path):
  gone = {
    "text.tokenizer_path": str(tmp_path / "gone"),
    "text.vocab_size": 49152,
    "tokenizer.loss.perceptual_weights": str(tmp_path / "gone.npz"),
  }
  run = start_run(tmp_path, **gone)
  config_lib.validate(config_lib.inherit(stage_two(run)))


def test_the_users_folder_is_where_the_shell_has_it(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  config = apply_overrides(default_config(), {"data.path": "~/pictures"})
  assert config.data.path == str(tmp_path / "pictures")


def test_what_only_costs_time_may_be_chosen(tmp_path):
  run = start_run(tmp_path, **STARTED, **{"llm.remat_policy": "full"})
  mine = {"llm.dtype": "bfloat16", "llm.attention_block": 64}
  config = config_lib.inherit(stage_two(run, **mine), tuple(mine))
  assert config.llm.dtype == "bfloat16" and config.llm.attention_block == 64
  assert config.llm.remat_policy == "full"
  assert set(config_lib._RUNTIME) <= set(DEFAULTS)
  for key in {key for keys in config_lib.INHERITED.values() for key in keys}:
    assert any(k == key or k.startswith(f"{key}.") for k in DEFAULTS), key


@pytest.mark.parametrize(
  ("stage", "start", "fragments"),
  [
    (INSTRUCT, PRIVATE, ["'tokenizer'", "'instruct'", "configs/pretrain.py"]),
    ({}, {}, ["'pretrain'", "cannot start", "configs/tokenizer.py"]),
    ({}, INSTRUCT, ["'instruct'", "'pretrain'", "configs/tokenizer.py"]),
  ],
)
def test_starts_that_do_not_fit(tmp_path, stage, start, fragments):
  """A start without an LLM, or with one that stage I would throw away."""
  config = apply_overrides(
    default_config(), stage | {"init_from": str(tmp_path)}
  )
  with pytest.raises(ConfigError, match=r"no config.json in it.*init_from=RUN"):
    config_lib.inherit(config)
  start_run(tmp_path, **start)
  with pytest.raises(ConfigError) as error:
    config_lib.inherit(config)
  for fragment in (str(tmp_path), *fragments):
    assert fragment in str(error.value)


def test_stage_one_takes_the_tokenizer_alone(tmp_path):
  private = {key: v for key, v in STARTED.items() if key != "codebook.paradigm"}
  run = start_run(tmp_path, **PRIVATE, **private)
  config = apply_overrides(default_config(), {"init_from": run})
  inherited = config_lib.flatten(config_lib.inherit(config))
  expected = {
    key: STARTED[key]
    for key in (
      "image_size",
      "data.heldout_fraction",
      "tokenizer.channel_multipliers",
      "tokenizer.loss.l1",
      "codebook.code_dim",
    )
  }
  assert inherited == DEFAULTS | expected | {"init_from": run}
  # A start that has not been written yet, in a chain of stages.
  start = config_lib.from_json(tmp_path / "config.json")
  nowhere = apply_overrides(config, {"init_from": str(tmp_path / "no")})
  later = config_lib.inherit(nowhere, (), start)
  assert config_lib.flatten(later) == inherited | {
    "init_from": str(tmp_path / "no")
  }


def test_without_a_start_nothing_is_inherited(tmp_path):
  run = start_run(tmp_path, **STARTED)
  for overrides in ({}, {"stage": "instruct"}, PRIVATE | {"init_from": run}):
    config = apply_overrides(default_config(), overrides)
    assert config_lib.inherit(config) is config


@pytest.mark.parametrize(
  ("overrides", "expected"),
  [({}, 16), (HQ, 4), ({"image_size": 64, "tokenizer.stem_patch": 8}, 16)],
)
def test_positions_that_the_llm_reads(overrides, expected):
  assert config_lib.positions(check(overrides)) == expected


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
    (INSTRUCT, 32, ["instruct.global_batch_size=16", "such as 32"]),
    ({"mesh.fsdp": 3}, 8, ["mesh.fsdp=3", "8 devices", "divides"]),
    ({"mesh.data": 2}, 8, ["mesh.data=2", "mesh.data=-1"]),
    ({"mesh.fsdp": 16}, 8, ["mesh.fsdp=16", "8 devices"]),
    (
      {"mesh.tensor": 4},
      8,
      ["llm.num_heads=6", "mesh.tensor=4", "divisor"],
    ),
    (
      INSTRUCT | {"microbatches": 4},
      8,
      ["instruct.global_batch_size=16", "microbatches", "such as 32"],
    ),
  ],
)
def test_devices_that_do_not_fit(overrides, devices, fragments):
  with pytest.raises(ConfigError) as error:
    config_lib.check_devices(check(overrides), devices)
  assert all(fragment in str(error.value) for fragment in fragments)


def test_tensor_does_not_cross_slices():
  config = check({"mesh.tensor": 2})
  config_lib.check_devices(config, 4, num_slices=2)
  with pytest.raises(
    config_lib.ConfigError, match=r"mesh\.tensor=2.* each of 4"
  ):
    config_lib.check_devices(config, 4, num_slices=4)
