r"""Trains a stage of UniCode, or a chain of them.

The embedded data, on a CPU, from nothing to an evaluated model:
  python -m unicode_jax.main --config=configs/quickstart.py

One stage:
  python -m unicode_jax.main --config=configs/pretrain.py

A preset, with values of your own (unicode_jax/config.py describes each key):
  python -m unicode_jax.main --config=configs/pretrain.py:debug \
    --config.codebook.paradigm=projected --workdir=runs/mine

The exact config of an earlier run:
  python -m unicode_jax.main --config=runs/mine/config.json --workdir=runs/again

The same command again goes on where the run stopped.
"""

from collections.abc import Mapping
import functools
import importlib
import itertools
import os
import pathlib

from absl import flags

from unicode_jax import command, config as config_lib, interruption, processes
from unicode_jax.stages import run_folder

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "FILE.py, FILE.py:PRESET (the file lists them, debug is always one) or a "
  "run's config.json; --config.KEY=VALUE sets one key.",
  required=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; by default runs/STAGE-PRESET."
)


def main(overrides: Mapping[str, str]) -> None:
  """Checks the config, then runs its stage.

  Args:
    overrides: Values of --config.KEY=VALUE.

  Raises:
    ConfigError: If the config cannot run.
  """
  links = config_lib.load_links(_CONFIG.value)
  config = next(iter(links.values()))
  file = pathlib.Path(_CONFIG.value.split(".py:")[0])
  name = file.stem if len(links) > 1 else config.stage
  workdir = pathlib.Path(
    os.path.expanduser(
      _WORKDIR.value or f"runs/{name}-{config.preset or 'default'}"
    )
  )
  links = config_lib.resolve_links(links, overrides, str(workdir))
  config = next(iter(links.values()))
  for link in links.values():
    _suites(link)
  _check_order(links, workdir)
  # JAX takes seconds to import, so only a config that can run gets to it.
  _start_devices(config.platform, config.distributed)
  for name, config in links.items():
    _run_link(name, config, workdir / name)


def _check_order(links: Mapping[str, object], workdir: pathlib.Path) -> None:
  """Raises ConfigError where a link is there, but not what it started from."""
  for before, name in itertools.pairwise(links):
    there = [(workdir / n / "config.json").exists() for n in (before, name)]
    if there == [False, True]:
      raise config_lib.ConfigError(
        f"{workdir / name} started from a run that is no longer in "
        f"{workdir / before}: remove it too, or choose another --workdir"
      )


def _run_link(name: str, config, workdir: pathlib.Path) -> None:
  """Trains one stage and evaluates what it asks for."""
  if name:
    print(f"{name}: {config.stage} in {workdir}", flush=True)
  if name and run_folder.is_finished(workdir, config):
    print(f"{name}: trained already", flush=True)
  else:
    stage = importlib.import_module(f"unicode_jax.stages.{config.stage}")
    stage.run(config, workdir)
  if names := _suites(config):
    if config.distributed:
      import jax  # pylint: disable=g-import-not-at-top

      if jax.process_index():
        return
      print(
        f"evaluate {workdir} by one process: python -m unicode_jax.evaluate "
        f"--workdir={workdir} --suites={','.join(names)}",
        flush=True,
      )
    else:
      _evaluate(workdir, names)


def _suites(config) -> tuple[str, ...]:
  """Returns the suites to evaluate at the end of a run, perhaps none."""
  if config.evaluate is None:
    return ()
  report = importlib.import_module("unicode_jax.evaluation.report")
  return report.parse_suites(config.evaluate, "evaluate")


def _evaluate(workdir: pathlib.Path, names: tuple[str, ...]) -> None:
  """Evaluates a finished run into its own folder."""
  inference = importlib.import_module("unicode_jax.inference")
  bench = importlib.import_module("unicode_jax.evaluation.bench")
  suites = importlib.import_module("unicode_jax.evaluation.suites")
  model = inference.load(workdir)
  out = workdir / "evaluation"
  suites.evaluate(
    model,
    bench.load_data(model.loaded, {}),
    bench.Settings(suites=names),
    out,
    say=functools.partial(print, flush=True),
    again=False,
  )
  print(f"report: {out / 'report.md'}")


def _start_devices(platform: str | None, distributed: bool) -> None:
  """Joins the other processes; raises unless there are devices as asked for."""
  if platform:
    os.environ["JAX_PLATFORMS"] = platform
  if distributed:
    processes.join()
  import jax  # pylint: disable=g-import-not-at-top

  try:
    jax.devices()
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    if "topologies" in reason:  # All processes tell each other what they have.
      command.end(
        interruption.PREEMPTED_STATUS,
        "error: a process of the run does not say which devices it has "
        f"({reason}): see what it says, and start all of them again",
      )
    raise config_lib.ConfigError(
      f"platform={platform!r} cannot be used here ({reason}): install JAX for "
      'it (pip install -e ".[tpu]" or ".[cuda]"), or leave config.platform '
      "unset to take what there is"
    ) from error


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  command.run(
    main, "the same command goes on from the newest checkpoint", overrides=True
  )


if __name__ == "__main__":
  run()
