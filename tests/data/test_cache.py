"""The cache of decoded images: reuse, keys, broken images, atomicity."""

import logging
import os
from pathlib import Path
import subprocess
import sys
import threading

import numpy as np
import pytest

from unicode_jax.data import cache

CONTENTS = [{"name": f"image {i}", "stamp": i} for i in range(5)]


def decode(content):
  return np.full((2, 2, 3), content["stamp"], np.uint8)


def test_decodes_once_and_keeps_the_order(tmp_path):
  first = cache.cached_images("s", CONTENTS, decode, 2, cache_dir=tmp_path)

  def must_not_run(content):
    raise AssertionError(content)

  again = cache.cached_images(
    "s", CONTENTS, must_not_run, 2, cache_dir=tmp_path
  )
  assert first == again
  images = np.load(again.path, mmap_mode="r")
  assert images.dtype == np.uint8
  assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
  assert [item["name"] for item in again.items] == [c["name"] for c in CONTENTS]
  assert len({item["digest"] for item in again.items}) == 5


@pytest.mark.parametrize("change", ["stamp", "size", "version", "source"])
def test_any_change_makes_a_new_cache(tmp_path, change):
  def call(source="s", stamp=0, size=2, version="1"):
    return cache.cached_images(
      source,
      [{"name": "a", "stamp": stamp}],
      lambda c: np.full((size, size, 3), c["stamp"], np.uint8),
      size,
      version=version,
      cache_dir=tmp_path,
    ).path

  changed = {"stamp": 7, "size": 3, "version": "2", "source": "t"}
  assert call() == call()
  assert call() != call(**{change: changed[change]})


def test_broken_images_are_skipped_and_reported_every_time(tmp_path, caplog):
  def fragile(content):
    if content["stamp"] == 1:
      raise OSError("image file is truncated")
    return decode(content)

  for _ in range(2):  # Decoded, then from the cache.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      cached = cache.cached_images(
        "s", CONTENTS, fragile, 2, cache_dir=tmp_path, max_broken=1
      )
    assert "image 1" in caplog.text and "truncated" in caplog.text
    assert "skipped 1 of 5" in caplog.text
    assert cached.broken == [("image 1", "OSError: image file is truncated")]
    images = np.load(cached.path)
    for item in cached.items:
      assert (images[item["row"]] == item["stamp"]).all()
    assert len(cached.items) == 4


def test_too_many_broken_images_name_the_first(tmp_path):
  def broken(content):
    raise ValueError("no image")

  with pytest.raises(ValueError, match=r"(?s)5 of .*more than the 2.*image 0"):
    cache.cached_images(
      "s", CONTENTS, broken, 2, cache_dir=tmp_path, max_broken=2
    )
  with pytest.raises(ValueError, match="none of the 5"):
    cache.cached_images(
      "s", CONTENTS, broken, 2, cache_dir=tmp_path, max_broken=9
    )
  assert not list(tmp_path.iterdir())


def test_a_lower_limit_counts_for_what_is_cached(tmp_path):
  def fragile(content):
    if content["stamp"] < 2:
      raise OSError("image file is truncated")
    return decode(content)

  def call(max_broken):
    return cache.cached_images(
      "s", CONTENTS, fragile, 2, cache_dir=tmp_path, max_broken=max_broken
    )

  assert len(call(2).items) == 3
  with pytest.raises(ValueError, match=r"2 of .*raise config.data.max_broken"):
    call(1)


def test_fields_from_the_decoder_become_part_of_the_item(tmp_path):
  def with_caption(content):
    return decode(content), {"said": f"number {content['stamp']}"}

  for _ in range(2):  # Decoded, then from the cache.
    cached = cache.cached_images(
      "s", CONTENTS, with_caption, 2, cache_dir=tmp_path
    )
    assert [item["said"] for item in cached.items] == [
      f"number {i}" for i in range(5)
    ]
  plain = cache.cached_images("t", CONTENTS, decode, 2, cache_dir=tmp_path)
  assert [i["digest"] for i in plain.items] == [
    i["digest"] for i in cached.items
  ]


def test_an_interrupted_write_leaves_nothing(tmp_path):
  def interrupted(content):
    if content["stamp"] == 3:
      raise KeyboardInterrupt
    return decode(content)

  with pytest.raises(KeyboardInterrupt):
    cache.cached_images("s", CONTENTS, interrupted, 2, cache_dir=tmp_path)
  assert not list(tmp_path.iterdir())
  cached = cache.cached_images("s", CONTENTS, decode, 2, cache_dir=tmp_path)
  assert len(cached.items) == 5


def test_racing_writers_agree(tmp_path):
  barrier = threading.Barrier(2)
  results = []

  def slow(content):
    if content["stamp"] == 0:
      barrier.wait(timeout=10)  # Both are writing now.
    return decode(content)

  def write():
    results.append(
      cache.cached_images("s", CONTENTS, slow, 2, cache_dir=tmp_path)
    )

  threads = [threading.Thread(target=write) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(results) == 2 and results[0] == results[1]
  assert [p.name for p in tmp_path.iterdir()] == [results[0].path.parent.name]


def test_default_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("UNICODE_JAX_CACHE", str(tmp_path / "mine"))
  cached = cache.cached_images("s", CONTENTS, decode, 2)
  assert tmp_path / "mine" in cached.path.parents
  monkeypatch.delenv("UNICODE_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert cache.default_cache_dir() == tmp_path / ".cache" / "unicode_jax"


def test_an_unwritable_folder_says_what_to_set(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(OSError, match="UNICODE_JAX_CACHE"):
    cache.cached_images("s", CONTENTS, decode, 2, cache_dir=file / "below")


FULL = """
import sys
import numpy as np
from unicode_jax.data import cache
contents = [{"name": str(i)} for i in range(60)]
try:
  cache.cached_images(
    "s", contents, lambda c: np.zeros((128, 128, 3), np.uint8), 128,
    cache_dir=sys.argv[1]
  )
except OSError as error:
  print(error)
"""


def test_a_full_disk_is_noticed_before_it_is_written(tmp_path):
  """Through a memory map it would end the process with SIGBUS."""
  small = ["unshare", "-rm", "sh", "-c"]
  mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
  arguments = [*small, mount, str(tmp_path)]
  try:
    subprocess.run([*arguments, "true"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("this user may not mount a small file system")
  done = subprocess.run(
    [*arguments, sys.executable, "-c", FULL, str(tmp_path / "cache")],
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "No space left on device); make room, or set" in done.stdout
  assert str(tmp_path / "cache") in done.stdout
