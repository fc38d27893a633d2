"""Data and commands of tiny runs."""

import json

import numpy as np
from PIL import Image
import pytest

from tests.crashes import harness

# So many checkpoints that many processes can each write one.
STAGE_ONE = (
  "--config=configs/pretrain.py:debug",
  "--config.num_steps=60",
  "--config.keep_checkpoints=1000",
  "--config.checkpoint_every=3",
  "--config.log_every=3",
  "--config.eval_every=30",
  "--config.picture_every=60",
)


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory):
  """Flags of a run on a folder of pictures with captions."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  with (folder / "captions.jsonl").open("w") as file:
    for i in range(60):
      pixels = rng.integers(0, 256, (5, 5, 3), np.uint8)
      image = Image.fromarray(pixels).resize((20, 20), Image.Resampling.NEAREST)
      image.save(folder / f"{i}.png")
      line = {"image": f"{i}.png", "text": f"picture {i} of many colours"}
      file.write(json.dumps(line) + "\n")
  return [
    "--config.data.source=folder",
    f"--config.data.path={folder}",
    f"--config.data.captions={folder}/captions.jsonl",
    f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
  ]


@pytest.fixture(scope="session")
def stage_one(data_flags):
  """Returns a function: the command that trains stage I into a folder."""

  def make(workdir, *flags):
    return harness.Command(
      "main",
      [*STAGE_ONE, *data_flags, f"--workdir={workdir}", *flags],
      workdir.with_suffix(".log"),
    )

  return make


@pytest.fixture(scope="session")
def straight(stage_one, tmp_path_factory):
  """A run of it that nothing has interrupted."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  command = stage_one(workdir)
  assert command.finish() == 0, command.said()[-3000:]
  return workdir
