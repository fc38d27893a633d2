"""Makes a Hugging Face folder of a run.

`AutoModelForCausalLM` loads its language model with no code of ours, and what
serves such folders serves it: it reads and writes text, for the visual codes
are tokens like any other. With `modeling_unicode.py`, which lies beside it, the
same weights read and draw pictures (see `visual`).

Tensors are written one at a time, behind a header that is known before any of
them, so that there is never a second copy of the model.
"""

from collections.abc import Iterable, Mapping
import json
import logging
import os
import pathlib
import struct

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from unicode_jax import config as config_lib, loading
from unicode_jax.convert import (
  architectures,
  folders,
  model_card,
  names,
  visual,
)
from unicode_jax.data import sequences
from unicode_jax.models import llama as llama_lib

# Of one file, as transformers splits them.
_SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(
  loaded: loading.Loaded | loading.LoadedLlm,
  out,
  dtype: str = "float32",
  licence: str | None = None,
) -> pathlib.Path:
  """Writes the folder.

  Args:
    loaded: the model; of a language model by itself, and of a baseline with a
      projector (which is said), only the language model is written.
    out: folder to make; must not be there yet.
    dtype: of the language model's weights: "float32" (as trained), "bfloat16"
      or "float16".
    licence: of the weights, for the model card.

  Returns:
    `out`.

  Raises:
    ConfigError: `out` is there, or no architecture that transformers has is
      the model's.
  """
  out = folders.new(out)
  llm, sees = loaded, False
  if isinstance(loaded, loading.Loaded):
    llm, sees = loaded.llm, loaded.model.vision != "projector"
    if not sees:
      logging.warning(
        "instruct.vision='projector' reads features instead of codes: the "
        "language model alone is exported"
      )
    elif loaded.model.tokenizer.dtype != "float32":
      logging.warning(
        "the visual tokenizer was trained in %s and is exported in float32: a "
        "few codes in a hundred will differ",
        loaded.model.tokenizer.dtype,
      )
  config = architectures.to_hugging_face(llm.llama)
  tokenizer = llm.text_tokenizer
  template = loading.sequence_format(llm.config).template
  ids = {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": sequences.stop_id(tokenizer, template),
    "pad_token_id": tokenizer.pad_id,
  }
  config |= ids | {
    "dtype": dtype,
    "max_position_embeddings": llm.config.llm.context_length,
  }
  with folders.filled(out) as work:
    tokenizer.save(work)
    path = work / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if llm.config.stage != loading.LLM_STAGE:  # Else its own.
      settings["chat_template"] = chat_template(template, tokenizer)
    _write_json(path, settings)
    write_weights(work, llm.params, llm.llama, dtype)
    if sees:
      config |= visual.write(work, loaded)
    _write_json(work / "config.json", config)
    _write_json(work / "generation_config.json", ids)
    (work / "unicode_jax_config.json").write_text(
      config_lib.to_json(_without_places(llm.config)), encoding="utf-8"
    )
    model_card.write(work, llm, config.get("unicode"), licence)
  logging.info("exported %s to %s", llm.workdir, out)
  return out


def _without_places(config):
  """Returns a config that does not say where folders lie, only their names."""
  values = config_lib.flatten(config)
  folders_of_run = {
    key: pathlib.PurePath(values[key]).name
    for key in config_lib.FOLDERS
    if values[key] is not None and os.path.isabs(values[key])
  }
  return config_lib.apply_overrides(config, folders_of_run)


def write_weights(
  folder: pathlib.Path,
  params: Mapping,
  llama: llama_lib.LlamaConfig,
  dtype: str = "float32",
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes `model.safetensors`, or shards with an index.

  Args:
    folder: where.
    params: of the model, unrolled or scanned.
    llama: its shape.
    dtype: of the file.
    shard_bytes: largest size of a file, unless one tensor is larger.
  """
  if llama.scan_layers:
    flat = _Scanned(params)
  else:
    flat = traverse_util.flatten_dict(params, sep="/")
  item = jnp.dtype(dtype).itemsize
  shards: list[list[names.Entry]] = [[]]
  size = 0
  for entry in names.table(llama):
    here = item * int(np.prod(entry.shape))
    if shards[-1] and size + here > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(entry)
    size += here

  def tensors(entries):
    for entry in entries:
      value = np.asarray(flat[entry.path]).astype(jnp.dtype(dtype))
      yield value.T if entry.transposed else value

  weight_map = {}
  for number, entries in enumerate(shards, 1):
    name = "model.safetensors"
    if len(shards) > 1:
      name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    shapes = {entry.key: entry.shape for entry in entries}
    write_safetensors(folder / name, shapes, dtype, tensors(entries))
    weight_map |= dict.fromkeys(shapes, name)
  if len(shards) > 1:
    total = sum(item * int(np.prod(e.shape)) for s in shards for e in s)
    _write_json(
      folder / "model.safetensors.index.json",
      {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


class _Scanned:
  """Scanned parameters by the paths that the unrolled ones have."""

  def __init__(self, params):
    self._flat = traverse_util.flatten_dict(params, sep="/")

  def __getitem__(self, path: str):
    layer, _, rest = path.partition("/")
    if not layer.startswith("layers_"):
      return self._flat[path]
    return self._flat[f"layers/{rest}"][int(layer.removeprefix("layers_"))]


def write_safetensors(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: str,
  tensors: Iterable[np.ndarray],
) -> None:
  """Writes a safetensors file, holding one tensor at a time.

  The library's own `save_file` wants all of them at once, and copies them. The
  format: the header's length, uint64 little-endian; the header, JSON; values.

  Args:
    path: of the file.
    shapes: name -> shape, in order.
    dtype: of all tensors.
    tensors: the values, in that order and of that type.
  """
  item, end, header = jnp.dtype(dtype).itemsize, 0, {}
  for name, shape in shapes.items():
    begin, end = end, end + item * int(np.prod(shape))
    header[name] = {
      "dtype": _DTYPES[dtype],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for tensor in tensors:
      file.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def chat_template(template: sequences.Template, tokenizer) -> str:
  """Writes a template in Jinja, as `tokenizer.apply_chat_template` wants it.

  Args:
    template: of conversations.
    tokenizer: whose control tokens it names.

  Returns:
    The template. Messages must be of users and assistants in turns.
  """

  def literal(pieces) -> str:
    text = "".join(
      _control(piece, tokenizer)
      if isinstance(piece, sequences.Control)
      else piece
      for piece in pieces
    )
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

  return (
    literal(template.opening) + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    + literal(template.question)
    + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    + literal((*template.answer, template.prefix))
    + "{{ message['content'] }}"
    + literal((template.end, *template.closing))
    + "{% else %}{{ raise_exception('this model knows users and assistants "
    "only') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + literal(template.answer) + "{% endif %}"
  )


def _control(control: sequences.Control, tokenizer) -> str:
  """Returns the name of a control token, nothing where there is none."""
  roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
  if control.name not in roles:
    return control.name
  id_ = roles[control.name]
  return "" if id_ is None else tokenizer.token_name(id_)


def _write_json(path: pathlib.Path, values: Mapping) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
