"""Opens checkpoints of the PyTorch world, one tensor at a time.

Safetensors, one file or several with an index, and GGUF. Pickled checkpoints
(`pytorch_model.bin`) are refused: reading one can run whatever is in it.
"""

from collections.abc import Mapping
import contextlib
import functools
import pathlib
from typing import Any, Protocol

import jax
import numpy as np
import safetensors

from unicode_jax import config as config_lib

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Weights of others are quantized, and mean nothing by themselves.
_DTYPES = ("F64", "F32", "F16", "BF16")


class Reader(Protocol):
  """A checkpoint.

  Attributes:
    shapes: name -> shape of every tensor.
  """

  shapes: Mapping[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor, float32, bfloat16 or float16."""


class SafetensorsReader:
  """A Hugging Face folder's weights."""

  def __init__(self, folder: pathlib.Path):
    """Reads the headers.

    Args:
      folder: with `model.safetensors`, or its shards and their index.

    Raises:
      ConfigError: there is none, or the index or a file is broken.
    """
    self.folder = folder
    self._files = {}
    self.shapes = {}
    types = {}
    for path in self._paths():
      try:
        with _open(path) as file:
          for name in file.keys():  # noqa: SIM118, it is no mapping.
            tensor = file.get_slice(name)
            self._files[name] = path
            self.shapes[name] = tuple(tensor.get_shape())
            types[name] = tensor.get_dtype()
      except Exception as error:  # Its own type, which is not public.
        raise config_lib.ConfigError(
          f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from error
    for name, kind in types.items():
      if kind not in _DTYPES:
        raise config_lib.ConfigError(
          f"{folder}: {name} is of type {kind}, but only {', '.join(_DTYPES)} "
          "can be imported: fetch the checkpoint that is not quantized"
        )

  def _paths(self) -> list[pathlib.Path]:
    if (self.folder / _SINGLE).is_file():
      return [self.folder / _SINGLE]
    index = self.folder / _INDEX
    if not index.is_file():
      pickled = sorted(self.folder.glob("*.bin")) + sorted(
        self.folder.glob("*.pt*")
      )
      raise config_lib.ConfigError(
        f"{self.folder} has neither {_SINGLE} nor {_INDEX}"
        + (
          f"; {pickled[0].name} is pickled and could run anything: convert it "
          "with transformers' save_pretrained where you trust it"
          if pickled
          else ": name the folder of a Hugging Face checkpoint"
        )
      )
    try:
      found = config_lib.parse_json(index.read_text("utf-8"))
      names = sorted(set(found["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise config_lib.ConfigError(
        f"{index} is not an index of tensors ({error!r:.99}): fetch it again"
      ) from error
    for name in names:
      # A plain name: an index must not lead out of its folder.
      if not isinstance(name, str) or pathlib.PurePath(name).name != name:
        raise config_lib.ConfigError(
          f"{index} names the file {name!r}, which is not in its own folder"
        )
      if not (self.folder / name).is_file():
        raise config_lib.ConfigError(
          f"{index} names {name}, which is not there: fetch it too"
        )
    return [self.folder / name for name in names]

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor."""
    with _open(self._files[name]) as file:
      return np.asarray(file.get_tensor(name))


@contextlib.contextmanager
def _open(path: pathlib.Path):
  """Opens a file so that bfloat16 can be read, in the host's memory."""
  with (
    jax.default_device(jax.local_devices(backend="cpu")[0]),
    safetensors.safe_open(path, framework="flax") as file,
  ):
    yield file


def _bounded(gguf):
  """Returns the package's reader, of a file that may end anywhere.

  Behind the end it would read empty arrays, and so count to 2**60 where a
  header says that there is so much.
  """

  class Bounded(gguf.GGUFReader):
    def _get(self, offset, dtype, count=1, override_order=None):
      values = super()._get(offset, dtype, count, override_order)
      if len(values) != int(count):
        raise ValueError(f"it ends before what it has at byte {offset}")
      return values

  return Bounded


class GGUFReader:
  """A GGUF file's weights; quantized ones are expanded as they are read."""

  def __init__(self, path: pathlib.Path):
    """Reads the header.

    Args:
      path: of the file.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is broken.
    """
    try:
      import gguf  # pylint: disable=g-import-not-at-top
    except ImportError as error:
      raise config_lib.ConfigError(
        'reading GGUF needs a package: run pip install "unicode-jax[gguf]" '
        "(gguf)"
      ) from error
    self._gguf = gguf
    try:
      self._reader = _bounded(gguf)(path)
    except Exception as error:
      raise config_lib.ConfigError(
        f"{path} is not a whole GGUF file ({error}): fetch it again, or name "
        "the folder of a Hugging Face checkpoint"
      ) from error
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    # Its shapes are those of the memory's order, the fastest axis first.
    self.shapes = {
      name: tuple(int(size) for size in tensor.shape[::-1])
      for name, tensor in self._tensors.items()
    }

  @functools.cached_property
  def metadata(self) -> dict[str, Any]:
    """Says what the file does of its model, without the tokenizer's lists."""
    try:
      return {
        name: field.contents()
        for name, field in self._reader.fields.items()
        if not name.startswith("tokenizer.")
      }
    except (ValueError, IndexError, TypeError) as error:
      raise config_lib.ConfigError(
        f"the GGUF file's header is damaged ({error}): fetch it again"
      ) from error

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor."""
    tensor = self._tensors[name]
    values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape(self.shapes[name])
