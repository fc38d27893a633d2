"""The products of a train step alone, in JAX and in PyTorch, GF/s.

The matrix products of the language models of train_step.py, small and wide,
and the 3x3 convolutions of the tokenizer's default preset with both gradients.
What they differ by is what the rest of a step cannot make good. One process
for each library and round, since threads that wait slow the other library's:

  python benchmarks/products.py --rounds=5
"""

import argparse
import os
import subprocess
import sys
import time

for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

import numpy as np  # noqa: E402

# Rows, summed over, columns.
MATRICES = (
  (1024, 192, 512),
  (1024, 512, 192),
  (1024, 192, 2048),
  (1024, 2048, 192),
  (192, 1024, 512),
  (4096, 256, 704),
  (4096, 704, 256),
  (256, 4096, 704),
)
# Images, side, channels in and out.
CONVOLUTIONS = ((64, 8, 128), (64, 4, 256))
REPEATS = 40


def cases(library: str):
  """Yields (name, FLOP, function that does it once and waits)."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  make_product, make_convolution = {"jax": _jax, "torch": _torch}[library]()
  for rows, inner, columns in MATRICES:
    work = 2 * rows * inner * columns
    run = make_product(draw(rows, inner), draw(inner, columns))
    yield f"{rows} x {inner} x {columns}", work, run
  for images, side, width in CONVOLUTIONS:
    shape = images, side, side, width
    work = 3 * 2 * images * side**2 * 9 * width**2
    run = make_convolution(draw(*shape), draw(3, 3, width, width), draw(*shape))
    yield f"3x3 of {side} x {side} x {width}, and gradients", work, run


def _jax():
  import jax

  multiply = jax.jit(lambda a, b: a @ b)

  @jax.jit
  def convolve(x, kernel, cotangent):
    def forward(x, kernel):
      names = ("NHWC", "HWIO", "NHWC")
      return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=names
      )

    out, pullback = jax.vjp(forward, x, kernel)
    return out, pullback(cotangent)

  def bind(function):
    def make(*arrays):
      arrays = tuple(map(jax.numpy.asarray, arrays))
      return lambda: jax.block_until_ready(function(*arrays))

    return make

  return bind(multiply), bind(convolve)


def _torch():
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))

  def make_product(a, b):
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    return lambda: a @ b

  def make_convolution(x, kernel, cotangent):
    x, cotangent = (
      torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, cotangent)
    )
    kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    inputs = x.requires_grad_(), kernel.requires_grad_()

    def run():
      out = torch.nn.functional.conv2d(*inputs, padding=1)
      return torch.autograd.grad(out, inputs, cotangent)

    return run

  return make_product, make_convolution


def measure(library: str) -> None:
  """Prints name, tab and GF/s of each case, of the median time."""
  for name, work, run in cases(library):
    run()
    seconds = []
    for _ in range(REPEATS):
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
    print(f"{name}\t{work / np.median(seconds) / 1e9}")


def main():
  """Takes turns, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--library", choices=("jax", "torch"), help="only print")
  args = parser.parse_args()
  if args.library:
    measure(args.library)
    return
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  rates: dict[str, dict[str, list[float]]] = {}
  load = os.getloadavg()[0]
  for _ in range(args.rounds):
    for library in ("jax", "torch"):
      out = subprocess.run(
        [sys.executable, __file__, f"--library={library}"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
      ).stdout
      for line in out.splitlines():
        name, rate = line.split("\t")
        rates.setdefault(name, {}).setdefault(library, []).append(float(rate))
  print(f"medians of {args.rounds} processes each (range); load {load:.1f}\n")
  print(
    "| product | jax, GF/s | torch, GF/s | jax / torch |\n|---|---|---|---|"
  )
  for name, of in rates.items():
    cells = [
      f"{np.median(of[lib]):.0f} ({min(of[lib]):.0f} to {max(of[lib]):.0f})"
      for lib in ("jax", "torch")
    ]
    ratio = np.median(of["jax"]) / np.median(of["torch"])
    print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
  main()
