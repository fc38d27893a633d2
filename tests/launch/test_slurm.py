"""launch/slurm.sh and its job, among programs that play Slurm."""

import re

import pytest

FLAGS = (
  "--run=demo",
  "--runs=/shared/my runs/",
  "--config=configs/instruct.py",
)
TRAINING = ["--config=configs/instruct.py", "--workdir=/shared/my runs/demo"]
# Runs what srun is given, once, without srun's own flags.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
# Plays the training: prints its flags, ends with the status it is told.
PYTHON = """#!/usr/bin/env bash
printf '<%s>' "$@"
exit "$STATUS"
"""


def test_a_dry_run_prints_what_is_submitted(dry, place):
  cd, mkdir, sbatch = dry("slurm.sh", *FLAGS, "--nodes=4", "--", "--x=a 'b'")
  assert cd == ["cd", str(place.root)]
  assert mkdir == ["mkdir", "-p", "runs/slurm"]
  assert sbatch[0] == "sbatch"
  script = sbatch.index("launch/slurm.sbatch")
  assert sbatch[script + 1 :] == [*TRAINING, "--x=a 'b'"]
  assert {
    "--job-name=demo",
    "--nodes=4",
    "--gpus-per-node=8",
    "--ntasks-per-node=8",
    "--output=runs/slurm/%x-%j.log",
    "--export=ALL,MAX_RESTARTS=20",
  } <= {*sbatch[:script]}


def test_submit(place):
  flags = (
    "--partition=gpu",
    "--account=me",
    "--gpus_per_node=4",
    "--time=1-12:00:00",
  )
  ended = place.run("slurm.sh", *FLAGS, *flags)
  assert ended.returncode == 0, ended.stderr
  assert (place.root / "runs/slurm").is_dir()
  [(sbatch, _)] = place.calls
  assert {"--partition=gpu", "--account=me", "--time=1-12:00:00"} <= {*sbatch}
  assert {"--gpus-per-node=4", "--ntasks-per-node=4"} <= {*sbatch}


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (FLAGS[1:], "--run is missing"),
    ((FLAGS[0], *FLAGS[2:]), "--runs is missing"),
    (FLAGS[:2], "--config is missing"),
    ((*FLAGS, "submit"), "unexpected argument 'submit'"),
    ((*FLAGS, "--nodes=many"), "--nodes='many'"),
    ((*FLAGS, "--time=tomorrow"), "--time='tomorrow'"),
    ((*FLAGS, "--gpus=8"), "no flag --gpus"),
    ((*FLAGS, "--runs=gs://b"), "mount the bucket on all nodes"),
  ],
)
def test_a_bad_setting_is_one_line_and_status_2(place, arguments, says):
  ended = place.run("slurm.sh", *arguments)
  assert ended.returncode == 2
  [line] = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line
  assert place.calls == []


def test_the_lines_for_sbatch(place):
  lines = (place.root / "launch/slurm.sbatch").read_text().splitlines()
  # Slurm reads them up to the first command.
  first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
  found = [line for line in lines if line.startswith("#SBATCH")]
  assert found == [line for line in lines[:first] if line.startswith("#SBATCH")]
  matches = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", x) for x in found]
  options = {match[1]: match[2] for match in matches}
  assert "requeue" in options
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert options["signal"] == "TERM@300"  # To the processes, so without "B:".
  assert options["open-mode"] == "append"  # A requeued job has the same log.


def job(place, status, **environment):
  place.program("srun", SRUN)
  place.program("python", PYTHON)
  return place.run(
    "slurm.sbatch",
    *TRAINING,
    STATUS=str(status),
    SLURM_JOB_ID="7",
    SLURM_JOB_NODELIST="node[1-4]",
    **environment,
  )


def requeued(place):
  return [words for words, _ in place.calls if words[0] == "scontrol"]


def test_a_job_that_is_done(place):
  ended = job(place, 0)
  assert ended.returncode == 0
  assert requeued(place) == []
  words = re.findall("<(.*?)>", ended.stdout)
  joined = ["--config.distributed=True", "--config.platform=gpu"]
  assert words == ["-m", "unicode_jax.main", *TRAINING, *joined]


@pytest.mark.parametrize("status", [1, 137, 143])
def test_a_job_that_failed_goes_back_into_the_queue(place, status):
  place.answer({"squeue": [(0, "RUNNING")]})
  ended = job(place, status, SLURM_RESTART_COUNT="19")
  assert ended.returncode == status
  assert requeued(place) == [["scontrol", "requeue", "7"]]
  assert "restart 20 of 20" in ended.stdout


@pytest.mark.parametrize("status", [2, 3])
def test_what_no_restart_mends_is_not_repeated(place, status):
  place.answer({"squeue": [(0, "RUNNING")]})
  ended = job(place, status)
  assert ended.returncode == status
  assert requeued(place) == []
  assert "which a restart does not mend" in ended.stdout
  assert [*place.bin.parent.glob(".slurm-*")] == []


def test_a_bad_flag_counts_even_if_srun_ends_with_another_status(place):
  place.answer({"squeue": [(0, "RUNNING")]})
  place.program("python", PYTHON)
  place.program("srun", SRUN.replace("exec ", "") + "exit 137\n")
  assert (
    place.run(
      "slurm.sbatch", STATUS="2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node1"
    ).returncode
    == 2
  )
  assert requeued(place) == []


def test_a_job_gives_up(place):
  place.answer({"squeue": [(0, "RUNNING")]})
  ended = job(place, 1, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
  assert ended.returncode == 1
  assert requeued(place) == []
  assert "gives up after 3 restarts" in ended.stdout


def test_a_cancelled_job_stays_away(place):
  place.answer({"squeue": [(0, "COMPLETING")]})
  assert job(place, 143).returncode == 143
  assert requeued(place) == []
