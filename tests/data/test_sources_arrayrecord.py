"""Training from prepared shards: splits, several folders, order, reads."""

import collections
import json
import os
import pickle
import resource
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from unicode_jax import config as config_lib, data as data_lib, prepare
from unicode_jax.data import pipeline, sources, tasks
from unicode_jax.data.sources.arrayrecord import DecodedRecords, RecordSource

SIZE = 8
COUNT = 60


def write_folder(folder, count=COUNT, first=0):
  """Pictures that say which they are, and captions of them."""
  folder.mkdir()
  lines = []
  for i in range(count):
    pixels = np.full((9, 9, 3), first + i, np.uint8)
    pixels[:, :2] = 255 - pixels[:, :2]
    Image.fromarray(pixels).save(folder / f"{i:03}.png")
    lines.append({"image": f"{i:03}.png", "text": f"picture {i}"})
  captions = folder.parent / f"{folder.name}.jsonl"
  captions.write_text("\n".join(map(json.dumps, lines)))
  return folder, captions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder, its captions, and what was prepared of them."""
  root = tmp_path_factory.mktemp("arrayrecord")
  folder, captions = write_folder(root / "images")
  prepare.prepare(
    "folder",
    str(folder),
    root / "out",
    captions=str(captions),
    shard_size=16,
    workers=1,
  )
  return folder, captions, root / "out"


def load(path, **options):
  return sources.load_arrayrecord(path, SIZE, **options)


def names(source):
  return [item["name"] for item in source.items]


def test_it_equals_the_folder(made, tmp_path):
  folder, captions, out = made
  expected = sources.load_folder(
    folder, SIZE, captions=captions, cache_dir=tmp_path, heldout_fraction=0.2
  )
  for ours, theirs in zip(load(out, heldout_fraction=0.2), expected):
    assert names(ours) == names(theirs)
    assert ours.annotations == theirs.annotations
    assert ours.image_size == SIZE
    np.testing.assert_array_equal(ours.images(), theirs.images())
    for i in (0, len(ours) - 1):
      np.testing.assert_array_equal(ours[i]["image"], theirs[i]["image"])
    for task in ("caption", "text_to_image", "decompression"):
      examples, others = (
        tasks.image_examples(
          task, source, positions=4, segments=2, questions_per_image=3
        )
        for source in (ours, theirs)
      )
      assert examples == others and len(examples) == len(ours)


def test_it_is_read_like_any_source(made):
  _, _, out = made
  train, _ = load(out)
  some = train.take([5, 3], "some")
  assert names(some) == [names(train)[5], names(train)[3]]
  np.testing.assert_array_equal(some.images(), train.images()[[5, 3]])
  left, held = sources.validation(train, 0.3)
  assert sorted(names(left) + names(held)) == names(train)
  data = data_lib.load_data(
    data_lib.DataConfig(source="arrayrecord", path=str(out)),
    data_lib.TextConfig(vocab_size=300),
    SIZE,
  )
  assert data.image_sources[0].name == "arrayrecord_train"
  assert data.heldout_images["arrayrecord_heldout"].shape[1:] == (SIZE, SIZE, 3)
  said = {text.turns[0][1] for text in data.train_texts}
  assert "picture 0" in said


def test_copies_of_held_out_images_are_dropped(tmp_path):
  folder, _ = write_folder(tmp_path / "images")
  names_ = [f"{i:03}.png" for i in range(COUNT)]
  held = next(n for n in names_ if sources.is_heldout(n, 0.1))
  trained = next(n for n in names_ if not sources.is_heldout(n, 0.1))
  # The same pixels in another file.
  Image.open(folder / held).convert("RGBA").save(folder / trained)
  prepare.prepare("folder", str(folder), tmp_path / "out", workers=1)
  train, heldout = load(tmp_path / "out")
  assert trained not in names(train) and held in names(heldout)
  assert len(train) + len(heldout) == COUNT - 1


def test_several_folders(tmp_path):
  for i, first in enumerate((100, 200)):
    folder, _ = write_folder(tmp_path / f"in{i}", 30, first)
    prepare.prepare("folder", str(folder), tmp_path / f"out{i}", workers=1)
  train, heldout = load(tmp_path / "out?")
  both = names(train) + names(heldout)
  assert len(both) == 60 and {n.split("/")[0] for n in both} == {"out0", "out1"}
  # Each image is on the side that it has alone.
  _, alone = load(tmp_path / "out0")
  assert {n for n in names(heldout) if n.startswith("out0")} == {
    f"out0/{n}" for n in names(alone)
  }
  for source in (train, heldout):
    for i, name in enumerate(names(source)):
      folder, _, number = name.partition("/")
      value = {"out0": 100, "out1": 200}[folder] + int(number[:3])
      assert source[i]["image"][-1, -1, 0] == value
  (tmp_path / "deep").mkdir()
  (tmp_path / "out1").rename(tmp_path / "deep" / "out0")
  with pytest.raises(ValueError, match="two images named 'out0/"):
    load(tmp_path / "**/out0")


def test_config_is_checked(made):
  def validate(**values):
    config = config_lib.apply_overrides(
      config_lib.default_config(),
      {f"data.{key}": value for key, value in values.items()},
    )
    return config_lib.validate(config)

  validate(source="arrayrecord", path=str(made[2]))
  validate(source="arrayrecord", path=str(made[2])[:-1] + "*")
  with pytest.raises(ValueError, match=r"data\.path=.*nowhere"):
    validate(source="arrayrecord", path="nowhere*")
  with pytest.raises(ValueError, match=r"needs the --out of.*data\.path"):
    validate(source="arrayrecord")
  with pytest.raises(ValueError, match=r"data\.captions is set, but"):
    validate(source="arrayrecord", path="x", captions="y")


class CountedRecords(DecodedRecords):
  """Notes which records are read."""

  def __getitem__(self, rows):
    self.reads.append(rows)
    return super().__getitem__(rows)


def counted(source):
  decoded = CountedRecords(source.decoded.shards, SIZE)
  object.__setattr__(decoded, "reads", [])
  fields = source.name, source.path, source.items, source.annotations
  return RecordSource(*fields, decoded), decoded.reads


def iterate(source, **options):
  return pipeline.image_iterator(
    [source], [1.0], global_batch_size=8, seed=3, **options
  )


class _Rows:
  """The numbers of the records of a source, as a source."""

  def __init__(self, source):
    self.rows = [item["row"] for item in source.items]

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return self.rows[index]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_order_and_reads_do_not_depend_on_processes(made, process_count):
  train, _ = load(made[2])
  steps = 12  # More than an epoch.
  alone = iterate(train)
  expected = [next(alone)["image"] for _ in range(steps)]
  epochs = pipeline.Epochs(_Rows(train), 3, 0)
  order = [epochs[i] for i in range(8 * (steps + 8))]
  parts, size = [], 8 // process_count
  for process in range(process_count):
    source, reads = counted(train)
    iterator = iterate(
      source, process_index=process, process_count=process_count
    )
    parts.append([next(iterator)["image"] for _ in range(steps)])
    share = [
      row
      for step in range(steps + 8)
      for row in order[step * 8 + process * size :][:size]
    ]
    # All of its share, nothing else, and only a few batches ahead.
    read = collections.Counter(reads)
    assert read >= collections.Counter(share[: steps * size])
    assert read <= collections.Counter(share)
  for step in range(steps):
    np.testing.assert_array_equal(
      np.concatenate([part[step] for part in parts]), expected[step]
    )


WORKERS = """
import sys
from absl import app
import numpy as np
from unicode_jax.data import pipeline, sources

def main(argv):
  train, _ = sources.load_arrayrecord(argv[1], 8)
  train[0]  # Its shard is open now.
  thread, processes = (
    pipeline.image_iterator(
      [train], [1.0], global_batch_size=8, seed=3, num_workers=num_workers
    )
    for num_workers in (0, 2)
  )
  for _ in range(10):
    images = [next(iterator)["image"] for iterator in (thread, processes)]
    np.testing.assert_array_equal(*images)
  print("equal")

if __name__ == "__main__":
  app.run(main)
"""


def test_worker_processes_give_the_same(made, tmp_path):
  (tmp_path / "workers.py").write_text(WORKERS)
  done = subprocess.run(
    [sys.executable, tmp_path / "workers.py", made[2]],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == "equal\n", done.stderr


def test_it_pickles(made):
  train, _ = load(made[2])
  train[0]  # Its shard is open now.
  copy = pickle.loads(pickle.dumps(train))
  np.testing.assert_array_equal(copy.images(), train.images())


OPEN_FILES = """
import os, resource, sys
from unicode_jax.data import sources
train, _ = sources.load_arrayrecord(sys.argv[1], 8)
before = len(os.listdir("/dev/fd"))
[train[i] for i in range(len(train))]
opened = len(os.listdir("/dev/fd")) - before
assert opened == 6, opened
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_shards_are_opened_when_they_are_read(made, tmp_path):
  prepare.prepare(
    "folder", str(made[0]), tmp_path / "out", shard_size=10, workers=1
  )

  def limited(hard):
    return subprocess.run(
      [sys.executable, "-c", OPEN_FILES, str(tmp_path / "out")],
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
      capture_output=True,
      text=True,
      check=False,
    )

  # The limit is raised as far as needed, or the remedy named.
  done = limited(1024)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) == 6 + 512
  assert "6 shards, but a process may open only 500" in limited(500).stderr
