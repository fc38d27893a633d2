"""Compiles the programs of a config, and says what came out.

The devices need not be here: the shapes are those of `programs`, and the facts
those of `compiled`.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import time

import jax

from unicode_jax import compiled as compiled_lib, config as config_lib, sharding
from unicode_jax.stages import programs

_SHOWN = 8  # Collectives in the text of a report.
# Sizes that `search` tries.
_DATA, _TENSOR, _MICROBATCHES = (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)


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
    flops: Of all chips, by arithmetic, nothing computed twice; of images the
      traced program's own; 0 if not known.
    executed_flops: Of all chips, in the traced program.
    compute_seconds: The compiler's estimate, without exchanges, and attention's
      kernel, for which it has none, at the chip's peak; 0 without one.
    link_seconds: Bytes exchanged within a slice over the links' published
      bandwidth.
    network_seconds: Bytes exchanged between slices over that of the network.
    collectives: Fields of `compiled.Collective`, the largest first.
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
  network_seconds: float = 0.0
  collectives: Sequence[tuple] = ()
  compile_seconds: float = 0.0
  problem: str = ""
  mfu_bound: float = 0.0

  @property
  def step_seconds(self) -> float:
    """The least that a step takes, 0 if not known."""
    if not self.compute_seconds:
      return 0.0
    return max(self.compute_seconds, self.link_seconds, self.network_seconds)

  @property
  def bound_by(self) -> str:
    """What takes the longest of a step."""
    seconds = {
      "work": self.compute_seconds,
      "links": self.link_seconds,
      "the network between slices": self.network_seconds,
    }
    return max(seconds, key=seconds.get)


def compile_program(program, mesh, microbatches: int) -> Report:
  """Compiles one program and reads what came out.

  Args:
    program: `stages.programs.Program`.
    mesh: Device mesh.
    microbatches: For the report.
  """
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
      problem = _problem(str(error), traced.jaxpr, mesh.size)
      return Report(**facts, fits=False, problem=problem)
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  text = compiled_lib.read(compiled.as_text(), mesh.size)
  executed = program.kernel_flops
  executed += compiled_lib.matmul_flops(traced.jaxpr, mesh.size)
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
    compute_seconds=(
      text.cycles / chip.clock + program.kernel_flops / (chip.flops * mesh.size)
      if chip
      else 0.0
    ),
    link_seconds=_received(text, False) / chip.links if chip else 0.0,
    network_seconds=_received(text, True) / chip.network if chip else 0.0,
    collectives=[dataclasses.astuple(c) for c in text.collectives],
    compile_seconds=seconds,
  )
  if not report.step_seconds or not flops:
    return report
  peak = chip.flops * mesh.size
  if executed > peak * report.compute_seconds:
    # The chips cannot do so much: some pieces have no estimate.
    return dataclasses.replace(report, compute_seconds=0.0)
  return dataclasses.replace(
    report, mfu_bound=flops / (peak * report.step_seconds)
  )


def _received(text: compiled_lib.Text, between_slices: bool) -> float:
  """Sums what a chip receives, in bytes, from other slices or its own."""
  return sum(
    c.bytes for c in text.collectives if c.between_slices == between_slices
  )


def _problem(message: str, jaxpr, num_devices: int) -> str:
  """Says what does not fit, and which arrays are the largest."""
  used = compiled_lib.used_memory(message)
  lines = [f"needs {used}" if used else message.splitlines()[0]]
  if buffers := compiled_lib.largest_buffers(message):
    lines += ["the largest of a chip:", *buffers]
  else:  # The compiler names none where it is far too much.
    lines.append("the largest on the way, of all chips together:")
    lines += compiled_lib.largest_arrays(jaxpr, num_devices)
  return "\n    ".join(lines)


def describe(report: Report) -> Iterator[str]:
  """Yields the lines of a report."""
  yield (
    f"{report.program}: {report.num_parameters / 1e9:.3g} B parameters, "
    f"{report.items} {report.unit} a run, mesh {_layout(report)}"
  )
  if not report.fits:
    yield f"  DOES NOT FIT: {report.problem}"
    yield (
      "  what helps: llm.remat_policy=full; more mesh.fsdp or mesh.tensor; "
      "microbatches; a smaller global batch"
    )
    return
  parts = report.arguments, report.temporaries, report.outputs
  arguments, temporaries, outputs = map(_size, parts)
  line = (
    f"  memory of a chip: {arguments} arguments + {temporaries} temporaries + "
    f"{outputs} new = {_size(sum(parts))}"
  )
  if report.memory:
    line += f" of {_size(report.memory)}"
  yield line
  if report.flops and report.unit == "images":
    yield f"  work: {report.flops:.3g} FLOP in the program's products"
  elif report.flops:
    again = report.executed_flops / report.flops
    yield (
      f"  work: {report.flops:.3g} FLOP by arithmetic; the program has "
      f"{again:.2f} times as many in its products"
    )
  if report.memory:
    line = "  time: "
    if report.compute_seconds:
      line += f"{report.compute_seconds:.4g} s of work by the compiler's "
      line += "estimate"
    else:
      line += "work not known (the compiler's estimates leave pieces out)"
    line += f", {report.link_seconds:.4g} s on the links"
    if report.network_seconds:
      line += f", {report.network_seconds:.4g} s on the network between slices"
    if report.program == "decode":
      line += ", the loop over new ids counted once"
    yield line
  if report.mfu_bound:
    yield (
      f"  at best {report.items / report.step_seconds:.4g} {report.unit}/s, "
      f"MFU {100 * report.mfu_bound:.1f} %, bound by {report.bound_by}"
    )
  total = sum(c[4] for c in report.collectives)
  count = len(report.collectives)
  yield f"  {count} exchanges, {_size(total)} to a chip; the largest:"
  for collective in report.collectives[:_SHOWN]:
    kind, shape, group, times, size, source, between_slices = collective
    place = source.rpartition("/")[0].replace("/closed_call", "")[-48:]
    yield (
      f"    {_size(size):>8}  {times:3d} x {kind} {shape[:44]} over {group}"
      f"{' slices' * between_slices}  {place}"
    )
  yield f"  compiled in {report.compile_seconds:.0f} s"


def _layout(report: Report) -> str:
  """Names the mesh, and the parts of a batch if there are several."""
  text = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items())
  if report.microbatches > 1:
    text += f", {report.microbatches} microbatches"
  return text


def _size(count: float) -> str:
  """Formats bytes, in powers of 1000."""
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if count >= size:
      return f"{count / size:.3g} {unit}"
  return f"{count / 1e3:.3g} kB"


def meshes(
  config, num_devices: int, num_slices: int = 1
) -> Iterator[dict[str, int]]:
  """Yields the meshes that `--search` tries, as values of `config.mesh`.

  The config's own is the first. With several slices, `data` lies over all of
  the others: `fsdp` over slices is not tried.
  """
  tries = [config_lib.fill_mesh(config.mesh, num_devices)]
  for tensor in _TENSOR:
    for data in (num_slices * times for times in _DATA):
      sizes = {"data": data, "fsdp": -1, "tensor": tensor}
      sizes = config_lib.fill_mesh(sizes, num_devices)
      if sizes["fsdp"] and sizes not in tries:
        tries.append(sizes)
  for sizes in tries:
    try:
      config_lib.check_devices(
        _with_mesh(config, sizes, config.microbatches),
        num_devices,
        num_slices=num_slices,
      )
    except config_lib.ConfigError:
      continue
    yield sizes


def _with_mesh(config, sizes: Mapping[str, int], microbatches: int):
  """Returns a config with another mesh and other parts of a batch."""
  return config_lib.apply_overrides(
    config,
    {f"mesh.{axis}": size for axis, size in sizes.items()}
    | {"microbatches": microbatches},
  )


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
  config_lib.check_devices(
    config, len(devices), num_slices=sharding.count_slices(devices)
  )
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  found = programs.train_programs(config, mesh)
  if decode and config.stage != "tokenizer":
    found.append(programs.decode_program(config, mesh))
  for program in found:
    yield compile_program(program, mesh, config.microbatches)


def search(config, devices) -> list[Sequence[Report]]:
  """Compiles the train steps on every sensible mesh.

  A mesh on which they do not fit is tried again with more microbatches than the
  config's, up to 16.

  Returns:
    Reports of each mesh, ranked.

  Raises:
    ConfigError: If the batch splits over none of them.
  """
  found = []
  tries = list(meshes(config, len(devices), sharding.count_slices(devices)))
  least = config.microbatches
  parts = [least, *(count for count in _MICROBATCHES if count > least)]
  for number, sizes in enumerate(tries, 1):
    print(f"mesh {number} of {len(tries)}:", flush=True)
    for microbatches in parts:
      tried = _with_mesh(config, sizes, microbatches)
      try:
        config_lib.check_devices(
          tried, len(devices), num_slices=sharding.count_slices(devices)
        )
      except config_lib.ConfigError:
        break
      reports = list(compile_config(tried, devices, decode=False))
      for report in reports:
        print("\n".join(describe(report)), flush=True)
      found.append(reports)
      if all(report.fits for report in reports):
        break
  if not found:
    raise config_lib.ConfigError(
      f"no mesh that is tried splits the batch over {len(devices)} devices: "
      "choose another global_batch_size, or --config.mesh without --search"
    )
  return rank(found)


def rank(found: Sequence[Sequence[Report]]) -> list[Sequence[Report]]:
  """Sorts the reports of several meshes.

  Returns:
    The fastest first; then those of which no time is known, what exchanges the
    least first; those that do not fit are last.
  """
  return sorted(
    found,
    key=lambda reports: (
      not all(report.fits for report in reports),
      not all(report.step_seconds for report in reports),
      sum(report.step_seconds for report in reports),
      sum(c[4] for report in reports for c in report.collectives),
    ),
  )


def rank_line(reports: Sequence[Report]) -> str:
  """Sums a mesh of the search up in a line."""
  mesh = _layout(reports[0])
  if not all(report.fits for report in reports):
    return f"  {mesh}: does not fit"
  most = max(r.arguments + r.temporaries + r.outputs for r in reports)
  steps = ", ".join(
    f"{r.program} {r.step_seconds:.4g} s (MFU {100 * r.mfu_bound:.0f} %)"
    if r.step_seconds
    else f"{r.program} in a time not known"
    for r in reports
  )
  return f"  {mesh}: {steps}, {_size(most)}"
