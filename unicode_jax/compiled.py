"""What a compiled program says of itself: memory, work, collectives, time.

XLA's own sums count the body of a loop once. So the work is counted in the
traced program, where a scan has its length, and cycles and collectives are read
from the text of the compiled one, each as often as its loop runs. Nothing is
run.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

from jax.interpreters import partial_eval

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Facts of a chip, as cloud.google.com/tpu/docs publishes them.

  Attributes:
    flops: FLOP/s, bfloat16.
    memory: Bytes.
    links: Bytes/s between chips, all links together, one direction.
    network: Bytes/s of a chip to other slices, one direction: the network of a
      pod or host over its chips.
    clock: Cycles/s, which is not published: what makes `flops` of the products
      that its matrix units do in a cycle.
  """

  flops: float
  memory: int
  links: float
  network: float
  clock: float


CHIPS = {
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 200e9, 3.125e9, 1.5e9),
  "TPU v5": Chip(459e12, 95 * _GIB, 600e9, 6.25e9, 1.75e9),
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 400e9, 12.5e9, 1.75e9),
}

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
  **dict.fromkeys(("f32", "s32", "u32"), 4),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[\da-z]*)\[([\d,]*)\]")
_CALLS = re.compile(
  r"\b(calls|to_apply|body|\w+_computations?)="
  r"\{?((?:%[\w.\-]+(?:, )?)+)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: "all-gather" and so on.
    shape: What comes out, as in "bf16[4096,2048]".
    group: Devices that exchange, or slices.
    times: How often a run of the program does it.
    bytes: That a device receives in all of them.
    source: Name of the operation that it serves.
    between_slices: Whether it takes the network between slices, not the links
      within one.
  """

  kind: str
  shape: str
  group: int
  times: int
  bytes: float
  source: str
  between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
  """What the text of a compiled program says.

  Attributes:
    cycles: The compiler's estimate of all pieces, one after the other, without
      what travels between devices; 0 where it makes none.
    collectives: The largest first.
  """

  cycles: float
  collectives: tuple[Collective, ...]


def read(text: str, num_devices: int) -> Text:
  """Reads a compiled program (`jax.stages.Compiled.as_text`).

  Args:
    text: HLO, after optimization.
    num_devices: That it runs on.

  Returns:
    What it says.
  """
  bodies, entry = _computations(text)
  cycles = 0.0
  found: dict[tuple, Collective] = {}
  for name, (times, fused) in _times(bodies, entry).items():
    for line in bodies[name]:
      if not fused and (match := _CYCLES.search(line)):
        cycles += times * int(match[1])
      collective = _collective(line, times, num_devices)
      if collective and name.startswith("all-reduce-scatter"):
        # Of the sum, which is twice the way, a device takes its part at once.
        collective = dataclasses.replace(
          collective, kind="reduce-scatter", bytes=collective.bytes / 2
        )
      if collective is not None:
        # The pieces of one that other work is fused with share a channel;
        # outside of fusions different ones may.
        channel = re.search(r"channel_id=(\d+)", line)
        piece = channel[0] if fused and channel else f"{name} {line}"
        key = piece, times, collective.kind, collective.shape, collective.source
        found[key] = collective
  ordered = sorted(found.values(), key=lambda c: -c.bytes)
  return Text(cycles, tuple(ordered))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of every computation, and the name of the first."""
  bodies: dict[str, list[str]] = {}
  lines, entry = [], ""
  for line in text.splitlines():
    if line[:1] not in ("", " ", "}") and line.endswith("{"):
      match = _COMPUTATION.match(line)
      lines = bodies[match[2]] = []
      entry = match[2] if match[1] else entry
    elif line.startswith(" "):
      lines.append(line)
  return bodies, entry


def _times(bodies, entry: str) -> dict[str, tuple[int, bool]]:
  """Says how often each computation runs, and whether inside of a fusion."""
  result: dict[str, tuple[int, bool]] = {}
  pending = [(entry, 1, False)]
  while pending:
    name, times, fused = pending.pop()
    before, was_fused = result.get(name, (0, True))
    result[name] = before + times, fused and was_fused
    for line in bodies[name]:
      for how, names in _CALLS.findall(line):
        if how == "to_apply" and " call(" not in line:
          continue  # The sum of a reduction.
        trips = _trips(bodies, bodies[name], line) if how == "body" else 1
        inside = fused or (how == "calls" and " fusion(" in line)
        for called in names.replace("%", "").rstrip(", ").split(", "):
          pending.append((called, times * trips, inside))
  return result


def _trips(bodies, around: list[str], line: str) -> int:
  """Returns how often a loop runs; 1 where that is not written.

  Args:
    bodies: Of `_computations`.
    around: The lines that the loop is among.
    line: The loop.
  """
  if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
    return int(match[1])
  condition = re.search(r"condition=%([\w.\-]+)", line)
  limits = {
    int(value)
    for text in bodies[condition[1]]
    for value in re.findall(r" s32\[\]\S* constant\((\d+)\)", text)
  }
  if len(limits) != 1:
    return 1
  return limits.pop() - _first(bodies[condition[1]], around, line)


def _first(condition: list[str], around: list[str], line: str) -> int:
  """Returns what a loop counts from, which is 1 if its first turn was peeled.

  Args:
    condition: Its lines, which compare an element of what the loop carries.
    around: The lines that the loop is among.
    line: The loop.
  """
  made = dict(
    text.strip().removeprefix("ROOT ").split(" = ", 1) for text in around
  )
  index = re.search(r"get-tuple-element\(.*index=(\d+)", "\n".join(condition))
  carried = re.search(r" while\((%[\w.\-]+)\)", line)
  made_of = re.search(r" tuple\((.*)\)", made.get(carried and carried[1], ""))
  if not index or not made_of:
    return 0
  name = re.findall(r"%[\w.\-]+", made_of[1])[int(index[1])]
  while copied := re.search(r" copy\((%[\w.\-]+)\)", made.get(name, "")):
    name = copied[1]
  found = re.search(r" constant\((\d+)\)", made.get(name, ""))
  return int(found[1]) if found else 0


def _collective(line: str, times: int, num_devices: int) -> Collective | None:
  """Reads an instruction, None if it is no collective."""
  match = re.search(rf" ({'|'.join(_COLLECTIVES)}|recv)(?:-start)?\(", line)
  if match is None:
    return None
  kind, result = match[1], line[: match.start()].partition(" = ")[2]
  between_slices = kind == "recv"
  if between_slices:
    # The TPU compiler splits what crosses slices into steps within each, and
    # one that the hosts do for a chip and those in its place elsewhere.
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if transfer is None:
      return None
    kind = transfer[1].lower().replace("_", "-")
    result = result.partition(", u32[]")[0]
  arrays = [
    (name, math.prod(map(int, filter(None, sizes.split(",")))))
    for name, sizes in _ARRAY.findall(result)
    if name in _BYTES
  ]
  if "-start(" in line and kind != "all-reduce":
    # Operands come first; what is passed on to the end, last.
    arrays = [a for a in arrays if a != ("u32", 1)]
    arrays = arrays[len(arrays) // 2 :]
  size = sum(_BYTES[name] * count for name, count in arrays)
  group = _group_size(line, num_devices)
  if group == 1:
    return None
  # What a ring passes through every device.
  share = (group - 1) / group
  received = {
    "all-gather": share * size,
    "all-reduce": 2 * share * size,
    "reduce-scatter": share * size * group,
    "all-to-all": share * size,
  }.get(kind, size)
  shapes = ", ".join(
    f"{name}[{sizes}]" for name, sizes in _ARRAY.findall(result)
  )
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(
    kind,
    shapes,
    group,
    times,
    times * received,
    source[1] if source else "",
    between_slices,
  )


def _group_size(line: str, num_devices: int) -> int:
  """Returns how many devices, or slices, a collective is among."""
  if match := re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line):
    ends = [part.split(":") for part in match[1].split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
  # Else devices: slice times 100000 and number, in groups or from one to one.
  if match := re.search(r"_xla_megascale_target=\{\{([^}]*)\}", line):
    return len({int(n) // 100_000 for n in re.findall(r"\d+", match[1])})
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return match[1].count(",") + 1
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(match[1])
  if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('[^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", match[2]))
  return num_devices


def matmul_flops(jaxpr, num_devices: int = 1) -> float:
  """Counts what the products and convolutions of a traced program cost.

  Args:
    jaxpr: `jax.core.ClosedJaxpr`, as of `jax.jit(...).trace(...).jaxpr`.
    num_devices: That share what is inside of a `jax.shard_map`.

  Returns:
    FLOP of all devices together, what is computed again included, but nothing
    that goes nowhere and no zeros that a convolution's stride puts between its
    inputs. A kernel counts as it says itself, if it does; a loop of unknown
    length once.
  """
  return _flops(_used(jaxpr), num_devices)


def _used(jaxpr):
  """Returns a traced program without what goes nowhere."""
  program = getattr(jaxpr, "jaxpr", jaxpr)
  used, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
  return used


def _flops(program, num_devices: int) -> float:
  """Counts the products of a program of which all is used."""
  total = 0.0
  for equation in program.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      sizes = math.prod(left[axis] for axis in contracted)
      total += 2.0 * sizes * math.prod(equation.outvars[0].aval.shape)
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
      each = math.prod(kernel) / outputs / math.prod(params["lhs_dilation"])
      total += 2.0 * each * math.prod(equation.outvars[0].aval.shape)
    elif name == "pallas_call":
      cost = params.get("cost_estimate")
      total += 0.0 if cost is None else float(cost.flops)
    else:
      times = {"scan": params.get("length"), "shard_map": num_devices}
      branches = [_flops(j, num_devices) for j in _inside(params)]
      inside = max(branches, default=0.0) if name == "cond" else sum(branches)
      total += (times.get(name) or 1) * inside
  return total


def _inside(params) -> Iterator:
  """Yields the programs within an equation."""
  for value in params.values():
    for item in value if isinstance(value, list | tuple) else (value,):
      if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
        yield item


def largest_arrays(jaxpr, num_devices: int = 1, count: int = 5) -> list[str]:
  """Lists the largest arrays that a traced program makes on its way.

  Args:
    jaxpr: As of `matmul_flops`.
    num_devices: As of `matmul_flops`.
    count: How many.

  Returns:
    Lines "34.4 GB  float32[...]  operation", of all devices together.
  """
  found: dict[str, float] = {}

  def visit(program, times):
    for equation in getattr(program, "jaxpr", program).eqns:
      inside = list(_inside(equation.params))
      shared = equation.primitive.name == "shard_map"
      for each in inside:
        visit(each, times * (num_devices if shared else 1))
      for variable in () if inside else equation.outvars:
        if hasattr(variable.aval, "dtype"):
          text = f"{variable.aval.str_short()}  {equation.primitive.name}"
          size = times * variable.aval.size * variable.aval.dtype.itemsize
          found[text] = max(size, found.get(text, 0))

  visit(_used(jaxpr), 1)
  largest = sorted(found.items(), key=lambda item: -item[1])[:count]
  return [f"{size / 1e9:.3g} GB  {text}" for text, size in largest]


def largest_buffers(message: str, count: int = 5) -> list[str]:
  """Lists the largest arrays of a program that does not fit.

  Args:
    message: The TPU compiler's complaint.
    count: How many.

  Returns:
    Lines "1.25G  bf16[...]  operation".
  """
  found = []
  for block in re.split(r"\n\s*\d+\. Size: ", message)[1 : count + 1]:
    size = block.split()[0]
    shape = re.search(r"Shape: (\S+?)\{?[\s{]", block)
    operator = re.search(r'op_name="([^"]*)"', block)
    found.append(
      "  ".join(
        part
        for part in (
          size,
          shape[1] if shape else "",
          operator[1] if operator else "",
        )
        if part
      )
    )
  return found


def used_memory(message: str) -> str:
  """Returns "USED of THERE" out of the TPU compiler's complaint, or ""."""
  match = re.search(
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm"
    r"|temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)",
    message,
  )
  if match is None:
    return ""
  used, there, more, available = match.groups()
  return f"{used} of {there}" if used else f"{more} of {available}"
