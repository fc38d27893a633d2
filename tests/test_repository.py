"""What must hold of the repository as a whole."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Brackets keep these patterns from matching themselves.
MACHINE_PATHS = re.compile(
  r"/(?:[w]ork|[r]oot|[h]ome/\w+|[U]sers/\w+|[t]mp|[o]pt)/\w|[.]pyenv"
)
REGISTRIES = re.compile(
  r"[p]ypi[.]org|[p]ythonhosted|[r]egistry[.]npmjs|[d]eb[.]debian"
  r"|[d]ownload[.]pytorch|--(?:extra-)?[i]ndex-url",
)


def tracked_files():
  try:
    listed = subprocess.run(
      ["git", "ls-files", "-co", "--exclude-standard", "-z"],
      cwd=ROOT,
      capture_output=True,
      check=True,
    ).stdout
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("not a git checkout")
  return [ROOT / name for name in listed.decode().split("\0") if name]


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRIES])
def test_no_file_names_a_machine_or_a_registry(pattern):
  found = []
  for path in tracked_files():
    if not path.is_file():
      continue
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # A picture.
      continue
    for number, line in enumerate(text.splitlines(), start=1):
      if match := pattern.search(line):
        found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
  assert not found


def test_ci_runs_what_the_readme_says():
  script = (ROOT / ".ci/run").read_text(encoding="utf-8")
  commands = re.findall(
    r"^(?:pip|ruff|python -m pytest).*", script, flags=re.MULTILINE
  )
  assert len(commands) >= 6
  for command in commands:
    assert command.replace(" --quiet", "") in README, command


def test_readme_commands_name_real_things():
  for module in re.findall(r"python -m (unicode_jax[.\w]*)", README):
    path = ROOT / module.replace(".", "/")
    files = path.with_suffix(".py"), path / "__main__.py"
    assert any(file.is_file() for file in files), module
  for path in re.findall(r"\b(?:configs|docs|benchmarks)/[\w/]+\.\w+", README):
    assert (ROOT / path).is_file(), path
