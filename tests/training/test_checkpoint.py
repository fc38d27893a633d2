"""Checkpoints come back as they were, or are said to be damaged."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicode_jax import config as config_lib, sharding
from unicode_jax.training import checkpoint, checksums


def make_state(seed):
  """Draws a small state with every kind of array that a real one has."""
  rng = np.random.default_rng(seed)
  return {
    "kernel": jnp.asarray(rng.normal(size=(40, 24)), jnp.float32),
    "half": jnp.asarray(rng.normal(size=(7, 5)), jnp.bfloat16),
    "count": jnp.asarray(seed, jnp.int32),
    "valid": jnp.asarray(rng.random(33) < 0.5),
  }


def equal(first, second):
  same = jax.tree.map(
    lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), first, second
  )
  return all(jax.tree.leaves(same))


def target():
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return sharding.placed_shapes(make_state(0), place)


def restore(workdir):
  with checkpoint.Checkpointer(workdir / "checkpoints", 5) as checkpointer:
    return checkpointer.restore(target())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpointer(workdir / "checkpoints", 5) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, make_state(step), {"seconds": {"step": 0.1}})
  return workdir


def files_of(workdir, step):
  folder = workdir / "checkpoints" / str(step)
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  )


def test_a_sum_tells_every_change_of_a_word():
  state = make_state(0)
  sums = checksums.checksums(state)
  rng = np.random.default_rng(0)
  for name, value in state.items():
    words = np.asarray(value).copy()
    as_bytes = words.reshape(-1).view(np.uint8)
    if name == "valid":
      as_bytes[rng.integers(len(as_bytes))] ^= 1
    else:
      as_bytes[rng.integers(len(as_bytes))] ^= 1 << rng.integers(8)
    changed = state | {name: jnp.asarray(words)}
    assert checksums.changed(changed, sums) == [name]
  moved = state | {"kernel": state["kernel"][::-1]}
  assert checksums.changed(moved, sums) == ["kernel"]


def test_a_sum_is_a_sum_over_places():
  """Against numpy, in Python's own whole numbers."""
  x = np.random.default_rng(1).normal(size=(3, 5, 7)).astype(np.float32)
  words = [int(w) for w in x.view(np.uint32).reshape(-1)]
  total = 0
  for place, word in enumerate(words):
    mixed = place * 2654435761 % 2**32
    total += word * ((mixed ^ mixed >> 15) | 1)
  assert checksums.checksums({"x": jnp.asarray(x)}) == {"x": total % 2**32}


def test_what_is_saved_comes_back(saved):
  step, state, record, damaged = restore(saved)
  assert step == 2 and not damaged
  assert equal(state, make_state(2))
  assert record["seconds"] == {"step": 0.1}


def flip(path, rng):
  content = bytearray(path.read_bytes())
  if content:
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def truncate(path, rng):
  content = path.read_bytes()
  path.write_bytes(content[: rng.integers(len(content) or 1)])


def empty(path, rng):
  path.write_bytes(b"")


def remove(path, rng):
  path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
def test_a_damaged_file_is_never_taken_for_whole(saved, tmp_path, damage):
  """Whatever file: the state is what was saved, of this step or the last."""
  rng = np.random.default_rng(0)
  found_out = 0
  for name in files_of(saved, 2):
    workdir = tmp_path / name.replace("/", "_")
    shutil.copytree(saved, workdir)
    damage(workdir / "checkpoints/2" / name, rng)
    step, state, _, damaged = restore(workdir)
    assert equal(state, make_state(step)), name
    found_out += step == 1
    if damaged:
      assert step == 1
      # Nothing is removed.
      assert (workdir / "set_aside/2").is_dir()
      assert restore(workdir)[0] == 1
  assert found_out


def contents(folder):
  return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_without_a_whole_checkpoint_nothing_is_touched(saved, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  for step in (1, 2):
    (workdir / f"checkpoints/{step}/record/metadata").write_text("{")
  before = contents(workdir)
  with pytest.raises(config_lib.ConfigError, match=r"step 2: .*; step 1: "):
    restore(workdir)
  assert contents(workdir) == before


def test_arrays_of_other_shapes_are_no_damage(saved, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  before = contents(workdir)
  wanted = target()
  kernel = wanted["kernel"]
  wanted["kernel"] = jax.ShapeDtypeStruct(
    (20, 48), kernel.dtype, sharding=kernel.sharding
  )
  with (
    checkpoint.Checkpointer(workdir / "checkpoints", 5) as checkpointer,
    pytest.raises(
      config_lib.ConfigError, match=r"kernel is \[40, 24\], .*20, 48"
    ),
  ):
    checkpointer.restore(wanted)
  assert contents(workdir) == before


def test_errors_of_tensorstore_name_array_and_file():
  inner = (
    'Error reading Byte range [0, 8) of local file "x/10/state/d/a": Requested '
    "byte range [0, 8) is not valid for value of size 4"
  )
  error = ValueError(
    'OUT_OF_RANGE: Error opening "cast" driver: Error reading '
    '"variables.params.a/.zarray" in OCDBT database at local file "x/10/": '
    f"{inner} [tensorstore_spec='{{}}'] [tensorstore_spec[1]='{{}}']"
  )
  said = str(checkpoint._damage(error))
  assert said == f"variables.params.a: {inner}"
  assert str(checkpoint._damage(ValueError("other\nlines"))) == "other"


def test_a_record_is_checked():
  sealed = checkpoint.sealed({"step_seconds": 0.25, "left_out": {"image": 3}})
  assert checkpoint.opened(sealed)["left_out"] == {"image": 3}
  sealed["step_seconds"] = 0.26
  with pytest.raises(checkpoint.DamagedError, match="record"):
    checkpoint.opened(sealed)


def test_a_record_is_what_it_was_when_it_was_saved(tmp_path):
  """It is written later, when the run has changed what it was made of."""
  with checkpoint.Checkpointer(tmp_path / "checkpoints", 5) as checkpointer:
    row = {"image": [1, 2]}
    checkpointer.save(1, make_state(1), {"skipped_in_a_row": row})
    row.pop("image")
  _, _, record, damaged = restore(tmp_path)
  assert record["skipped_in_a_row"] == {"image": [1, 2]} and not damaged


def test_a_save_that_does_nothing_is_an_error(saved, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  with (
    checkpoint.Checkpointer(workdir / "checkpoints", 5) as checkpointer,
    pytest.raises(OSError, match="there are later ones"),
  ):
    checkpointer.save(1, make_state(1), {})


def test_newer_checkpoints_are_set_aside(saved, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  with checkpoint.Checkpointer(workdir / "checkpoints", 5) as checkpointer:
    assert checkpointer.restore(target(), newest=1)[0] == 1
    assert checkpointer.steps() == [1]
    checkpointer.save(2, make_state(7), {})
    checkpointer.wait()
    assert equal(checkpointer.restore(target())[1], make_state(7))
    checkpointer.restore(target(), newest=1)
  assert {p.name for p in (workdir / "set_aside").iterdir()} == {"2", "2-2"}


def test_a_folder_that_cannot_be_written_keeps_what_it_has(
  saved, tmp_path, small_disk
):
  """The error names the folder; older checkpoints are whole."""
  disk = pathlib.Path(small_disk(2_000_000))
  shutil.copytree(saved, disk / "run")
  noise = np.random.default_rng(0).normal(size=(1500, 1500))
  large = make_state(3) | {"kernel": jnp.asarray(noise)}
  with (
    pytest.raises(OSError, match="could not be written") as caught,
    checkpoint.Checkpointer(disk / "run/checkpoints", 5) as checkpointer,
  ):
    checkpointer.save(3, large, {})
  assert "steps [2, 1] are whole" in str(caught.value)
  assert caught.value.filename == str(disk / "run/checkpoints")
  assert restore(disk / "run")[0] == 2
