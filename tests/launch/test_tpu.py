"""launch/tpu.sh against a gcloud that plays the states of a TPU."""

import shlex
import tarfile

import pytest

WHERE = ("--project=my-project", "--zone=us-west4-b", "--run=demo")
HARDWARE = ("--accelerator=v5litepod-16",)
TRAINING = ("--bucket=my-bucket", "--config=configs/instruct.py:paper")
ALL = (*WHERE, *HARDWARE, *TRAINING)
FAST = ("--poll_seconds=0", "--backoff_seconds=0")
NEEDED = {
  "create": (*WHERE, *HARDWARE),
  "wait": WHERE,
  "copy": WHERE,
  "run": (*WHERE, *TRAINING),
  "logs": WHERE,
  "watch": ALL,
  "delete": WHERE,
  "all": ALL,
}


def states(*names):
  """What `describe` answers, one after the other."""
  missing = (1, "ERROR: NOT_FOUND: no such resource")
  return {
    "describe": [missing if n == "NONE" else (0, n) for n in names],
  }


def statuses(*looks):
  """What the workers answer, look by look, in words: "0 running", say."""
  answers = []
  for look in looks:
    text = "\n".join(f"status={word}" for word in look.split())
    answers.append((0, text) if look else (255, "ssh: connection refused"))
  return {"worker.sh status": answers}


def story(place):
  """What happened, in words, without the looks."""
  names = {
    "queued-resources create": "create",
    "queued-resources delete": "delete",
    "tpu-vm scp": "copy",
    "worker.sh install": "install",
    "worker.sh start": "start",
    "worker.sh log": "log",
  }
  lines = [" ".join(call) for call, _ in place.calls]
  return [n for line in lines for part, n in names.items() if part in line]


@pytest.mark.parametrize("command", NEEDED)
def test_a_dry_run_prints_commands_and_runs_none(dry, command):
  printed = dry("tpu.sh", command, *NEEDED[command])
  assert printed
  for words in printed:
    assert words[0] in ("gcloud", "git", "mkdir", "cd"), words
    if words[0] == "gcloud":
      assert words[1:3] == ["compute", "tpus"]
      assert {"--project=my-project", "--zone=us-west4-b"} <= {*words}
      assert any(word in ("demo", "demo:code.tar.gz") for word in words)


def test_what_is_asked_for(dry):
  [create] = dry("tpu.sh", "create", *WHERE, *HARDWARE)
  assert create[3:6] == ["queued-resources", "create", "demo"]
  assert {
    "--node-id=demo",
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
  } <= {*create}


@pytest.mark.parametrize(
  ("flags", "given", "absent"),
  [
    (["--capacity=on_demand"], [], ["--spot", "--reserved"]),
    (["--capacity=reserved"], ["--reserved"], ["--spot"]),
    (["--runtime=v9"], ["--runtime-version=v9"], []),
    (["--accelerator=v6e-8"], ["--runtime-version=v2-alpha-tpuv6e"], []),
    (["--accelerator=v5p-8"], ["--runtime-version=v2-alpha-tpuv5"], []),
    (["--accelerator=v4-8"], ["--runtime-version=tpu-ubuntu2204-base"], []),
    (["--service_account=a@b.c"], ["--service-account=a@b.c"], []),
  ],
)
def test_hardware_flags(dry, flags, given, absent):
  [create] = dry("tpu.sh", "create", *WHERE, *HARDWARE, *flags)
  assert {*given} <= {*create}
  assert not {*absent} & {*create}


def remote(words):
  """The words of a command that a worker's shell gets."""
  [command] = [w for w in words if w.startswith("--command=")]
  return shlex.split(command.removeprefix("--command="))


def test_the_training_survives_two_shells(dry):
  odd = ['--config.data.path=/mnt/b/it\'s a "dir"', "--x=$HOME `a` \\ & é;#"]
  [run] = dry("tpu.sh", "run", *WHERE, *TRAINING, "--", *odd)
  assert "--worker=all" in run
  assert remote(run) == [
    "code/launch/worker.sh",
    "start",
    "my-bucket",
    *["python", "-m", "unicode_jax.main"],
    "--config=configs/instruct.py:paper",
    "--workdir=/mnt/my-bucket/demo",
    "--config.distributed=True",
    "--config.platform=tpu",
    *odd,
  ]


def test_settings_may_come_from_the_environment(dry):
  [run] = dry(
    "tpu.sh",
    "run",
    "--run=other",
    PROJECT="my-project",
    ZONE="us-west4-b",
    RUN="demo",
    BUCKET="gs://my-bucket/",
    CONFIG="/mnt/my-bucket/old/config.json",
  )
  assert "--workdir=/mnt/my-bucket/other" in remote(run)
  assert "--config=/mnt/my-bucket/old/config.json" in remote(run)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((), "no command"),
    (("start",), "unknown command 'start'"),
    (("all", *ALL, "more"), "unexpected argument 'more'"),
    (("all", *ALL, "--zon=x"), "no flag --zon"),
    (("all", *ALL, "--zone"), "--zone needs a value"),
    (("all", *ALL[1:]), "--project is missing"),
    (("all", *ALL, "--project=My Project"), "--project='My Project'"),
    (("all", *ALL, "--zone=us-west4"), "--zone='us-west4'"),
    (("all", *ALL, "--run=Demo"), "--run='Demo'"),
    (("all", *ALL, "--run=demo\nx"), "--run has control characters"),
    (("all", *ALL, "--accelerator=h100-8"), "v5litepod-256"),
    (("all", *ALL, "--accelerator=v5litepod-7"), "8, 16, 32"),
    (("all", *ALL, "--accelerator=v5p-4"), "8, 16, 32"),
    (("all", *ALL, "--capacity=free"), "spot, on_demand or reserved"),
    (("all", *ALL, "--bucket=a/b"), "--bucket='a/b'"),
    (("all", *ALL, "--config="), "--config is missing"),
    (("all", *ALL, "--config=gs://my-bucket/x"), "as /mnt/my-bucket"),
    (("all", *ALL, "--", "--config.init_from=gs://b/x"), "as /mnt/my-bucket"),
    (("all", *ALL, "--config=configs/instrukt.py"), "configs/instrukt.py"),
    (("all", *ALL, "--revision=nowhere"), "--revision='nowhere'"),
    (("all", "--dry_run", *ALL, "--revision=nowhere"), "--revision='nowhere'"),
    (("all", *ALL, "--config.mesh.fsdp=2"), "put it behind --"),
    (("all", *ALL, "--", "--workdir=elsewhere"), "'--workdir=elsewhere'"),
    (("all", *ALL, "--", "--config.platform=cpu"), "sets --config.platform"),
    (("all", *ALL, "--max_restarts=-1"), "--max_restarts='-1'"),
    (("all", *ALL, "--backoff_seconds=08"), "--backoff_seconds='08'"),
  ],
)
def test_a_bad_setting_is_one_line_and_status_2(place, arguments, says):
  ended = place.run("tpu.sh", *arguments)
  assert ended.returncode == 2
  assert ended.stdout == ""
  [line] = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line
  assert place.calls == []


@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)])
def test_a_config_that_is_not_copied(place, dry_run):
  """What is copied is a commit."""
  (place.root / "configs" / "mine.py").write_text("")
  bad = "--config=configs/mine.py:paper"
  ended = place.run("tpu.sh", "all", *dry_run, *ALL, bad)
  assert ended.returncode == 2
  assert "configs/mine.py is not in HEAD" in ended.stderr
  assert place.calls == []


def test_gcloud_is_missing(place):
  (place.bin / "gcloud").unlink()
  ended = place.run("tpu.sh", "delete", *WHERE)
  assert ended.returncode == 2
  assert ended.stderr.startswith("error: gcloud is not installed: ")
  ended = place.run("tpu.sh", "delete", "--dry_run", *WHERE)
  assert ended.returncode == 0
  assert "delete demo" in ended.stdout


def test_help(place):
  ended = place.run("tpu.sh", "--help")
  assert ended.returncode == 0
  for name in (*NEEDED, "--max_restarts", "--dry_run"):
    assert name in ended.stdout
  assert "set -e" not in ended.stdout


@pytest.mark.parametrize(
  ("seen", "status"),
  [
    (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0),
    (["ACCEPTED", "FAILED"], 1),
    (["PROVISIONING", "SUSPENDED"], 1),
    (["NONE"], 1),
  ],
)
def test_wait(place, seen, status):
  place.answer(states(*seen))
  ended = place.run("tpu.sh", "wait", *WHERE, *FAST)
  assert ended.returncode == status
  assert len(place.calls) == len(seen)
  assert ended.stderr.splitlines() == [f"demo: {state}" for state in seen]


def test_wait_endures_a_gap_in_the_network(place):
  gap = {"describe": [(1, "timed out")] * 3 + [(0, "warning: x\nACTIVE")]}
  place.answer(gap)
  assert place.run("tpu.sh", "wait", *WHERE, *FAST).returncode == 0
  place.answer({"describe": [(1, "timed out")]})
  assert place.run("tpu.sh", "wait", *WHERE, *FAST).returncode == 1


def test_copy_takes_what_is_committed(place):
  (place.root / "secret").write_text("x")
  (place.root / "configs/instruct.py").write_text("changed")
  ended = place.run("tpu.sh", "copy", *WHERE)
  assert ended.returncode == 0, ended.stderr
  assert "note: what differs from HEAD" in ended.stderr
  with tarfile.open(place.root / "dist/demo.tar.gz") as tarball:
    names = tarball.getnames()
  assert "launch/worker.sh" in names
  assert "secret" not in names
  [(scp, _), (ssh, _)] = place.calls
  assert scp[3:7] == ["tpu-vm", "scp", "dist/demo.tar.gz", "demo:code.tar.gz"]
  assert "--worker=all" in scp
  assert remote(ssh)[-2:] == ["code/launch/worker.sh", "install"]


def test_a_failed_step_of_copy_is_a_failure(place):
  place.answer({"scp": [(1, "no space")]})
  assert place.run("tpu.sh", "copy", *WHERE).returncode == 1
  assert story(place) == ["copy"]


def watch(place, seen, looks, *flags, command="watch"):
  place.answer(states(*seen) | statuses(*looks))
  return place.run("tpu.sh", command, *ALL, *FAST, *flags)


def test_watch_a_run_without_incidents(place):
  ended = watch(place, ["ACTIVE"], ["running running", "0 running", "0 0"])
  assert ended.returncode == 0
  assert story(place) == []
  assert ended.stderr == "demo: done\n"


def test_watch_starts_again_where_the_tpu_was_taken_away(place):
  seen = ["ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES"]
  ended = watch(
    place, [*seen, "PROVISIONING", "ACTIVE"], ["running", "running", "0"]
  )
  assert ended.returncode == 0, ended.stderr
  assert story(place) == ["delete", "create", "copy", "install", "start"]
  assert "restart 1 of 20" in ended.stderr


@pytest.mark.parametrize("state", ["FAILED", "PREEMPTED", "NONE"])
def test_watch_starts_again_from_other_ends(place, state):
  ended = watch(place, [state, "ACTIVE"], ["0"])
  assert ended.returncode == 0
  steps = ["delete", "create", "copy", "install", "start"]
  assert story(place) == steps[state == "NONE" :]


@pytest.mark.parametrize("look", ["0 1", "running 143", "lost running"])
def test_watch_starts_a_failed_run_again_on_the_same_tpu(place, look):
  ended = watch(place, ["ACTIVE"], ["running running", look, "0 0"])
  assert ended.returncode == 0
  assert story(place) == ["start"]
  [start] = [call for call, _ in place.calls if "start" in " ".join(call)]
  assert "--workdir=/mnt/my-bucket/demo" in remote(start)


@pytest.mark.parametrize(("look", "status"), [("1 2", 2), ("3 running", 3)])
def test_watch_never_repeats_what_no_restart_mends(place, look, status):
  ended = watch(place, ["ACTIVE"], [look])
  assert ended.returncode == status
  assert story(place) == ["log"]
  assert f"status {status}, which a restart does not mend" in ended.stderr


def test_watch_gives_up(place):
  ended = watch(place, ["ACTIVE"], ["1"], "--max_restarts=2")
  assert ended.returncode == 1
  assert story(place) == ["start", "start", "log"]
  assert ended.stderr.endswith("demo: gives up after 2 restarts\n")


def test_watch_makes_anew_a_tpu_that_does_not_answer(place):
  ended = watch(place, ["ACTIVE"], [*[""] * 9, "running", *[""] * 10, "0"])
  assert ended.returncode == 0
  assert story(place) == ["delete", "create", "copy", "install", "start"]


def test_watch_deletes_nothing_while_nobody_can_be_asked(place):
  place.program("sleep", "#!/bin/sh\n")
  gap = [(1, "no network")] * 30
  place.answer({"describe": [*gap, (0, "ACTIVE")]} | statuses("0"))
  assert place.run("tpu.sh", "watch", *ALL, *FAST).returncode == 0
  place.answer({"describe": gap[:1]})
  ended = place.run("tpu.sh", "watch", *ALL, *FAST)
  assert ended.returncode == 1
  assert "may go on, and costs money" in ended.stderr
  assert story(place) == []


def test_watch_waits_longer_each_time(place):
  place.program("sleep", '#!/bin/sh\necho "slept $1" >&2\n')
  ended = watch(
    place, ["ACTIVE"], ["1"], "--backoff_seconds=300", "--max_restarts=5"
  )
  slept = [
    line.split()[1] for line in ended.stderr.splitlines() if "slept" in line
  ]
  assert [s for s in slept if s != "0"] == [
    "300",
    "600",
    "1200",
    "1800",
    "1800",
  ]


def test_all(place):
  ended = watch(place, ["NONE", "PROVISIONING", "ACTIVE"], ["0"], command="all")
  assert ended.returncode == 0, ended.stderr
  assert story(place) == [
    *["create", "copy", "install", "start"],
    "delete",
  ]


def test_all_goes_on_with_a_tpu_that_is_there(place):
  assert watch(place, ["ACTIVE"], ["0"], command="all").returncode == 0
  assert story(place) == ["delete"]


def test_all_deletes_after_a_failure_too(place):
  assert watch(place, ["ACTIVE"], ["2"], command="all").returncode == 2
  assert story(place) == ["log", "delete"]


def test_all_ends_where_nothing_can_be_created(place):
  place.answer(states("NONE") | {"create": [(1, "no quota")]})
  assert place.run("tpu.sh", "all", *ALL, *FAST).returncode == 1
  assert story(place) == ["create"]
