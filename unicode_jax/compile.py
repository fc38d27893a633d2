r"""Compiles the programs of a config for devices that are not here.

  pip install -e ".[tpu]"
  python -m unicode_jax.compile --config=configs/instruct.py:paper \
    --topology=v5e:16x16

It says, before anything is paid for, whether the train steps and the decoding
fit, how they are laid out and what bounds their speed. The TPU compiler does
this on any Linux machine; topologies are v5e:XxY, v5p:XxYxZ and v6e:XxY, as
Cloud TPU names them, and --slices=2 is two of them. cpu:N compiles for N
processors of this machine, which shows layouts and exchanges, but no times.

--search compiles the train steps on every sensible mesh, as long for each as
without it, and ranks them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re

from absl import flags

from unicode_jax import command, config as config_lib

# How Cloud TPU writes slices: chips along each of two or three axes.
_SLICE = r"v\d\w*:[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}"
_SUCH_AS = "use one such as v5e:4x4, v5p:2x2x2, v6e:4x4 or cpu:8"
_MOST_PROCESSORS = 1024
# What the data is does not change a program, nor which tokens mean what.
_DATA_KEYS = ("data.path", "data.captions", "data.conversations", "data.tfds")
_NOT_READ = {*_DATA_KEYS, "data.source", "text.tokenizer_path"}


def load_configs(spec: str, overrides: Mapping[str, str]) -> dict:
  """Resolves a config as for training, without its data or the run it needs.

  Args:
    spec: Of --config.
    overrides: Values of --config.KEY=VALUE.

  Returns:
    Validated configs by link. Folders of data, which may be those of a pod,
    need not be there. Stage II takes its model from the run that it starts
    from, or from the preset of the same name of pretrain.py beside it if there
    is no such run.

  Raises:
    ConfigError: If the config cannot run.
  """
  links = config_lib.load_links(spec)
  for name, config in links.items():
    not_read = {key: {key, f"{name}.{key}"} & {*overrides} for key in _NOT_READ}
    for key, given in not_read.items():
      for chosen in given:  # It is to be right all the same.
        tried = config_lib.apply_overrides(config, {key: overrides[chosen]})
        config_lib.check_model(tried)
    links[name] = _without_data(config)
    given = set().union(*not_read.values())
    overrides = {k: v for k, v in overrides.items() if k not in given}
  config = links.get("")
  if config is None or config.stage != "instruct":
    return config_lib.resolve_links(links, overrides, "run")
  config = config_lib.apply_overrides(config, overrides)
  start = pathlib.Path(config.init_from or "") / "config.json"
  given = None
  if not start.is_file():
    path = pathlib.Path(spec.split(".py:")[0]).parent / "pretrain.py"
    given = config_lib.load(f"{path}:{config.preset}")
    preset = f"{path}:{config.preset}".rstrip(":")
    print(f"no run in {config.init_from}: the model is that of {preset}")
  config = config_lib.inherit(config, tuple(overrides), given)
  return {"": config_lib.validate(config)}


def _without_data(config):
  """Returns a config that reads nothing."""
  values = {key: None for key in _DATA_KEYS} | {"data.source": "embedded"}
  if config.text.tokenizer_path is None:
    values["text.tokenizer_path"] = os.curdir  # It is not read.
  return config_lib.apply_overrides(config, values)


def check_topology(topology: str, slices: int = 1) -> None:
  """Checks how a topology is written, before anything is imported.

  Args:
    topology: See the module's docstring.
    slices: How many of them.

  Raises:
    ConfigError: If it is none, or one of processors is to have slices.
  """
  if not re.fullmatch(rf"cpu:[1-9]\d{{0,3}}|{_SLICE}", topology, re.ASCII):
    raise config_lib.ConfigError(
      f"--topology={topology} is no kind of device and their number: {_SUCH_AS}"
    )
  kind, _, shape = topology.partition(":")
  if kind != "cpu":
    return
  if int(shape) > _MOST_PROCESSORS:
    raise config_lib.ConfigError(
      f"--topology={topology} is more than can be played on this machine: use "
      f"up to cpu:{_MOST_PROCESSORS}"
    )
  if slices > 1:
    raise config_lib.ConfigError(
      f"--slices={slices} of --topology={topology}: processors have no slices, "
      "leave --slices out, or name a TPU's topology"
    )


def get_devices(topology: str, slices: int = 1) -> Sequence:
  """Returns the devices of a topology.

  Args:
    topology: See the module's docstring.
    slices: How many of them.

  Raises:
    ConfigError: If there is no such topology, or no compiler for it.
  """
  check_topology(topology, slices)
  kind, _, shape = topology.partition(":")
  os.environ["JAX_PLATFORMS"] = "cpu"
  if kind == "cpu":
    flag = f"--xla_force_host_platform_device_count={shape}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    return jax.devices()
  # Without these the compiler looks for a TPU, and waits.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Several may compile at once: none of them takes a TPU.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  # A single chip has a host of its own; else they have four or more.
  more = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, num_slices=slices, **more
    )
  except Exception as error:  # Of several types, none of them documented.
    reason = str(error).splitlines()[0]
    remedy = (
      'install the compiler with pip install -e ".[tpu]"'
      if "not installed" in reason or "libtpu" in reason
      else _SUCH_AS
    )
    raise config_lib.ConfigError(
      f"--topology={topology} is not to be had ({reason}): {remedy}"
    ) from error
  return found.devices


def main(overrides: Mapping[str, str]) -> None:
  """Compiles what the flags name, and prints the reports.

  Args:
    overrides: Values of --config.KEY=VALUE.

  Raises:
    ConfigError: If the config cannot run, or the topology is not to be had.
    RunError: If a program does not fit.
  """
  values = flags.FLAGS
  check_topology(values.topology, values.slices)
  reports_file = pathlib.Path(os.path.expanduser(values.json or "reports"))
  if reports_file.is_dir() or not reports_file.absolute().parent.is_dir():
    raise config_lib.ConfigError(
      f"--json={values.json} cannot be written: name a file in a folder that "
      "is there"
    )
  if values.cache and os.path.isfile(values.cache):
    raise config_lib.ConfigError(
      f"--cache={values.cache} is a file: name a folder"
    )
  configs = load_configs(values.config, overrides)
  devices = get_devices(values.topology, values.slices)
  times = f"{values.slices} x " if values.slices > 1 else ""
  kind = devices[0].device_kind
  print(f"{times}{values.topology}: {len(devices)} x {kind}")
  if values.cache:
    import jax

    jax.config.update("jax_compilation_cache_dir", values.cache)
  from unicode_jax.stages import compilation

  reports, fits = [], True
  for name, config in configs.items():
    if name:
      print(f"{name}:")
    if values.search:
      ranked = compilation.search(config, devices)
      print("ranked:")
      for found in ranked:
        print(compilation.rank_line(found))
      reports += [report for found in ranked for report in found]
      fits &= all(report.fits for report in ranked[0])
      continue
    for report in compilation.compile_config(
      config, devices, decode=values.decode
    ):
      print("\n".join(compilation.describe(report)), flush=True)
      reports.append(report)
      fits &= report.fits
  if values.json:
    text = json.dumps([dataclasses.asdict(r) for r in reports], indent=1)
    reports_file.write_text(text + "\n", encoding="utf-8")
  if not fits:
    raise config_lib.RunError("not all programs fit")


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  flags.DEFINE_string("config", None, "As of unicode_jax.main.", required=True)
  flags.DEFINE_string(
    "topology", None, "Devices, such as v5e:16x16 or cpu:8.", required=True
  )
  flags.DEFINE_integer(
    "slices", 1, "How many of them.", lower_bound=1, upper_bound=1024
  )
  flags.DEFINE_boolean("decode", True, "Compile decoding too.")
  flags.DEFINE_boolean(
    "search", False, "Try meshes, and microbatches where one does not fit."
  )
  flags.DEFINE_string("json", None, "File for the reports.")
  flags.DEFINE_string(
    "cache",
    None,
    "Folder that keeps the executables. Training on the same topology with "
    "JAX_COMPILATION_CACHE_DIR=FOLDER looks there before it compiles.",
  )
  command.run(main, "nothing was made", overrides=True)


if __name__ == "__main__":
  run()
