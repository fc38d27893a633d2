"""Image files as they are found in the wild, through every reader of them.

Each kind is read as it should look, or left out with its reason: nothing else
is raised, nothing waits, and memory stays bounded.
"""

import faulthandler
import io
import json
import os
from pathlib import Path
import re
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, inference, prepare
from unicode_jax.data import sources

ROOT = Path(__file__).parents[2]
SIZE = 8
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
GRAY = (100, 100, 100)


@pytest.fixture(autouse=True)
def _no_hang():
  """Ends the process where something waits for ever."""
  faulthandler.dump_traceback_later(120, exit=True)
  yield
  faulthandler.cancel_dump_traceback_later()


def encoded(image, image_format="PNG", **options):
  stream = io.BytesIO()
  image.save(stream, image_format, **options)
  return stream.getvalue()


def chunk(kind, content):
  checksum = zlib.crc32(kind + content)
  return (
    struct.pack(">I", len(content))
    + kind
    + content
    + struct.pack(">I", checksum)
  )


def png(width, height, depth, color, rows, *chunks):
  """A PNG file, chunk by chunk; `rows` are its compressed rows."""
  header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
  return b"".join(
    [
      b"\x89PNG\r\n\x1a\n",
      chunk(b"IHDR", header),
      *chunks,
      chunk(b"IDAT", rows),
      chunk(b"IEND", b""),
    ]
  )


def blank_png(width, height, depth=8, color=6):
  """A PNG of zeros: few bytes for many pixels."""
  bits = depth * {0: 1, 2: 3, 3: 1, 6: 4}[color]
  row = bytes(1 + (width * bits + 7) // 8)
  squeeze = zlib.compressobj()
  rows = [squeeze.compress(row) for _ in range(height)]
  palette = [chunk(b"PLTE", bytes(6))] if color == 3 else []
  squeezed = b"".join(rows) + squeeze.flush()
  return png(width, height, depth, color, squeezed, *palette)


def animation(image_format):
  frames = [Image.new("RGB", (20, 20), c) for c in (RED, "blue", "green")]
  options = {"lossless": True} if image_format == "WEBP" else {}
  return encoded(
    frames[0], image_format, save_all=True, append_images=frames[1:], **options
  )


def palette(transparent):
  image = Image.new("P", (20, 10), 1)
  image.putpalette([0, 255, 0, *RED])
  return image, ({"transparency": 1} if transparent else {})


def quarters():
  """Four colours, of which no turn or reflection looks like another."""
  pixels = np.zeros((32, 32, 3), np.uint8)
  pixels[:16, :16] = RED
  pixels[:16, 16:] = (0, 255, 0)
  pixels[16:, :16] = (0, 0, 255)
  return pixels


# What turns an upright picture into the one that is stored, by the tag.
STORED = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: a.swapaxes(0, 1)[::-1],
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


def rotated(tag, image_format, **options):
  exif = Image.Exif()
  exif[0x0112] = tag
  pixels = np.ascontiguousarray(STORED.get(tag, STORED[1])(quarters()))
  return encoded(Image.fromarray(pixels), image_format, exif=exif, **options)


def with_exif(content):
  """A red JPEG with an EXIF block of any bytes."""
  return encoded(Image.new("RGB", (20, 20), RED), "JPEG", exif=content)


def floats(values):
  return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


def good_files():
  """Name -> (file, what it shows: a colour, or `quarters`)."""
  cmyk = Image.new("CMYK", (20, 10), (0, 255, 255, 0))
  grey16 = Image.new("I;16", (20, 10), 257 * 100)
  nan = np.zeros((9, 27), np.float32)
  nan[0, 0] = np.nan
  files = {
    "grey16.png": (encoded(grey16), GRAY),
    "rgb16.png": (
      png(1, 1, 16, 2, zlib.compress(b"\0\xff\x12\0\x34\0\x56")),
      RED,
    ),
    # A 16-bit grey that stands for nothing, as the tRNS chunk says.
    "clear16.png": (
      png(
        *(1, 1, 16, 0, zlib.compress(b"\0\x12\x34")),
        chunk(b"tRNS", b"\x12\x34"),
      ),
      WHITE,
    ),
    "rgba16.png": (png(1, 1, 16, 6, zlib.compress(bytes(9))), WHITE),
    "cmyk.jpg": (encoded(cmyk, "JPEG", quality=100), RED),
    "progressive.jpg": (
      encoded(Image.new("RGB", (99, 99), RED), "JPEG", progressive=True),
      RED,
    ),
    "animated.gif": (animation("GIF"), RED),
    "animated.webp": (animation("WEBP"), RED),
    "animated.png": (animation("PNG"), RED),
    "one.png": (encoded(Image.new("RGB", (1, 1), RED)), RED),
    "wide.png": (encoded(Image.new("RGB", (30000, 1), RED)), RED),
    "tall.png": (encoded(Image.new("RGBA", (1, 30000), RED)), RED),
    "wide.jpg": (encoded(Image.new("RGB", (30000, 1), RED), "JPEG"), RED),
    "jpeg_named.png": (encoded(Image.new("RGB", (9, 9), RED), "JPEG"), RED),
    "float.tif": (floats(np.full((9, 9), 130)), (130,) * 3),
    "nan.tif": (floats(nan + 0.4), (102,) * 3),
    "no_exif.jpg": (with_exif(b"Exif\0\0not a TIFF header"), RED),
    "cut_exif.jpg": (with_exif(b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"), RED),
    "loop_exif.jpg": (
      with_exif(
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\x08"
      ),
      RED,
    ),
    "exif_9.jpg": (rotated(9, "JPEG", quality=95), quarters()),
  }
  for name, transparent in (("p", False), ("clear_p", True)):
    image, options = palette(transparent)
    files[f"{name}.png"] = (
      encoded(image, **options),
      (WHITE if transparent else RED),
    )
    files[f"{name}.gif"] = (
      encoded(image, "GIF", **options),
      (WHITE if transparent else RED),
    )
  for tag in STORED:
    files[f"exif_{tag}.jpg"] = rotated(tag, "JPEG", quality=95), quarters()
    files[f"exif_{tag}.png"] = rotated(tag, "PNG"), quarters()
    files[f"exif_{tag}.webp"] = (
      rotated(tag, "WEBP", lossless=True),
      quarters(),
    )
    files[f"exif_{tag}.tif"] = rotated(tag, "TIFF"), quarters()
  return files


def patched(content, *changes):
  content = bytearray(content)
  for offset, new in changes:
    content[offset : offset + len(new)] = new
  return bytes(content)


def bad_files():
  """Name -> (file, what its reason says)."""
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  noise = Image.fromarray(noise)
  jpeg, gif = encoded(noise, "JPEG"), encoded(noise, "GIF")
  bmp, huge = encoded(noise, "BMP"), struct.pack("<ii", 2**17, 2**17)
  webp = encoded(noise, "WEBP", lossless=True)
  bomb, no_image = "decompression bomb", "not an image file"
  return {
    "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
    "cut.gif": (gif[: len(gif) // 2], "truncated|not process"),
    "cut.webp": (webp[: len(webp) // 2], no_image + "|decoder"),
    "cut.png": (encoded(noise)[:-3000], "truncated|unrecognized|broken"),
    "header.png": (encoded(noise)[:20], no_image + "|truncated"),
    "empty.png": (b"", no_image),
    "text.jpg": (b"this is no picture\n" * 50, no_image),
    "html.png": (b"<!DOCTYPE html><html>404</html>", no_image),
    "script.png": (
      b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
      no_image,
    ),
    "zeros.tga": (bytes(5000), no_image),
    "bomb.png": (
      png(2**17, 2**17, 8, 2, zlib.compress(bytes(999))),
      bomb,
    ),
    "bomb.gif": (patched(gif, (6, b"\xff\xff\xff\xff")), bomb),
    "bomb.bmp": (patched(bmp, (18, huge)), bomb),
    "negative.bmp": (
      patched(bmp, (18, struct.pack("<ii", -5, 5))),
      no_image + "|Unsupported|bad|invalid|SystemError|Error",
    ),
    "bomb.jpg": (
      patched(jpeg, (jpeg.index(b"\xff\xc0") + 5, b"\xff\xff\xff\xff")),
      bomb,
    ),
    # More than Pillow reads of a compressed text.
    "text_bomb.png": (
      png(
        *(1, 1, 8, 0, zlib.compress(bytes(2))),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))),
      ),
      "too large|no",
    ),
  }


def on_disk(folder):
  """Makes what only a folder can hold; name -> what its reason says."""
  os.mkfifo(folder / "pipe.png")
  os.symlink("/dev/zero", folder / "device.png")
  os.symlink("nowhere.png", folder / "dangling.png")
  os.symlink("loop.png", folder / "loop.png")
  with (folder / "sparse.png").open("wb") as file:
    file.truncate(2**40)
  Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(
    encoded(Image.new("RGB", (9, 9)))
  )
  return {
    "pipe.png": "neither a file nor a link",
    "device.png": "neither a file nor a link",
    "dangling.png": "FileNotFoundError|No such file",
    "loop.png": "Too many levels",
    "sparse.png": "1099511627776 bytes are more than",
    "\udcff.png": "surrogates not allowed",
  }


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
  """A folder of everything: (folder, good, bad), by name."""
  root = tmp_path_factory.mktemp("wild")
  folder = root / "images"
  (folder / "folder.png" / "deep").mkdir(parents=True)
  good, bad = good_files(), bad_files()
  for name, (content, _) in {**good, **bad}.items():
    (folder / name).write_bytes(content)
  odd = ("new\nline.png", "folder.png/inside.png", "漢字 🐓 \u202e.png")
  for name in odd:
    (folder / name).write_bytes(encoded(Image.new("RGB", (9, 9), RED)))
  os.symlink(folder, folder / "folder.png" / "round")
  os.symlink("..", folder / "folder.png" / "deep" / "again")
  outside = root / "outside.png"
  outside.write_bytes(encoded(Image.new("RGB", (9, 9), RED)))
  os.symlink(outside, folder / "link.png")
  shown = {name: color for name, (_, color) in good.items()}
  shown |= dict.fromkeys([*odd, "link.png"], RED)
  reasons = {name: reason for name, (_, reason) in bad.items()}
  return folder, shown, reasons | on_disk(folder)


def check_shown(pair, shown):
  """Compares what was read with what the files show."""
  found = {
    item["name"]: image
    for source in pair
    for item, image in zip(source.items, source.images(), strict=True)
  }
  assert found.keys() == shown.keys()
  for name, expected in shown.items():
    check_picture(name, found[name], expected)


def check_picture(name, image, expected):
  if isinstance(expected, np.ndarray):
    expected = expected.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3))
  assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
  off = np.abs(image.astype(int) - expected)
  # Resizing rings at the edges between the four quarters.
  assert off.max() <= (60 if np.ndim(expected) > 1 else 3), name
  assert off.mean() <= 8, name


def check_reasons(broken, reasons):
  assert broken.keys() == reasons.keys()
  for name, reason in reasons.items():
    assert re.search(reason, broken[name], re.I), (name, broken[name])
    assert len(broken[name]) < 300 and "0x" not in broken[name]


def cached_reasons(cache_dir):
  (meta,) = cache_dir.glob("*/meta.json")
  return dict(json.loads(meta.read_text())["broken"])


def test_a_folder(wild, tmp_path):
  folder, shown, reasons = wild
  pair = sources.load_folder(
    folder, SIZE, cache_dir=tmp_path, max_broken=0.5, heldout_fraction=0.3
  )
  # Copies of held-out pictures are not trained on: nearly all are red.
  assert len(pair[0]) and len(pair[1])
  assert {i["name"] for s in pair for i in s.items} <= shown.keys()
  check_reasons(cached_reasons(tmp_path), reasons)
  (pixels,) = tmp_path.glob("*/images.npy")
  (meta,) = tmp_path.glob("*/meta.json")
  images = np.load(pixels)
  items = json.loads(meta.read_text())["items"]
  assert {item["name"] for item in items} == shown.keys()
  for item in items:
    check_picture(item["name"], images[item["row"]], shown[item["name"]])
  with pytest.raises(config_lib.ConfigError, match="more than the 10") as error:
    sources.load_folder(folder, SIZE, cache_dir=tmp_path)
  # A line for each of ten, whatever their names hold.
  assert len(str(error.value).split("\n")) == 11


def test_llavas_records(wild, tmp_path):
  folder, shown, reasons = wild
  names = [*shown, *reasons, "folder.png", "nowhere.png", "x" * 300 + ".png"]
  turns = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "That."},
  ]
  records = [{"image": name, "conversations": turns} for name in names]
  file = tmp_path / "conversations.json"
  file.write_text(json.dumps(records))
  sources.load_llava(
    folder, file, SIZE, cache_dir=tmp_path, max_broken=0.6, heldout_fraction=0.3
  )
  expected = {
    **reasons,
    "folder.png": "IsADirectoryError",
    "nowhere.png": "FileNotFoundError",
    "x" * 300 + ".png": "File name too long",
  }
  del expected["\udcff.png"]  # A mistake of the record, which JSON can spell.
  broken = cached_reasons(tmp_path)
  long = broken.pop("x" * 300 + ".png")
  assert re.search(expected.pop("x" * 300 + ".png"), long)
  check_reasons(broken, expected)


def check_prepared(path, shown, reasons, made):
  broken = {
    name: reason for piece in made["pieces"] for name, reason in piece["broken"]
  }
  check_reasons(broken, reasons)
  pair = sources.load_arrayrecord(path, SIZE, heldout_fraction=0.3)
  from unicode_jax.data.prepared import manifest

  _, headers = manifest.open_prepared(path)
  assert {header["name"] for header in headers} == shown.keys()
  rows = pair[0].decoded[list(range(len(headers)))]
  for header, image in zip(headers, rows, strict=True):
    check_picture(header["name"], image, shown[header["name"]])


@pytest.mark.parametrize("image_size", [None, SIZE])
def test_a_prepared_folder(wild, tmp_path, image_size):
  folder, shown, reasons = wild
  made = prepare.prepare(
    *("folder", str(folder), tmp_path / "out"),
    image_size=image_size,
    workers=1,
    max_broken=0.5,
  )
  reasons = dict(reasons)
  reasons["\\udcff.png"] = reasons.pop("\udcff.png")
  check_prepared(tmp_path / "out", shown, reasons, made)


def contents(wild):
  """The files that have contents: name -> bytes, and the two expectations."""
  _, shown, reasons = wild
  good, bad = good_files(), bad_files()
  files = {name: content for name, (content, _) in {**good, **bad}.items()}
  return (
    files,
    {name: shown[name] for name in good},
    {name: reasons[name] for name in bad},
  )


def test_a_webdataset(wild, tmp_path):
  files, shown, reasons = contents(wild)
  names = {
    name: f"{i:03}.{name.rpartition('.')[2]}" for i, name in enumerate(files)
  }
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(names[name])
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  made = prepare.prepare(
    "webdataset",
    str(tmp_path / "a.tar"),
    tmp_path / "out",
    workers=1,
    max_broken=0.5,
  )
  keys = {name: f"a.tar/{new.partition('.')[0]}" for name, new in names.items()}
  check_prepared(
    tmp_path / "out",
    {keys[name]: color for name, color in shown.items()},
    {keys[name]: reason for name, reason in reasons.items()},
    made,
  )


def test_parquet(wild, tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  files, shown, reasons = contents(wild)
  rows = [{"image": {"bytes": c, "path": n}} for n, c in files.items()]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
  made = prepare.prepare(
    *("parquet", str(tmp_path / "a.parquet"), tmp_path / "out"),
    workers=1,
    max_broken=0.5,
  )
  keys = {name: f"a.parquet/{i}" for i, name in enumerate(files)}
  check_prepared(
    tmp_path / "out",
    {keys[name]: color for name, color in shown.items()},
    {keys[name]: reason for name, reason in reasons.items()},
    made,
  )


def test_tfds(wild, tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  files, _, reasons = contents(wild)
  picture = tfds.features.Image(shape=(None, None, 3))

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    name = "wild"

    def _info(self):
      features = tfds.features.FeaturesDict({"image": picture})
      return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for name, content in files.items():
        yield name, {"image": io.BytesIO(content)}

  builder = Builder(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  pair = sources.load_tfds(
    *("wild", SIZE),
    data_dir=tmp_path,
    cache_dir=tmp_path / "cache",
    max_broken=0.5,
    heldout_fraction=0.3,
  )
  assert len(pair[0]) and len(pair[1])
  broken = cached_reasons(tmp_path / "cache")
  assert len(broken) == len(reasons)
  # TFDS shuffles: the reasons in any order.
  left = list(broken.values())
  for reason in reasons.values():
    assert any(re.search(reason, said, re.I) for said in left), reason


def test_a_picture_that_a_command_is_given(wild):
  folder, shown, reasons = wild
  for name, expected in shown.items():
    check_picture(name, inference.open_image(folder / name, SIZE), expected)
  for name in [*reasons, "nowhere.png", "folder.png", "x" * 300, "a\0b"]:
    if name == "\udcff.png":
      continue  # Nothing is wrong with what it holds.
    with pytest.raises(config_lib.ConfigError) as error:
      inference.open_image(folder / name, SIZE)
    said = str(error.value)
    assert "cannot read the image" in said and "name a file" in said
    assert "\n" not in said and len(said) < 800


# What a reader may not read, by a user who has no say: root reads everything.
UNREADABLE = """
import os, pathlib, sys
from unicode_jax.data import sources
os.chdir(sys.argv[1])
# Another user may not even read the standard library.
sources.load_folder("images", 4, cache_dir="first", max_broken=0.2)
if not os.getuid():
  os.setgid(65534)
  os.setuid(65534)
def load():
  pair = sources.load_folder("images", 4, cache_dir="cache")
  return sorted(i["name"] for s in pair for i in s.items)
before = load()
print(len(before), "secret.png" in before)
os.chmod("images/secret.png", 0o644)
after = load()
print(len(after), "secret.png" in after)
os.chmod("images/below", 0)
try:
  load()
except OSError as error:
  print(type(error).__name__, error.filename)
os.chmod("images/below", 0o755)
"""


def test_what_may_not_be_read(tmp_path):
  folder = tmp_path / "images"
  (folder / "below").mkdir(parents=True)
  for i in range(40):
    Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")
  Image.new("RGB", (9, 9), (0, 9, 0)).save(folder / "secret.png")
  (folder / "secret.png").chmod(0)
  (tmp_path / "cache").mkdir()
  for path in (tmp_path, *tmp_path.rglob("*")):
    if path.name != "secret.png":
      path.chmod(0o777)
    if not os.getuid():
      os.chown(path, 65534, 65534)
  done = subprocess.run(
    [sys.executable, "-c", UNREADABLE, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
    check=False,
  )
  assert done.stdout.split("\n")[:3] == [
    "40 False",
    "41 True",  # Its time and size are what they were.
    "PermissionError images/below",
  ], done.stderr
  assert "secret.png: PermissionError" in done.stderr


# Peak memory of a reader in MB beyond what its imports take.
MEASURE = """
import os, resource, sys
os.cpu_count = lambda: 4
from unicode_jax import prepare
from unicode_jax.data import sources
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
start, (how, path, out) = peak(), sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (9 * 2**30,) * 2)
if how == "folder":
  sources.load_folder(path, 4, cache_dir=out, heldout_fraction=0.4)
else:
  prepare.prepare("folder", path, out, workers=1)
print(peak() - start)
"""


def peak_memory(how, folder, out):
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, how, str(folder), str(out)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return int(done.stdout.split()[-1])


def bombs(folder, *kinds, copies=1):
  """Writes pictures of few bytes, a pixel row below what Pillow refuses."""
  folder.mkdir()
  side = 13377
  for i in range(9):
    Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")
  for kind in kinds:
    content = blank_png(side, side, *kind)
    assert len(content) < 2**21
    for copy in range(copies):
      name = f"{'_'.join(map(str, kind))}_{copy}.png"
      (folder / name).write_bytes(content)
  return folder


def test_large_pictures_take_turns(tmp_path):
  """Two at once, of 0.9 GB each, would take it twice."""
  folder = bombs(tmp_path / "images", (8, 3), copies=2)
  assert peak_memory("folder", folder, tmp_path / "cache") < 1300


@pytest.mark.slow
@pytest.mark.parametrize("how", ["folder", "prepare"])
@pytest.mark.parametrize(
  "kind", [(8, 6), (8, 2), (16, 2), (16, 0), (1, 0), (8, 3), (16, 6)]
)
def test_memory_just_below_the_limit(tmp_path, how, kind):
  folder = bombs(tmp_path / "images", kind, copies=2)
  used = peak_memory(how, folder, tmp_path / "out")
  print(f"{how} {kind}: {used} MB")
  assert used < (1500 if how == "folder" else 2600)


def test_damaged_caches_say_what_to_remove(tmp_path):
  folder, cache = tmp_path / "images", tmp_path / "cache"
  folder.mkdir()
  for i in range(40):
    Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")

  def load():
    return sources.load_folder(folder, SIZE, cache_dir=cache)

  load()
  (made,) = cache.iterdir()
  whole = {path: path.read_bytes() for path in made.iterdir()}
  meta, pixels = made / "meta.json", made / "images.npy"
  for path, content in (
    (meta, b"{"),
    (meta, b"[" * 100_000),
    (meta, b"\xff"),
    (meta, b"[]"),
    (meta, b'{"items": [{"row": 40}], "broken": []}'),
    (meta, None),
    (pixels, whole[pixels][:-1]),
    (pixels, whole[pixels][:9]),
    (pixels, b""),
    (pixels, whole[pixels].replace(b"(40, 8", b"(40, 4")),
    (pixels, None),
  ):
    if content is None:
      path.unlink()
    else:
      path.write_bytes(content)
    with pytest.raises(config_lib.ConfigError) as error:
      load()
    assert f"{made} is damaged" in str(error.value)
    assert "remove that folder" in str(error.value)
    path.write_bytes(whole[path])
  load()


def test_patterns_do_not_run_round_links(tmp_path):
  """Two links to a folder above are 2^40 paths to who follows them."""
  for name in ("one", "two"):
    os.symlink(tmp_path, tmp_path / name)
  (tmp_path / "deep").mkdir()
  with tarfile.open(tmp_path / "deep" / "a.tar", "w") as tar:
    member = tarfile.TarInfo("1.png")
    content = encoded(Image.new("RGB", (9, 9)))
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
  made = prepare.prepare(
    "webdataset", f"{tmp_path}/**/*.tar", tmp_path / "out", workers=1
  )
  assert made["records"] == 1
  with pytest.raises(config_lib.ConfigError, match="too few to hold out"):
    sources.load_arrayrecord(f"{tmp_path}/**/out", SIZE)
  with pytest.raises(config_lib.ConfigError, match="is no pattern"):
    prepare.prepare("webdataset", f"{tmp_path}/**x.tar", tmp_path / "new")
