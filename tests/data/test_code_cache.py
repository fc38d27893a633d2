"""The folder of codes: layout, refusal, damage, and going on."""

import json
import multiprocessing
import pickle

import grain
import numpy as np
import pytest

from unicode_jax import config as config_lib
from unicode_jax.data import code_cache, sources as sources_lib, views

MADE_BY = "a" * 64
BOTH = views.views(flip=True, shift=0)
FACTS = code_cache.CodeFacts(MADE_BY, 300, positions=2, depth=3, views=BOTH)


def make_source(name, count, pixels="x"):
  items = tuple(
    {"name": f"{name}{i}", "row": i, "digest": f"{pixels}{i}"}
    for i in range(count)
  )
  annotations = (sources_lib.Annotation(),) * count
  return sources_lib.ImageSource(name, "unused.npy", items, annotations)


SOURCES = (make_source("birds", 7), make_source("cats", 3))


def codes_of(source, i):
  """Returns codes that say whose they are, up to the largest id."""
  first = {"birds": 299, "cats": 150}[source.name] - 12 * i
  return np.arange(first, first - 12, -1).reshape(2, 2, 3)


def write(writer, shards):
  for shard in shards:
    codes = [codes_of(shard.source, i) for i in range(shard.start, shard.stop)]
    batches = codes[:1], codes[1:]  # They end where they like.
    writer.write(shard, [np.stack(batch) for batch in batches if batch])


def make_writer(folder, sources=SOURCES, facts=FACTS, images_per_shard=2):
  return code_cache.CodeWriter(
    folder, sources, facts, images_per_shard=images_per_shard
  )


@pytest.fixture
def folder(tmp_path):
  writer = make_writer(tmp_path / "codes", images_per_shard=3)
  writer.prepare()
  write(writer, writer.missing())
  writer.finish()
  return tmp_path / "codes"


def check(readers, sources=SOURCES):
  assert len(readers) == len(sources)
  for reader, source in zip(readers, sources):
    assert len(reader) == len(source)
    for i in range(len(source)):
      codes = reader[i]
      assert codes.dtype == np.int32
      np.testing.assert_array_equal(codes, codes_of(source, i))


def read(reader, i):
  return reader[i]


def test_codes_come_back(folder):
  assert sorted(path.name for path in folder.iterdir()) == [
    "birds-00000-of-00003.array_record",
    "birds-00001-of-00003.array_record",
    "birds-00002-of-00003.array_record",
    "cats-00000-of-00001.array_record",
    "manifest.json",
  ]
  readers = code_cache.open_codes(folder, SOURCES, MADE_BY, views=BOTH)
  check(readers)
  assert len(list(readers[0])) == 7
  # As the docstring says, with nothing of ours.
  records = grain.sources.ArrayRecordDataSource(
    str(folder / "cats-00000-of-00001.array_record")
  )
  np.testing.assert_array_equal(
    np.frombuffer(records[2], "<u2"), codes_of(SOURCES[1], 2).reshape(-1)
  )


def test_some_sources_in_another_order(folder):
  swapped = SOURCES[::-1]
  check(code_cache.open_codes(folder, swapped, MADE_BY), swapped)
  check(code_cache.open_codes(folder, SOURCES[1:], MADE_BY), SOURCES[1:])


def test_a_reader_goes_to_worker_processes(folder):
  (birds, _) = code_cache.open_codes(folder, SOURCES, MADE_BY)
  birds[0]  # Its file is open now.
  assert len(pickle.dumps(birds)) < 10_000
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    np.testing.assert_array_equal(
      pool.apply(read, (birds, 6)), codes_of(SOURCES[0], 6)
    )


@pytest.mark.parametrize(
  ("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")]
)
def test_the_largest_id_is_kept(tmp_path, vocab_size, dtype):
  facts = code_cache.CodeFacts(MADE_BY, vocab_size, 1, 1, BOTH[:1])
  assert facts.dtype == np.dtype(dtype)
  source = make_source("cats", 1)
  writer = make_writer(tmp_path, [source], facts)
  writer.prepare()
  (shard,) = writer.missing()
  writer.write(shard, [np.full((1, 1, 1, 1), vocab_size - 1)])
  writer.finish()
  (reader,) = code_cache.open_codes(tmp_path, [source], MADE_BY)
  assert reader[0].tolist() == [[[vocab_size - 1]]]


@pytest.mark.parametrize(
  ("codes", "message"),
  [
    (np.zeros((2, 2, 3, 2), int), "must be"),
    (np.full((2, 2, 2, 3), 300), "300 .*not all ids"),
    (np.full((2, 2, 2, 3), -1), "-1 .*not all ids"),
    (np.zeros((1, 2, 2, 3), int), "has 2 images, but got codes of 1"),
  ],
)
def test_wrong_codes_leave_nothing_behind(tmp_path, codes, message):
  writer = make_writer(tmp_path)
  writer.prepare()
  with pytest.raises(ValueError, match=message):
    writer.write(writer.missing()[0], [codes])
  assert [path.name for path in tmp_path.iterdir()] == ["unfinished.json"]


def test_another_tokenizer_is_refused(folder):
  message = f"another tokenizer.*{MADE_BY[:16]}.*bbbb.*another folder"
  with pytest.raises(config_lib.ConfigError, match=message):
    code_cache.open_codes(folder, SOURCES, "b" * 64)
  other = code_cache.CodeFacts("b" * 64, 300, 2, 3, BOTH)
  with pytest.raises(config_lib.ConfigError, match=message):
    make_writer(folder, facts=other)


@pytest.mark.parametrize(
  ("sources", "message"),
  [
    ([make_source("birds", 6), SOURCES[1]], "7 images of birds.*6 images of"),
    ([make_source("birds", 7, "y"), SOURCES[1]], "7 images of birds .*wanted"),
    (
      [make_source("dogs", 7), SOURCES[1]],
      "cats.*7 images of dogs",
    ),
  ],
)
def test_other_images_are_refused(folder, sources, message):
  message = f"another data set: .*{message}"
  with pytest.raises(config_lib.ConfigError, match=message):
    code_cache.open_codes(folder, sources, MADE_BY)
  with pytest.raises(config_lib.ConfigError, match="another data set"):
    make_writer(folder, sources)


def test_the_order_of_images_counts(folder):
  source = SOURCES[0]
  turned = sources_lib.ImageSource(
    source.name, source.path, source.items[::-1], source.annotations
  )
  with pytest.raises(config_lib.ConfigError, match="another data set"):
    code_cache.open_codes(folder, [turned], MADE_BY)


def test_views_that_are_not_there_are_refused(tmp_path):
  facts = code_cache.CodeFacts(MADE_BY, 300, 2, 3, (views.AS_IS,))
  writer = make_writer(tmp_path, facts=facts)
  writer.prepare()
  for shard in writer.missing():
    writer.write(shard, [np.zeros((len(shard), 1, 2, 3), int)])
  writer.finish()
  code_cache.open_codes(tmp_path, SOURCES, MADE_BY)
  with pytest.raises(config_lib.ConfigError, match=r"config\.data\.flip"):
    code_cache.open_codes(tmp_path, SOURCES, MADE_BY, views=BOTH)
  with pytest.raises(config_lib.ConfigError, match=r"views=\[.* have \["):
    make_writer(tmp_path)


def test_a_damaged_shard_is_named_and_repaired(folder):
  damaged = folder / "birds-00001-of-00003.array_record"
  content = bytearray(damaged.read_bytes())
  content[1000] ^= 1
  damaged.write_bytes(content)
  missing = folder / "cats-00000-of-00001.array_record"
  with pytest.raises(config_lib.ConfigError, match=r"birds-00001.*damaged"):
    code_cache.open_codes(folder, SOURCES, MADE_BY)
  # What is not asked for is not looked at.
  check(code_cache.open_codes(folder, SOURCES[1:], MADE_BY), SOURCES[1:])
  missing.unlink()
  with pytest.raises(config_lib.ConfigError, match=r"cats-00000.*missing"):
    code_cache.open_codes(folder, SOURCES[1:], MADE_BY)

  writer = make_writer(folder, images_per_shard=3)
  assert writer.finished
  writer.prepare()
  assert not writer.finished
  assert [shard.path for shard in writer.missing()] == [damaged, missing]
  write(writer, writer.missing())
  writer.finish()
  check(code_cache.open_codes(folder, SOURCES, MADE_BY))


def test_writing_goes_on_where_it_stopped(tmp_path):
  first = make_writer(tmp_path)
  first.prepare()
  shards = first.missing()
  assert [len(shard) for shard in shards] == [2, 2, 2, 1, 2, 1]
  write(first, shards[:2])

  def interrupted():
    yield np.stack([codes_of(SOURCES[0], 4)])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    first.write(shards[2], interrupted())
  (tmp_path / ".writing-killed").mkdir()  # What a killed process leaves.
  with pytest.raises(config_lib.ConfigError, match="is not finished"):
    code_cache.open_codes(tmp_path, SOURCES, MADE_BY)
  with pytest.raises(config_lib.ConfigError, match="--images_per_shard"):
    make_writer(tmp_path, images_per_shard=3)
  with pytest.raises(config_lib.ConfigError, match="another tokenizer"):
    make_writer(tmp_path, facts=code_cache.CodeFacts("b" * 64, 300, 2, 3, BOTH))
  before = [shard.path.stat().st_mtime_ns for shard in shards[:2]]

  second = make_writer(tmp_path)
  assert not second.finished
  second.prepare()
  assert second.missing() == shards[2:]
  write(second, second.missing())
  second.finish()
  assert before == [shard.path.stat().st_mtime_ns for shard in shards[:2]]
  check(code_cache.open_codes(tmp_path, SOURCES, MADE_BY))
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"manifest.json", *(shard.path.name for shard in shards)}


def test_processes_share_the_work(tmp_path):
  writers = [make_writer(tmp_path) for _ in range(4)]
  writers[0].prepare()
  shares = [w.missing(i, 4) for i, w in enumerate(writers)]
  assert sorted(s.path for share in shares for s in share) == sorted(
    s.path for s in writers[0].missing()
  )
  assert [len(share) for share in shares] == [2, 2, 1, 1]
  for writer, share in list(zip(writers, shares))[:3]:
    write(writer, share)
  with pytest.raises(config_lib.ConfigError, match=r"birds-00003.*all process"):
    writers[0].finish()
  assert not writers[0].finished
  write(writers[3], shares[3])
  writers[0].finish()
  check(code_cache.open_codes(tmp_path, SOURCES, MADE_BY))


def test_a_folder_of_other_things_is_left_alone(tmp_path):
  with pytest.raises(config_lib.ConfigError, match=r"no codes \(no manifest"):
    code_cache.open_codes(tmp_path, SOURCES, MADE_BY)
  (tmp_path / "unfinished.tmp").write_text("{")  # Killed at once: no harm.
  make_writer(tmp_path)
  (tmp_path / "letter.txt").write_text("")
  with pytest.raises(config_lib.ConfigError, match="not codes"):
    make_writer(tmp_path)
  with pytest.raises(config_lib.ConfigError, match="is a file"):
    make_writer(tmp_path / "letter.txt")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}'])
def test_a_manifest_that_cannot_be_read(folder, text):
  path = folder / "manifest.json"
  assert json.loads(path.read_text())["format"] == 2
  path.write_text(text)
  with pytest.raises(config_lib.ConfigError, match="another folder"):
    code_cache.open_codes(folder, SOURCES, MADE_BY)
