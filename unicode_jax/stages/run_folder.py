"""The run folder: belongs to one config, which it keeps."""

import os
import pathlib

from unicode_jax import config as config_lib, files


def check(workdir: pathlib.Path, config) -> None:
  """Checks that a folder is free or holds a run of this config to resume.

  Args:
    workdir: Run folder.
    config: Resolved ConfigDict.

  Raises:
    ConfigError: If the folder holds a run of another config; names the keys.
  """
  path = workdir / "config.json"
  if path.exists():
    try:
      old = config_lib.flatten(config_lib.from_json(path))
    except config_lib.ConfigError as error:
      raise config_lib.ConfigError(
        f"{error}; move it away, and the same command writes it anew"
      ) from None
    new = config_lib.flatten(config)
    for values in (old, new):  # However the same folder is named.
      if values["init_from"] is not None:
        values["init_from"] = os.path.realpath(values["init_from"])
    differing = [
      f"{key}: {there!r} there, {asked!r} asked for"
      for key, there, asked in config_lib.differences(old, new)
    ]
    if differing:
      raise config_lib.ConfigError(
        f"{workdir} holds a run of another config ({'; '.join(differing)}): "
        "choose another --workdir, or the same config to resume it"
      )


def is_finished(workdir: pathlib.Path, config) -> bool:
  """Says whether a folder holds a run of this config that reached its end.

  Args:
    workdir: Run folder.
    config: Resolved ConfigDict.

  Raises:
    ConfigError: If the folder holds a run of another config.
  """
  check(workdir, config)
  return (workdir / "report.md").exists()


def check_start(workdir: pathlib.Path, fingerprint: str) -> None:
  """Checks that a run goes on from the start that it began with.

  Args:
    workdir: Run folder, checked; the first time, the fingerprint is kept there.
    fingerprint: Of the tokenizer of the run to start from.

  Raises:
    ConfigError: If that run was trained anew in the meantime.
  """
  path = workdir / "start.txt"
  if not path.exists():
    # By every process of the run, all of them with the same text.
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, fingerprint + "\n")
  elif path.read_text().strip() != fingerprint:
    raise config_lib.ConfigError(
      f"{workdir} was begun from another tokenizer than init_from has now, so "
      "its ids mean something else: choose another --workdir, or restore that "
      "run"
    )


def claim(workdir: pathlib.Path, config) -> None:
  """Makes the folder and writes the resolved config into it.

  Args:
    workdir: Run folder, checked.
    config: Resolved ConfigDict.
  """
  path = workdir / "config.json"
  workdir.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, config_lib.to_json(config))
