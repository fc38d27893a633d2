r"""Fuzzes what reads files that others wrote.

  pip install atheris
  python tests/fuzz/fuzz.py --target=gguf --seconds=60 --seed=1

With atheris the search is guided by coverage; without it inputs are mutated
blindly. Whatever a file holds, its reader succeeds, or raises a `ConfigError`
of one line, or an OSError that names the file. Anything else is a finding, and
so is memory that a header asks for and the file has not got. Inputs that were
one are kept in --keep.

`--target=all` gives each of them an equal share of the time.
"""

import argparse
from collections.abc import Callable
import contextlib
import importlib.util
import io
import json
import logging
import pathlib
import random
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import NamedTuple

# Above what is in use when the imports are done, bytes.
MEMORY = 2**30
MOST_BYTES = 1 << 16


class Target(NamedTuple):
  """A reader.

  Attributes:
    seeds: makes files that it reads, to begin from.
    read: is given a folder and the contents of a file.
  """

  seeds: Callable[[], list[bytes]]
  read: Callable[[pathlib.Path, bytes], None]


def _safetensors_seeds():
  import numpy as np
  import safetensors.numpy

  tensors = {
    "model.norm.weight": np.ones(4, np.float32),
    "model.embed_tokens.weight": np.ones((3, 4), np.float16),
  }
  header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  return [
    safetensors.numpy.save(tensors),
    struct.pack("<Q", len(header)) + header + bytes(4),
    struct.pack("<Q", 2**60) + header,
  ]


def _read_safetensors(folder, data):
  from unicode_jax.convert import readers

  (folder / "model.safetensors").write_bytes(data)
  reader = readers.SafetensorsReader(folder)
  for name in reader.shapes:
    reader.read(name)


def _index_seeds():
  names = {f"a.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
  return [json.dumps({"metadata": {}, "weight_map": names}).encode()]


def _read_index(folder, data):
  from unicode_jax.convert import readers

  (folder / "model.safetensors.index.json").write_bytes(data)
  readers.SafetensorsReader(folder)


def _gguf_seeds():
  import gguf
  import numpy as np

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "x.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(4, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path.read_bytes()]


def _read_gguf(folder, data):
  from unicode_jax.convert import importing, readers

  path = folder / "model.gguf"
  path.write_bytes(data)
  reader = readers.GGUFReader(path)
  description = importing.gguf_description(reader.metadata, reader.shapes)
  _make_config(description)
  for name in reader.shapes:
    reader.read(name)


def _config_seeds():
  config = {
    **{"model_type": "qwen2", "vocab_size": 100, "hidden_size": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    **{"num_hidden_layers": 2, "intermediate_size": 32, "rms_norm_eps": 1e-5},
    **{"rope_theta": 10000.0, "max_position_embeddings": 64},
    **{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    **{"tie_word_embeddings": True, "hidden_act": "silu"},
  }
  scaling = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
  }
  llama = config | {"model_type": "llama", "rope_scaling": scaling}
  layers = config | {"layer_types": ["sliding_attention"] * 2}
  return [json.dumps(c).encode() for c in (config, llama, layers)]


def _make_config(description):
  from unicode_jax.convert import importing, names

  llama, _ = importing.describe(description, "x")
  names.table(llama)


def _read_config(folder, data):
  from unicode_jax.convert import importing

  (folder / "config.json").write_bytes(data)
  _make_config(importing.read_description(folder / "config.json"))


def _tokenizer_seeds():
  from unicode_jax.data import text_tokenizer

  texts = ["User: a red dot?\nAssistant: yes, a dot"] * 3
  with tempfile.TemporaryDirectory() as folder:
    text_tokenizer.train_text_tokenizer(texts, 280).save(folder)
    files = [
      pathlib.Path(folder, name).read_text()
      for name in ("tokenizer.json", "tokenizer_config.json")
    ]
  spec = json.loads(files[0])
  unigram = spec | {
    "model": {
      "type": "Unigram",
      "unk_id": 0,
      "vocab": [["<unk>", 0], ["a", 1]],
    },
    "pre_tokenizer": {
      **{"type": "Metaspace", "replacement": "_"},
      **{"prepend_scheme": "always", "split": True},
    },
    "decoder": None,
    "added_tokens": [],
  }
  small = spec | {"added_tokens": spec["added_tokens"][:3]}
  small["model"] |= {
    "vocab": {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5},
    "merges": [["a", "b"]],
  }
  config = json.loads(files[1])
  return [
    json.dumps({"tokenizer": t, "config": c}).encode()
    for t, c in ((small, config), (unigram, {"eos_token": "a"}), (small, {}))
  ]


def _read_tokenizer(folder, data):
  from unicode_jax.data import text_tokenizer

  try:  # Two files in one.
    both = json.loads(data)
    tokenizer, config = both["tokenizer"], both["config"]
    texts = json.dumps(tokenizer).encode(), json.dumps(config).encode()
  except (ValueError, KeyError, TypeError, RecursionError):
    texts = data, data
  for name, text in zip(("tokenizer.json", "tokenizer_config.json"), texts):
    (folder / name).write_bytes(text)
  loaded = text_tokenizer.load_text_tokenizer(folder)
  ids = loaded.encode("a red dot </s> \n")
  loaded.decode(ids)
  if loaded.vocab_size < 10**6:
    with contextlib.suppress(ValueError):
      loaded.visual_code_mask("a", "b")


_PIECE = {
  "name": "images 0 to 1",
  "shards": [
    {
      **{"file": "00000-000.array_record", "records": 1, "bytes": 4},
      **{"sha256": "", "index_sha256": ""},
    }
  ],
  "broken": [["x.png", "no image"]],
}


def _prepared_seeds():
  import hashlib

  header = {
    **{"name": "a.png", "captions": ["a"], "label": None, "digest": "0"},
    **{"width": 2, "height": 2},
  }
  line = json.dumps(header) + "\n"
  manifest = {
    **{"format": 1, "path": "x", "options": {"from": "folder"}},
    "inputs": {"files": 1, "bytes": 1, "sha256": ""},
    **{"records": 1, "broken": 1, "pieces": [json.loads(json.dumps(_PIECE))]},
  }
  digest = hashlib.sha256(line.encode()).hexdigest()
  manifest["pieces"][0]["shards"][0]["index_sha256"] = digest
  return [json.dumps({"manifest": manifest, "header": header}).encode()]


def _read_prepared(folder, data):
  import hashlib

  from unicode_jax.data.prepared import manifest as manifest_lib

  text, line = data, data
  try:
    both = json.loads(data)
    line = (json.dumps(both["header"]) + "\n").encode()
    manifest = both["manifest"]
    for piece in manifest["pieces"]:  # A checksum is no hurdle for anybody.
      for shard in piece["shards"]:
        if "index_sha256" in shard:
          shard["index_sha256"] = hashlib.sha256(line).hexdigest()
    text = json.dumps(manifest).encode()
  except (ValueError, KeyError, TypeError, RecursionError):
    pass
  (folder / "manifest.json").write_bytes(text)
  (folder / "00000-000.array_record").write_bytes(b"1234")
  (folder / "00000-000.jsonl").write_bytes(line)
  files, headers = manifest_lib.open_prepared(folder)
  assert len(headers) == sum(count for _, count in files)
  assert all(path.parent == folder for path, _ in files)


def _codes_seeds():
  manifest = {
    **{"format": 2, "fingerprint": "f", "vocab_size": 100, "positions": 4},
    **{"depth": 2, "views": [[False, 0, 0]]},
    "sources": [
      {
        **{"name": "a", "count": 1, "items": "x"},
        "shards": [
          {"file": "a-0.array_record", "count": 1, "sha256": "0" * 64},
        ],
      }
    ],
  }
  return [json.dumps(manifest).encode()]


def _read_codes(folder, data):
  from unicode_jax.data import code_cache

  (folder / "manifest.json").write_bytes(data)
  (folder / "a-0.array_record").write_bytes(b"1234")
  code_cache.open_codes(folder, [], "f")


def _captions_seeds():
  lines = [{"image": f"{i}.png", "text": f"picture {i}"} for i in range(3)]
  return ["\n".join(map(json.dumps, lines)).encode()]


def _read_captions(folder, data):
  from unicode_jax.data.sources import folder as folder_lib

  (folder / "captions.jsonl").write_bytes(data)
  folder_lib.read_captions(folder / "captions.jsonl", {"0.png", "1.png"})


def _llava_seeds():
  records = [
    {
      **{"id": "1", "image": "a/b.png"},
      "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "This."},
      ],
    },
    {
      "id": 2,
      "conversations": [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "This."},
      ],
    },
  ]
  return [
    json.dumps(records).encode(),
    "\n".join(map(json.dumps, records)).encode(),
  ]


def _read_llava(folder, data):
  from unicode_jax.data.sources import llava

  (folder / "llava.json").write_bytes(data)
  for record in llava._read_records(folder / "llava.json", 0.1):
    assert record.image is None or ".." not in record.image.split("/")


def _run_seeds():
  from unicode_jax import config as config_lib

  config = config_lib.default_config()
  texts = [config_lib.to_json(config)]
  small = {key: config.to_dict()[key] for key in ("stage", "llm", "tokenizer")}
  texts += [json.dumps(small), '{"seed": 1}']
  return [text.encode() for text in texts]


def _read_run(folder, data):
  from unicode_jax import config as config_lib

  (folder / "config.json").write_bytes(data)
  config = config_lib.read_run(folder)
  config_lib.total_steps(config)
  config_lib.validate(config)


def _tar_seeds():
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as tar:
    for name, content in (
      ("a/0.png", b"x"),
      ("a/0.txt", b"a caption"),
      ("a/0.json", b'{"caption": ["a"], "label": 3}'),
      ("../1.jpg", b"y"),
      ("/2.jpg", b"y"),
    ):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
    link = tarfile.TarInfo("3.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  return [stream.getvalue()]


def _read_tar(folder, data):
  from unicode_jax.data.prepared import from_webdataset, inputs

  path = folder / "x.tar"
  path.write_bytes(data)
  piece = from_webdataset.TarPiece("x.tar", path, inputs.Columns())
  for _ in piece.samples():
    pass
  assert [p.name for p in folder.iterdir()] == ["x.tar"]


TARGETS = {
  "safetensors": Target(_safetensors_seeds, _read_safetensors),
  "safetensors_index": Target(_index_seeds, _read_index),
  "gguf": Target(_gguf_seeds, _read_gguf),
  "hf_config": Target(_config_seeds, _read_config),
  "tokenizer": Target(_tokenizer_seeds, _read_tokenizer),
  "prepared": Target(_prepared_seeds, _read_prepared),
  "codes": Target(_codes_seeds, _read_codes),
  "captions": Target(_captions_seeds, _read_captions),
  "llava": Target(_llava_seeds, _read_llava),
  "run": Target(_run_seeds, _read_run),
  "webdataset": Target(_tar_seeds, _read_tar),
}
# What reads them, beside our own.
INSTRUMENTED = ("unicode_jax", "gguf", "tarfile", "json")


def available(name: str) -> bool:
  """Says whether what a target needs is installed."""
  return name != "gguf" or importlib.util.find_spec("gguf") is not None


def finding(target: Target, data: bytes) -> BaseException | None:
  """Gives a reader some bytes; returns what it may not do, None if all is well.

  Args:
    target: of TARGETS.
    data: contents of a file.
  """
  from unicode_jax import config as config_lib

  with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
    try:
      target.read(pathlib.Path(folder), data)
    except config_lib.ConfigError as error:
      message = str(error)
      # Records that cannot be used are listed, a line each.
      if "\n" in message.partition(":\n  ")[0] or len(message) > 5000:
        return error
    except OSError as error:
      if error.filename is None:
        return error
    except KeyboardInterrupt:
      raise
    except BaseException as error:
      return error
  return None


def _scratch() -> str | None:
  """Returns a folder in memory, if there is one."""
  return "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None


_NUMBERS = (
  *(0, -1, 1, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1),
  *(10**30, 10**400, 0.5, -1e308, float("nan"), float("inf")),
)
_TEXTS = (
  *("", "..", "/etc/passwd", "../x", "a/b", "\0", "é", "\ud800", "x" * 300),
  *("llama", "F32", "none", "1", "<image>", "sliding_attention", "__class__"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
  """Returns changed contents: of the tree where it is JSON, or of the bytes."""
  for _ in range(1 + rng.randrange(3)):
    changed = None
    if rng.random() < 0.7:
      changed = _mutate_json(data, rng)
    data = _mutate_bytes(data, rng) if changed is None else changed
  return data[:MOST_BYTES]


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
  """Changes one node of a JSON tree, or of one line."""
  lines = data.split(b"\n")
  place = rng.randrange(len(lines))
  for start, text, end in (
    (b"", data, b""),
    (
      b"".join(line + b"\n" for line in lines[:place]),
      lines[place],
      b"".join(b"\n" + line for line in lines[place + 1 :]),
    ),
  ):
    try:
      tree = [json.loads(text)]
    except (ValueError, RecursionError):
      continue
    _change_node(tree, rng)
    return start + json.dumps(tree[0]).encode() + end
  return None


def _change_node(tree: list, rng: random.Random) -> None:
  """Replaces, removes or repeats a node below a root in a list of one."""
  nodes, stack = [(tree, 0)], [tree[0]]
  while stack:
    node = stack.pop()
    keys = ()
    if isinstance(node, dict):
      keys = [*node]
    elif isinstance(node, list):
      keys = range(len(node))
    for key in keys:
      nodes.append((node, key))
      stack.append(node[key])
  holder, key = rng.choice(nodes)
  kind = rng.randrange(6)
  if kind == 0:
    holder[key] = rng.choice(_NUMBERS)
  elif kind == 1:
    holder[key] = rng.choice(_TEXTS)
  elif kind == 2:
    holder[key] = rng.choice((None, True, [], {}, [[]], [None], {"a": {}}))
  elif kind == 3 and holder is not tree:
    del holder[key]
  elif kind == 4:
    holder[key] = json.loads(json.dumps(rng.choice(nodes)[0]))
  elif isinstance(holder, dict):
    holder[rng.choice(_TEXTS)] = holder.pop(key)
  else:
    holder[key] = [holder[key]] * rng.choice((2, 50))


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
  """Flips, cuts, repeats, or writes a number over some bytes."""
  place = rng.randrange(len(data) + 1)
  size = rng.choice((1, 2, 4, 8, 64))
  kind = rng.randrange(5)
  if kind == 0 and data:
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << rng.randrange(8)
    return bytes(changed)
  if kind == 1:
    return data[:place] + data[place + size :]
  if kind == 2:
    return data[:place] + data[place : place + size] * 3 + data[place + size :]
  if kind == 3:
    return data[:place] + rng.randbytes(size) + data[place:]
  number = rng.choice([n for n in _NUMBERS if isinstance(n, int)]) % 2**64
  packed = struct.pack("<Q", number)[: rng.choice((4, 8))]
  return data[:place] + packed + data[place + len(packed) :]


def limit_memory(extra: int = MEMORY) -> None:
  """Lets this process take so many bytes more than it has, and no more."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = pages * resource.getpagesize() + extra
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(
  name: str,
  seed: int,
  *,
  seconds: float | None = None,
  runs: int | None = None,
) -> tuple[int, list[tuple[bytes, BaseException]]]:
  """Mutates blindly, until the time or the number of runs is reached.

  Args:
    name: of TARGETS.
    seed: of the mutations.
    seconds: budget; None for none.
    runs: budget; None for none.

  Returns:
    Inputs that were tried, and the findings, one of each kind.
  """
  target, rng = TARGETS[name], random.Random(seed)
  corpus = target.seeds()
  end = None if seconds is None else time.monotonic() + seconds
  found, tried = {}, 0
  while (runs is None or tried < runs) and (
    end is None or time.monotonic() < end
  ):
    data = (
      corpus[tried] if tried < len(corpus) else mutate(rng.choice(corpus), rng)
    )
    tried += 1
    error = finding(target, data)
    if error is not None:
      found.setdefault(_kind(error), (data, error))
  return tried, list(found.values())


def _kind(error: BaseException) -> str:
  """Returns where an error was raised."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  where = trace and (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
  return f"{type(error).__name__} {where}"


def guided(name: str, seed: int, seconds: int, keep: pathlib.Path) -> None:
  """Fuzzes with atheris; does not return. A finding ends it, and is kept."""
  import atheris

  with atheris.instrument_imports(include=INSTRUMENTED):
    if available("gguf"):
      import gguf  # noqa: F401
    from unicode_jax import config
    from unicode_jax.convert import importing, readers  # noqa: F401
    from unicode_jax.data import code_cache, text_tokenizer  # noqa: F401
    from unicode_jax.data.prepared import from_webdataset  # noqa: F401
    from unicode_jax.data.sources import llava  # noqa: F401
  del config
  target = TARGETS[name]
  corpus = pathlib.Path(tempfile.mkdtemp(prefix="corpus_"))
  for number, data in enumerate(target.seeds()):
    (corpus / str(number)).write_bytes(data)

  def one(data):
    error = finding(target, data)
    if error is not None:
      raise error

  def custom(data, max_size, number):
    rng = random.Random(number)
    if rng.random() < 0.3:
      return atheris.Mutate(data, max_size)
    return mutate(data, rng)[:max_size]

  keep.mkdir(parents=True, exist_ok=True)
  atheris.Setup(
    [
      *(sys.argv[0], str(corpus), f"-seed={seed}"),
      *(f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}"),
      *(f"-artifact_prefix={keep}/{name}-", "-rss_limit_mb=4096"),
      *("-timeout=20", "-print_final_stats=1", "-verbosity=0"),
    ],
    one,
    custom_mutator=custom,
  )
  atheris.Fuzz()


def main() -> None:
  """Fuzzes what the arguments name."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="all", choices=["all", *TARGETS])
  parser.add_argument("--seconds", type=int, default=60)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument(
    "--runs", type=int, help="inputs of each target instead of --seconds, blind"
  )
  parser.add_argument("--keep", type=pathlib.Path, default="fuzz_findings")
  args = parser.parse_args()
  logging.disable()  # What is wrong with an input, thousands of times.
  names = [n for n in TARGETS if args.target in ("all", n) and available(n)]
  seconds = max(1, args.seconds // len(names))
  if args.runs is None and importlib.util.find_spec("atheris") is not None:
    if len(names) == 1:
      guided(names[0], args.seed, seconds, args.keep)
    flags = [f"--seconds={seconds}", f"--seed={args.seed}"]
    statuses = [
      subprocess.run(
        [
          *(sys.executable, __file__, f"--target={name}", *flags),
          f"--keep={args.keep}",
        ],
        check=False,
      ).returncode
      for name in names
    ]
    sys.exit(max(map(bool, statuses)))
  failed = False
  for name in names:  # Which imports what they need.
    fuzz(name, args.seed, runs=len(TARGETS[name].seeds()))
  limit_memory()
  for name in names:
    tried, found = fuzz(
      name,
      args.seed,
      runs=args.runs,
      seconds=seconds if args.runs is None else None,
    )
    print(f"{name}: {tried} inputs, {len(found)} findings", flush=True)
    for number, (data, error) in enumerate(found):
      failed = True
      args.keep.mkdir(parents=True, exist_ok=True)
      path = args.keep / f"{name}-{number}"
      path.write_bytes(data)
      print(f"  {path}: {_kind(error)}: {str(error)[:300]}")
  sys.exit(failed)


if __name__ == "__main__":
  main()
