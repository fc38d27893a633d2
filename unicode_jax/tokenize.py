r"""Encodes a data set once, so that stage II need not do it at every step.

The images that a run was trained on:
  python -m unicode_jax.tokenize --workdir=runs/pretrain-default --out=codes

Other images (unicode_jax/config.py describes the keys of --config.data):
  python -m unicode_jax.tokenize --workdir=runs/pretrain-default --out=codes \
    --config.data.source=folder --config.data.path=pictures

Then train with the same --config.data and --config.data.codes=codes. The same
command again goes on where this one stopped, or repairs what is damaged.
"""

from collections.abc import Mapping
import os

from absl import flags

from unicode_jax import command, config as config_lib


def main(overrides: Mapping[str, str]) -> None:
  """Encodes what the flags name.

  Args:
    overrides: Values of --config.data.KEY=VALUE.

  Raises:
    ConfigError: If a flag names nothing that can be used.
  """
  values = flags.FLAGS
  encode_data_set(
    values.workdir,
    values.out,
    overrides,
    images_per_shard=values.images_per_shard,
  )


def encode_data_set(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  overrides: Mapping[str, str] | None = None,
  *,
  images_per_shard: int | None = None,
) -> None:
  """Writes the codes of all training images of a data set (H12).

  Args:
    workdir: Run whose tokenizer encodes, of any stage.
    out: Folder for the codes; one that was begun is finished.
    overrides: Values of `data.KEY`, which replace the run's own.
    images_per_shard: In one file; None for the default.

  Raises:
    ConfigError: If there is no such run or data, or the folder holds codes of
      another tokenizer or other images.
  """
  overrides = overrides or {}
  config_lib.apply_overrides(config_lib.default_config(), overrides)
  for key in overrides:
    if not key.startswith("data.") or key == "data.codes":
      raise config_lib.ConfigError(
        f"--config.{key} cannot be set here: --config.data.KEY=VALUE names the "
        "images, and the run decides all else"
      )
  config_lib.read_run(workdir)
  # JAX takes seconds to import, so only flags that can work get to it.
  import jax

  from unicode_jax import data as data_lib, encoding, loading
  from unicode_jax.data import views as views_lib

  loaded = loading.load(workdir)
  # The run's other settings are no concern of ours, such as paths of its start.
  config = config_lib.validate(
    config_lib.apply_overrides(
      config_lib.default_config(),
      config_lib.flatten(loaded.config.data, "data.")
      | dict(overrides)
      | {"data.codes": None, "image_size": loaded.config.image_size},
    )
  )
  sources = data_lib.load_data(
    data_lib.DataConfig(**config.data), None, loaded.config.image_size
  ).image_sources
  encoding.encode_sources(
    loaded,
    sources,
    out,
    views=views_lib.views(config.data.flip, config.data.shift),
    batch_size=config.data.global_batch_size,
    images_per_shard=images_per_shard,
  )
  if jax.process_index() == 0:
    print(f"train with --config.data.codes={out}")


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  # Defined here, so that another command's flags can be beside them.
  flags.DEFINE_string(
    "workdir", None, "Run folder of stage I, II or a tokenizer.", required=True
  )
  flags.DEFINE_string("out", None, "Folder for the codes.", required=True)
  flags.DEFINE_integer(
    "images_per_shard",
    None,
    "Images in one file, by default 8192; an interruption loses at most one.",
    lower_bound=1,
    upper_bound=10**9,
  )
  command.run(main, "the same command goes on from here", overrides=True)


if __name__ == "__main__":
  run()
