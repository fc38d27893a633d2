"""Shared by all tests: compile fast, and nothing twice.

Nearly all the time goes into compiling programs that then run for milliseconds.
Many tests train the same small model, so JAX's persistent cache, in a folder of
this run's own, serves them all; and the compiler need not optimize. To test the
programs as they ship, in twice the time: `XLA_FLAGS= python -m pytest`.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

# Read when the first device is used.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

# Of each source, for the tiny run of stage II.
IMAGES = 120


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Frees a file's compiled programs when its tests are done.

  Each takes memory maps, of which Linux grants a process 65530; the compiler
  crashes beyond. What another file needs too is read from the cache.
  """
  yield
  jax.clear_caches()


def pytest_configure(config):
  folder = tempfile.TemporaryDirectory(prefix="unicode_jax_tests_")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory):
  """A tiny run of stage I, one cycle long: (run folder, stage, state).

  It stops before the snap, so that codebook and token table differ.
  """
  from configs import pretrain as pretrain_config
  from unicode_jax import config as config_lib, loading, sharding
  from unicode_jax.stages import pretrain, run_folder, runner
  from unicode_jax.training import loop

  config = config_lib.apply_overrides(
    pretrain_config.get_config("debug"),
    {
      "checkpoint_every": 2,
      "eval_every": 1000,
      "picture_every": 1000,
    },
  )
  workdir = tmp_path_factory.mktemp("stage_one")
  data = runner.load_data(config, with_text=True)
  stage = pretrain.PretrainStage(
    config,
    data,
    loading.build_model(config),
    loading.valid_codes(config, data.text_tokenizer),
  )
  # As `runner.train_and_report`, without what ends a run.
  run_folder.claim(workdir, config)
  data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  state = loop.train(
    stage,
    workdir,
    runner.loop_config(config, data.text_tokenizer),
    sharding.make_mesh(),
    until_step=4,
  )
  return workdir, stage, state


@pytest.fixture(scope="session")
def host_devices():
  """Returns a function: the environment of a process with n CPU devices."""

  def environment(count: int) -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"]
    return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
      # Collectives block threads: as many as devices are too few, and wait for
      # each other until XLA gives up.
      "PJRT_NPROC": "64",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }

  return environment


@pytest.fixture
def small_disk(tmp_path):
  """Returns a function: a folder on a disk of so many bytes.

  It takes a system that lets this user mount one.
  """
  mounted = []

  def mount(size: int) -> pathlib.Path:
    folder = tmp_path / f"disk{len(mounted)}"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
      pytest.skip("this user may not mount a disk")
    mounted.append(folder)
    return folder

  yield mount
  for folder in mounted:
    subprocess.run(["umount", "--lazy", folder], check=True)


class TinyRun(NamedTuple):
  """A run of stage II, and what it was made of.

  Attributes:
    pretrain: run folder of stage I.
    stage_one: its stage and state.
    instruct: run folder of stage II.
    data: what it was trained and evaluated on: few images.
    model: `inference.UniCodeModel` of its last step, 8; there is a checkpoint
      of step 4 too.
  """

  pretrain: pathlib.Path
  stage_one: tuple[Any, Any]
  instruct: pathlib.Path
  data: Any
  model: Any


@pytest.fixture(scope="session")
def tiny_run(stage_one, tmp_path_factory):
  """A tiny run of stage II on few images: a `TinyRun`."""
  from configs import instruct as instruct_config
  from unicode_jax import config as config_lib, inference, loading, sharding
  from unicode_jax.stages import instruct, run_folder, runner
  from unicode_jax.training import loop

  pretrain, *stage_and_state = stage_one
  workdir = tmp_path_factory.mktemp("stage_two")
  config = config_lib.apply_overrides(
    instruct_config.get_config("debug"), {"init_from": str(pretrain)}
  )
  config = config_lib.validate(config_lib.inherit(config))
  data = runner.load_data(
    config,
    with_text=True,
    tokenizer_path=str(pretrain / loading.TEXT_TOKENIZER),
  )

  def few(sources):
    return tuple(
      dataclasses.replace(
        source,
        items=source.items[:IMAGES],
        annotations=source.annotations[:IMAGES],
      )
      for source in sources
    )

  data = dataclasses.replace(
    data,
    image_sources=(data.image_sources[0], few(data.image_sources)[1]),
    heldout_sources=few(data.heldout_sources),
    heldout_images={k: v[:IMAGES] for k, v in data.heldout_images.items()},
  )
  stage = instruct.InstructStage(config, data, loading.load(pretrain))
  run_folder.claim(workdir, config)
  data.text_tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  loop.train(stage, workdir, runner.loop_config(config), sharding.make_mesh())
  return TinyRun(
    pretrain, tuple(stage_and_state), workdir, data, inference.load(workdir)
  )
