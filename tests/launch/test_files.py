"""What can be said of the launchers without running them."""

import ast
import io
import pathlib
import re
import shutil
import subprocess
import sys

import dockerfile_parse
import pytest

from unicode_jax import compile as compile_command, config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
README = (LAUNCH / "README.md").read_text(encoding="utf-8")


def test_there_are_scripts():
  assert len(SCRIPTS) == 6


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_have_no_complaint(path):
  beside = str(pathlib.Path(sys.executable).parent)
  shellcheck = shutil.which("shellcheck", path=beside) or "shellcheck"
  for command in (["bash", "-n"], [shellcheck, "--external-sources"]):
    ended = subprocess.run(
      [*command, path], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["tpu.sh", "gke.sh", "slurm.sh"])
def test_help_and_flags_agree(name):
  source = (LAUNCH / name).read_text(encoding="utf-8")
  flags = re.search(r'^parse "([^"]+)"', source, flags=re.MULTILINE)[1]
  flags = flags.replace("\\\n", "").split()
  help_text = source[: source.index("set -euo")]
  assert {*re.findall(r"--([a-z_]+)", help_text)} - {"dry_run"} == {*flags}


@pytest.mark.parametrize("name", ["tpu.sh", "gke.sh", "slurm.sh"])
def test_the_readme_names_real_commands_and_flags(name):
  source = (LAUNCH / name).read_text(encoding="utf-8")
  commands = re.findall(rf"^launch/{name}[^#\n]*", README, flags=re.MULTILINE)
  assert commands
  for command in commands:
    flags = command.split(" -- ")[0]
    for flag in re.findall(r"--([a-z_]+)", flags):
      assert flag == "dry_run" or re.search(rf"\b{flag}\b", source), flag


def spelled_out(command, folder):
  """Has bash put in what the README says of the flags that trainings share."""
  lines = re.findall(r"^(?:DATA|STAGE\d)=\(.*\)$", README, re.MULTILINE)
  assert len(lines) == 3
  script = "\n".join([f"FOLDER={folder}", *lines, f"printf '%s ' {command}"])
  return subprocess.run(
    ["bash", "-euc", script], capture_output=True, text=True, check=True
  ).stdout.strip()


@pytest.mark.parametrize("name", ["tpu.sh", "gke.sh", "slurm.sh"])
def test_what_the_readme_trains_splits_over_what_it_asks_for(name):
  commands = re.findall(rf"^launch/{name}.*--config=.*", README, re.MULTILINE)
  assert commands
  for command in commands:
    folder = "/shared/runs" if name == "slurm.sh" else "/mnt/my-bucket"
    assert folder in README
    command = spelled_out(command, folder)
    flags, _, training = command.partition(" -- ")
    values = dict(re.findall(r"--(\w+)=(\S+)", flags))
    overrides = dict(re.findall(r"--config\.(\S+?)=(\S+)", training))
    slices = int(values.get("slices", 1))
    if name == "slurm.sh":
      devices = int(values["nodes"]) * int(values["gpus_per_node"])
    else:
      devices = slices * int(values["accelerator"].rpartition("-")[2])
    # What the preset leaves open.
    assert "data.path" in overrides
    if "instruct" in values["config"]:
      assert {"init_from", "data.conversations"} <= overrides.keys()
    else:
      assert overrides.pop("llm_from")  # Of the preset's sizes.
    configs = compile_command.load_configs(values["config"], overrides)
    config_lib.check_devices(configs[""], devices, num_slices=slices)
    assert configs[""].mesh.data % slices == 0


def test_all_mount_the_bucket_in_the_same_way():
  source = (LAUNCH / "common.sh").read_text(encoding="utf-8")
  lines = re.findall(r"^MOUNT_OPTIONS\+?=(.*)", source, flags=re.MULTILINE)
  # As fields of gcsfuse's config file, but for its flags without a value.
  fields = "".join(lines).replace("file-system:", "").split(",")
  expected = [re.sub(r":(\d+)$", r"=\1", field) for field in fields]
  source = (LAUNCH / "worker.sh").read_text(encoding="utf-8")
  flags = re.search(r"MOUNT_FLAGS=\(([^)]+)\)", source)[1].split()
  assert flags == [f"--{field.replace(':', '-')}" for field in expected]
  assert "--implicit-dirs" in flags


def dockerfile():
  parser = dockerfile_parse.DockerfileParser(
    fileobj=io.BytesIO((LAUNCH / "Dockerfile").read_bytes())
  )
  return [(step["instruction"], step["value"]) for step in parser.structure]


def test_the_image_copies_what_the_ignore_file_lets_through():
  lines = (ROOT / ".dockerignore").read_text().splitlines()
  rules = [line for line in lines if line and not line.startswith("#")]
  assert rules[0] == "*"
  allowed = {line[1:] for line in rules if line.startswith("!")}
  copied = {
    source
    for instruction, value in dockerfile()
    if instruction == "COPY"
    for source in value.split()[:-1]
  }
  assert {source.split("/")[0] for source in copied} == allowed
  for source in copied:
    assert (ROOT / source).exists(), source


def test_the_image_is_pinned_and_runs_as_nobody_special():
  steps = dockerfile()
  [base] = [value for instruction, value in steps if instruction == "FROM"]
  assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
  arguments = dict(v.split("=") for i, v in steps if i == "ARG")
  assert arguments["EXTRAS"] == "tpu"
  assert int(arguments["USER_ID"]) > 0
  assert [value for i, value in steps if i == "USER"] == ["${USER_ID}"]
  last = [i for i, _ in steps].index("USER")
  assert {i for i, _ in steps[last:]} <= {"USER", "COMMENT", "CMD"}


def test_the_image_installs_extras_that_exist():
  tree = ast.parse((ROOT / "setup.py").read_text())
  [extras] = [
    node.value
    for node in tree.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS"
  ]
  names = {key.value for key in extras.keys}
  assert {"tpu", "cuda", "demo"} <= names
  text = (LAUNCH / "Dockerfile").read_text()
  for used in re.findall(r"EXTRAS=([a-z,]+)", text + README):
    assert {*used.split(",")} <= names, used


def test_the_final_statuses_are_those_of_the_program():
  documented = (ROOT / "unicode_jax/command.py").read_text(encoding="utf-8")
  assert "2 for a flag, config or file that cannot be used" in " ".join(
    documented.split()
  )
  assert "3 for a run that should not go on" in " ".join(documented.split())
  assert 'FINAL_STATUSES="2 3"' in (LAUNCH / "common.sh").read_text()
  assert "2 | 3)" in (LAUNCH / "slurm.sbatch").read_text()
