r"""Counts the cycles of the nearest-code search on TPUs, without a TPU.

  pip install "jax[tpu]"
  python benchmarks/tpu_schedule.py --chips v5e v5p v6e --dims 32 64 256

The TPU compiler, libtpu, runs anywhere and prints the bundles of instructions
that it ends up with. One is issued a cycle, so a loop's bundles are its cycles
if nothing stalls; waits for memory are not in them. For each chip and size it
compiles

  ours      `kernels.search_tpu`, the whole search
  product   a Pallas kernel with ours' tile and operands that only multiplies,
            and stores what comes out
  XLA       the argmin of the biased product, which XLA fuses

and prints the bundles of the main loop for every 1024 distances (a register of
8 x 128), beside the floor: what the matrix unit's published peak takes for the
columns that are multiplied, 128 (v5) or 256 (v6e) at once. XLA's exact product
is six of bfloat16; ours has them as columns. A time is the larger of bundles
and floor. XLA's loop says nothing of how much a trip of it does; that is
counted by its comparisons of floats, one a register.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# A topology; FLOP a cycle of a core, bfloat16 (published peak over clock); and
# the columns that a matrix unit multiplies at once.
_CHIPS = {
  "v5e": ("v5e:2x2", 131072, 128),
  "v5p": ("v5p:2x2x1", 131072, 128),
  "v6e": ("v6e:2x2", 524288, 256),
}
_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?[ >:]*\{")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_JUMP = re.compile(r"sbr\.rel.*?target = \$region(\d+)")
_COMPARED = re.compile(r"= vcmp\.[lg]t\.f32")
_NAMES = {"ours": "nearest_code", "product": "product", "xla": "fusion"}


def read(path: pathlib.Path) -> tuple[int, int]:
  """Returns comparisons and bundles of a program's longest loop."""
  starts, jumps, compared, address = {}, [], collections.Counter(), 0
  for line in path.read_text(errors="replace").splitlines():
    if match := _LINE.match(line):
      address = int(match.group(1), 16)
    compared[address] += len(_COMPARED.findall(line))
    for region in _START.findall(line):
      starts.setdefault(region, address)
    for region in _JUMP.findall(line):
      jumps.append((address, region))
  loops = [
    (starts[region], end)
    for end, region in jumps
    if region in starts and starts[region] <= end
  ]
  if not loops:
    return 0, 0
  first, last = max(loops, key=lambda loop: loop[1] - loop[0])
  return sum(n for a, n in compared.items() if first <= a <= last), last - first


def compile_and_read(chip: str, program: str, size: dict) -> dict:
  """Compiles a program in a process of its own, and reads its schedule."""
  with tempfile.TemporaryDirectory() as dump:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "LIBTPU_INIT_ARGS": (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
      ),
    }
    arguments = [chip, program, json.dumps(size)]
    done = subprocess.run(
      [sys.executable, __file__, "--compile", *arguments],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      said = done.stderr.strip().splitlines() or ["no message"]
      raise RuntimeError(said[-1])
    made = json.loads(done.stdout.splitlines()[-1])
    paths = [
      path
      for path in pathlib.Path(dump).glob("*-final_bundles.txt")
      if "schedule-analysis" not in path.name and _NAMES[program] in path.name
    ]
    # XLA has other fusions too, which compare nothing.
    compared, bundles = max((read(path) for path in paths), default=(0, 0))
    if not bundles or (program == "xla" and not compared):
      raise RuntimeError("no loop was found in its schedule")
    return made | {"bundles": bundles, "compared": compared}


def compile_program(chip: str, program: str, size: dict) -> dict:
  """Compiles one program; says tile and columns where it has them."""
  import jax
  from jax.experimental import pallas as pl, topologies
  from jax.experimental.pallas import tpu as pltpu
  import jax.numpy as jnp
  import numpy as np

  from unicode_jax.kernels import operands, search_tpu

  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=_CHIPS[chip][0]
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  dtype = jnp.dtype(size["dtype"])
  num_queries, num_codes, dim = size["queries"], size["codes"], size["dim"]

  def compiled(function, *shapes):
    shapes = [
      jax.ShapeDtypeStruct(shape, kind, sharding=whole)
      for shape, kind in shapes
    ]
    with jax.set_mesh(mesh):
      return jax.jit(function).lower(*shapes).compile()

  if program == "xla":

    def search(z, codebook):
      wide = codebook.astype(jnp.float32)
      precision = None if size["fast"] else jax.lax.Precision.HIGHEST
      product = jnp.matmul(
        z, codebook.T, precision=precision, preferred_element_type=jnp.float32
      )
      return jnp.argmin(jnp.sum(wide**2, axis=1) / 2 - product, axis=1)

    compiled(search, ((num_queries, dim), dtype), ((num_codes, dim), dtype))
    return {}
  with jax.set_mesh(mesh):
    generation, depth, vmem = search_tpu._chip()
  queries, codes = search_tpu._tile(generation, num_queries, num_codes)
  width, folded = search_tpu._columns(
    operands.width(dim, dtype, dtype, size["fast"]), depth
  )
  made = {
    "queries": queries,
    "codes": codes,
    "columns": width,
    "note": "" if folded else " + bias",
  }
  if width > search_tpu._WIDEST:
    made["note"] = ", in parts"
  if program == "ours":
    compiled(
      lambda z, c, bias: search_tpu.search(z, c, bias, size["fast"]),
      ((num_queries, dim), dtype),
      ((num_codes, dim), dtype),
      ((num_codes,), jnp.float32),
    )
    return made

  def multiply(codebook_ref, z_ref, out_ref):
    out_ref[...] = jnp.dot(
      codebook_ref[...], z_ref[...], preferred_element_type=jnp.float32
    )

  compiled(
    pl.pallas_call(
      multiply,
      grid=(num_queries // queries, num_codes // codes),
      in_specs=[
        pl.BlockSpec((codes, width), lambda n, k: (k, 0)),
        pl.BlockSpec((width, queries), lambda n, k: (0, n)),
      ],
      out_specs=pl.BlockSpec((codes, queries), lambda n, k: (0, n)),
      out_shape=jax.ShapeDtypeStruct((codes, num_queries), jnp.float32),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=int(0.9 * vmem),
      ),
      name="product",
    ),
    ((num_codes, width), jnp.bfloat16),
    ((width, num_queries), jnp.bfloat16),
  )
  return made


def row(chip: str, size: dict) -> str:
  """Returns one line of the table."""
  found = {}
  for program in _NAMES:
    try:
      found[program] = compile_and_read(chip, program, size)
    except RuntimeError as error:
      print(f"{chip} {size}: {program}: {error}", file=sys.stderr)
  exact = size["dtype"] == "float32" and not size["fast"]
  _, peak, depth = _CHIPS[chip]

  def cycles(columns):
    return 2 * 1024 * depth * -(-columns // depth) / peak

  floor = cycles(size["dim"]) * (6 if exact else 1)
  cells = [chip, "float32 exact" if exact else "bfloat16", str(size["dim"])]
  cells += ["-"] * 8
  ours = found.get("ours")
  if ours:
    registers = ours["queries"] * ours["codes"] / 1024
    each, ours_floor = ours["bundles"] / registers, cycles(ours["columns"])
    tile = f"{ours['queries']}x{ours['codes']}x{ours['columns']}"
    cells[3:5] = tile + ours["note"], f"{each:.2f}"
    cells[7] = f"{ours_floor:.2f}"
    # What is cut into parts is not one product.
    if "product" in found and "parts" not in ours["note"]:
      alone = found["product"]["bundles"] / registers
      cells[5:7] = f"{alone:.2f}", f"{each / alone:.3f}"
  if "xla" in found:
    fused = found["xla"]["bundles"] / found["xla"]["compared"]
    cells[8:10] = f"{fused:.2f}", f"{floor:.2f}"
    if ours:
      cells[10] = f"{max(fused, floor) / max(each, ours_floor):.2f}"
  return "| " + " | ".join(cells) + " |"


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", nargs="+", choices=_CHIPS, default=["v6e"])
  parser.add_argument("--queries", type=int, default=65536)
  parser.add_argument("--codes", type=int, default=32768)
  parser.add_argument("--dims", type=int, nargs="+", default=[64])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--precision", choices=("exact", "fast"), default="fast")
  parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.compile:
    chip, program, size = args.compile
    print(json.dumps(compile_program(chip, program, json.loads(size))))
    return
  print(
    "| chip | operands | dim | tile | ours | product | ratio | floor | XLA | "
    "floor | XLA / ours |\n" + "|---" * 11 + "|"
  )
  for chip in args.chips:
    for dim in args.dims:
      size = {
        "queries": args.queries,
        "codes": args.codes,
        "dim": dim,
        "dtype": args.dtype,
        "fast": args.precision == "fast",
      }
      print(row(chip, size), flush=True)


if __name__ == "__main__":
  main()
