"""Files and folders that were made to do harm: nothing of theirs is run.

A checkpoint, a data set or a run folder may come from anywhere. Each test
plants something that would leave a mark (`mark`) if its code ran, or a secret
outside of the folder, and asks for a `ConfigError` or for the data alone.
"""

import ast
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from benchmarks import hf_parity
from tests.fuzz import fuzz
from unicode_jax import config as config_lib, loading
from unicode_jax.config import ConfigError
from unicode_jax.convert import exporting, importing, readers
from unicode_jax.data import code_cache, text_tokenizer
from unicode_jax.data.prepared import from_webdataset, inputs, manifest
from unicode_jax.data.sources import images, tfds
from unicode_jax.training import perceptual

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def mark(tmp_path):
  """Returns a path that must not come to be."""
  path = tmp_path / "mark"
  yield path
  assert not path.exists(), "code of a file was run"


class _Bomb:
  """Leaves a mark when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@pytest.fixture
def bomb(mark):
  """Returns bytes that leave a mark when they are unpickled."""
  data = pickle.dumps(_Bomb(mark))
  pickle.loads(data)
  mark.unlink()  # It works, that is.
  return data


def evil_module(folder, mark, name="evil.py"):
  """Writes a module that leaves a mark when it is imported."""
  (folder / name).write_text(
    f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
  )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """A small Hugging Face checkpoint, to be copied."""
  folder = tmp_path_factory.mktemp("llama")
  (folder / "tokenizer").mkdir()
  hf_parity.save_tokenizer(folder / "tokenizer")
  hf_parity.make("llama", folder / "hf", folder / "tokenizer")
  return folder / "hf"


# Checkpoints of others.


@pytest.mark.parametrize(
  "name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"]
)
def test_pickled_weights(llama, tmp_path, bomb, name):
  folder = shutil.copytree(llama, tmp_path / "hf")
  (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(bomb)
  with pytest.raises(ConfigError, match="pickled and could run anything"):
    importing.import_checkpoint(folder, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_pickles_under_other_names(llama, tmp_path, bomb):
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    folder = shutil.copytree(llama, tmp_path / name)
    (folder / name).write_bytes(bomb)
    with pytest.raises(ConfigError):
      importing.import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
  (tmp_path / "x.gguf").write_bytes(bomb)
  with pytest.raises(ConfigError, match="GGUF"):  # Or its package is missing.
    importing.import_checkpoint(tmp_path / "x.gguf", tmp_path / "run")


def test_code_beside_a_checkpoint(llama, tmp_path, mark):
  """What trust_remote_code would run is neither run nor kept."""
  folder = shutil.copytree(llama, tmp_path / "hf")
  evil_module(folder, mark)
  auto_map = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}
  template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
  for name in ("config.json", "tokenizer_config.json"):
    values = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
    values["tokenizer_class"] = "Evil"
    (folder / name).write_text(json.dumps(values))
  (folder / "chat_template.jinja").write_text(template)
  run = importing.import_checkpoint(folder, tmp_path / "run")
  out = exporting.export(loading.load_llm(run), tmp_path / "out")
  for made in (run / "text_tokenizer", out):
    kept = json.loads((made / "tokenizer_config.json").read_text())
    assert "auto_map" not in kept
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert kept["chat_template"] == template  # Kept, and never rendered.
    assert not list(made.glob("*.py"))
  assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_a_tokenizer_with_code(tmp_path, mark):
  """Without a tokenizer.json transformers is asked, which must not ask us."""
  folder = tmp_path / "hf"
  folder.mkdir()
  evil_module(folder, mark)
  settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  (folder / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ConfigError, match="transformers cannot load") as error:
    text_tokenizer.load_text_tokenizer(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name",
  ["../secret.safetensors", "/etc/passwd", "..", "", "a/b", "./x", 5, None],
)
def test_an_index_leads_nowhere(tmp_path, name):
  folder = tmp_path / "hf"
  folder.mkdir()
  tensors = {"x": np.ones(1, np.float32)}
  (tmp_path / "secret.safetensors").write_bytes(safetensors.numpy.save(tensors))
  index = {"weight_map": {"x": name}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(ConfigError):
    readers.SafetensorsReader(folder)


def test_quantized_weights_mean_nothing(tmp_path):
  tensors = {"x": np.ones(1, np.int8)}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ConfigError, match="x is of type I8"):
    readers.SafetensorsReader(tmp_path)


# Runs of others.


def hostile_run(folder, values, stage_one):
  """Copies a run, and puts values into its config."""
  shutil.copytree(stage_one[0], folder, symlinks=True)
  path = folder / "config.json"
  tree = json.loads(path.read_text())
  for key, value in values.items():
    *sections, leaf = key.split(".")
    holder = tree
    for section in sections:
      holder = holder.setdefault(section, {})
    holder[leaf] = value
  path.write_text(json.dumps(tree))
  return folder


@pytest.mark.parametrize(
  "values",
  [
    {"__class__": "os"},
    {"llm.__init__": 1},
    {"stage": "evil"},
    {"stage": "../evil"},
    {"preset": "../../../evil"},
    {"llm.num_layers": 2**40},
    {"llm.embed_dim": 2**17},
    {"text.vocab_size": 2**24},
    {"image_size": 2**31},
    {"tokenizer.channel_multipliers": [1] * 10_000},
    {"llm.num_heads": 0},
    {"llm.head_dim": -16},
    {"codebook.paradigm": "__import__('os')"},
  ],
  ids=lambda values: next(iter(values)),
)
def test_a_run_with_another_config(stage_one, tmp_path, values):
  """Refused by its config, or by what the checkpoint was made with."""
  folder = hostile_run(tmp_path / "run", values, stage_one)
  for load in (loading.load, loading.load_llm):
    with pytest.raises(ConfigError) as error:
      load(folder)
    assert "\n" not in str(error.value)


def test_pickles_in_a_checkpoint(stage_one, tmp_path, bomb):
  """Whatever file of a checkpoint is a pickle, nothing is unpickled."""
  kinds = {
    path.parent.name if path.parent.name == "d" else path.name: path
    for path in (stage_one[0] / "checkpoints" / "4").rglob("*")
    if path.is_file()
  }
  files = [path.relative_to(stage_one[0]) for path in kinds.values()]
  assert len(files) > 5
  for number, file in enumerate(files):
    folder = hostile_run(tmp_path / str(number), {}, stage_one)
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / file).write_bytes(bomb)
    try:
      loading.load(folder)  # Some files say nothing of what is loaded.
    except ConfigError as error:
      assert "\n" not in str(error)
    shutil.rmtree(folder)


COMMANDS = {
  "generate": ["--workdir={run}"],
  "chat": ["--workdir={run}", "--prompt=hello"],
  "evaluate": ["--workdir={run}"],
  "export": ["--workdir={run}", "--out={out}"],
  "tokenize": ["--workdir={run}", "--out={out}"],
  "main": ["--config={run}/config.json"],
  "compile": ["--config={run}/config.json", "--topology=cpu:1"],
}


HOSTILE = (
  {"preset": "../../../../../../../../../{tmp}/made"},
  {"stage": "evil"},
  {"llm": {"num_layers": 10**12}},
)


@pytest.mark.parametrize(
  ("name", "number"),
  [(name, i % 3) for i, name in enumerate(COMMANDS)]
  + [("main", 1), ("main", 2), ("export", 1)],
)
def test_commands_and_a_hostile_run(name, number, tmp_path, mark):
  """As a user meets it: one line, status 2, and nothing made."""
  run, work = tmp_path / "run", tmp_path / "work"
  run.mkdir()
  work.mkdir()
  evil_module(run, mark, "config.py")
  evil_module(run, mark, "evil.py")
  values = dict(HOSTILE[number])
  if "preset" in values:
    values["preset"] = values["preset"].format(tmp=tmp_path)
  config = config_lib.default_config().to_dict() | values
  (run / "config.json").write_text(json.dumps(config))
  arguments = [a.format(run=run, out=tmp_path / "out") for a in COMMANDS[name]]
  done = subprocess.run(
    [sys.executable, "-m", f"unicode_jax.{name}", *arguments],
    cwd=work,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2 and done.stdout == "", done.stderr[-2000:]
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and len(line) < 2000
  assert os.listdir(work) == []
  assert sorted(os.listdir(tmp_path)) == ["run", "work"]


def test_an_export_takes_no_links_along(llama, tmp_path):
  """A run of others, exported and published, gives away no file of ours."""
  run = importing.import_checkpoint(llama, tmp_path / "run")
  evaluation = run / "evaluation"
  evaluation.mkdir()
  results = {"run": {"step": 0}, "suites": {}}
  (evaluation / "results.json").write_text(json.dumps(results))
  secret = tmp_path / "secret"
  (secret / "inside").mkdir(parents=True)
  (secret / "inside" / "key").write_text("secret")
  (evaluation / "report.md").symlink_to(secret / "inside" / "key")
  (evaluation / "pictures").symlink_to(secret)
  out = exporting.export(loading.load_llm(run), tmp_path / "out")
  assert [p.name for p in (out / "evaluation").rglob("*")] == ["results.json"]
  for text in ("[]", "{", '{"suites": 5}', '{"run": [], "suites": {}}'):
    (evaluation / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json cannot be read"):
      exporting.export(loading.load_llm(run), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Data of others.


@pytest.mark.parametrize(
  "name", ["../x.array_record", "/x", "..", "", "a/b", 5]
)
def test_a_manifest_leads_nowhere(tmp_path, name):
  shard = {
    **{"file": name, "records": 1, "bytes": 1},
    **{"sha256": "", "index_sha256": "", "count": 1},
  }
  (tmp_path / "x").mkdir()
  path = tmp_path / "x" / "manifest.json"
  found = {
    **{"format": 1, "path": "", "options": {}, "records": 1, "broken": 0},
    "inputs": {"files": 1, "bytes": 1, "sha256": ""},
    "pieces": [{"name": "", "shards": [shard], "broken": []}],
  }
  path.write_text(json.dumps(found))
  with pytest.raises(ConfigError, match=r"own folder|damaged"):
    manifest.open_prepared(path.parent)
  found = {
    **{"format": 2, "fingerprint": "f", "vocab_size": 9, "positions": 1},
    **{"depth": 1, "views": [[False, 0, 0]]},
    "sources": [{"name": "a", "count": 1, "items": "", "shards": [shard]}],
  }
  path.write_text(json.dumps(found))
  with pytest.raises(ConfigError, match=r"own folder|damaged"):
    code_cache.open_codes(path.parent, [], "f")


def test_archives_write_nothing(tmp_path):
  """Nor read what their links name."""
  (tmp_path / "secret.png").write_bytes(b"secret")
  with tarfile.open(tmp_path / "x.tar", "w") as tar:
    for name, kind, link in (
      ("../out.png", tarfile.REGTYPE, ""),
      (f"{tmp_path}/absolute.png", tarfile.REGTYPE, ""),
      ("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
      ("hard.png", tarfile.LNKTYPE, "../secret.png"),
      ("device.png", tarfile.CHRTYPE, ""),
      ("pipe.png", tarfile.FIFOTYPE, ""),
    ):
      info = tarfile.TarInfo(name)
      info.type, info.linkname, info.size = kind, link, 3 * (not link)
      tar.addfile(info, io.BytesIO(b"abc"))
  piece = from_webdataset.TarPiece("x", tmp_path / "x.tar", inputs.Columns())
  samples = [s for s in piece.samples() if isinstance(s, inputs.Sample)]
  assert {s.image for s in samples} <= {b"abc"} and len(samples) == 2
  assert sorted(os.listdir(tmp_path)) == ["secret.png", "x.tar"]


def test_an_image_starts_no_program(tmp_path, mark, monkeypatch):
  """Pillow hands PostScript to ghostscript, whatever the file is named."""
  programs = tmp_path / "bin"
  programs.mkdir()
  for name in ("gs", "gswin32c"):
    (programs / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
  picture = tmp_path / "picture.png"
  Image.new("RGB", (8, 8)).save(picture, format="EPS")
  with Image.open(picture) as opened:
    assert opened.format == "EPS"
  with pytest.raises(OSError, match="not an image file of a kind"):
    images.decode_image(picture, 8)
  with pytest.raises(OSError, match="not an image file of a kind"):
    images.decode_whole(io.BytesIO(picture.read_bytes()))


def test_arrays_are_not_unpickled(tmp_path, bomb):
  """Neither an array of objects nor a pickle with the ending of one."""
  objects = np.empty(1, object)
  objects[0] = pickle.loads(pickle.dumps(None))
  np.savez(tmp_path / "objects.npz", **{"net.slice1.0.weight": objects})
  (tmp_path / "pickle.npz").write_bytes(bomb)
  for name in ("objects.npz", "pickle.npz"):
    with pytest.raises(ValueError, match="pickle"):
      perceptual.load_weights(str(tmp_path / name))


def test_a_data_set_that_names_code(tmp_path, mark, monkeypatch):
  """TFDS imports the modules that its files name."""
  evil_module(tmp_path, mark, "evil_features.py")
  monkeypatch.syspath_prepend(tmp_path)
  folder = tmp_path / "data" / "own" / "1.0.0"
  folder.mkdir(parents=True)
  for key in ("pythonClassName", "type"):
    features = {"features": {"image": {key: "evil_features.Image"}}}
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(
      ConfigError, match=r"evil_features\.Image.*code would run"
    ):
      tfds.load_tfds("own", 8, data_dir=tmp_path / "data")


# What a header declares.


def test_memory_is_what_the_file_has(tmp_path):
  """In a process that may take a gigabyte more than it has."""
  header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
  folders = []
  for number, data in enumerate(
    (
      struct.pack("<Q", 2**60),
      struct.pack("<Q", 2**60) + b"{}",
      struct.pack("<Q", 60) + (header % (2**58, 2**60)).ljust(60),
      struct.pack("<Q", 60) + (header % (2**62, 4)).ljust(60),
    )
  ):
    folder = tmp_path / str(number)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(data)
    folders.append(str(folder))
  strings = [
    b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest
    for counts, rest in (
      ((2**60, 0), b""),
      ((0, 2**60), b""),
      ((0, 1), struct.pack("<Q", 2**60)),
      ((0, 1), struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60) + bytes(64)),
      ((0, 1), struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60) + bytes(64)),
      ((1, 0), struct.pack("<Q1sI2QIQ", 1, b"a", 2, 2**40, 2**40, 0, 0)),
    )
  ]
  files = []
  for number, data in enumerate(strings if fuzz.available("gguf") else ()):
    files.append(str(tmp_path / f"{number}.gguf"))
    pathlib.Path(files[-1]).write_bytes(data)
  script = """
import json, pathlib, resource, sys, time
import jax
from tests.fuzz import fuzz
from unicode_jax.config import ConfigError
from unicode_jax.convert import readers
folders, files = json.loads(sys.argv[1])
jax.devices()
fuzz.limit_memory()
kilobytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kilobytes()
tried = [(readers.SafetensorsReader, f) for f in folders]
tried += [(readers.GGUFReader, f) for f in files]
for read, path in tried:
  start = time.monotonic()
  try:
    read(pathlib.Path(path))
    print("read", path)
  except ConfigError as error:
    assert "\\n" not in str(error) and len(str(error)) < 500, str(error)
  assert time.monotonic() - start < 5, path
  assert kilobytes() - before < 100_000, path
print("all refused")
"""
  done = subprocess.run(
    [sys.executable, "-c", script, json.dumps([folders, files])],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.stdout == "all refused\n", done.stdout + done.stderr[-3000:]


def test_the_fuzzer_finds_nothing_in_a_few_inputs():
  """Of every reader; `tests/fuzz/fuzz.py` says how to search for longer."""
  done = subprocess.run(
    [sys.executable, "tests/fuzz/fuzz.py", "--runs=250", "--seed=3"],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  names = [name for name in fuzz.TARGETS if fuzz.available(name)]
  assert done.stdout.count("250 inputs, 0 findings") == len(names), done.stdout


def test_the_fuzzer_notices(tmp_path):
  """Whatever is no error of ours, and an error of several lines."""

  def reader(error):
    def read(folder, data):
      if error is not None:
        raise error

    return fuzz.Target(lambda: [b""], read)

  for error in (ValueError("x"), ConfigError("a\nb"), OSError("x"), KeyError()):
    assert fuzz.finding(reader(error), b"") is error
  for error in (None, ConfigError("a"), OSError(2, "gone", "file")):
    assert fuzz.finding(reader(error), b"") is None


# What no linter knows of.
NEVER = {"trust_remote_code", "allow_pickle", "weights_only", "shell"}


def unsafe_calls(source):
  """Yields the keywords of calls that would run a file's code."""
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    for key, value in given.items():
      if key in NEVER and value is not (key == "weights_only"):
        yield f"{name}({key}={value})"
    if name == "from_pretrained" and given.get("trust_remote_code") is None:
      kind = getattr(getattr(node.func, "value", None), "attr", "")
      if kind.startswith("Auto"):
        yield f"{kind}.from_pretrained without trust_remote_code=False"


def test_nothing_trusts_a_file():
  found = [
    f"{path}: {call}"
    for path in (ROOT / "unicode_jax").rglob("*.py")
    for call in unsafe_calls(path.read_text(encoding="utf-8"))
  ]
  assert found == []
  for source in (
    "np.load(x, allow_pickle=True)",
    "torch.load(x, weights_only=False)",
    "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
    "transformers.AutoTokenizer.from_pretrained(x)",
    "subprocess.run(x, shell=True)",
  ):
    assert len(list(unsafe_calls(source))) == 1, source
