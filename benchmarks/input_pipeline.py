"""Images per second that training is fed with, beside torch and webdataset.

The same pictures three ways: ArrayRecord shards read by our pipeline, a folder
read by torch's DataLoader, and tars read by webdataset. All decode and resize
with the same Pillow calls (`decode_image`), shuffle, and give batches of
float32[b, S, S, 3] in [-1, 1]. The pictures are OpenMoji's and easy-VQA's,
drawn at --file_size and stored in turns as PNG and as JPEG.

  python benchmarks/input_pipeline.py --images=3000 --rounds=7
  python benchmarks/input_pipeline.py --images=300 --rounds=2 --batches=6

Readers are timed in turns, a round each, after two batches to warm up; shown
are median, lowest and highest of the rounds. All files are in memory after the
first round, so this measures work, not disks. webdataset is no requirement of
ours: pip install webdataset, or leave it away with --readers unicode_jax torch.
--consumed is what a training step takes, in images per second; the default is
the tokenizer of the default preset, which the quickstart trains, on two CPU
cores (docs/speed.md). The figures mean nothing on a busy machine, so the load
average is printed too.
"""

import argparse
import functools
import io
import json
import os
from pathlib import Path
import platform
import statistics
import tarfile
import tempfile
import time

from absl import flags
import numpy as np
from PIL import Image

from unicode_jax import prepare
from unicode_jax.data import pipeline, sources

READERS = ("unicode_jax", "torch", "webdataset")
WARM_UP = 2  # Batches.
CONSUMED = 235.0


def write_pictures(folder, count, size):
  """Writes PNG and JPEG files; returns their number."""
  written = 0
  for load in (sources.load_openmoji, sources.load_easy_vqa):
    source, _ = load(size if load is sources.load_openmoji else 64)
    for index in range(min(len(source), count - written)):
      picture = Image.fromarray(source[index]["image"])
      picture = picture.resize((size, size), Image.Resampling.BICUBIC)
      suffix, kind = (("png", {}), ("jpg", {"quality": 95}))[written % 2]
      picture.save(folder / f"{written:06d}.{suffix}", **kind)
      written += 1
  return written


def write_tars(folder, out, images_per_tar):
  """Writes the files of a folder as a webdataset; returns the tars."""
  files = sorted(folder.iterdir())
  tars = []
  for start in range(0, len(files), images_per_tar):
    tars.append(str(out / f"{len(tars):05d}.tar"))
    with tarfile.open(tars[-1], "w") as tar:
      for file in files[start : start + images_per_tar]:
        tar.add(file, arcname=file.name)
  return tars


class Files:
  """A folder for torch's DataLoader."""

  def __init__(self, folder, size):
    self.files, self.size = sorted(map(str, folder.iterdir())), size

  def __len__(self):
    return len(self.files)

  def __getitem__(self, index):
    return sources.decode_image(self.files[index], self.size)


def to_batch(images):
  """Returns what our pipeline gives: float32[b, S, S, 3] in [-1, 1]."""
  return pipeline.to_float(np.stack(images))


def ours(paths, args, num_workers):
  """Returns an endless iterator of batches."""
  source, _ = sources.load_arrayrecord(paths["shards"], args.size)
  return pipeline.image_iterator(
    [source],
    [1.0],
    global_batch_size=args.batch,
    seed=0,
    flip=False,
    num_workers=num_workers,
  )


def torch_loader(paths, args, num_workers):
  """Returns an iterator of batches that is long enough."""
  import torch

  dataset = Files(paths["folder"], args.size)
  return iter(
    torch.utils.data.DataLoader(
      dataset,
      args.batch,
      sampler=torch.utils.data.RandomSampler(
        dataset, replacement=True, num_samples=10**7
      ),
      num_workers=num_workers,
      collate_fn=to_batch,
    )
  )


def decode_sample(sample, size):
  """Decodes an image of a webdataset."""
  file = io.BytesIO(sample.get("png") or sample.get("jpg"))
  return sources.decode_image(file, size)


def webdataset_loader(paths, args, num_workers):
  """Returns an endless iterator of batches."""
  import webdataset

  dataset = (
    webdataset.WebDataset(paths["tars"], resampled=True, shardshuffle=False)
    .shuffle(1000)
    .map(functools.partial(decode_sample, size=args.size))
    .batched(args.batch, collation_fn=to_batch)
  )
  return iter(
    webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers)
  )


MAKE = dict(zip(READERS, (ours, torch_loader, webdataset_loader)))


def measure(make, paths, args, num_workers):
  """Returns images per second of one reader, from a fresh start."""
  batches = make(paths, args, num_workers)
  for _ in range(WARM_UP + num_workers):  # Also what workers have ready.
    next(batches)
  start = time.perf_counter()
  for _ in range(args.batches):
    next(batches)
  seconds = time.perf_counter() - start
  del batches  # Ends its workers.
  return args.batches * args.batch / seconds


def main():
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--images", type=int, default=3000)
  parser.add_argument("--file_size", type=int, default=256)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--batches", type=int, default=30)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
  parser.add_argument("--readers", nargs="+", default=READERS, choices=READERS)
  parser.add_argument("--consumed", type=float, default=CONSUMED)
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain's workers read some.
  print(
    f"{platform.machine()}, {os.cpu_count()} cores, load average "
    f"{os.getloadavg()[0]:.1f} before"
  )
  with tempfile.TemporaryDirectory() as root:
    root = Path(root)
    folder = root / "folder"
    folder.mkdir()
    (root / "tars").mkdir()
    count = write_pictures(folder, args.images, args.file_size)
    prepare.prepare("folder", str(folder), root / "shards", shard_size=1024)
    paths = {
      "folder": folder,
      "shards": root / "shards",
      "tars": write_tars(folder, root / "tars", 1024),
    }
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{count} files, {size / 2**20:.0f} MiB")
    cases = [(r, w) for w in args.workers for r in args.readers]
    speeds = {case: [] for case in cases}
    for _ in range(args.rounds):
      for reader, num_workers in cases:
        speeds[reader, num_workers].append(
          measure(MAKE[reader], paths, args, num_workers)
        )
  print(f"load average {os.getloadavg()[0]:.1f} after\n")
  print("| reader | workers | images/s | lowest | highest |")
  print("| --- | --- | --- | --- | --- |")
  for (reader, num_workers), found in speeds.items():
    print(
      f"| {reader} | {num_workers} | {statistics.median(found):.0f} "
      f"| {min(found):.0f} | {max(found):.0f} |"
    )
  print(f"\na training step takes {args.consumed:.0f} images/s")
  print(json.dumps({f"{r} {w}": found for (r, w), found in speeds.items()}))


if __name__ == "__main__":
  main()
