"""launch/gke.sh: the JobSet against Kubernetes' and JobSet's own models.

The models of kubeflow_trainer_api are generated from the OpenAPI of both. They
check types and required fields; what comes back from them lacks fields that the
API does not have.
"""

import copy
import math
import re

from kubeflow_trainer_api import models
import pytest
import yaml

RUN = ("--run=demo",)
CLUSTER = ("--project=my-project", "--location=us-west4-b", "--cluster=tpus")
TRAINING = (
  *RUN,
  "--accelerator=v5litepod-256",
  "--image=images/unicode_jax:tpu",
  "--bucket=my-bucket",
  "--config=configs/instruct.py:paper",
)
COMMAND = [
  *["python", "-m", "unicode_jax.main"],
  "--config=configs/instruct.py:paper",
  "--workdir=/mnt/my-bucket/demo",
  "--config.distributed=True",
  "--config.platform=tpu",
]
NEEDED = {
  "render": TRAINING,
  "apply": (*CLUSTER, *TRAINING),
  "xpk": (*CLUSTER, *TRAINING),
  "attach": (*CLUSTER, "--bucket=my-bucket"),
  "status": (*CLUSTER, *RUN),
  "logs": (*CLUSTER, *RUN),
  "delete": (*CLUSTER, *RUN),
}


@pytest.fixture
def render(place):
  def run(*flags):
    ended = place.run("gke.sh", "render", *TRAINING, *flags)
    assert ended.returncode == 0, ended.stderr
    assert place.calls == []
    return yaml.safe_load(ended.stdout)

  return run


def unknown(given, known, path=""):
  """Names fields that a model dropped or changed."""
  if isinstance(given, dict) and isinstance(known, dict):
    for name, value in given.items():
      yield from unknown(value, known.get(name), f"{path}.{name}")
  elif isinstance(given, list) and isinstance(known, list):
    for place, value in enumerate(given):
      yield from unknown(value, known[place], f"{path}[{place}]")
  elif given != known:
    yield path


def check(jobset):
  model = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset))
  assert [*unknown(jobset, model.to_dict())] == []
  return model


def parts(jobset):
  """The Job's, the pod's and the container's part."""
  [replicated] = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  return replicated, job, pod, container


def test_the_jobset_is_valid_and_says_what_it_should(render):
  jobset = render("--slices=2", "--max_restarts=7", "--grace_seconds=400")
  check(jobset)
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["metadata"]["name"] == "demo"
  replicated, job, pod, container = parts(jobset)
  assert replicated["replicas"] == 2
  assert job["completions"] == job["parallelism"] == 64
  assert job["completionMode"] == "Indexed"
  assert job["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs that.
  assert pod["terminationGracePeriodSeconds"] == 400
  assert container["image"] == "images/unicode_jax:tpu"
  assert container["command"] == COMMAND
  chips = {"google.com/tpu": 4}
  assert container["resources"] == {"requests": chips, "limits": chips}


def test_the_bucket_is_mounted_where_the_run_is(render):
  jobset = render("--bucket=gs://1.my_bucket/", "--service_account=trainer")
  check(jobset)
  _, job, pod, container = parts(jobset)
  annotations = job["template"]["metadata"]["annotations"]
  assert annotations["gke-gcsfuse/volumes"] == "true"
  assert pod["serviceAccountName"] == "trainer"
  [volume] = pod["volumes"]
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert not volume["csi"].get("readOnly")
  attributes = volume["csi"]["volumeAttributes"]
  assert attributes["bucketName"] == "1.my_bucket"
  assert attributes["mountOptions"].split(",")[0] == "implicit-dirs"
  # Without it, a pod on the nodes' network is the nodes' service account.
  assert pod["hostNetwork"] is True
  assert attributes["hostNetworkPodKSA"] == "true"
  [mount] = container["volumeMounts"]
  assert mount == {"name": volume["name"], "mountPath": "/mnt/1.my_bucket"}
  assert "--workdir=/mnt/1.my_bucket/demo" in container["command"]


def test_what_looks_like_a_number_stays_a_name(render):
  jobset = render("--bucket=12345", "--namespace=7")
  check(jobset)
  *_, pod, _ = parts(jobset)
  [volume] = pod["volumes"]
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "12345"
  assert jobset["metadata"]["namespace"] == "7"


def test_final_statuses_fail_the_set_and_others_restart_it(render):
  jobset = render("--max_restarts=7")
  _, job, _, container = parts(jobset)
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7
  [rule] = policy["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  [rule] = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
    "containerName": container["name"],
    "operator": "In",
    "values": [2, 3],
  }


@pytest.mark.parametrize(
  ("accelerator", "kind", "topology"),
  [
    ("v6e-1", "tpu-v6e-slice", "1x1"),
    ("v5litepod-4", "tpu-v5-lite-podslice", "2x2"),
    ("v6e-8", "tpu-v6e-slice", "2x4"),
    ("v5litepod-128", "tpu-v5-lite-podslice", "8x16"),
    ("v5p-8", "tpu-v5p-slice", "2x2x1"),
    ("v4-64", "tpu-v4-podslice", "2x4x4"),
    ("v5p-2048", "tpu-v5p-slice", "8x8x16"),
  ],
)
def test_hosts_and_chips(render, accelerator, kind, topology):
  jobset = render(f"--accelerator={accelerator}")
  check(jobset)
  _, job, pod, container = parts(jobset)
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": kind,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  name, size = accelerator.split("-")
  chips = int(size) // (2 if name in ("v4", "v5p") else 1)
  assert math.prod(map(int, topology.split("x"))) == chips
  each = container["resources"]["limits"]["google.com/tpu"]
  assert job["completions"] * each == chips


def test_every_size_of_a_slice_has_all_its_chips(place):
  script = (place.root / "launch/common.sh").read_text()
  sizes = re.findall(r"(\d+)\) TOPOLOGY=([\dx]+)", script)
  assert len(sizes) == 17
  for size, topology in sizes:
    sides = [int(side) for side in topology.split("x")]
    assert math.prod(sides) == int(size) // (len(sides) - 1)


def test_values_cannot_become_syntax(place):
  odd = [
    '--config.data.path=/mnt/b/it\'s: a "dir"',
    "--x=$run ${slices} $$ $(HOME) # &é {} [] | > - yes",
    "null",
    "12",
  ]
  ended = place.run("gke.sh", "render", *TRAINING, "--", *odd)
  jobset = yaml.safe_load(ended.stdout)
  check(jobset)
  *_, container = parts(jobset)
  escaped = [word.replace("$(", "$$(") for word in odd]
  assert container["command"] == [*COMMAND, *escaped]


def test_the_models_see_mistakes(render):
  jobset = render()
  _, job, pod, _ = parts(jobset)
  pod["volumes"][0]["csi"]["bucketName"] = "b"
  with pytest.raises(AssertionError, match="bucketName"):
    check(jobset)
  del pod["volumes"][0]["csi"]["bucketName"]
  job["backOffLimit"] = 0
  with pytest.raises(AssertionError, match="backOffLimit"):
    check(jobset)
  del job["backOffLimit"]
  job["completions"] = "64"
  with pytest.raises(ValueError, match="completions"):
    check(jobset)


@pytest.mark.parametrize("command", ["xpk", "status", "logs", "delete"])
def test_a_dry_run_prints_commands_and_runs_none(dry, command):
  printed = dry("gke.sh", command, *NEEDED[command])
  assert printed
  for words in printed:
    if command == "xpk":
      assert words[:3] == ["xpk", "workload", "create"]
    else:
      assert words[0] == "kubectl"
      assert "--context=gke_my-project_us-west4-b_tpus" in words
    assert any("demo" in word for word in words)


def test_xpk_trains_the_same(dry):
  [words] = dry("gke.sh", "xpk", *NEEDED["xpk"], "--slices=2", "--", "--x=a b")
  flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
  assert flags["project"] == "my-project"
  assert flags["workload"] == "demo"
  assert flags["tpu-type"] == "v5litepod-256"
  assert flags["num-slices"] == "2"
  assert flags["docker-image"] == "images/unicode_jax:tpu"
  assert flags["command"] == " ".join([*COMMAND, "'--x=a b'"])
  assert flags["restart-on-exit-codes"] == "1,4-126"
  assert flags["storage"] == "my-bucket"


def test_xpk_gets_the_bucket_on_the_same_folder(dry, render):
  bucket = "--bucket=gs://1.my_bucket"
  [words] = dry("gke.sh", "attach", *CLUSTER, bucket)
  assert words[:4] == ["xpk", "storage", "attach", "1-my-bucket"]
  flags = dict(word.partition("=")[::2] for word in words[4:])
  assert flags["--cluster"] == "tpus"
  assert flags["--zone"] == "us-west4-b"
  assert flags["--type"] == "gcsfuse"
  assert flags["--bucket"] == "1.my_bucket"
  assert flags["--readonly"] == flags["--auto-mount"] == "false"
  [words] = dry("gke.sh", "xpk", *NEEDED["xpk"], bucket)
  assert "--storage=1-my-bucket" in words
  *_, pod, container = parts(render(bucket))
  [mount] = container["volumeMounts"]
  assert flags["--mount-point"] == mount["mountPath"]
  options = pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"]
  assert flags["--mount-options"] == options


def test_a_dry_apply_is_what_apply_does(place):
  flags = NEEDED["apply"]
  dry = place.run("gke.sh", "apply", "--dry_run", *flags).stdout
  assert place.calls == []
  head, *body, last = dry.splitlines()
  assert place.run("gke.sh", "apply", *flags).returncode == 0
  [(words, stdin)] = place.calls
  assert head == " ".join(words) + " <<'JOBSET'"
  assert last == "JOBSET"
  assert body == stdin.splitlines()
  assert stdin == place.run("gke.sh", "render", *TRAINING).stdout


def test_a_dry_apply_can_be_pasted(place):
  printed = place.run("gke.sh", "apply", "--dry_run", *NEEDED["apply"]).stdout
  (place.root / "launch/pasted").write_text("#!/usr/bin/env bash\n" + printed)
  (place.root / "launch/pasted").chmod(0o755)
  assert place.run("pasted").returncode == 0
  [(_, stdin)] = place.calls
  check(yaml.safe_load(stdin))


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((), "no command"),
    (("aply",), "unknown command 'aply'"),
    (("render", *TRAINING[1:]), "--run is missing"),
    (("render", *TRAINING, "--image="), "--image is missing"),
    (("render", *TRAINING, "--slices=0"), "--slices='0'"),
    (
      ("render", *TRAINING, "--slices=2", "--accelerator=v6e-4"),
      "more than one host",
    ),
    (("render", *TRAINING, "--grace_seconds=soon"), "--grace_seconds='soon'"),
    (("apply", *TRAINING), "--project is missing"),
    (("status", *RUN, *CLUSTER[:2]), "--cluster is missing"),
    (("xpk", *NEEDED["xpk"], "--location=us-west4"), "xpk wants a zone"),
    (("attach", *CLUSTER), "--bucket is missing"),
    (("attach", *NEEDED["attach"], "--location=us-west4"), "xpk wants a zone"),
    (
      ("render", *TRAINING, "--", "--config.init_from=gs://my-bucket/x"),
      "has gs://my-bucket as /mnt/my-bucket",
    ),
  ],
)
def test_a_bad_setting_is_one_line_and_status_2(place, arguments, says):
  ended = place.run("gke.sh", *arguments)
  assert ended.returncode == 2
  assert ended.stdout == ""
  [line] = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line
  assert place.calls == []


def test_a_failure_of_kubectl_is_one_here(place):
  place.answer({"apply": [(1, "no such cluster")]})
  assert place.run("gke.sh", "apply", *NEEDED["apply"]).returncode == 1
