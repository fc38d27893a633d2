"""Trains a tiny stage as one of several processes; run by the tests.

  python train.py STAGE WORKDIR UNTIL_STEP KEY=VALUE ...

UNTIL_STEP 0 runs to the end, as `unicode_jax.main` does.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np

from configs import instruct as instruct_config, pretrain as pretrain_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.stages import instruct, pretrain, run_folder, runner
from unicode_jax.training import loop

stage, workdir, until_step, *pairs = sys.argv[1:]
if "JAX_NUM_PROCESSES" in os.environ:
  jax.distributed.initialize(
    num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
    process_id=int(os.environ["JAX_PROCESS_ID"]),
  )

# Or nothing of a tiny model would be split.
sharding.MIN_SHARDED_SIZE = 256

presets = {"pretrain": pretrain_config, "instruct": instruct_config}
chosen = dict(pair.split("=", 1) for pair in pairs)
config = config_lib.apply_overrides(presets[stage].get_config("debug"), chosen)
config = config_lib.validate(config_lib.inherit(config, tuple(chosen)))
workdir, until_step = pathlib.Path(workdir), int(until_step)


def digests(state):
  """Hashes every array of a state, wherever its parts are."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    value = np.asarray(sharding.gather(leaf))
    name = jax.tree_util.keystr(path)
    found[name] = hashlib.sha256(value.tobytes()).hexdigest()
  return found


if not until_step:
  {"pretrain": pretrain, "instruct": instruct}[stage].run(config, workdir)
  sys.exit()
here = contextlib.ExitStack()
mesh = here.enter_context(runner.prepared(config, workdir))
data = runner.load_data(config, with_text=True)
# Counts what this process reads.
reads = []
for source in data.image_sources:
  read = type(source).__getitem__


def counted(self, index, read=read):
  reads.append(index)
  return read(self, index)


type(data.image_sources[0]).__getitem__ = counted
made = pretrain.PretrainStage(
  config,
  data,
  loading.build_model(config),
  loading.valid_codes(config, data.text_tokenizer),
)
restored = {}
made_iterators = made.make_iterators


def make_iterators(start, share):
  restored["start"] = dict(start)
  return made_iterators(start, share)


made.make_iterators = make_iterators
if jax.process_index() == 0:
  run_folder.claim(workdir, config)
before = len(reads)
state = loop.train(
  made, workdir, runner.loop_config(config), mesh, until_step=until_step
)
found = {
  "digests": digests(state),
  "start": restored["start"],
  "reads": len(reads) - before,
  "process": jax.process_index(),
}
name = f"{until_step}-{jax.process_index()}-of-{jax.process_count()}.json"
(workdir / name).write_text(json.dumps(found))
