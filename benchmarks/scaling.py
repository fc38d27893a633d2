r"""Compiles the paper's presets for slices of TPUs, and tables what comes out.

  pip install -e ".[tpu]"
  python benchmarks/scaling.py --out=runs/scaling --doc=docs/scaling.md

No TPU is needed. Each topology and stage is one run of `unicode_jax.compile` in
a process of its own: three minutes for stage II, and for stage I, on the slices
whose full reports are shown, eight, for its tokenizer has convolutions of 256
pixels. One whose result is there already is not run again. The tables go below
a marked line of the page.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import subprocess
import sys

MARK = "<!-- tables: benchmarks/scaling.py -->"
CONFIGS = {
  "pretrain": "configs/pretrain.py:paper",
  "instruct": "configs/instruct.py:paper",
}
# Slices, and what they need beside the preset to fit or to fill them.
SLICES = {
  "v5e:2x4": {"mesh.tensor": 1, "microbatches": 16},
  "v5e:4x8": {
    "mesh.tensor": 1,
    "microbatches": 4,
    "llm.remat_policy": "full",
  },
  "v5e:8x8": {"mesh.tensor": 1},
  "v5e:16x16": {},
  # Of 64 shards a piece of the MLP would not fill the chip's tiles.
  "v5p:4x4x4": {"mesh.data": 2, "mesh.tensor": 1},
  "v6e:16x16": {},
}
# Of which the full reports are shown.
SHOWN = ("v5e:16x16", "v5p:4x4x4")
# With the decoding, which takes minutes more and is the same in both stages.
DECODED = {("v5e:16x16", "instruct")}


def compiled_reports(out: pathlib.Path, slice_name: str, stage: str) -> dict:
  """Compiles a stage for a slice, if that was not done yet.

  Args:
    out: Folder of results.
    slice_name: Topology.
    stage: Of `CONFIGS`.

  Returns:
    "reports", a list of `stages.compilation.Report` as dicts, and "text", what
    the command printed.
  """
  path = out / f"{slice_name.replace(':', '-')}-{stage}.json"
  if not path.exists():
    flags = [f"--config.{k}={v}" for k, v in SLICES[slice_name].items()]
    raw = path.with_suffix(".raw")
    command = [
      *(sys.executable, "-m", "unicode_jax.compile"),
      *(f"--config={CONFIGS[stage]}", f"--topology={slice_name}"),
      *(f"--json={raw}", f"--decode={(slice_name, stage) in DECODED}".lower()),
      *flags,
    ]
    print(" ".join(command[2:]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: it does not fit.
      raise SystemExit(f"the command ended with status {done.returncode}")
    reports = json.loads(raw.read_text())
    path.write_text(json.dumps({"reports": reports, "text": done.stdout}))
    raw.unlink()
  return json.loads(path.read_text())


def row(slice_name: str, report: dict) -> str:
  """Makes a row of the table out of a report."""
  mesh = " x ".join(str(n) for n in report["mesh"].values())
  cells = [slice_name, report["program"], mesh, str(report["microbatches"])]
  if not report["fits"]:
    reason = report["problem"].splitlines()[0]
    return f"| {' | '.join([*cells, reason, '', '', '', ''])} |"
  memory = sum(report[k] for k in ("arguments", "temporaries", "outputs"))
  work, links = report["compute_seconds"], report["link_seconds"]
  seconds = max(work, links) if work else 0.0
  chips = math.prod(report["mesh"].values())
  cells += [
    f"{memory / 1e9:.1f} of {report['memory'] / 1e9:.1f} GB",
    f"{work:.3f}" if work else "not known",
    f"{links:.3f}",
    f"{100 * report['mfu_bound']:.0f} %" if work else "-",
    f"{1000 * seconds * chips / 3600:.1f}" if work else "-",
  ]
  return f"| {' | '.join(cells)} |"


def tables(out: pathlib.Path, stages: list[str]) -> list[str]:
  """Compiles what is missing, and returns the lines of the page."""
  found = {
    (name, stage): compiled_reports(out, name, stage)
    for name in SLICES
    for stage in stages
    if stage == "instruct" or name in SHOWN
  }
  lines = [
    f"jax {importlib.metadata.version('jax')}, libtpu "
    f"{importlib.metadata.version('libtpu')}; mesh: data x fsdp x tensor.",
    "",
    "| slice | program | mesh | microbatches | memory of a chip | work, s | "
    "links, s | MFU bound | chip-hours for 1000 steps, at least |",
    "|---" * 9 + "|",
  ]
  for (name, _), result in found.items():
    lines += [
      row(name, report)
      for report in result["reports"]
      if report["program"] != "decode"
    ]
  lines += ["", "Beside the preset: "]
  lines[-1] += "; ".join(
    f"{name} " + " ".join(f"--config.{k}={v}" for k, v in values.items())
    for name, values in SLICES.items()
    if values
  )
  lines[-1] += "."
  lines += [""]
  for name in SHOWN:
    for stage in stages:
      lines += [f"## {CONFIGS[stage]} on {name}", "", "```"]
      lines += [found[name, stage]["text"].rstrip(), "```", ""]
  return lines


def main() -> None:
  """Writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--doc", type=pathlib.Path)
  parser.add_argument("--stages", nargs="+", default=[*CONFIGS])
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  lines = tables(args.out, args.stages)
  if args.doc is None:
    print("\n".join(lines))
    return
  above = args.doc.read_text(encoding="utf-8").partition(MARK)[0]
  args.doc.write_text("\n".join([above + MARK, "", *lines]), encoding="utf-8")
  print(f"wrote {args.doc}")


if __name__ == "__main__":
  main()
