"""Times the nearest-code search beside its peers, and checks their choices.

  python benchmarks/nearest_code.py --queries 4096 65536 --dims 64 256 1024
  python benchmarks/nearest_code.py --queries 1024 --dims 256 --depth 4

Prints one Markdown table: a row for each implementation and size with the
median and range of interleaved repetitions, the time beside ours, the rate of
the useful product (2 N K C a depth), its share of what the same product alone
reaches in jnp, the memory it takes above its inputs (in a process of its own,
what compiling takes included), and the share of indices that equal a float64
search's. All are float32 but "fast".

Peers walk over chunks of queries where they would build an N x K matrix
otherwise; one that is not installed is left out. What takes longer than
--patience seconds is timed once, compiling included, and marked "once". The
load of the machine is printed before and after: two-thread times mean little
beside other work. It was written for CPUs; on a GPU memory is the host's.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

# Some shells export these, and OpenBLAS (numpy, faiss, scikit-learn) then runs
# at about 0.6 of its speed, which would flatter us. Before numpy is imported.
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ.pop("OPENBLAS_L2_SIZE", None)

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax.kernels.nearest_code import stacked_nearest_code

_CHUNK = 1024
# Rows whose choices are compared with float64.
_CHECKED = 1024


def ours(z, codebook, depth, precision="exact", backend="auto"):
  """Searches with `nearest_code`; returns a function that gives indices."""
  z, codebook = jnp.asarray(z), jnp.asarray(codebook)
  search = jax.jit(
    lambda z, c: (
      stacked_nearest_code(
        z, c, np.ones(depth), precision=precision, backend=backend
      ).indices
    )
  )
  return lambda: np.asarray(search(z, codebook))


def ours_fast(z, codebook, depth):
  """Searches with bfloat16 products."""
  return ours(z, codebook, depth, "fast")


def ours_pallas_gpu(z, codebook, depth):
  """Searches with the GPU kernel."""
  _need_gpu()
  return ours(z, codebook, depth, backend="pallas_gpu")


def ours_pallas_gpu_fast(z, codebook, depth):
  """Searches with the GPU kernel and bfloat16 products."""
  _need_gpu()
  return ours(z, codebook, depth, "fast", "pallas_gpu")


def jnp_product(z, codebook, depth):
  """Multiplies and does nothing else: the ceiling, without indices."""
  z, codebook = jnp.asarray(z), jnp.asarray(codebook)
  product = jax.jit(
    lambda z, c: jnp.matmul(z, c.T, precision=jax.lax.Precision.HIGHEST)
  )

  def multiply():
    for _ in range(depth):
      for start in range(0, len(z), 4 * _CHUNK):
        product(z[start : start + 4 * _CHUNK], codebook).block_until_ready()

  return multiply


def _jnp_stacked(choose, z, codebook, depth):
  """Makes a residual search of a jitted choice, on chunks of queries."""
  codebook = jnp.asarray(codebook)

  @jax.jit
  def search(z, c):
    indices = []
    for _ in range(depth):
      indices.append(choose(z, c))
      z = z - c[indices[-1]]
    return jnp.stack(indices, 1)

  chunks = [jnp.asarray(z[i : i + 4096]) for i in range(0, len(z), 4096)]
  return lambda: np.concatenate([search(q, codebook) for q in chunks])


def jnp_naive(z, codebook, depth):
  """Builds the whole matrix and takes its argmin."""

  def choose(z, c):
    return jnp.argmin(jnp.sum(c**2, axis=1) / 2 - z @ c.T, axis=1)

  return _jnp_stacked(choose, z, codebook, depth)


def jax_approx_min_k(z, codebook, depth):
  """Lets `jax.lax.approx_min_k` find the minimum."""

  def choose(z, c):
    values = jnp.sum(c**2, axis=1) / 2 - z @ c.T
    return jax.lax.approx_min_k(values, 1)[1][:, 0]

  return _jnp_stacked(choose, z, codebook, depth)


def _stacked(nearest, z, codebook, depth):
  """Makes a residual search of a function of the queries."""

  def search():
    left, indices = z, []
    for _ in range(depth):
      indices.append(nearest(left))
      if depth > 1:
        left = left - codebook[indices[-1]]
    return np.stack(indices, axis=1)

  return search


def numpy_chunks(z, codebook, depth):
  """Builds the matrix for some queries at a time; also the reference."""

  def nearest(queries):
    bias = (codebook**2).sum(1) / 2
    starts = range(0, len(queries), _CHUNK)
    return np.concatenate(
      [(bias - queries[i : i + _CHUNK] @ codebook.T).argmin(1) for i in starts]
    )

  return _stacked(nearest, z, codebook, depth)


def torch_addmm(z, codebook, depth, compiled=False, cdist=False):
  """Does that in PyTorch, with one `addmm` a chunk."""
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  z, codebook = (torch.tensor(x, device=device) for x in (z, codebook))

  def choose(queries, bias):
    if cdist:
      return torch.cdist(queries, codebook).argmin(1)
    return torch.addmm(bias, queries, codebook.T, alpha=-1).argmin(1)

  if compiled:
    choose = torch.compile(choose)

  @torch.no_grad()
  def search():
    bias = (codebook**2).sum(1) / 2
    left, indices = z, []
    for _ in range(depth):
      found = torch.cat([choose(q, bias) for q in left.split(_CHUNK)])
      left = left - codebook[found]
      indices.append(found)
    return torch.stack(indices, 1).cpu().numpy()

  return search


def torch_cdist(z, codebook, depth):
  """Does that in PyTorch, with `cdist`."""
  return torch_addmm(z, codebook, depth, cdist=True)


def torch_compiled(z, codebook, depth):
  """Lets PyTorch's compiler fuse what it can; needs a C++ compiler."""
  return torch_addmm(z, codebook, depth, compiled=True)


def faiss_flat(z, codebook, depth):
  """Searches the exact index."""
  import faiss

  index = faiss.IndexFlatL2(z.shape[1])
  index.add(codebook)
  return _stacked(lambda q: index.search(q, 1)[1][:, 0], z, codebook, depth)


def vector_quantize_pytorch(z, codebook, depth):
  """Runs the evaluation forward pass of a VQ or residual VQ layer."""
  import torch
  import vector_quantize_pytorch as library

  size = {"dim": z.shape[1], "codebook_size": len(codebook)}
  if depth == 1:
    module = library.VectorQuantize(**size)
    books = [module._codebook]
  else:
    module = library.ResidualVQ(num_quantizers=depth, **size)
    books = [layer._codebook for layer in module.layers]
  module = module.eval()
  for book in books:
    book.embed.data.copy_(torch.tensor(codebook)[None])
  chunks = torch.tensor(z)[None].split(4 * _CHUNK, dim=1)

  @torch.no_grad()
  def search():
    indices = [module(q)[1][0].numpy() for q in chunks]
    return np.concatenate(indices).reshape(len(z), depth)

  return search


def scikit_learn(z, codebook, depth):
  """Calls the function that does just this."""
  from sklearn.metrics import pairwise_distances_argmin

  return _stacked(
    lambda q: pairwise_distances_argmin(q, codebook), z, codebook, depth
  )


PEERS = {
  function.__name__: function
  for function in (
    ours,
    ours_fast,
    ours_pallas_gpu,
    ours_pallas_gpu_fast,
    jnp_product,
    numpy_chunks,
    jnp_naive,
    jax_approx_min_k,
    torch_addmm,
    torch_cdist,
    torch_compiled,
    faiss_flat,
    scikit_learn,
    vector_quantize_pytorch,
  )
}


def _need_gpu():
  if jax.default_backend() != "gpu":
    raise ImportError("no GPU")


def _data(queries, codes, dim):
  """Draws queries and codes."""
  rng = np.random.default_rng(0)
  return (
    rng.standard_normal((queries, dim), np.float32),
    rng.standard_normal((codes, dim), np.float32),
  )


def _memory(name, *size) -> str:
  """Measures what an implementation takes, MB, in a process of its own."""
  done = subprocess.run(
    [sys.executable, __file__, "--memory-of", name, *map(str, size)],
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() if done.returncode == 0 else "-"


def _print_memory(name, queries, codes, dim, depth):
  """Prints the peak above what the process had with its inputs, MB."""
  search = PEERS[name](*_data(queries, codes, dim), depth)
  # A first search, smaller, loads and compiles libraries.
  PEERS[name](*_data(64, codes, dim), depth)()
  before = _peak_kilobytes()
  search()
  print(f"{(_peak_kilobytes() - before) / 1024:.0f}")


def _peak_kilobytes() -> int:
  """Returns the peak of resident memory; Linux only.

  Of `getrusage` a process inherits its parent's, which hides its own.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith("VmHWM"))
  return int(line.split()[1])


def _measure(names, queries, codes, dim, depth, repeats, patience, memory):
  """Prints the rows of one size."""
  z, codebook = _data(queries, codes, dim)
  exact = numpy_chunks(
    z[:_CHECKED].astype(np.float64), codebook.astype(np.float64), depth
  )()
  searches, agreement, times = {}, {}, {}
  for name in names:
    try:
      search = PEERS[name](z, codebook, depth)
      start = time.perf_counter()
      found = search()  # Compiles too.
      took = time.perf_counter() - start
    except (ImportError, RuntimeError) as error:
      print(f"left out: {name} ({str(error).splitlines()[0]})", flush=True)
      continue
    agreement[name] = (
      "-" if found is None else f"{np.mean(found[:_CHECKED] == exact):.3%}"
    )
    times[name] = [took] if took > patience else []
    if took <= patience:
      searches[name] = search
  for _ in range(repeats):
    for name, search in searches.items():
      start = time.perf_counter()
      search()
      times[name].append(time.perf_counter() - start)
  median = {name: np.median(seconds) for name, seconds in times.items()}
  size = f"N={queries} K={codes} C={dim}" + (f" D={depth}" if depth > 1 else "")
  for name, seconds in times.items():
    rate = 2e-9 * queries * codes * dim * depth / median[name]
    share = median.get("jnp_product", np.nan) / median[name]
    taken = _memory(name, queries, codes, dim, depth) if memory else "-"
    print(
      f"| {size} | {name} | {1e3 * median[name]:.1f} | "
      + (
        f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f} | "
        if name in searches
        else "once | "
      )
      + f"{median[name] / median['ours']:.2f} | {rate:.0f} | {share:.2f} | "
      f"{taken} | {agreement[name]} |",
      flush=True,
    )


def main():
  """Times every peer and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--queries", type=int, nargs="+", default=[4096], help="N, several sizes"
  )
  parser.add_argument("--codes", type=int, default=32000, help="K")
  parser.add_argument(
    "--dims", type=int, nargs="+", default=[256], help="C, several sizes"
  )
  parser.add_argument("--depth", type=int, default=1, help="codes a query")
  parser.add_argument(
    "--repeats", type=int, default=7, help="of each, in turns"
  )
  parser.add_argument(
    "--patience", type=float, default=20.0, help="seconds, see above"
  )
  parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
  parser.add_argument("--no-memory", dest="memory", action="store_false")
  parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.memory_of:
    name, *size = args.memory_of
    _print_memory(name, *map(int, size))
    return

  names = ["ours", "jnp_product"]
  names += [name for name in args.peers if name not in names]
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, "
    f"{os.cpu_count()} CPU cores, load before: {os.getloadavg()}\n"
  )
  print(
    "| size | implementation | median ms | range | x ours | GF/s | of the "
    "product | MB | as in float64 |\n|---|---|---|---|---|---|---|---|---|"
  )
  for dim in args.dims:
    for queries in args.queries:
      _measure(
        names,
        queries,
        args.codes,
        dim,
        args.depth,
        args.repeats,
        args.patience,
        args.memory,
      )
  print(f"\nload after: {os.getloadavg()}")


if __name__ == "__main__":
  main()
