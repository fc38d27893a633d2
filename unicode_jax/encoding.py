"""Encodes image sources into a code cache, with a run's frozen tokenizer.

The work behind `python -m unicode_jax.tokenize` and `data.codes="auto"` (METHOD
H12). `data.code_cache` knows the files; this knows the model.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import os
import sys
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from unicode_jax import (
  codebook as codebook_lib,
  config as config_lib,
  loading,
  sharding,
)
from unicode_jax.data import (
  code_cache,
  sources as sources_lib,
  views as views_lib,
)
from unicode_jax.training import instruct_step


def encode_sources(
  loaded: loading.Loaded,
  sources: Sequence[sources_lib.ImageSource],
  out: str | os.PathLike[str],
  *,
  views: Sequence[views_lib.View],
  batch_size: int,
  images_per_shard: int | None = None,
) -> None:
  """Writes the codes of all images of some sources.

  Args:
    loaded: Run whose tokenizer encodes, of any stage.
    sources: Images.
    out: Folder for the codes; one that was begun is finished.
    views: Of each image that are encoded.
    batch_size: Views of images at a time, over all processes.
    images_per_shard: In one file; None for the default.

  Raises:
    ConfigError: If the tokenizer was never trained, or the folder holds codes
      of another tokenizer or other images.
  """
  model, variables = frozen_tokenizer(loaded.model, loaded.variables)
  facts = code_cache.CodeFacts(
    fingerprint=loading.fingerprint(model, variables),
    vocab_size=len(variables.valid),
    positions=model.num_positions,
    depth=model.depth,
    views=tuple(views),
  )
  is_main, count = jax.process_index() == 0, jax.process_count()
  open_writer = functools.partial(
    code_cache.CodeWriter,
    out,
    sources,
    facts,
    images_per_shard=images_per_shard or code_cache.IMAGES_PER_SHARD,
  )

  def wait(name):
    if count > 1:
      multihost_utils.sync_global_devices(name)

  if is_main:  # The folder is its own until it is prepared.
    writer = open_writer()
    writer.prepare()
  wait("prepared")
  if not is_main:
    writer = open_writer()
  finished = writer.finished
  if count > 1:
    finished = bool(multihost_utils.broadcast_one_to_all(np.int32(finished)))
  if finished:
    if is_main:
      print(f"{writer.folder} is finished: nothing to do")
    return
  missing = writer.missing(jax.process_index(), count)
  encode = Encoder(model, variables, views, batch_size // count)
  progress = _Progress(sum(map(len, missing)), silent=not is_main)
  for shard in missing:
    writer.write(shard, map(progress.count, encode.shard(shard)))
  wait("written")
  if is_main:
    writer.finish()
    progress.end(
      f"{len(writer.shards)} shards of {sum(map(len, sources))} images in "
      f"{writer.folder}"
    )
  wait("finished")


def frozen_tokenizer(model, variables):
  """Leaves of a model what encodes images, as stage II fixes it.

  Args:
    model: `models.unicode.UniCode` of any stage.
    variables: Its variables.

  Returns:
    A model without an LLM that gives images the same codes, and its variables.

  Raises:
    ConfigError: If the tokenizer was never trained.
  """
  check_trained(variables)
  params, state = variables.params["codebook"], variables.codebook_state
  rules = model.codebook
  if rules.paradigm != "private":
    params, state = loading.frozen_codebook(model, variables)
    rules = codebook_lib.frozen_config(rules)
  return (
    dataclasses.replace(model, codebook=rules, llama=None, vision="unified"),
    sharding.gather(
      variables.replace(
        params={"encoder": variables.params["encoder"], "codebook": params},
        codebook_state=state,
      )
    ),
  )


def check_trained(variables) -> None:
  """Raises ConfigError if the tokenizer of a model was never trained."""
  if not (np.asarray(variables.codebook_state["gain"]) > 0).all():
    # Each batch would be encoded with gains of its own.
    raise config_lib.ConfigError(
      "the tokenizer of this run has no gains yet, so an image has no codes of "
      "its own: train it for some steps first"
    )


class Encoder:
  """Encodes images batch by batch on all devices of this process."""

  def __init__(
    self,
    model,
    variables,
    views: Sequence[views_lib.View],
    batch_size: int,
  ):
    """Places the tokenizer.

    Args:
      model: Of `frozen_tokenizer`.
      variables: Its variables.
      views: Of each image that are encoded.
      batch_size: Views of images at a time, rounded up to fill the devices.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh(
      (len(devices),),
      ("data",),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=devices,
    )
    spec = jax.sharding.PartitionSpec
    whole = jax.sharding.NamedSharding(mesh, spec())
    self._split = jax.sharding.NamedSharding(mesh, spec("data"))
    size = max(batch_size // len(views), 1)
    self._batch_size = -(-size // len(devices)) * len(devices)
    self._mesh = mesh
    self._variables = jax.device_put(variables, whole)

    @functools.partial(jax.jit, out_shardings=whole)
    def encode(variables, images):
      seen = jnp.stack([views_lib.see(images, view) for view in views], axis=1)
      # What a step of training from pixels computes.
      codes = instruct_step.batch_codes(model, variables, {"images": seen})
      shape = len(views), model.num_positions, model.depth
      return codes.reshape(-1, *shape)

    self._encode: Callable = encode

  def batch(self, images: np.ndarray):
    """Encodes a batch.

    Args:
      images: uint8[n, S, S, 3], at most `batch_size`.

    Returns:
      int32[batch_size, views, P, D], on the device and perhaps not yet
      computed; behind n of no meaning.
    """
    padding = [(0, self._batch_size - len(images))] + [(0, 0)] * 3
    images = jax.device_put(np.pad(images, padding), self._split)
    with jax.set_mesh(self._mesh):  # Kernels cannot be split otherwise.
      return self._encode(self._variables, images)

  def shard(self, shard) -> Iterator[np.ndarray]:
    """Yields the codes of a `code_cache.Shard`, int32[n, views, P, D] each."""
    pending = None
    for start in range(shard.start, shard.stop, self._batch_size):
      stop = min(start + self._batch_size, shard.stop)
      images = [shard.source[i]["image"] for i in range(start, stop)]
      # The next images are read while the device works.
      codes = self.batch(np.stack(images)), len(images)
      if pending is not None:
        yield np.asarray(pending[0])[: pending[1]]
      pending = codes
    if pending is not None:
      yield np.asarray(pending[0])[: pending[1]]


class _Progress:
  """One line that redraws itself in a terminal; elsewhere only the last."""

  def __init__(self, total: int, silent: bool):
    self._total, self._done = total, 0
    self._silent = silent
    self._start = self._first = time.monotonic()
    self._warm = 0
    if not silent:
      print(f"encoding {total} images", flush=True)

  def count(self, codes: np.ndarray) -> np.ndarray:
    """Counts a batch, and returns it."""
    self._done += len(codes)
    if not self._warm:  # The first batch compiles.
      self._first, self._warm = time.monotonic(), self._done
    if not self._silent and sys.stdout.isatty():
      elapsed = time.monotonic() - self._start
      left = elapsed / self._done * (self._total - self._done)
      line = f"{self._done}/{self._total} images  eta {left:.0f}s"
      print(f"\r\x1b[2K{line}", end="", flush=True)
    return codes

  def end(self, text: str) -> None:
    """Says how fast it was, then `text`."""
    now = time.monotonic()
    speed = f"encoded {self._done} images in {now - self._start:.1f} s"
    if self._done > self._warm:
      rate = (self._done - self._warm) / (now - self._first)
      speed += f", {rate:.0f} images/s after the first batch"
    if not self._silent:
      erase = "\r\x1b[2K" if sys.stdout.isatty() else ""
      print(f"{erase}{speed}\n{text}")
