r"""Compiles the programs of a config for devices that are not here.

  pip install "unicode_jax[tpu]"
  python -m unicode_jax.compile --config=configs/instruct.py:paper \
    --topology=v5e:16x16

It says, before anything is paid for, whether the train steps and the decoding
fit, how they are laid out and what bounds their speed. The TPU compiler does
this on any Linux machine; topologies are v4:XxYxZ, v5e:XxY, v5p:XxYxZ and
v6e:XxY, as Cloud TPU names them. cpu:N compiles for N processors of this
machine, which shows layouts and collectives, but no times.

--search compiles the train steps on every sensible mesh, and ranks them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import time

from absl import flags

from unicode_jax import command, config as config_lib

_SHOWN = 8  # Collectives in the report.
_GIB = 2**30
# What the data is does not change a program.
_DATA_KEYS = ("path", "captions", "conversations", "tfds")


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of a compiled program; seconds and bytes are a chip's.

  Attributes:
    program: Its name.
    mesh: Sizes by axis.
    microbatches: Parts of a batch.
    num_parameters: Of the model.
    unit: What a run takes, "images" or "tokens".
    items: How many of them, all chips together.
    fits: Whether the chip's memory holds it.
    arguments: Bytes of what it is given.
    temporaries: Bytes of what it needs meanwhile.
    outputs: Bytes of results that do not take an argument's place.
    memory: Bytes that the chip has, 0 if that is not known.
    flops: Of all chips, by arithmetic, nothing computed twice; 0 if not counted.
    executed_flops: Of all chips, in the traced program.
    compute_seconds: The compiler's estimate, without exchanges; 0 without one.
    link_seconds: Exchanged bytes over the links' published bandwidth.
    collectives: (kind, shape, devices, times, bytes, source), largest first.
    compile_seconds: Of this machine.
    problem: What does not fit, and the largest arrays; "" if it fits.
    mfu_bound: Share of the chips' peak that the arithmetic takes if all
      exchanges hide behind the work, or the other way round; 0 if not known.
  """

  program: str
  mesh: Mapping[str, int]
  microbatches: int
  num_parameters: int
  unit: str
  items: int
  fits: bool
  arguments: int = 0
  temporaries: int = 0
  outputs: int = 0
  memory: int = 0
  flops: float = 0.0
  executed_flops: float = 0.0
  compute_seconds: float = 0.0
  link_seconds: float = 0.0
  collectives: Sequence[tuple] = ()
  compile_seconds: float = 0.0
  problem: str = ""
  mfu_bound: float = 0.0

  @property
  def step_seconds(self) -> float:
    """The least that a step takes, 0 if not known."""
    if not self.compute_seconds:
      return 0.0
    return max(self.compute_seconds, self.link_seconds)


def load_configs(spec: str, overrides: Mapping[str, str]) -> dict:
  """Resolves a config as for training, without its data or the run it needs.

  Args:
    spec: Of --config.
    overrides: Values of --config.KEY=VALUE.

  Returns:
    Validated configs by link. Stage II takes its model from the run that it
    starts from, or from the preset of the same name of pretrain.py beside it if
    there is no such run.

  Raises:
    ConfigError: If the config cannot run.
  """
  links = config_lib.load_links(spec)
  links = {name: _without_data(config) for name, config in links.items()}
  config = links.get("")
  if config is None or config.stage != "instruct":
    return config_lib.resolve_links(links, overrides, "run")
  config = config_lib.apply_overrides(config, overrides)
  start = pathlib.Path(config.init_from or "") / "config.json"
  given = None
  if not start.is_file():
    path = pathlib.Path(spec.split(".py:")[0]).parent / "pretrain.py"
    given = config_lib.load(f"{path}:{config.preset}")
    print(f"no run in {config.init_from}: the model is that of {path}")
  config = config_lib.inherit(config, tuple(overrides), given)
  return {"": config_lib.validate(config)}


def _without_data(config):
  """Returns a config that reads nothing."""
  values = {f"data.{key}": None for key in _DATA_KEYS}
  return config_lib.apply_overrides(
    config, {**values, "data.source": "embedded"}
  )


def get_devices(topology: str) -> Sequence:
  """Returns the devices of a topology.

  Args:
    topology: See the module's docstring.

  Raises:
    ConfigError: If there is no such topology, or no compiler for it.
  """
  kind, _, shape = topology.partition(":")
  os.environ["JAX_PLATFORMS"] = "cpu"
  if kind == "cpu" and shape.isdigit() and int(shape):
    flag = f"--xla_force_host_platform_device_count={shape}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    return jax.devices()
  # Without these the compiler looks for a TPU, and waits.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # Of several types, none of them documented.
    reason = str(error).splitlines()[0]
    remedy = (
      'install the compiler with pip install "unicode_jax[tpu]"'
      if "libtpu" in reason or "tpu_library" in reason
      else "use one such as v5e:4x4, v5p:2x2x2, v6e:4x4 or cpu:8"
    )
    raise config_lib.ConfigError(
      f"--topology={topology} is not to be had ({reason}): {remedy}"
    ) from error
  return found.devices


def compile_program(program, mesh, microbatches: int) -> Report:
  """Compiles one program and reads what came out.

  Args:
    program: `stages.programs.Program`.
    mesh: Device mesh.
    microbatches: For the report.
  """
  import jax

  from unicode_jax import compiled as compiled_lib

  device = mesh.devices.flat[0]
  chip = compiled_lib.CHIPS.get(device.device_kind)
  facts = {
    "program": program.name,
    "mesh": dict(mesh.shape),
    "microbatches": microbatches,
    "num_parameters": program.num_parameters,
    "unit": program.unit,
    "items": program.items,
    "memory": chip.memory if chip else 0,
  }
  start = time.monotonic()
  with jax.set_mesh(mesh):
    traced = program.function.trace(*program.arguments)
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return Report(**facts, fits=False, problem=_problem(str(error)))
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  text = compiled_lib.read(compiled.as_text(), mesh.size)
  executed = compiled_lib.matmul_flops(traced.jaxpr, mesh.size)
  flops = executed if program.flops is None else program.flops
  if program.name == "decode":  # Its loop has no length to count with.
    flops = executed = 0.0
  report = Report(
    **facts,
    fits=True,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    flops=flops,
    executed_flops=executed,
    compute_seconds=text.cycles / chip.clock if chip else 0.0,
    link_seconds=(
      sum(c.bytes for c in text.collectives) / chip.links if chip else 0.0
    ),
    collectives=[dataclasses.astuple(c) for c in text.collectives],
    compile_seconds=seconds,
  )
  if not report.step_seconds or not flops:
    return report
  peak = chip.flops * mesh.size
  return dataclasses.replace(
    report, mfu_bound=flops / (peak * report.step_seconds)
  )


def _problem(message: str) -> str:
  """Says what does not fit, and which arrays are the largest."""
  from unicode_jax import compiled as compiled_lib

  used = compiled_lib.used_memory(message)
  lines = [f"needs {used}" if used else message.splitlines()[0]]
  lines += compiled_lib.largest_buffers(message)
  return "\n    ".join(lines)


def describe(report: Report) -> Iterator[str]:
  """Yields the lines of a report."""
  sizes = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items())
  yield (
    f"{report.program}: {report.num_parameters / 1e9:.3g} B parameters, "
    f"{report.items} {report.unit} a run, mesh {sizes}"
    + (f", {report.microbatches} microbatches" * (report.microbatches > 1))
  )
  if not report.fits:
    yield f"  DOES NOT FIT: {report.problem}"
    yield (
      "  what helps: llm.remat_policy=full; more mesh.fsdp or mesh.tensor; "
      "instruct.microbatches or text.microbatches; a smaller global batch"
    )
    return
  parts = report.arguments, report.temporaries, report.outputs
  total = sum(parts) / _GIB
  line = "  memory of a chip: {:.2f} GiB arguments + {:.2f} temporaries + {:.2f}"
  line = line.format(*(part / _GIB for part in parts)) + f" new = {total:.2f}"
  if report.memory:
    line += f" of {report.memory / _GIB:.0f} GiB"
  yield line
  if report.flops:
    again = report.executed_flops / report.flops
    yield (
      f"  work: {report.flops:.3g} FLOP by arithmetic; the program has "
      f"{again:.2f} times as many in its products"
    )
  if report.step_seconds:
    yield (
      f"  time: {report.compute_seconds:.4g} s of work by the compiler's "
      f"estimate, {report.link_seconds:.4g} s on the links"
    )
  if report.mfu_bound:
    bound = (
      "work" if report.compute_seconds >= report.link_seconds else "links"
    )
    yield (
      f"  at best {report.items / report.step_seconds:.4g} {report.unit}/s, MFU "
      f"{100 * report.mfu_bound:.1f} %, bound by {bound}"
    )
  total = sum(c[4] for c in report.collectives)
  yield (
    f"  {len(report.collectives)} kinds of exchanges, {total / 1e9:.3g} GB to a "
    "chip; the largest:"
  )
  for kind, shape, group, times, size, source in report.collectives[:_SHOWN]:
    place = source.rpartition("/")[0].replace("/closed_call", "")[-48:]
    yield (
      f"    {size / 1e9:8.3f} GB  {times:3d} x {kind} {shape[:44]} over {group}"
      f"  {place}"
    )
  yield f"  compiled in {report.compile_seconds:.0f} s"


def meshes(config, num_devices: int) -> Iterator[dict[str, int]]:
  """Yields the meshes that `--search` tries, as values of `config.mesh`."""
  for tensor in (1, 2, 4, 8):
    for data in (1, 2, 4):
      fsdp, rest = divmod(num_devices, tensor * data)
      if rest or not fsdp:
        continue
      sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
      try:
        config_lib.check_devices(_with_mesh(config, sizes, 1), num_devices)
      except config_lib.ConfigError:
        continue
      yield sizes


def _with_mesh(config, sizes: Mapping[str, int], microbatches: int):
  """Returns a config with another mesh and other parts of a batch."""
  section = "instruct" if config.stage == "instruct" else "text"
  return config_lib.apply_overrides(
    config,
    {f"mesh.{axis}": size for axis, size in sizes.items()}
    | {f"{section}.microbatches": microbatches},
  )


def _microbatches(config) -> int:
  if config.stage == "tokenizer":
    return 1
  return config["instruct" if config.stage == "instruct" else "text"].microbatches


def compile_config(config, devices, *, decode: bool) -> Iterator[Report]:
  """Compiles all programs of a config.

  Args:
    config: Of `load_configs`.
    devices: Of `get_devices`.
    decode: Whether decoding is compiled too.

  Yields:
    A report for each.

  Raises:
    ConfigError: If batches or heads do not split over the devices.
  """
  from unicode_jax import sharding
  from unicode_jax.stages import programs

  config_lib.check_devices(config, len(devices))
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  found = programs.train_programs(config, mesh)
  if decode and config.stage != "tokenizer":
    found.append(programs.decode_program(config, mesh))
  for program in found:
    yield compile_program(program, mesh, _microbatches(config))


def search(config, devices) -> list[list[Report]]:
  """Compiles the train steps on every sensible mesh.

  A mesh on which they do not fit is tried again with more microbatches.

  Returns:
    Reports of each mesh, the fastest first; those that do not fit are last.
  """
  found = []
  for sizes in meshes(config, len(devices)):
    for microbatches in (1, 2, 4, 8):
      tried = _with_mesh(config, sizes, microbatches)
      try:
        config_lib.check_devices(tried, len(devices))
      except config_lib.ConfigError:
        break
      reports = list(compile_config(tried, devices, decode=False))
      for line in describe(reports[-1]):
        print(line, flush=True)
      found.append(reports)
      if all(report.fits for report in reports):
        break
  return sorted(
    found,
    key=lambda reports: (
      not all(report.fits for report in reports),
      sum(report.step_seconds for report in reports),
    ),
  )


def main(overrides: Mapping[str, str]) -> None:
  """Compiles what the flags name, and prints the reports.

  Args:
    overrides: Values of --config.KEY=VALUE.

  Raises:
    ConfigError: If the config cannot run, or the topology is not to be had.
    RunError: If a program does not fit.
  """
  values = flags.FLAGS
  configs = load_configs(values.config, overrides)
  devices = get_devices(values.topology)
  print(f"{values.topology}: {len(devices)} x {devices[0].device_kind}")
  if values.cache:
    import jax

    jax.config.update("jax_compilation_cache_dir", values.cache)
  reports = []
  for name, config in configs.items():
    if name:
      print(f"{name}:")
    if values.search:
      ranked = search(config, devices)
      print("ranked:")
      for found in ranked:
        print(_rank_line(found))
      reports += [report for found in ranked[:1] for report in found]
      continue
    for report in compile_config(config, devices, decode=values.decode):
      print("\n".join(describe(report)), flush=True)
      reports.append(report)
  if values.json:
    text = json.dumps([dataclasses.asdict(r) for r in reports], indent=1)
    pathlib.Path(values.json).write_text(text + "\n", encoding="utf-8")
  if not all(report.fits for report in reports):
    raise config_lib.RunError("not all programs fit")


def _rank_line(reports: Sequence[Report]) -> str:
  """Sums a mesh of the search up in a line."""
  first = reports[0]
  mesh = " x ".join(f"{axis} {n}" for axis, n in first.mesh.items())
  if first.microbatches > 1:
    mesh += f", {first.microbatches} microbatches"
  if not all(report.fits for report in reports):
    return f"  {mesh}: does not fit"
  most = max(r.arguments + r.temporaries + r.outputs for r in reports)
  steps = ", ".join(
    f"{r.program} {r.step_seconds:.4g} s (MFU {100 * r.mfu_bound:.0f} %)"
    for r in reports
  )
  return f"  {mesh}: {steps}, {most / _GIB:.1f} GiB"


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  flags.DEFINE_string("config", None, "As of unicode_jax.main.", required=True)
  flags.DEFINE_string(
    "topology", None, "Devices, such as v5e:16x16 or cpu:8.", required=True
  )
  flags.DEFINE_boolean("decode", True, "Compile decoding too.")
  flags.DEFINE_boolean("search", False, "Try meshes, and rank them.")
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
