"""docs/own_data.md: the example makes data, and its commands read them."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from unicode_jax import config as config_lib, data as data_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
MAKE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
PREPARE = shlex.split(
  re.search(r"^python (-m unicode_jax\.prepare --from=folder.*)", PAGE, re.M)[1]
)
COMMANDS = [
  shlex.split(line)[3:]
  for line in re.findall(r"^python -m unicode_jax\.main .*", PAGE, re.MULTILINE)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("example")
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  for command in (["-c", MAKE], PREPARE):
    subprocess.run(
      [sys.executable, *command], cwd=folder, check=True, env=environment
    )
  return folder


def config_of(command):
  """Returns the config that a command of the page names."""
  values = dict(flag.removeprefix("--").split("=", 1) for flag in command)
  config = config_lib.load(str(ROOT / values["config"]))
  overrides = {
    key.removeprefix("config."): value
    for key, value in values.items()
    if key.startswith("config.")
  }
  if "init_from" in overrides:
    overrides["init_from"] = "."  # The run that the page's first command makes.
  return config_lib.apply_overrides(config, overrides)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[-1])
def test_the_commands_read_what_the_example_makes(
  made, command, monkeypatch, tmp_path
):
  monkeypatch.chdir(made)
  config = config_of(command)
  config_lib.validate(config)
  options = dict(config.data, cache_dir=str(tmp_path))
  loaded = data_lib.load_data(
    data_lib.DataConfig(**options), data_lib.TextConfig(**config.text), 8
  )
  train, heldout = *loaded.image_sources, *loaded.heldout_sources
  assert len(train) + len(heldout) == 60 and len(heldout) > 2
  said = [a for source in (train, heldout) for a in source.annotations]
  if config.data.source == "llava":
    assert {len(a.dialogues) for a in said} == {1}
    assert {len(a.dialogues[0]) for a in said} == {2}
    sums = [
      [c for c in texts if c.turns[0][0].startswith("What is")]
      for texts in (loaded.train_texts, loaded.heldout_texts)
    ]
    assert sums[0] and sums[1]
    questions = [c.turns[0][0] for side in sums for c in side]
    assert sum(" plus " in question for question in questions) == 40
  assert {len(a.captions) for a in said} == (
    {1} if config.data.captions or config.data.source == "arrayrecord" else {0}
  )


def test_the_page_shows_every_way_in():
  shown = [config_of(command).data.source for command in COMMANDS]
  assert shown == ["llava", "llava", "folder", "arrayrecord"]
  stages = [config_of(command).stage for command in COMMANDS]
  assert stages == ["pretrain", "instruct", "pretrain", "pretrain"]
  for name in ("embedded", "folder", "llava", "tfds", "arrayrecord"):
    assert f"| `{name}` |" in PAGE
