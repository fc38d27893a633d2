"""What every stage does around its training: checks, data, loop, report."""

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib

import jax
import numpy as np

from unicode_jax import (
  command,
  config as config_lib,
  data as data_lib,
  files,
  loading,
  sharding,
)
from unicode_jax.stages import agreement, run_folder
from unicode_jax.training import guard, loop, phase as phase_lib, report


def load_data(
  config, *, with_text: bool, tokenizer_path: str | None = None
) -> data_lib.Data:
  """Loads what a config names.

  Args:
    config: Resolved ConfigDict.
    with_text: Whether the stage has an LLM.
    tokenizer_path: Text tokenizer to use; None for the config's.

  Returns:
    Images, and texts with their tokenizer.

  Raises:
    ConfigError: If what the config names is not there or of no use.
  """
  text = None
  if with_text:
    text = data_lib.TextConfig(**config.text)
    if tokenizer_path is not None:
      text = dataclasses.replace(text, tokenizer_path=tokenizer_path)
  with agreement.together():
    return data_lib.load_data(
      data_lib.DataConfig(**config.data), text, config.image_size
    )


def loop_config(config, text_tokenizer=None) -> loop.LoopConfig:
  """Takes the loop's settings out of a config.

  Args:
    config: Resolved ConfigDict.
    text_tokenizer: The stage's, None where it has none.
  """
  record = {"config": config_lib.flatten(config)}
  if text_tokenizer is not None:
    record["text_tokenizer"] = text_tokenizer.digest
  return loop.LoopConfig(
    seed=config.seed,
    log_every=config.log_every,
    eval_every=config.eval_every,
    picture_every=config.picture_every,
    checkpoint_every=config.checkpoint_every,
    keep_checkpoints=config.keep_checkpoints,
    record=record,
    recovery=guard.RecoveryConfig(**config.recovery),
    began=command.began(),
  )


@contextlib.contextmanager
def prepared(config, workdir: pathlib.Path) -> Iterator[jax.sharding.Mesh]:
  """Checks devices and run folder, before anything expensive.

  The folder is this run's alone while the block runs.

  Args:
    config: Validated ConfigDict.
    workdir: Run folder.

  Yields:
    The mesh over all devices.

  Raises:
    ConfigError: If the devices or the folder do not fit the config, or
      processes were given different ones.
    InUseError: If another run trains into the folder.
  """
  is_main = jax.process_index() == 0
  agreement.check_devices()
  with contextlib.ExitStack() as stack:
    with agreement.together():
      config_lib.check_devices(
        config,
        jax.device_count(),
        jax.process_count(),
        sharding.count_slices(),
      )
      run_folder.check(workdir, config)
      if is_main:
        stack.enter_context(files.held(workdir))
    agreement.check(config, workdir)
    mesh = sharding.make_mesh(**config.mesh)
    if is_main and mesh.size > 1:
      sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
      print(
        f"{mesh.size} devices ({jax.devices()[0].device_kind}, "
        f"{jax.process_count()} processes): {sizes}",
        flush=True,
      )
    yield mesh


def train_and_report(
  stage: phase_lib.Stage, config, workdir: pathlib.Path, mesh, curves
) -> None:
  """Trains a stage to its end and writes the report.

  Args:
    stage: What to train.
    config: Resolved ConfigDict.
    workdir: Run folder, checked.
    mesh: Device mesh.
    curves: Groups of curves for the report.
  """
  is_main = jax.process_index() == 0
  tokenizer = stage.data.text_tokenizer
  if is_main:
    run_folder.claim(workdir, config)
    if tokenizer is not None:
      tokenizer.save(workdir / loading.TEXT_TOKENIZER)
  loop.train(stage, workdir, loop_config(config, tokenizer), mesh)
  if is_main:
    facts = {
      "stage": config.stage,
      "preset": config.preset or "default",
      "paradigm": config.codebook.paradigm,
      "quantizer": config.tokenizer.quantizer,
      "codes per position": config.tokenizer.depth,
      "codes": f"{int(np.sum(stage.valid))} of {len(stage.valid)} ids",
      "steps": stage.total_steps,
      "seed": config.seed,
      "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "jax": jax.__version__,
    }
    path = report.write_report(
      workdir, f"unicode_jax {config.stage}", facts, curves
    )
    print(f"report: {path}")
