"""The compile command, as a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest

from unicode_jax.stages import compilation

INSTRUCT = "--config=configs/instruct.py:debug"


def compile_(host_devices, *flags, timeout=600):
  return subprocess.run(
    [sys.executable, "-m", "unicode_jax.compile", *flags],
    env=host_devices(1),
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def test_a_stage_on_eight_devices(host_devices, tmp_path):
  """Without a run of stage I, data, or a device."""
  path = tmp_path / "reports.json"
  done = compile_(
    host_devices,
    *(INSTRUCT, "--topology=cpu:8", f"--json={path}"),
    *("--config.mesh.fsdp=4", "--config.mesh.tensor=2"),
    f"--cache={tmp_path / 'cache'}",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "the model is that of configs/pretrain.py" in done.stdout
  assert "mesh data 1 x fsdp 4 x tensor 2" in done.stdout
  reports = {r["program"]: r for r in json.loads(path.read_text())}
  assert reports.keys() == {"instruct", "decode"}
  step = reports["instruct"]
  assert step["fits"] and step["items"] == 8 * 64
  assert step["arguments"] > 0 and step["temporaries"] > 0
  # Nothing is recomputed here; masked scores are computed, but not counted.
  assert 1 < step["executed_flops"] / step["flops"] < 1.5
  kinds = {kind for kind, *_ in step["collectives"]}
  assert {"all-gather", "all-reduce"} <= kinds
  assert list((tmp_path / "cache").iterdir())


def test_the_search_ranks_meshes(host_devices):
  done = compile_(host_devices, INSTRUCT, "--topology=cpu:4", "--search")
  assert done.returncode == 0, done.stderr[-3000:]
  ranked = done.stdout.partition("ranked:\n")[2].splitlines()
  # data 1, 2, 4 by tensor 1, and 1, 2 by 2: there are two heads.
  assert len({line.split(":")[0] for line in ranked}) == len(ranked) == 5
  assert "mesh 5 of 5:" in done.stdout
  assert all("in a time not known" in line for line in ranked)  # No TPU's.


@pytest.mark.parametrize(
  ("flags", "fragments"),
  [
    (["--topology=cpu:0"], ["--topology=cpu:0", "cpu:8"]),
    (["--topology=cpu:3"], ["global_batch_size=8", "such as 9"]),
    (["--topology=cpu:8", "--config.mesh.tensor=8"], ["llm.num_heads=2"]),
    (["--topology=cpu:8", "--slices=2"], ["--slices=2", "processors"]),
    (
      ["--topology=cpu:8", "--config.data.source=parquet"],
      ["data.source='parquet'", "arrayrecord"],
    ),
    (["--topology=cpu:9999"], ["cpu:9999", "cpu:1024"]),
    (["--topology=cpu:8", "--cache=gs://b/c"], ["--cache=gs://b/c", "mount"]),
    (
      ["--topology=cpu:8", "--config.data.path=gs://b/c"],
      ["data.path=gs://b/c", "mount"],
    ),
    (["--topology=v5e:2x2", "--slices=0"], ["--slices=0"]),
    (["--topology=cpu:8", "--config.mash.tensor=8"], ["mash.tensor"]),
    ([], ["--topology"]),
  ],
)
def test_what_cannot_be_compiled_is_one_line(host_devices, flags, fragments):
  done = compile_(host_devices, INSTRUCT, *flags)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert all(fragment in line for fragment in fragments), line


def test_a_time_that_is_not_known_is_not_the_shortest():
  def report(**values):
    return compilation.Report(
      program="instruct",
      mesh={"data": 1, "fsdp": 4, "tensor": 1},
      microbatches=1,
      num_parameters=7_000_000_000,
      unit="tokens",
      items=4096,
      **{"fits": True, "memory": 16_000_000_000, **values},
    )

  slow, fast = report(compute_seconds=0.5), report(compute_seconds=0.25)
  unknown, too_large = report(), report(fits=False)
  bound_by_links = report(compute_seconds=0.25, link_seconds=0.375)
  found = [too_large, unknown, slow, bound_by_links, fast]
  ranked = compilation.rank([[report] for report in found])
  expected = [fast, bound_by_links, slow, unknown, too_large]
  assert [report for (report,) in ranked] == expected
  # Of two programs both times are wanted.
  assert compilation.rank([[fast, unknown], [slow, slow]])[0] == [slow, slow]
  line = compilation.rank_line([unknown])
  assert "not known" in line and "0 s" not in line and "MFU" not in line


@pytest.mark.parametrize(
  ("work", "fragments"),
  [
    (0.25, ["0.25 s of work", "MFU 40.0 %, bound by the network"]),
    (0.0, ["work not known"]),
  ],
)
def test_exchanges_are_told_whether_the_work_is_known_or_not(work, fragments):
  report = compilation.Report(
    program="instruct",
    mesh={"data": 2, "fsdp": 4, "tensor": 1},
    microbatches=1,
    num_parameters=7_000_000_000,
    unit="tokens",
    items=4096,
    fits=True,
    memory=16_000_000_000,
    compute_seconds=work,
    link_seconds=0.125,
    network_seconds=0.5,
    mfu_bound=0.4 if work else 0.0,
  )
  text = "\n".join(compilation.describe(report))
  fragments = [*fragments, "0.125 s on the links", "0.5 s on the network"]
  assert all(fragment in text for fragment in fragments), text


@pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"), reason="the TPU's compiler: .[tpu]"
)
def test_the_tpu_s_compiler(host_devices, tmp_path):
  path = tmp_path / "reports.json"
  done = compile_(
    host_devices,
    *(INSTRUCT, "--topology=v5e:2x2", f"--json={path}", "--nodecode"),
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (report,) = json.loads(path.read_text())
  assert report["compute_seconds"] > 0 and report["link_seconds"] > 0
  assert 0 < report["mfu_bound"] < 1
  assert report["network_seconds"] == 0
  done = compile_(
    host_devices,
    *(INSTRUCT, "--topology=v5e:2x2", f"--json={path}", "--nodecode"),
    *("--slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4"),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "2 x v5e:2x2: 8 x TPU v5 lite" in done.stdout
  (two,) = json.loads(path.read_text())
  between = [c for c in two["collectives"] if c[-1]]
  # Gradients are summed over the slices, float32: a fourth of them by a chip,
  # or all where they are too small to be split, in tiles of 8 x 128.
  assert {(c[0], c[2]) for c in between} == {("all-reduce", 2)}
  crossing = sum(c[4] for c in between)
  assert two["num_parameters"] < crossing < 16 * two["num_parameters"]
  assert two["network_seconds"] > 0
  done = compile_(
    host_devices,
    *("--config=configs/pretrain.py:debug", "--topology=v5e:1x1", "--nodecode"),
    *("--config.llm.embed_dim=8192", "--config.llm.mlp_dim=65536"),
    "--config.codebook.projection=random",
  )
  assert done.returncode == 3
  assert "DOES NOT FIT: needs" in done.stdout
  assert "of 15.75G" in done.stdout and "the largest" in done.stdout
