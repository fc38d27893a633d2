"""Drawing from the command line: what is written, and what is refused."""

import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, generate, inference

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "unicode_jax.generate", *map(str, arguments)],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    },
    capture_output=True,
    text=True,
    timeout=120,
  )


def pixels(path):
  return np.asarray(Image.open(path).convert("RGB"))


def test_files_are_what_the_model_draws(tiny_run, tmp_path):
  def draw(num):
    return generate.draw(
      tiny_run.instruct,
      prompts=["rooster", "a red\ncircle!"],
      class_labels=["red circle"],
      num=num,
      seed=5,
      out=tmp_path / str(num),
      form="files",
    )

  paths = draw(2)
  assert [path.name for path in paths] == [
    "1_rooster_1.png",
    "1_rooster_2.png",
    "2_a-red-circle_1.png",
    "2_a-red-circle_2.png",
    "3_red-circle_1.png",
    "3_red-circle_2.png",
  ]
  questions = ["Draw: rooster", "Draw: a red\ncircle!"]
  codes = tiny_run.model.draw_codes(
    [*questions, "Draw one of: red circle"] * 2, seed=5
  )
  images = tiny_run.model.decode(codes).reshape(2, 3, 16, 16, 3)
  for path, image in zip(paths, images.swapaxes(0, 1).reshape(6, 16, 16, 3)):
    np.testing.assert_array_equal(pixels(path), image)
  # Fewer are the first of these.
  for path in draw(1):
    assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
  assert len(list((tmp_path / "2").iterdir())) == 6


def test_the_command_writes_a_grid(tiny_run, tmp_path):
  flags = [f"--workdir={tiny_run.instruct}", "--num=3", "--seed=1"]
  out = tmp_path / "grid.png"
  result = run(*flags, "--prompt=rooster", "--prompt=Grüße", f"--out={out}")
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout == f"{out}\n"
  captions = ["rooster", "Grüße"] * 3
  images = tiny_run.model.draw(captions, seed=1).reshape(3, 2, 16, 16, 3)
  images = images.swapaxes(0, 1)
  sheet = pixels(out)
  np.testing.assert_array_equal(
    sheet, generate.sheet(images, ["rooster", "Grüße"])
  )
  assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_without_a_prompt_whatever_comes(tiny_run, tmp_path):
  (path,) = generate.draw(
    tiny_run.instruct, num=2, out=tmp_path / "x.png", guidance=7.0
  )
  unguided = inference.dataclasses.replace(
    inference.DRAW_SAMPLING, guidance=1.0
  )
  images = tiny_run.model.draw([None, None], unguided)
  np.testing.assert_array_equal(
    pixels(path), generate.sheet(images[None], ["unconditional"])
  )


def test_a_sheet_has_rows_of_tiles_under_titles():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
  sheet = generate.sheet(images, ["first", "第二 🐓 " + "long " * 200])
  height = sheet.shape[0] // 2
  assert sheet.shape[1] >= 3 * 96
  for r in range(2):
    band = sheet[r * height : (r + 1) * height]
    title, tiles = band[:15], band[15 : 15 + 96]
    assert (title < 128).any() and (title == 255).any()
    for c in range(3):
      tile = tiles[:, c * 98 : c * 98 + 96]
      for dy in range(3):
        for dx in range(3):
          np.testing.assert_array_equal(tile[dy::3, dx::3], images[r, c])
  # The second title is as wide as there is room, and ends in dots.
  np.testing.assert_array_equal(
    generate.sheet(images, ["x", "y" * 500])[height : height + 15],
    generate.sheet(images, ["x", "y" * 600])[height : height + 15],
  )
  # However long a prompt was, its title takes no minutes.
  (row,) = generate._rows(["word " * 100_000], [])
  assert len(row.title) < 2000 and row.question.endswith("word")
  assert generate.sheet(images[:1], [row.title]).shape[1] >= 3 * 96
  # Large pictures stay as they are; one may be narrower than its title.
  large = generate.sheet(images.repeat(4, 2).repeat(4, 3), ["a", "b"])
  assert large.shape[1] == 3 * 130
  assert generate.sheet(images[:, :1], ["a" * 60, ""]).shape[1] > 300


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--num=0"], ["--num=0", "at least 1"]),
    (["--seed=-1"], ["--seed=-1"]),
    (["--prompt= "], ["--prompt=' '", "empty"]),
    (["--class_label="], ["--class_label=''", "empty"]),
    (["--format=gif"], ["'gif'", "grid, files"]),
    (["--out=nowhere/x.png"], ["nowhere", "no folder"]),
    (["--out=x.jpg"], ["x.jpg", ".png"]),
    (["--format=files", "--out=setup.py"], ["setup.py", "folder"]),
    (["red circle"], ["'red circle'", "quotes"]),
  ],
)
def test_a_mistake_is_one_line_before_jax(arguments, fragments):
  code = (
    "import sys\n"
    "from unicode_jax import generate\n"
    "sys.argv = ['generate', '--workdir=nowhere', *sys.argv[1:]]\n"
    "try: generate.run()\n"
    "finally: print('jax' in sys.modules)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (result.returncode, result.stdout) == (2, "False\n"), result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
  ("settings", "fragment"),
  [({"top_p": 2.0}, "top_p=2"), ({"guidance": -1.0}, "guidance=-1")],
)
def test_sampling_is_checked_before_the_run(tmp_path, settings, fragment):
  out = tmp_path / "x.png"
  with pytest.raises(config_lib.ConfigError, match=fragment):
    generate.draw("nowhere", prompts=["x"], out=out, **settings)
  with pytest.raises(config_lib.ConfigError, match="nowhere holds no run"):
    generate.draw("nowhere", prompts=["x"], out=out)


def test_stage_one_draws_with_a_note(tiny_run, tmp_path, capsys):
  generate.draw(tiny_run.pretrain, num=2, out=tmp_path / "x.png")
  assert "stage I" in capsys.readouterr().err
  assert (tmp_path / "x.png").is_file()


def test_help_takes_less_than_a_second_and_names_the_defaults():
  def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

  before = cpu_seconds()
  result = run("--help")
  assert cpu_seconds() - before < 1
  for name in ("temperature", "top_k", "top_p", "guidance"):
    default = getattr(inference.DRAW_SAMPLING, name)
    found = result.stdout.partition(f"--{name}:")[2].partition("'")[2]
    assert float(found.partition("'")[0]) == default, name
