r"""Evaluates a trained run: reconstruction, drawing, answers, language.

  python -m unicode_jax.evaluate --workdir=runs/mine

Some suites only, on fewer pictures (suites: reconstruction, generation, vqa,
pope, caption, text, decompression, pictures):
  python -m unicode_jax.evaluate --workdir=runs/mine --suites=vqa,pope \
    --max_images=100

Other data than the run's (unicode_jax/config.py):
  python -m unicode_jax.evaluate --workdir=runs/mine \
    --config.data.source=folder --config.data.path=DIR

Pictures of another size than the run was trained on:
  python -m unicode_jax.evaluate --workdir=runs/mine --config.image_size=40 \
    --out=runs/mine/evaluation_40

Writes results.json and report.md to RUN/evaluation, or to --out.
"""

from collections.abc import Mapping
import functools
import os
import pathlib

from absl import flags

from unicode_jax import command, config as config_lib
from unicode_jax.evaluation import report

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Run folder, of any stage.", required=True
)
_SUITES = flags.DEFINE_string(
  "suites", "all", "Suites to run, separated by commas; or all."
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for the results; by default WORKDIR/evaluation."
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint to evaluate; by default the newest.", lower_bound=0
)
_MAX_IMAGES = flags.DEFINE_integer(
  "max_images",
  None,
  "Pictures of each held-out set, and drawings of each kind, at most; by "
  "default all, and some hundred drawings.",
  lower_bound=1,
  upper_bound=10**9,
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Seed of what is drawn at random.",
  lower_bound=0,
  upper_bound=2**31 - 1,
)
_GUIDANCE = flags.DEFINE_float(
  "guidance",
  None,
  "Classifier-free guidance of drawings; 1 is off, unset takes the default.",
)
_FEATURES = flags.DEFINE_string(
  "features",
  "pixels",
  "Networks that tell sets of pictures apart, separated by commas: pixels, "
  "efficientnet-lite0, clip:FOLDER. All but pixels are slow on a CPU.",
)
_PERCEPTUAL = flags.DEFINE_bool(
  "perceptual",
  True,
  "Whether to measure the perceptual distance of reconstructions: 0.1 s a "
  "picture on a CPU.",
)


def main(overrides: Mapping[str, str]) -> None:
  """Loads a run and its data, and evaluates it.

  Args:
    overrides: Values of --config.KEY=VALUE; only data.* and image_size may be
      set.

  Raises:
    ConfigError: If the run, the data or a flag is of no use.
  """
  names = report.parse_suites(_SUITES.value)
  features = tuple(_FEATURES.value.split(","))
  for name in features:
    report.check_feature_network(name)
  if _GUIDANCE.value is not None:
    config_lib.check_sampling({"guidance": _GUIDANCE.value})
  config_lib.apply_overrides(config_lib.default_config(), overrides)
  workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
  config = config_lib.read_run(workdir)
  overrides = dict(overrides)
  size = {k: overrides.pop(k) for k in ("image_size",) if k in overrides}
  resized = config_lib.check_model(config_lib.apply_overrides(config, size))
  # JAX takes seconds to import.
  from unicode_jax import inference, loading  # pylint: disable=g-import-not-at-top
  from unicode_jax.evaluation import bench, suites  # pylint: disable=g-import-not-at-top

  settings = bench.Settings(
    suites=names,
    max_images=_MAX_IMAGES.value,
    seed=_SEED.value,
    guidance=_GUIDANCE.value,
    features=features,
    perceptual=_PERCEPTUAL.value,
  )
  model = inference.load(workdir, _STEP.value)
  if size:
    loaded = loading.at_image_size(model.loaded, resized.image_size)
    model = inference.UniCodeModel(loaded)
  data = bench.load_data(model.loaded, overrides)
  out = pathlib.Path(os.path.expanduser(_OUT.value or workdir / "evaluation"))
  suites.evaluate(
    model, data, settings, out, say=functools.partial(print, flush=True)
  )
  print(f"report: {out / report.REPORT}")


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  command.run(main, "suites that were done are kept", overrides=True)


if __name__ == "__main__":
  run()
