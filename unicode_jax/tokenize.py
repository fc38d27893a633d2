r"""Encodes a data set once, so that stage II need not do it at every step.

The images that a run was trained on:
  python -m unicode_jax.tokenize --workdir=runs/pretrain-default --out=codes

Other images (unicode_jax/config.py describes the keys of --config.data):
  python -m unicode_jax.tokenize --workdir=runs/pretrain-default --out=codes \
    --config.data.source=folder --config.data.path=pictures

Then train with the same --config.data and --config.data.codes=codes. The same
command again goes on where this one stopped, or repairs what is damaged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
import sys
import time

from absl import app, flags, logging
import numpy as np

from unicode_jax import config as config_lib


def main(argv: Sequence[str], overrides: Mapping[str, str]) -> int:
  """Encodes what the flags name.

  Args:
    argv: What is left of the command line after flags: the program's name.
    overrides: Values of --config.data.KEY=VALUE.

  Returns:
    The exit status.

  Raises:
    ConfigError: If a flag names nothing that can be used.
  """
  if len(argv) > 1:
    raise config_lib.ConfigError(f"unexpected argument {argv[1]!r}")
  values = flags.FLAGS
  if not values["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # what libraries say is not progress
  encode_data_set(
    values.workdir,
    values.out,
    overrides,
    images_per_shard=values.images_per_shard,
  )
  return 0


def encode_data_set(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  overrides: Mapping[str, str] | None = None,
  *,
  images_per_shard: int | None = None,
) -> None:
  """Writes the codes of all training images of a data set (H12).

  Args:
    workdir: Run whose tokenizer encodes, of any stage.
    out: Folder for the codes; one that was begun is finished.
    overrides: Values of `data.KEY`, which replace the run's own.
    images_per_shard: In one file; None for the default.

  Raises:
    ConfigError: If there is no such run or data, or the folder holds codes of
      another tokenizer or other images.
  """
  overrides = overrides or {}
  config_lib.apply_overrides(config_lib.default_config(), overrides)
  for key in overrides:
    if not key.startswith("data.") or key == "data.codes":
      raise config_lib.ConfigError(
        f"--config.{key} cannot be set here: --config.data.KEY=VALUE names the "
        "images, and the run decides all else"
      )
  # JAX takes seconds to import, so only flags that can work get to it.
  import jax  # pylint: disable=g-import-not-at-top
  from jax.experimental import multihost_utils

  from unicode_jax import data as data_lib, loading
  from unicode_jax.data import code_cache

  loaded = loading.load(workdir)
  # The run's other settings are no concern of ours, such as paths of its start.
  config = config_lib.validate(
    config_lib.apply_overrides(
      config_lib.default_config(),
      config_lib.flatten(loaded.config.data, "data.")
      | dict(overrides)
      | {"data.codes": None},
    )
  )
  model, variables = frozen_tokenizer(loaded.model, loaded.variables)
  facts = code_cache.CodeFacts(
    fingerprint=loading.fingerprint(model, variables),
    vocab_size=len(variables.valid),
    positions=model.num_positions,
    depth=model.depth,
    views=2 if config.data.flip else 1,
  )
  del loaded  # The LLM may take most of the memory.
  sources = data_lib.load_data(
    data_lib.DataConfig(**config.data), None, model.tokenizer.image_size
  ).image_sources
  writer = code_cache.CodeWriter(
    out,
    sources,
    facts,
    images_per_shard=images_per_shard or code_cache.IMAGES_PER_SHARD,
  )
  is_main, count = jax.process_index() == 0, jax.process_count()

  def wait(name):
    if count > 1:
      multihost_utils.sync_global_devices(name)

  if is_main:
    writer.prepare()
  wait("prepared")
  if writer.finished:
    if is_main:
      print(f"{writer.folder} is finished: nothing to do")
    return
  missing = writer.missing(jax.process_index(), count)
  encode = Encoder(
    model, variables, config.data.flip, config.data.global_batch_size // count
  )
  progress = _Progress(sum(map(len, missing)), silent=not is_main)
  for shard in missing:
    writer.write(shard, map(progress.count, encode.shard(shard)))
  wait("written")
  if is_main:
    writer.finish()
    progress.end(
      f"{len(writer.shards)} shards of {sum(map(len, sources))} images in "
      f"{writer.folder}: train with --config.data.codes={writer.folder}"
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
  from unicode_jax import codebook as codebook_lib

  if not (np.asarray(variables.codebook_state["gain"]) > 0).all():
    # Each batch would be encoded with gains of its own.
    raise config_lib.ConfigError(
      "the tokenizer of this run has no gains yet, so an image has no codes of "
      "its own: train it for some steps first"
    )
  params, state = variables.params["codebook"], variables.codebook_state
  rules = model.codebook
  if rules.paradigm != "private":
    params, state = codebook_lib.freeze(
      params, state, model.embedding(variables.params), variables.valid, rules
    )
    rules = codebook_lib.frozen_config(rules)
  return (
    dataclasses.replace(model, codebook=rules, llama=None, vision="unified"),
    variables.replace(
      params={"encoder": variables.params["encoder"], "codebook": params},
      codebook_state=state,
    ),
  )


class Encoder:
  """Encodes images batch by batch on all devices of this process."""

  def __init__(self, model, variables, flip: bool, batch_size: int):
    """Places the tokenizer.

    Args:
      model: Of `frozen_tokenizer`.
      variables: Its variables.
      flip: Whether to encode mirror images too.
      batch_size: Images at a time, rounded up to fill the devices.
    """
    import jax
    import jax.numpy as jnp

    from unicode_jax.training import instruct_step

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
    self._batch_size = -(-max(batch_size, 1) // len(devices)) * len(devices)
    self._variables = jax.device_put(variables, whole)

    @functools.partial(jax.jit, out_shardings=whole)
    def encode(variables, images):
      views = [images, images[:, :, ::-1]] if flip else [images]
      # What a step of training from pixels computes.
      codes = instruct_step.batch_codes(
        model, variables, {"images": jnp.stack(views, axis=1)}
      )
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
    import jax

    padding = [(0, self._batch_size - len(images))] + [(0, 0)] * 3
    images = jax.device_put(np.pad(images, padding), self._split)
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


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.main`."""
  # Defined here, so that another command's flags can be beside them.
  flags.DEFINE_string(
    "workdir", None, "Run folder of stage I, II or a tokenizer.", required=True
  )
  flags.DEFINE_string("out", None, "Folder for the codes.", required=True)
  flags.DEFINE_integer(
    "images_per_shard",
    None,
    "Images in one file, by default 8192; an interruption loses at most one.",
    lower_bound=1,
  )
  try:
    argv, overrides = config_lib.split_overrides(sys.argv)
    app.run(functools.partial(main, overrides=overrides), argv=argv)
  except config_lib.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted: the same command goes on from here", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  run()
