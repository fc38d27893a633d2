"""Shared by all tests: compile fast, and nothing twice.

Nearly all the time goes into compiling programs that then run for milliseconds.
Many tests train the same small model, so JAX's persistent cache, in a folder of
this run's own, serves them all; and the compiler need not optimize. To test the
programs as they ship, in twice the time: `XLA_FLAGS= python -m pytest`.
"""

import os
import tempfile

# Read when the first device is used.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


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
    runner.loop_config(config),
    sharding.make_mesh(),
    until_step=4,
  )
  return workdir, stage, state
