"""Times ways to add up what a quantizer assigned: counts and sums of codes.

  python benchmarks/code_statistics.py

A codebook's update needs, of N queries and their codes, how often each of K
codes was chosen (counts) and the sum of what chose it (sums). Candidates:

  scatter   adds each query to its row; what `quantizer.quantize` does
  joint     the same, counts as one more column of the sums
  sort      sorts by code first, so that a row's queries follow each other
  one-hot   a product with the matrix of choices, left out where it is too large

Prints medians of interleaved repetitions, ms, for the platform that it runs on.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

# Queries, codes, dimensions: the quickstart's, the default's, larger ones.
SIZES = (
  (4096, 2048, 6),
  (1024, 2048, 16),
  (16384, 32000, 32),
  (65536, 32000, 32),
  (65536, 32000, 256),
)
# Entries of the matrix of choices, 1.2 GB of float32.
_LARGEST = 3e8


def scatter(codes, values, num_codes):
  """Adds every query to its row."""
  sums = jnp.zeros((num_codes, values.shape[1]))
  return jnp.zeros(num_codes).at[codes].add(1.0), sums.at[codes].add(values)


def joint(codes, values, num_codes):
  """Adds a column of ones too."""
  ones = jnp.ones((len(codes), 1))
  both = jnp.zeros((num_codes, values.shape[1] + 1))
  both = both.at[codes].add(jnp.concatenate([values, ones], axis=1))
  return both[:, -1], both[:, :-1]


def sort(codes, values, num_codes):
  """Sorts the queries by their codes."""
  order = jnp.argsort(codes)
  add = jax.tree_util.Partial(
    jax.ops.segment_sum,
    segment_ids=codes[order],
    num_segments=num_codes,
    indices_are_sorted=True,
  )
  return add(jnp.ones(len(codes))), add(values[order])


def one_hot(codes, values, num_codes):
  """Multiplies with the matrix of choices."""
  chosen = jax.nn.one_hot(codes, num_codes, dtype=jnp.float32)
  sums = jnp.matmul(chosen.T, values, precision=jax.lax.Precision.HIGHEST)
  return chosen.sum(0), sums


CANDIDATES = (scatter, joint, sort, one_hot)


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=9)
  args = parser.parse_args()
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, load: "
    f"{os.getloadavg()}\n"
  )
  print("| N x K x C | " + " | ".join(f.__name__ for f in CANDIDATES) + " |")
  print("|---" * (1 + len(CANDIDATES)) + "|")
  for num_queries, num_codes, dim in SIZES:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, num_codes, num_queries), jnp.int32)
    values = jnp.asarray(rng.standard_normal((num_queries, dim), np.float32))
    expected = np.zeros((num_codes, dim))
    np.add.at(expected, np.asarray(codes), np.asarray(values))
    programs = {}
    for candidate in CANDIDATES:
      if candidate is one_hot and num_queries * num_codes > _LARGEST:
        continue
      program = jax.jit(candidate, static_argnums=2)
      counts, sums = program(codes, values, num_codes)
      np.testing.assert_array_equal(
        counts, np.bincount(codes, minlength=num_codes)
      )
      np.testing.assert_allclose(sums, expected, atol=1e-4)
      programs[candidate.__name__] = program
    times = {name: [] for name in programs}
    for _ in range(args.repeats):
      for name, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program(codes, values, num_codes))
        times[name].append(time.perf_counter() - start)
    cells = [
      f"{1e3 * np.median(times[f.__name__]):.2f}"
      if f.__name__ in times
      else "-"
      for f in CANDIDATES
    ]
    size = f"{num_queries} x {num_codes} x {dim}"
    print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  main()
