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

from collections.abc import Mapping, Sequence
import functools
import importlib
import itertools
import os
import pathlib
import sys

from absl import app, flags, logging

from unicode_jax import config as config_lib
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


def main(argv: Sequence[str], overrides: Mapping[str, str]) -> int:
  """Checks the config, then runs its stage.

  Args:
    argv: What is left of the command line after flags: the program's name.
    overrides: Values of --config.KEY=VALUE.

  Returns:
    The exit status.

  Raises:
    ConfigError: If the config cannot run.
  """
  if len(argv) > 1:
    raise config_lib.ConfigError(f"unexpected argument {argv[1]!r}")
  links = config_lib.load_links(_CONFIG.value)
  config = next(iter(links.values()))
  file = pathlib.Path(_CONFIG.value.split(".py:")[0])
  name = file.stem if len(links) > 1 else config.stage
  workdir = pathlib.Path(
    _WORKDIR.value or f"runs/{name}-{config.preset or 'default'}"
  )
  links = config_lib.resolve_links(links, overrides, str(workdir))
  config = next(iter(links.values()))
  for link in links.values():
    _suites(link)
  _check_order(links, workdir)
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # what libraries say is not progress
  if config.platform:
    os.environ["JAX_PLATFORMS"] = config.platform
  # JAX takes seconds to import, so only a config that can run gets to it.
  _check_platform(config.platform)
  for name, config in links.items():
    _run_link(name, config, workdir / name)
  return 0


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


def _check_platform(platform: str | None) -> None:
  """Raises unless JAX has the device that was asked for."""
  import jax  # pylint: disable=g-import-not-at-top

  try:
    jax.devices()
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise config_lib.ConfigError(
      f"platform={platform!r} cannot be used here ({reason}): install JAX for "
      "it, or leave config.platform unset to take what there is"
    ) from error


def run() -> None:
  """Runs the command.

  An error of the config is one line and exit status 2; a run that should not go
  on (collapse, divergence) is one line and exit status 3; Ctrl-C is 130.
  """
  try:
    argv, overrides = config_lib.split_overrides(sys.argv)
    app.run(functools.partial(main, overrides=overrides), argv=argv)
  except config_lib.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print(
      "interrupted: the same command goes on from the newest checkpoint",
      file=sys.stderr,
    )
    sys.exit(130)
  except config_lib.RunError as error:
    print(f"stopped: {error}", file=sys.stderr)
    sys.exit(3)


if __name__ == "__main__":
  run()
