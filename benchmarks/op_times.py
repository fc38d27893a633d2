"""Where a compiled JAX program spends its time, by kind of operation.

`jax.profiler` records when each of the program's operations began and ended,
and its compiled text says what an operation is made of. One that holds a
convolution or a matrix product, alone or fused with others, counts as that. It
works on CPU; on a GPU, never tried, operations in CUDA graphs may be missing.
"""

import collections
from collections.abc import Callable
import pathlib
import re
import tempfile

import jax

KINDS = ("matrix products", "convolutions", "everything else")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"%?([\w.-]+) = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# Their bodies' operations are recorded, too.
_CONTAINERS = ("while", "conditional")


def kinds(hlo: str) -> dict[str, str | None]:
  """Says what each operation of a program is.

  Args:
    hlo: The optimized program as text.

  Returns:
    name -> one of KINDS, or None for a loop or branch around others.
  """
  members, computation = collections.defaultdict(list), ""
  opcodes, words, called = {}, {}, {}
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      computation = match[1]
    elif match := _OPERATION.search(line):
      name, opcodes[match[1]] = match[1], match[2]
      words[name] = " ".join([match[2], *_TARGET.findall(line)])
      called[name] = _CALLED.findall(line)
      members[computation].append(name)

  def holds(name, pattern):
    return bool(re.search(pattern, words[name])) or any(
      holds(member, pattern) for of in called[name] for member in members[of]
    )

  def kind(name):
    if opcodes[name] in _CONTAINERS:
      return None
    if holds(name, r"convolution|\$conv"):
      return "convolutions"
    if holds(name, r"^dot$|gemm|matmul"):
      return "matrix products"
    return "everything else"

  return {name: kind(name) for name in opcodes}


def seconds_by_kind(
  run: Callable[[], object], hlo: str, steps: int
) -> dict[str, float]:
  """Runs a program a few times under the profiler.

  Args:
    run: Runs it once and waits for it; it must be compiled already.
    hlo: The optimized program as text.
    steps: How many times.

  Returns:
    kind -> seconds a run, all of its operations together: more than a run
    takes where operations overlap, less where there are gaps.

  Raises:
    RuntimeError: the profiler recorded none of the program's operations.
  """
  kind_of = kinds(hlo)
  module = re.match(r"HloModule ([^,\s]+)", hlo)[1]
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(steps):
        run()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  seconds = dict.fromkeys(KINDS, 0.0)
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        kind = kind_of.get(stats.get("hlo_op"))
        if kind and stats.get("hlo_module") == module:
          seconds[kind] += event.duration_ns / 1e9 / steps
  if not any(seconds.values()):
    raise RuntimeError(
      f"the profiler recorded no operation of {module}: leave out --profile"
    )
  return seconds
