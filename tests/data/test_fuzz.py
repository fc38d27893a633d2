"""Valid files with random damage, by the thousand, through every reader.

Each input is read, left out with a reason, or refused by one error that a user
can act on. Anything else ends the test: another exception, a crash of a native
library, or a wait. Every worker process logs the seed of an input before it
begins, so what killed it can be had again.

  python -m pytest -m slow tests/data/test_fuzz.py -s
  python tests/data/test_fuzz.py KIND FIRST COUNT   # these inputs alone
"""

import collections
import io
import json
import logging
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import warnings

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, prepare
from unicode_jax.data import sources, text_tokenizer
from unicode_jax.data.prepared import manifest
from unicode_jax.data.sources import folder as folder_lib, images

ROOT = Path(__file__).parents[2]
SECONDS = 20  # That one input may take.
MEMORY = 6 * 2**30
COUNTS = {
  "image": 6000,
  "tar": 1500,
  "parquet": 1500,
  "arrayrecord": 1500,
  "manifest": 1500,
  "jsonl": 3000,
  "tfds": 600,
  "tokenizer": 1500,
}


def mutate(content, rng, other=b""):
  """Flips, overwrites, cuts, doubles, splices or removes parts of bytes."""
  content = bytearray(content)
  for _ in range(rng.choice([1, 1, 1, 2, 4, 30])):
    size = max(len(content), 1)
    # Headers decide more than what they are followed by.
    near = rng.choice([16, 64, 512, size])
    at = rng.randrange(min(near, size))
    if rng.random() < 0.2:
      at = size - 1 - at
    length = rng.choice([1, 2, 4, 8, 64, size // 4 + 1])
    match rng.randrange(9):
      case 0 | 1:
        if content:
          content[at] ^= 1 << rng.randrange(8)
      case 2:
        content[at : at + 1] = bytes([rng.randrange(256)])
      case 3:
        value = rng.choice([0, 1, 127, 128, 255, 2**16, 2**31 - 1, 2**32 - 1])
        order = rng.choice(["big", "little"])
        content[at : at + 4] = value.to_bytes(4, order)
      case 4:
        del content[at:]
      case 5:
        del content[at : at + length]
      case 6:
        content[at:at] = content[at : at + length]
      case 7:
        start = rng.randrange(len(other) + 1)
        content[at : at + length] = other[start : start + length]
      case 8:
        content[at:at] = rng.randbytes(length % 64)
  return bytes(content)


def encoded(image, image_format, **options):
  stream = io.BytesIO()
  image.save(stream, image_format, **options)
  return stream.getvalue()


def image_seeds():
  """Small valid files of every kind that is read."""
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
  rgba = Image.fromarray(pixels)
  rgb, grey = rgba.convert("RGB"), rgba.convert("L")
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = "a picture"
  exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
  frames = {"save_all": True, "append_images": [rgb.rotate(90), grey]}
  palette = rgb.quantize(16)
  grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  return [
    encoded(rgb, "PNG", exif=exif),
    encoded(rgba, "PNG"),
    encoded(palette, "PNG", transparency=bytes(range(16))),
    encoded(grey16, "PNG"),
    encoded(rgb, "PNG", **frames),
    encoded(rgb, "JPEG", exif=exif, quality=90),
    encoded(rgb, "JPEG", progressive=True, icc_profile=b"x" * 300),
    encoded(rgb.convert("CMYK"), "JPEG"),
    encoded(rgb, "MPO", **frames),
    encoded(palette, "GIF", transparency=3),
    encoded(rgb, "GIF", **frames),
    encoded(rgba, "WEBP", lossless=True, exif=exif),
    encoded(rgb, "WEBP", **frames),
    encoded(rgba, "AVIF", exif=exif, quality=50),
    encoded(rgb, "BMP"),
    encoded(palette, "BMP"),
    encoded(rgb, "TIFF", exif=exif),
    encoded(rgb, "TIFF", compression="tiff_lzw"),
    encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
    encoded(rgb, "TIFF", compression="jpeg"),
    encoded(rgb.convert("1"), "TIFF", compression="group4"),
    encoded(rgb.convert("F"), "TIFF"),
    encoded(grey16, "TIFF", save_all=True, append_images=[grey16]),
    encoded(rgba, "TGA"),
    encoded(palette, "TGA", compression="tga_rle"),
    encoded(rgb, "PPM"),
    encoded(grey16, "PPM"),
    encoded(rgb.convert("1"), "PPM"),
    b"P3 2 2 255\n" + b"1 2 3 " * 4,
  ]


PNGS = [encoded(Image.new("RGB", (9, 7), (i, 0, 0)), "PNG") for i in range(20)]


class Images:
  """Image files, as every reader decodes them, at two sizes and whole."""

  def __init__(self, folder):
    self._seeds = image_seeds()
    self._path = folder / "x.png"

  def run(self, rng):
    content = mutate(rng.choice(self._seeds), rng, rng.choice(self._seeds))
    self._path.write_bytes(content)
    outcomes = []
    for read in (
      lambda: images.decode_image(self._path, rng.choice([1, 8, 300])),
      lambda: images.decode_whole(io.BytesIO(content)),
    ):
      try:
        picture = read()
      except (OSError, ValueError, SyntaxError):
        outcomes.append("left out")
      else:
        assert picture.dtype == np.uint8 and picture.shape[2:] == (3,)
        outcomes.append("read")
    return outcomes[-1]


def converted(source, path, folder, **options):
  """Converts, then reads everything back."""
  out = folder / "out"
  shutil.rmtree(out, ignore_errors=True)
  made = prepare.prepare(
    *(source, str(path), out), workers=1, max_broken=1.0, **options
  )
  _, headers = manifest.open_prepared(out)
  assert made["records"] == len(headers)
  sources.load_arrayrecord(out, 4, heldout_fraction=0.5)[0].images()
  return "left out" if made["broken"] else "read"


class Tars:
  """A webdataset of twelve samples with texts, classes and JSON."""

  def __init__(self, folder):
    self._folder = folder
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
      path = folder / f"{tar_format}.tar"
      with tarfile.open(path, "w", format=tar_format) as tar:
        for i in range(12):
          said = json.dumps({"caption": ["a", "é"], "label": i}).encode()
          for name, content in (
            (f"{'deep/' * 25 * (i == 3)}{i}.png", PNGS[i]),
            (f"{'deep/' * 25 * (i == 3)}{i}.json", said),
            (f"{'deep/' * 25 * (i == 3)}{i}.txt", b"text"),
          ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    self._seeds = [path.read_bytes() for path in sorted(folder.glob("*.tar"))]

  def run(self, rng):
    path = self._folder / "x.tar"
    path.write_bytes(mutate(rng.choice(self._seeds), rng, self._seeds[0]))
    return converted("webdataset", path, self._folder)


class Parquets:
  """Parquet files of images, captions and classes, in several encodings."""

  def __init__(self, folder):
    import pyarrow
    from pyarrow import parquet

    self._folder = folder
    rows = [
      {
        "image": {"bytes": PNGS[i], "path": f"{i}.png"},
        "caption": [f"c{i}", "é"],
        "label": i % 2,
      }
      for i in range(12)
    ]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
      {"huggingface": json.dumps({"info": {"features": features}})}
    )
    self._seeds = []
    for options in (
      {"compression": "none", "row_group_size": 4},
      {"compression": "snappy"},
      {"compression": "zstd", "use_dictionary": False},
      {"compression": "gzip", "data_page_version": "2.0"},
    ):
      parquet.write_table(table, folder / "seed", **options)
      self._seeds.append((folder / "seed").read_bytes())

  def run(self, rng):
    path = self._folder / "x.parquet"
    path.write_bytes(mutate(rng.choice(self._seeds), rng, self._seeds[0]))
    return converted("parquet", path, self._folder)


class Records:
  """A prepared folder of which a shard or an index is damaged."""

  names = ("00000-000.array_record", "00000-000.jsonl")

  def __init__(self, folder):
    self._folder, inputs = folder / "made", folder / "images"
    inputs.mkdir()
    for i in range(40):
      Image.new("RGB", (9, 7), (i, 0, 0)).save(inputs / f"{i}.png")
    self._inputs = inputs
    prepare.prepare("folder", str(inputs), self._folder, workers=1)
    self._whole = {p.name: p.read_bytes() for p in self._folder.iterdir()}

  def run(self, rng):
    for name, content in self._whole.items():
      (self._folder / name).write_bytes(content)
    name = rng.choice(self.names)
    content = mutate(self._whole[name], rng, self._whole["manifest.json"])
    if name.endswith(".array_record"):  # The size is compared at the start.
      content = content[: len(self._whole[name])]
      content = content.ljust(len(self._whole[name]), b"\0")
    (self._folder / name).write_bytes(content)
    pair = sources.load_arrayrecord(self._folder, 4)
    for source in pair:
      for item, image in zip(source.items, source.images(), strict=True):
        # Damage is noticed, or did not matter: never another picture.
        number = int(item["name"].partition(".")[0])
        assert (image == (number, 0, 0)).all(), item
    return "read"


class Manifests(Records):
  """A prepared folder whose manifest is damaged: read, and gone on with."""

  names = ("manifest.json",)

  def run(self, rng):
    said = super().run(rng)
    prepare.prepare("folder", str(self._inputs), self._folder, workers=1)
    return said


class Lines:
  """Captions, and LLaVA's records as lines and as a list."""

  def __init__(self, folder):
    self._folder, self._images = folder, folder / "images"
    self._images.mkdir()
    names = [f"{i}.png" for i in range(40)]
    for i, name in enumerate(names):
      Image.new("RGB", (9, 7), (i, 0, 0)).save(self._images / name)
    captions = [json.dumps({"image": n, "text": f"é {n}"}) for n in names]
    records = [
      {
        "id": name,
        "image": name,
        "conversations": [
          {"from": "human", "value": "<image>\nWhat é?"},
          {"from": "gpt", "value": f"This is {name}."},
        ],
      }
      for name in names
    ]
    lines = "\n".join(map(json.dumps, records))
    self._captions = "\n".join(captions).encode()
    self._records = [lines.encode(), json.dumps(records).encode()]
    self._names = set(names)

  def run(self, rng):
    file = self._folder / "x.json"
    if rng.random() < 0.4:
      file.write_bytes(mutate(self._captions, rng, self._records[0]))
      folder_lib.read_captions(file, self._names)
      return "read"
    file.write_bytes(mutate(rng.choice(self._records), rng, self._captions))
    sources.load_llava(
      self._images, file, 4, cache_dir=self._folder / "cache", max_broken=1.0
    )
    return "read"

  def tidy(self):
    shutil.rmtree(self._folder / "cache", ignore_errors=True)


class Tfds:
  """What TFDS wrote, with damage to a shard or to what describes it."""

  def __init__(self, folder):
    import tensorflow_datasets as tfds

    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "caption": tfds.features.Text(),
      "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version("1.0.0")
      code_path = None
      pkg_dir_path = folder
      name = "seed"

      def _info(self):
        return self.dataset_info_from_configs(
          features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i in range(20):
          row = {"image": io.BytesIO(PNGS[i]), "caption": "c", "label": i % 2}
          yield i, row

    Builder(data_dir=folder, file_format="array_record").download_and_prepare()
    self._folder = folder
    root = folder / "seed" / "1.0.0"
    self._whole = {p: p.read_bytes() for p in sorted(root.iterdir())}

  def run(self, rng):
    for path, content in self._whole.items():
      path.write_bytes(content)
    path = rng.choice(list(self._whole))
    content = mutate(self._whole[path], rng, self._whole[path])
    path.write_bytes(content)
    pair = sources.load_tfds(
      *("seed", 4),
      data_dir=self._folder,
      cache_dir=self._folder / "cache",
      heldout_fraction=0.3,
      max_broken=0.9,
    )
    pair[0].images()
    return "read"

  def tidy(self):
    shutil.rmtree(self._folder / "cache", ignore_errors=True)


class Tokenizers:
  """A text tokenizer's files, read and used."""

  def __init__(self, folder):
    texts = ["the quick brown fox </s> jumps <image> over"] * 5
    made = text_tokenizer.train_text_tokenizer(texts, 275)
    self._folder = folder
    made.save(folder)
    self._whole = {p: p.read_bytes() for p in sorted(folder.iterdir())}

  def run(self, rng):
    for path, content in self._whole.items():
      path.write_bytes(content)
    path = rng.choice(list(self._whole))
    content = self._whole[path]
    path.write_bytes(mutate(content, rng, content))
    tokenizer = text_tokenizer.load_text_tokenizer(self._folder)
    ids = tokenizer.encode("the fox </s><image> é")
    assert tokenizer.control_ids.isdisjoint(ids)
    tokenizer.decode(ids)
    return "read"


KINDS = {
  "tokenizer": Tokenizers,
  "image": Images,
  "tar": Tars,
  "parquet": Parquets,
  "arrayrecord": Records,
  "manifest": Manifests,
  "jsonl": Lines,
  "tfds": Tfds,
}


def work(kind, first, count):
  """Reads so many inputs; prints each number before, then the outcomes."""
  logging.disable(logging.CRITICAL)
  warnings.simplefilter("ignore")
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  outcomes = collections.Counter()
  with tempfile.TemporaryDirectory() as name:
    inputs = KINDS[kind](Path(name))
    for number in range(first, first + count):
      print(f"begin {number}", file=sys.__stdout__, flush=True)
      signal.alarm(SECONDS)  # Nobody handles it: the end.
      try:
        outcomes[inputs.run(random.Random(f"{kind} {number}"))] += 1
      except config_lib.ConfigError as error:
        assert 10 < len(str(error)) < 5000, error
        outcomes["refused"] += 1
      except OSError as error:
        assert error.filename is not None, error
        outcomes["refused"] += 1
      signal.alarm(0)
      if hasattr(inputs, "tidy"):
        inputs.tidy()
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  said = {**outcomes, "peak_mb": used}
  print(f"done {json.dumps(said)}", file=sys.__stdout__, flush=True)


def run_worker(kind, first, count):
  """Returns outcomes, and what ended the process before the last input."""
  done = subprocess.run(
    [sys.executable, __file__, kind, str(first), str(count)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=120 + count * SECONDS,
    check=False,
  )
  lines = [
    line for line in done.stdout.split("\n") if line[:5] in ("begin", "done ")
  ]
  if done.returncode == 0:
    return json.loads(lines[-1][5:]), None
  number = int(lines[-1].split()[1]) if lines else first - 1
  return {}, (number, done.returncode, done.stderr[-2000:])


def fuzz(kind, count, chunk=500):
  """Returns the outcomes of so many inputs, and every failure."""
  outcomes, failures, number = collections.Counter(), [], 0
  while number < count:
    stop = min(number + chunk, count)
    said, failure = run_worker(kind, number, stop - number)
    if failure is None:
      outcomes["peak_mb"] = max(outcomes["peak_mb"], said.pop("peak_mb"))
      outcomes.update(said)
      number = stop
      continue
    at, *_ = failure
    failures.append(failure)
    if at < number or len(failures) > 20:
      break
    if at > number:  # What came before it.
      said, _ = run_worker(kind, number, at - number)
      outcomes.update({k: v for k, v in said.items() if k != "peak_mb"})
    number = at + 1
  return outcomes, failures


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_damage(kind):
  for package in {"parquet": ["pyarrow"], "tfds": ["tensorflow_datasets"]}.get(
    kind, []
  ):
    pytest.importorskip(package)
  outcomes, failures = fuzz(kind, COUNTS[kind])
  print(f"{kind}: {dict(outcomes)}")
  assert not failures, failures
  handled = sum(v for k, v in outcomes.items() if k != "peak_mb")
  assert handled == COUNTS[kind]
  # Damage that nobody notices, or that nothing survives, tests nothing.
  assert len(outcomes) > 2 or kind == "jsonl", outcomes


def test_some_random_damage():
  """The same for a few inputs of each kind that is quick."""
  for kind in ("image", "jsonl"):
    outcomes, failures = fuzz(kind, 60)
    assert not failures, failures
    assert outcomes["read"] > 5


if __name__ == "__main__":
  work(sys.argv[1], *map(int, sys.argv[2:]))
