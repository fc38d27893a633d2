"""Makes a run folder of a LLaMA-family checkpoint.

The folder holds what every run does: `config.json` (of the stage "llm", which
nothing trains), a checkpoint with the LLM's parameters, and the text tokenizer.
So stage I starts from it (`llm_from`), and `export` takes it as it is.

Tensors are read, checked and converted one at a time, into a file that is
mapped into memory: the only copy that the host must hold is the one that orbax
makes to write the checkpoint.
"""

import json
import logging
import pathlib
import tempfile

from flax import traverse_util
import numpy as np
import orbax.checkpoint as ocp

from unicode_jax import config as config_lib, loading
from unicode_jax.convert import (
  architectures,
  folders,
  names,
  readers,
  visual,
)
from unicode_jax.data import text_tokenizer as text_tokenizer_lib
from unicode_jax.models import llama as llama_lib
from unicode_jax.training import checkpoint


def import_checkpoint(path, out) -> pathlib.Path:
  """Imports a Hugging Face folder or a GGUF file.

  Args:
    path: the folder, or the file.
    out: the run folder to make; must not be there yet.

  Returns:
    `out`.

  Raises:
    ConfigError: nothing fit to import is there, or `out` is; says which tensor,
      setting or file.
  """
  out, path = folders.new(out), folders.source(path)
  gguf = path.is_file()
  if gguf:
    reader = readers.GGUFReader(path)
    description = gguf_description(reader.metadata, reader.shapes)
  else:
    description = read_description(path / "config.json")
    reader = readers.SafetensorsReader(path)
  llama, config = describe(description, str(path))
  entries = names.table(llama, gguf)
  names.check(entries, reader.shapes, str(path), llama.tie_embeddings)

  with folders.filled(out) as work:
    tokenizer = _save_tokenizer(path, work / loading.TEXT_TOKENIZER)
    if tokenizer.vocab_size > llama.vocab_size:
      raise config_lib.ConfigError(
        f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
        f"{llama.vocab_size} rows: they do not belong together"
      )
    (work / "config.json").write_text(config_lib.to_json(config))
    scratch = work / "parameters"
    params = read_parameters(reader, entries, llama, scratch, gguf)
    # Compressing weights saves a twelfth, and takes the model's memory again.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    folder = (work / "checkpoints" / "0").absolute()
    state = {"variables": {"params": {"llm": params}}}
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(state))
    checkpoint.write_record(
      folder,
      state,
      {
        "config": config_lib.flatten(config),
        "text_tokenizer": tokenizer.digest,
      },
    )
    del params, state
    scratch.unlink()
  if (path / visual.WEIGHTS).is_file():
    logging.warning(
      "%s also has a visual tokenizer, which is not imported: of what `export` "
      "wrote, the language model alone comes back",
      path,
    )
  logging.info("imported %s to %s", path, out)
  return out


def describe(description: dict, where: str):
  """Checks a description, before anything is made of the sizes that it tells.

  Args:
    description: Hugging Face's `config.json`.
    where: what to call the checkpoint.

  Returns:
    `LlamaConfig`, and the config of the run folder.

  Raises:
    ConfigError: there is no such model.
  """
  settings = architectures.from_hugging_face(description)
  try:
    llama = llama_lib.LlamaConfig(**settings)
    return llama, run_config(llama, description.get("max_position_embeddings"))
  except ValueError as error:
    raise config_lib.ConfigError(
      f"{where} describes a model that cannot be: {error}"
    ) from None


def read_parameters(
  reader: readers.Reader,
  entries: list[names.Entry],
  llama: llama_lib.LlamaConfig,
  scratch: pathlib.Path,
  gguf: bool = False,
) -> dict:
  """Reads all parameters, one at a time.

  Args:
    reader: the checkpoint.
    entries: of `names.table`, checked.
    llama: the model.
    scratch: file to keep them in, of the model's size in float32.
    gguf: whether it is GGUF.

  Returns:
    Parameters of the unrolled `Llama`, float32, mapped from that file.
  """
  heads = {"attn_q": llama.num_heads, "attn_k": llama.num_kv_heads}
  sizes = [int(np.prod(entry.shape)) for entry in entries]
  kept = np.memmap(scratch, np.float32, "w+", shape=(sum(sizes),))
  params, end = {}, 0
  for entry, size in zip(entries, sizes, strict=True):
    value = np.asarray(reader.read(entry.key), np.float32)
    kind = entry.key.split(".")[-2]
    if gguf and kind in heads:
      value = names.unpermuted(value, heads[kind])
    if entry.transposed:
      value = value.T
    begin, end = end, end + size
    place = np.asarray(kept[begin:end]).reshape(value.shape)
    place[...] = value
    params[entry.path] = place
  return traverse_util.unflatten_dict(params, sep="/")


def gguf_description(metadata, shapes) -> dict:
  """Translates GGUF's metadata to Hugging Face's `config.json`.

  Args:
    metadata: of the file.
    shapes: of its tensors.

  Raises:
    ConfigError: the architecture is not LLaMA's, the only one whose order of
      rows is known here, or a setting cannot be imported.
  """
  kind = metadata.get("general.architecture")
  if kind != "llama":
    raise config_lib.ConfigError(
      f"a GGUF file of architecture {kind!r:.99} cannot be imported, only "
      "'llama': import the model's Hugging Face folder"
    )

  def value(name, default=None):
    stored = metadata.get(f"llama.{name}", default)
    # Fractions are float32 there: 1e-5 reads as 9.999999747e-06.
    return float(f"{stored:.7g}") if isinstance(stored, float) else stored

  if (
    value("rope.scaling.type", "none") != "none"
    or "rope_freqs.weight" in shapes
  ):
    raise config_lib.ConfigError(
      "the GGUF file scales RoPE: import the model's Hugging Face folder"
    )
  rows = (*shapes.get("token_embd.weight", ()), value("vocab_size"))[0]
  return {
    "model_type": "llama",
    "vocab_size": rows,
    "hidden_size": value("embedding_length"),
    "num_hidden_layers": value("block_count"),
    "num_attention_heads": value("attention.head_count"),
    "num_key_value_heads": value("attention.head_count_kv"),
    "head_dim": value("attention.key_length"),
    "intermediate_size": value("feed_forward_length"),
    "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
    "rope_theta": value("rope.freq_base", 10000.0),
    "tie_word_embeddings": "output.weight" not in shapes,
    "max_position_embeddings": value("context_length"),
  }


def run_config(llama: llama_lib.LlamaConfig, context_length: int | None):
  """Returns the config of the run folder that an import makes."""
  config = config_lib.default_config()
  changes = {"stage": loading.LLM_STAGE, "text.vocab_size": llama.vocab_size}
  if context_length is not None:
    changes["llm.context_length"] = context_length
  for key in set(config.llm) - {"context_length"}:
    value = getattr(llama, key)
    if key == "rope_scaling":
      if value is not None:
        changes |= {
          f"llm.rope_scaling.{name}": getattr(value, name)
          for name in config.llm.rope_scaling
        }
    else:
      changes[f"llm.{key}"] = value
  return config_lib.check_model(config_lib.apply_overrides(config, changes))


def _save_tokenizer(
  path: pathlib.Path, folder: pathlib.Path
) -> text_tokenizer_lib.TextTokenizer:
  """Copies the text tokenizer and its chat template, and returns it."""
  if path.is_file():
    import transformers  # pylint: disable=g-import-not-at-top

    try:
      tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent,
        gguf_file=path.name,
        local_files_only=True,
        trust_remote_code=False,
      )
    except Exception as error:  # Of any type, none of them documented.
      reason = str(error).strip().partition("\n")[0]
      raise config_lib.ConfigError(
        f"the tokenizer in {path} cannot be read ({reason}): import the "
        "model's Hugging Face folder"
      ) from error
    with tempfile.TemporaryDirectory() as saved:
      tokenizer.save_pretrained(saved)
      return _save_tokenizer(pathlib.Path(saved), folder)
  tokenizer = text_tokenizer_lib.load_text_tokenizer(path)
  tokenizer.save(folder)
  template = path / "chat_template.jinja"
  if template.is_file():
    file = folder / "tokenizer_config.json"
    settings = read_description(file)
    settings["chat_template"] = template.read_text("utf-8")
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
  return tokenizer


def read_description(path: pathlib.Path) -> dict:
  """Reads a JSON object."""
  try:
    found = config_lib.parse_json(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise config_lib.ConfigError(f"{path} is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise config_lib.ConfigError(
      f"{path} holds {type(found).__name__}, not an object: fetch it again"
    )
  return found
