"""Data sets as shards: every format, hostile archives, damage, refusals."""

import io
import json
import os
import random
import re
import struct
import sys
import tarfile
import zlib

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, prepare
from unicode_jax.data import sources
from unicode_jax.data.prepared import manifest as manifest_lib, record

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SIZE = 8
COUNT = 40


@pytest.fixture(scope="module")
def pictures(openmoji, tmp_path_factory):
  """A folder of pictures of many kinds, and the captions of each."""
  root = tmp_path_factory.mktemp("pictures")
  folder, captions = root / "images", {}
  (folder / "sub").mkdir(parents=True)
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: lying on its side.
  for i in range(COUNT):
    source = openmoji[0][37 * i]["image"]
    picture = Image.fromarray(source).resize((12 + i % 9, 16 + i % 5))
    kind = i % 5
    name = f"sub/{i:02}." + ("png", "jpg", "webp", "gif", "jpeg")[kind]
    picture = picture.convert(("RGBA", "RGB", "RGB", "P", "L")[kind])
    picture.save(folder / name, **({"exif": exif} if kind == 1 else {}))
    captions[name] = [openmoji[0].items[37 * i]["name"]]
  captions["sub/01.jpg"].append("another")
  lines = [
    json.dumps({"image": name, "text": text})
    for name, texts in captions.items()
    for text in texts
  ]
  (root / "captions.jsonl").write_text("\n".join(lines))
  return folder, captions


def write_tar(path, members):
  """Writes a tar of (name, bytes), or of ready headers."""
  with tarfile.open(path, "w") as tar:
    for member, content in members:
      if isinstance(member, str):
        member = tarfile.TarInfo(member)
        member.size = len(content)
      tar.addfile(member, io.BytesIO(content))


def sample(folder, captions, name):
  """Members of a webdataset's sample, the texts in different places."""
  stem = name.rpartition(".")[0]
  texts = captions[name]
  said = {"caption": texts, "label": int(stem[-1])}
  return [
    (f"{stem}.txt", texts[0].encode()),
    (name, (folder / name).read_bytes()),
    (f"{stem}.json", json.dumps(said).encode()),
  ]


def as_webdataset(folder, captions, root):
  names = sorted(captions)
  for i, part in enumerate((names[:25], names[25:])):
    members = [m for name in part for m in sample(folder, captions, name)]
    write_tar(root / f"{i}.tar", members)
  return str(root / "?.tar"), {
    f"{int(i >= 25)}.tar/{name.rpartition('.')[0]}": name
    for i, name in enumerate(names)
  }


def as_parquet(folder, captions, root):
  names = sorted(captions)
  rows = [
    {
      "image": {"bytes": (folder / name).read_bytes(), "path": name},
      "caption": captions[name],
      "label": int(name.rpartition(".")[0][-1]),
    }
    for name in names
  ]
  features = {"label": {"_type": "ClassLabel", "names": [*map(str, range(10))]}}
  huggingface = json.dumps({"info": {"features": features}})
  table = pyarrow.Table.from_pylist(rows)
  table = table.replace_schema_metadata({"huggingface": huggingface})
  parquet.write_table(table, root / "a.parquet", row_group_size=9)
  return str(root), {f"a.parquet/{i}": name for i, name in enumerate(names)}


def as_folder(folder, captions, root):
  return str(folder), {name: name for name in captions}


def make(source, path, out, **options):
  options = {"workers": 1, "shard_size": 7, **options}
  return prepare.prepare(source, path, out, **options)


def images_of(pair):
  """Pixels and annotation of every image of both sides, by name."""
  return {
    item["name"]: (image, annotation)
    for source in pair
    for item, image, annotation in zip(
      source.items, source.images(), source.annotations, strict=True
    )
  }


@pytest.mark.parametrize("write", [as_folder, as_webdataset, as_parquet])
def test_every_format_gives_what_the_folder_gives(write, pictures, tmp_path):
  folder, captions = pictures
  file = str(folder.parent / "captions.jsonl")
  expected = images_of(
    sources.load_folder(folder, SIZE, captions=file, cache_dir=tmp_path)
  )
  assert len(expected) == COUNT
  source = write.__name__.removeprefix("as_")
  (tmp_path / "inputs").mkdir()
  path, names = write(folder, captions, tmp_path / "inputs")
  options = {"captions": file} if source == "folder" else {}
  made = make(source, path, tmp_path / "out", **options)
  assert (made["records"], made["broken"]) == (COUNT, 0)
  pair = sources.load_arrayrecord(tmp_path / "out", SIZE)
  found = images_of(pair)
  assert {names[name] for name in found} == expected.keys()
  for name, (image, annotation) in found.items():
    picture, said = expected[names[name]]
    np.testing.assert_array_equal(image, picture)
    assert annotation.captions == said.captions
    label = names[name].rpartition(".")[0][-1]
    assert annotation.label == (None if source == "folder" else label)
  heldout = {item["name"] for item in pair[1].items}
  assert heldout == {n for n in names if sources.is_heldout(n, 0.1)}


def test_records_describe_themselves(pictures, tmp_path):
  folder, captions = pictures
  make("folder", str(folder), tmp_path)
  files, headers = manifest_lib.open_prepared(tmp_path)
  assert [count for _, count in files] == [7, 7, 7, 7, 7, 5]
  pair = sources.load_arrayrecord(tmp_path, SIZE)
  for number, header in enumerate(headers):
    stored, image = record.decode_record(pair[0].decoded.records[number])
    assert stored == header
    assert image == (folder / header["name"]).read_bytes()  # As it was.
  assert [header["name"] for header in headers] == sorted(captions)


def test_smaller_images_train_the_same(pictures, tmp_path):
  folder, _ = pictures
  make("folder", str(folder), tmp_path / "out", image_size=14)
  _, headers = manifest_lib.open_prepared(tmp_path / "out")
  sides = {(header["width"], header["height"]) for header in headers}
  assert (14, 14) in sides and len(sides) > 3  # Small ones are as they were.
  assert all(min(side) <= 14 for side in sides)
  expected = sources.load_folder(folder, 14, cache_dir=tmp_path)
  pair = sources.load_arrayrecord(tmp_path / "out", 14)
  for source, other in zip(pair, expected, strict=True):
    np.testing.assert_array_equal(source.images(), other.images())


def png(number=0, size=(9, 7)):
  stream = io.BytesIO()
  Image.new("RGB", size, (number, 0, 0)).save(stream, "PNG")
  return stream.getvalue()


def huge_png():
  """A PNG whose header says that it has 4 billion pixels."""
  content = bytearray(png())
  content[16:24] = struct.pack(">II", 2**16, 2**16)
  content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
  return bytes(content)


def link(name, target, kind=tarfile.SYMTYPE):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, target
  return member, b""


def claiming(name, size, content, kind=tarfile.REGTYPE):
  """A member that says it has another size, as its raw blocks."""
  member = tarfile.TarInfo(name)
  member.size, member.type = size, kind
  return member.tobuf(tarfile.GNU_FORMAT) + content


def tree(folder):
  return sorted(str(path) for path in folder.rglob("*"))


def broken_of(made):
  return {
    name: reason for piece in made["pieces"] for name, reason in piece["broken"]
  }


def test_a_hostile_tar(tmp_path):
  inside = tmp_path / "a" / "b" / "c"
  inside.mkdir(parents=True)
  secret = tmp_path / "secret.png"
  secret.write_bytes(png(99))
  members = [
    ("../../evil.png", png(1)),
    ("/absolute.png", png(2)),
    ("back\\slash.png", png(3)),
    ("..\\evil.png", png()),
    link("symbolic.png", str(secret)),
    link("hard.png", "../../evil.png", tarfile.LNKTYPE),
    link("device.png", "", tarfile.CHRTYPE),
    ("folder.png/", b""),
    (".hidden.png", png()),
    ("plain", b"no extension"),
    ("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ("bomb.png", huge_png()),
    ("cut.png", png(size=(400, 400))[:-60]),
    ("text.png", b"not an image"),
    ("two.png", png()),
    ("two.jpg", png()),
    ("wordy.png", png()),
    ("wordy.txt", b"x" * 2**21),
    ("latin.png", png()),
    ("latin.txt", "é".encode("latin-1")),
    ("listed.png", png()),
    ("listed.json", b"[1, 2]"),
    ("number.png", png()),
    ("number.json", b'{"caption": 5}'),
    ("half.png", png()),
    ("half.json", b'{"caption": "\\ud800"}'),
    ("deep.png", png()),
    ("deep.json", b"[" * 100_000),
    ("again.png", png(4)),
    ("other.png", png(5)),
    ("again.txt", b"too late"),
    ("alone.txt", b"no image"),
  ]
  path = inside / "hostile.tar"
  write_tar(path, members)
  with tarfile.open(path, "a", errors="surrogateescape") as tar:
    member = tarfile.TarInfo("\udcff.png")
    member.size = len(png())
    tar.addfile(member, io.BytesIO(png()))
  before = tree(tmp_path)
  made = make("webdataset", str(inside), inside / "out", max_broken=1.0)
  outside = [path for path in tree(tmp_path) if "/out" not in path]
  assert outside == before
  assert {path.name for path in (inside / "out").iterdir()} == {
    *("00000-000.array_record", "00000-000.jsonl", "manifest.json")
  }
  _, headers = manifest_lib.open_prepared(inside / "out")
  assert [header["name"] for header in headers] == [
    *("hostile.tar/../../evil", "hostile.tar//absolute"),
    *("hostile.tar/back\\slash", "hostile.tar/again", "hostile.tar/other"),
  ]
  broken = {
    name.removeprefix("hostile.tar/"): reason
    for name, reason in broken_of(made).items()
  }
  assert "not an image file" in broken.pop("eps")
  assert "not an image file" in broken.pop("text")
  assert "decompression bomb" in broken.pop("bomb")
  assert "OSError" in broken.pop("cut")
  assert "png and jpg" in broken.pop("two")
  assert "of 2097152 bytes, more than 1048576" in broken.pop("wordy")
  assert "utf-8" in broken.pop("latin")
  assert "not an object" in broken.pop("listed")
  assert "must be a text, not 5" in broken.pop("number")
  assert "surrogates" in broken.pop("half")
  assert "nested too deeply" in broken.pop("deep")
  assert "neighbours" in broken.pop("again")
  assert "only txt" in broken.pop("alone")
  assert "surrogates" in broken.pop("\\udcff")
  assert not broken


BLOCK = tarfile.BLOCKSIZE
WHOLE = claiming("good.png", len(png()), png().ljust(BLOCK, b"\0"))


@pytest.mark.parametrize(
  ("rest", "reason"),
  [
    (b"", "no end mark"),
    (b"\1" * BLOCK, "no end mark"),
    (b"\0" * 100, "no end mark"),
    (claiming("x.png", 2**60, b"abc"), "Invalid argument|unexpected end"),
    (claiming("x.png", 8 * 2**20, b"abc"), "unexpected end of data"),
    (claiming("x.txt", 2**80, b"abc"), "too large|too big|int"),
    (claiming("././@LongLink", 2**50, b"abc", b"L"), "asks for"),
    (claiming("pax", 2**40, b"abc", b"x"), "asks for"),
    (claiming("x.png", -1024, b"") + b"\0" * 4 * BLOCK, "backwards|offset"),
  ],
)
def test_a_tar_that_breaks_off(rest, reason, tmp_path):
  (tmp_path / "a.tar").write_bytes(WHOLE + rest)
  made = make("webdataset", str(tmp_path / "a.tar"), tmp_path / "out")
  assert made["records"] == 1
  said = broken_of(made)["a.tar"]
  assert re.search(f"the rest is left out: .*({reason})", said)


def test_what_is_no_tar_or_empty(tmp_path):
  (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
  (tmp_path / "b.tar").write_bytes(b"")
  write_tar(tmp_path / "c.tar", [])
  with pytest.raises(
    ValueError,
    match=r"holds no image that can be read.*\n.*a\.tar: damaged.*\n"
    r".*b\.tar: damaged.*empty",
  ):
    make("webdataset", str(tmp_path), tmp_path / "out")
  write_tar(tmp_path / "c.tar", [("1.png", png())])
  made = make("webdataset", str(tmp_path), tmp_path / "out2")
  assert made["records"] == 1 and set(broken_of(made)) == {"a.tar", "b.tar"}


def test_too_many_broken_images(tmp_path):
  members = [(f"{i}.png", png(i)[: 30 if i % 2 else None]) for i in range(60)]
  write_tar(tmp_path / "a.tar", members)
  with pytest.raises(
    ValueError, match=r"30 of 60 inputs are broken, more than the 10.*\n.*1: "
  ):
    make("webdataset", str(tmp_path), tmp_path / "out")
  with pytest.raises(ValueError, match="is not finished: run the python"):
    sources.load_arrayrecord(tmp_path / "out", SIZE)
  # What is converted counts: nothing is written again.
  shard = tmp_path / "out" / "00000-000.array_record"
  stamp = shard.stat().st_mtime_ns
  made = make("webdataset", str(tmp_path), tmp_path / "out", max_broken=0.5)
  assert (made["records"], made["broken"]) == (30, 30)
  assert shard.stat().st_mtime_ns == stamp


def test_columns_by_name(tmp_path):
  rows = [
    {"left": png(i), "right": png(100), "say": f"c{i}", "kind": f"k{i}"}
    for i in range(30)
  ]
  rows[3]["left"] = None
  rows[4]["kind"] = None
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
  path = str(tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=r"it has left \(binary\).*--image_col"):
    make("parquet", path, tmp_path / "out")
  with pytest.raises(ValueError, match=r"no column 'Left' \(--image_column\)"):
    make("parquet", path, tmp_path / "out", image_column="Left")
  with pytest.raises(ValueError, match=r"needs a column of image files"):
    make("parquet", path, tmp_path / "out", image_column="say")
  assert not (tmp_path / "out").exists()
  named = {"image_column": "left", "caption_column": "say"}
  made = make("parquet", path, tmp_path / "out", **named, label_column="kind")
  assert broken_of(made) == {"a.parquet/3": "no bytes of an image in this row"}
  found = images_of(sources.load_arrayrecord(tmp_path / "out", SIZE))
  for i in {*range(30)} - {3}:
    image, annotation = found[f"a.parquet/{i}"]
    assert image[0, 0, 0] == i
    label = None if i == 4 else f"k{i}"
    assert annotation == sources.Annotation((f"c{i}",), label=label)


def test_damaged_parquet(tmp_path):
  rows = [{"image": png(i), "text": "x"} for i in range(40)]
  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
    make("parquet", str(path), tmp_path / "out")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(
    ValueError, match=r'pyarrow.*pip install -e "\.\[parquet\]"'
  ):
    make("parquet", str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
  ("source", "path", "options", "message"),
  [
    ("webdataset", ".", {}, r"names no file that ends in \.tar"),
    ("parquet", "*.parquet", {}, "names no file: name a file"),
    ("webdataset", "nowhere", {}, "neither a file nor a folder"),
    ("folder", ".", {}, "no image in"),
    ("folder", "nowhere", {}, "is not a folder"),
    ("folder", ".", {"label_column": "x"}, "label_column=x is not read"),
    ("webdataset", ".", {"captions": "x"}, "captions=x is not read"),
    ("tfds", ".", {}, "--from=tfds must be one of webdataset"),
  ],
)
def test_nothing_to_convert(source, path, options, message, tmp_path):
  with pytest.raises(config_lib.ConfigError, match=message):
    make(source, str(tmp_path / path), tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


@pytest.fixture
def prepared(pictures, tmp_path):
  """A finished folder, and a function that makes it again."""

  def again(**options):
    return make("folder", str(pictures[0]), tmp_path / "out", **options)

  again()
  return tmp_path / "out", again


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_again_does_nothing(prepared, capsys):
  folder, again = prepared
  stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  again()
  assert "is finished" in capsys.readouterr().out
  assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shard_size": 8}, "was begun with shard_size=7, not 8"),
    ({"image_size": 9}, "was begun with image_size=None, not 9"),
  ],
)
def test_other_options_are_refused(prepared, options, message):
  folder, again = prepared
  before = contents(folder)
  with pytest.raises(config_lib.ConfigError, match=message):
    again(**options)
  assert contents(folder) == before


def test_other_inputs_are_refused(tmp_path):
  inputs = tmp_path / "in"
  inputs.mkdir()
  write_tar(inputs / "a.tar", [("1.png", png())])
  make("webdataset", str(inputs), tmp_path / "out")
  write_tar(inputs / "b.tar", [("1.png", png())])
  with pytest.raises(ValueError, match=r"1 files of \d+ bytes.* 2 of \d+"):
    make("webdataset", str(inputs), tmp_path / "out")
  path = tmp_path / "one.parquet"
  parquet.write_table(pyarrow.Table.from_pylist([{"image": png()}]), path)
  with pytest.raises(ValueError, match=r"begun with from=webdataset, not"):
    make("parquet", str(path), tmp_path / "out")


def test_a_folder_of_somebody_else(pictures, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"holds other files, such as notes"):
    make("folder", str(pictures[0]), tmp_path)
  with pytest.raises(ValueError, match=r"is a file"):
    make("folder", str(pictures[0]), tmp_path / "notes.txt")
  assert os.listdir(tmp_path) == ["notes.txt"]
  with pytest.raises(ValueError, match="holds no prepared data set"):
    sources.load_arrayrecord(tmp_path, SIZE)
  with pytest.raises(ValueError, match="is no folder"):
    sources.load_arrayrecord(tmp_path / "no*", SIZE)


def cut(content):
  return content[:-1000]


def flip(content):
  """Flips one bit somewhere in the middle of an image's bytes."""
  damaged = bytearray(content)
  damaged[content.index(b"IHDR") + 9 if b"IHDR" in content else 70] ^= 4
  return bytes(damaged)


@pytest.mark.parametrize(
  ("name", "damage", "at_start"),
  [
    ("00002-000.array_record", cut, "has .* bytes instead of"),
    ("00002-000.array_record", None, "is missing"),
    ("00002-000.jsonl", None, "is missing"),
    ("00002-000.jsonl", flip, "is damaged"),
    ("00002-000.array_record", flip, None),
  ],
)
def test_damage_is_named_and_repaired(prepared, name, damage, at_start):
  folder, again = prepared
  before = contents(folder)
  if damage is None:
    (folder / name).unlink()
  else:
    (folder / name).write_bytes(damage(before[name]))
  if at_start:
    with pytest.raises(
      ValueError, match=rf"{name} {at_start}.*remove it and run"
    ):
      sources.load_arrayrecord(folder, SIZE)
  else:  # Seen when the record is read, by its own checksum.
    pair = sources.load_arrayrecord(folder, SIZE)
    with pytest.raises(
      ValueError, match=rf"{name} is damaged \(.*hash.*remove it and run"
    ):
      images_of(pair)
  with pytest.raises(ValueError, match=rf"{name} .*remove it and run"):
    prepare.check(folder)
  (folder / name).unlink(missing_ok=True)
  again()
  assert contents(folder) == before
  prepare.check(folder)


def test_a_damaged_manifest(prepared):
  folder, _ = prepared
  path = folder / "manifest.json"
  for content, message in (
    ("{", "is damaged"),
    ("[]", "is no manifest"),
    ('{"format": 99, "pieces": []}', "of format 99, and this version reads"),
  ):
    path.write_text(content)
    with pytest.raises(config_lib.ConfigError, match=message):
      sources.load_arrayrecord(folder, SIZE)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    # Rows behind it would show other images than their names say.
    ({"records": 6}, r"says that 00002-000\.array_record has 6 images, not 7"),
    ({"records": "7"}, r"manifest\.json is damaged: prepare the data again"),
    ({"file": "../00002-000.array_record"}, r"manifest\.json is damaged"),
    ({"file": "/etc/passwd"}, r"manifest\.json is damaged"),
    ({"file": None}, r"manifest\.json is damaged"),
    ({"index_sha256": "0"}, r"00002-000\.jsonl is damaged"),
  ],
)
def test_a_manifest_that_lies(prepared, change, message):
  folder, again = prepared
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["pieces"][2]["shards"][0] |= change
  path.write_text(json.dumps(manifest))
  with pytest.raises(config_lib.ConfigError, match=message):
    sources.load_arrayrecord(folder, SIZE)
  if "manifest" in message:
    with pytest.raises(config_lib.ConfigError, match=message):
      again()


def test_random_bytes_stop_nothing(tmp_path):
  """Images and tars with random damage: broken or read, never an exception."""
  rng = random.Random(0)
  good = [(f"{i}.png", png(i)) for i in range(20)]
  write_tar(tmp_path / "good.tar", good)
  whole = (tmp_path / "good.tar").read_bytes()
  for i in range(12):
    content = bytearray(whole)
    for _ in range(rng.choice([1, 5, 50])):
      content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
      content = content[: rng.randrange(len(content))]
    (tmp_path / f"{i:02}.tar").write_bytes(content)
  made = make("webdataset", str(tmp_path), tmp_path / "out", max_broken=1.0)
  assert 20 < made["records"] < 13 * 20 and made["broken"] > 10


def test_paths_do_not_matter(pictures, tmp_path):
  """Names, and so what is held out, are the same wherever the data lie."""
  outs = []
  for place in ("here", "there/below"):
    root = tmp_path / place
    root.mkdir(parents=True)
    path, _ = as_webdataset(*pictures, root)
    make("webdataset", path, root / "out")
    outs.append(contents(root / "out"))
  shards = [
    {k: v for k, v in out.items() if k != "manifest.json"} for out in outs
  ]
  assert shards[0] == shards[1] and len(shards[0]) == 2 * 7
