"""What several processes do with a checkpoint that they cannot restore."""

import pathlib

RESTORE = pathlib.Path(__file__).parent / "restore.py"


def steps_in(folder):
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_a_run_never_begins_anew_because_its_checkpoints_do_not_fit(
  together, tmp_path
):
  folder = tmp_path / "checkpoints"
  for status, text in together(2, 1, RESTORE, folder, "save", 4):
    assert status == 0, text
  assert steps_in(folder) == [5, 10]

  # Of another shape: it is no damage, and nothing is moved.
  ended = together(2, 1, RESTORE, folder, "restore", 6)
  for status, text in ended:
    assert status == 74
    assert "ConfigError" in text and "kernel is [4, 4], and [6, 6]" in text
  assert steps_in(folder) == [5, 10]

  # Both damaged: one goes aside, the last one stays, however often they try.
  for path in folder.rglob("d/*"):
    path.write_bytes(path.read_bytes()[:-10])
  for _ in range(3):
    ended = together(2, 1, RESTORE, folder, "restore", 4)
    assert 74 in [status for status, _ in ended]
    assert not any("restored" in text for _, text in ended)
    assert steps_in(folder) == [5]
  assert any("there is no older one" in text for _, text in ended)
  assert (tmp_path / "set_aside/10").is_dir()
