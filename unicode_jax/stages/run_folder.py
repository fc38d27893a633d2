"""The run folder: claims it for one config and keeps that config in it."""

import pathlib

from absl import logging

from unicode_jax import config as config_lib

# Keys that may differ when a run is resumed: they do not change its numbers.
FREE_KEYS = (
  "log_every",
  "eval_every",
  "picture_every",
  "checkpoint_every",
  "keep_checkpoints",
  "platform",
  "data.cache_dir",
  "data.num_workers",
  "mesh",
)


def claim(workdir: pathlib.Path, config) -> None:
  """Writes the resolved config, or checks that it is the one already there.

  Args:
    workdir: Run folder, made if missing.
    config: Resolved ConfigDict.

  Raises:
    ConfigError: If the folder holds a run of another config; names the keys.
  """
  path = workdir / "config.json"
  if path.exists():
    old = config_lib.flatten(config_lib.from_json(path))
    new = config_lib.flatten(config)
    differing = [
      f"{key}: {old.get(key)!r} there, {new.get(key)!r} asked for"
      for key in sorted(old.keys() | new.keys())
      if old.get(key) != new.get(key)
      and not any(key == k or key.startswith(k + ".") for k in FREE_KEYS)
    ]
    if differing:
      raise config_lib.ConfigError(
        f"{workdir} holds a run of another config ({'; '.join(differing)}): "
        "choose another --workdir, or the same config to resume it"
      )
    logging.info("resuming the run in %s", workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(config_lib.to_json(config))
  temporary.replace(path)
