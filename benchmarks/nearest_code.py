"""Times the nearest-code search beside its peers, and checks their choices.

  python benchmarks/nearest_code.py --queries=4096 --codes=32000 --dim=256

Prints a Markdown table: the median and the range of interleaved repetitions,
GF/s of the product alone (2 N K C), and the share of indices that equal the
float64 search's. All rows are float32 but "fast". A peer that is not installed
is left out. The load of the machine is printed before and after: two-thread
times mean little beside other work.
"""

import argparse
import os
import time

# Some shells export these, and OpenBLAS (numpy, faiss, scikit-learn) then runs
# at about 0.6 of its speed, which would flatter us. Before numpy is imported.
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ.pop("OPENBLAS_L2_SIZE", None)

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax.kernels.nearest_code import nearest_code


def ours(z, codebook, precision="exact"):
  """Searches with `nearest_code`; returns a function that gives indices."""
  z, codebook = jnp.asarray(z), jnp.asarray(codebook)
  search = jax.jit(lambda z, c: nearest_code(z, c, precision=precision))
  return lambda: np.asarray(search(z, codebook).indices)


def ours_fast(z, codebook):
  """Searches with bfloat16 products."""
  return ours(z, codebook, "fast")


def jnp_naive(z, codebook):
  """Builds the whole matrix and takes its argmin."""
  z, codebook = jnp.asarray(z), jnp.asarray(codebook)

  @jax.jit
  def search(z, c):
    return jnp.argmin(jnp.sum(c**2, axis=1) / 2 - z @ c.T, axis=1)

  return lambda: np.asarray(search(z, codebook))


def numpy_chunks(z, codebook, chunk=1024):
  """Builds it for some queries at a time; also the float64 reference."""

  def search():
    bias = (codebook**2).sum(1) / 2
    starts = range(0, len(z), chunk)
    chunks = [(bias - z[i : i + chunk] @ codebook.T).argmin(1) for i in starts]
    return np.concatenate(chunks)

  return search


def torch_chunks(z, codebook, chunk=1024):
  """Does that in PyTorch, with one `addmm` a chunk."""
  import torch

  z, codebook = torch.tensor(z), torch.tensor(codebook)

  def search():
    bias = (codebook**2).sum(1) / 2
    chunks = [
      torch.addmm(bias, q, codebook.T, alpha=-1).argmin(1)
      for q in z.split(chunk)
    ]
    return torch.cat(chunks).numpy()

  return search


def faiss_flat(z, codebook):
  """Searches the exact index."""
  import faiss

  index = faiss.IndexFlatL2(z.shape[1])
  index.add(codebook)
  return lambda: index.search(z, 1)[1][:, 0]


def vector_quantize_pytorch(z, codebook):
  """Runs the evaluation forward pass of a VQ layer."""
  import torch
  from vector_quantize_pytorch import VectorQuantize

  module = VectorQuantize(dim=z.shape[1], codebook_size=len(codebook)).eval()
  module._codebook.embed.data.copy_(torch.tensor(codebook)[None])
  z = torch.tensor(z)[None]

  @torch.no_grad()
  def search():
    return module(z)[1][0].numpy()

  return search


def scikit_learn(z, codebook):
  """Calls the function that does just this."""
  from sklearn.metrics import pairwise_distances_argmin

  return lambda: pairwise_distances_argmin(z, codebook)


PEERS = (
  ours,
  ours_fast,
  jnp_naive,
  numpy_chunks,
  torch_chunks,
  faiss_flat,
  scikit_learn,
  vector_quantize_pytorch,
)


def main():
  """Times every peer and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--queries", type=int, default=4096)
  parser.add_argument("--codes", type=int, default=32000)
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()

  rng = np.random.default_rng(0)
  z = rng.standard_normal((args.queries, args.dim)).astype(np.float32)
  codebook = rng.standard_normal((args.codes, args.dim)).astype(np.float32)
  exact = numpy_chunks(z.astype(np.float64), codebook.astype(np.float64))()

  searches, agreement = {}, {}
  for peer in PEERS:
    try:
      search = peer(z, codebook)
    except ImportError as error:
      print(f"left out: {peer.__name__} ({error})")
      continue
    agreement[peer.__name__] = np.mean(search() == exact)  # also warms up
    searches[peer.__name__] = search

  print(f"load before: {os.getloadavg()}")
  times = {name: [] for name in searches}
  for _ in range(args.repeats):
    for name, search in searches.items():
      start = time.perf_counter()
      search()
      times[name].append(time.perf_counter() - start)
  print(f"load after: {os.getloadavg()}")

  size = f"N={args.queries} K={args.codes} C={args.dim}"
  print(f"\n| {size} | median ms | range | GF/s | as in float64 |")
  print("|---|---|---|---|---|")
  for name, seconds in times.items():
    median = np.median(seconds)
    rate = 2e-9 * args.queries * args.codes * args.dim / median
    low, high = (1e3 * f(seconds) for f in (min, max))
    print(
      f"| {name} | {1e3 * median:.1f} | {low:.1f}-{high:.1f} | {rate:.0f} "
      f"| {agreement[name]:.4%} |"
    )


if __name__ == "__main__":
  main()
