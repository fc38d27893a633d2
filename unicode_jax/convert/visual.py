"""Writes what a PyTorch checkpoint needs to see: the visual tokenizer.

Beside the language model's folder: the encoder, the decoder and the codebook as
safetensors; the text tokenizer as prompts use it; and `modeling_unicode.py`,
whose modules have the names that the parameters have here.
"""

import pathlib
import shutil
from typing import Any

from flax import traverse_util
import numpy as np
import safetensors.numpy

from unicode_jax import encoding, loading
from unicode_jax.data import sequences, tasks

CODE = "modeling_unicode.py"
WEIGHTS = "visual_tokenizer.safetensors"
TOKENIZER = "visual_text_tokenizer.json"
_CLASSES = {
  "AutoModelForImageTextToText": "UniCodeForConditionalGeneration",
  "AutoProcessor": "UniCodeProcessor",
}


def write(folder: pathlib.Path, loaded: loading.Loaded) -> dict[str, Any]:
  """Writes the files.

  Args:
    folder: the checkpoint's, which has the language model already.
    loaded: a model that reads and says codes.

  Returns:
    What `config.json` needs besides: where the code is, and its settings.

  Raises:
    ConfigError: its tokenizer was never trained.
  """
  encoding.check_trained(loaded.variables)
  shutil.copyfile(pathlib.Path(__file__).with_name(CODE), folder / CODE)
  loaded.text_tokenizer.save_plain(folder / TOKENIZER)
  # Its `save_file` makes files that their owner alone can read.
  (folder / WEIGHTS).write_bytes(
    safetensors.numpy.save(weights(loaded), metadata={"format": "pt"})
  )
  module = CODE.removesuffix(".py")
  auto_map = {auto: f"{module}.{name}" for auto, name in _CLASSES.items()}
  return {"auto_map": auto_map, "unicode": settings(loaded)}


def weights(loaded: loading.Loaded) -> dict[str, np.ndarray]:
  """Returns encoder, decoder and codebook by PyTorch's names and shapes."""
  model, variables = loaded.model, loaded.variables
  tensors = {
    "table": np.asarray(model.table(variables), np.float32),
    "gain": np.asarray(variables.codebook_state["gain"], np.float32),
    "valid": np.asarray(variables.valid),
  }
  parts = {name: variables.params[name] for name in ("encoder", "decoder")}
  for path, leaf in traverse_util.flatten_dict(parts).items():
    value = np.asarray(leaf, np.float32)
    if value.ndim == 2:
      value = value.T
    elif (
      value.ndim == 4
    ):  # [height, width, in, out] -> [out, in, height, width]
      value = value.transpose(3, 2, 0, 1)
    *modules, kind = path
    if modules[-1] == "norm" and modules[-2].startswith("norm"):
      modules.pop()  # Flax's module inside of ours.
    kind = "bias" if kind == "bias" else "weight"
    tensors[".".join((*modules, kind))] = np.ascontiguousarray(value)
  return tensors


def settings(loaded: loading.Loaded) -> dict[str, Any]:
  """Returns what the code must know besides the weights, for JSON."""
  model, tokenizer, layout = loaded.model, loaded.text_tokenizer, loaded.layout
  visual, template = model.tokenizer, layout.template

  def pieces(side):
    named = [_piece(piece, tokenizer) for piece in side]
    return [piece for piece in named if piece is not None]

  return {
    "image_size": visual.image_size,
    "channels": visual.channels,
    "channel_multipliers": list(visual.channel_multipliers),
    "num_res_blocks": visual.num_res_blocks,
    "stem_patch": visual.stem_patch,
    "attention": visual.attention,
    "code_dim": visual.code_dim,
    "num_codes": len(loaded.variables.valid),
    "quantizer": model.quantizer,
    "depth": model.depth,
    "grid": list(model.code_grid),
    "codes_shift": model.codes_shift,
    "text_vocab_size": tokenizer.vocab_size,
    "control_ids": sorted(tokenizer.control_ids),
    "image_start_id": tokenizer.token_id(layout.image_start),
    "image_end_id": tokenizer.token_id(layout.image_end),
    "stop_id": sequences.stop_id(tokenizer, template),
    "template": {
      "opening": pieces(template.opening),
      "question": pieces(template.question),
      "answer": pieces(template.answer),
      "prefix": template.prefix,
      "closing": pieces(template.closing),
    },
    "text_to_image": tasks.draw_question("{}"),
    "unconditional": tasks.UNCONDITIONAL,
  }


def _piece(piece: str | sequences.Control, tokenizer) -> str | int | None:
  """Returns text as it is, a control token as its id; None if there is none."""
  if isinstance(piece, str):
    return piece
  if piece.name in ("bos", "eos"):
    return getattr(tokenizer, f"{piece.name}_id")
  return tokenizer.token_id(piece.name)
