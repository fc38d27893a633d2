"""A run that starts from another one on several devices."""

import pathlib
import subprocess
import sys

CODE = """
import dataclasses, pathlib, sys
import jax
import numpy as np
from configs import instruct as instruct_config, pretrain as pretrain_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.models import llama
from unicode_jax.stages import instruct, pretrain, runner
from unicode_jax.training import loop

run, out = map(pathlib.Path, sys.argv[1:])
sharding.MIN_SHARDED_SIZE = 256
mesh = sharding.make_mesh(fsdp=8)


def check_split(tree):
  # Of an eighth, and what is too small to be split.
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  assert max(held.values()) < total / 5, (held, total)


# Each device reads its share of a checkpoint.
whole, split = loading.load(run), loading.load(run, mesh=mesh)
for tree in (split.variables, loading.load_llm(run, mesh=mesh).params):
  check_split(tree)
jax.tree.map(np.testing.assert_array_equal, whole.variables, split.variables)

# What a codebook is does not depend on how the table is split.
rules = dataclasses.replace(whole.model.codebook, paradigm="projected")
model = dataclasses.replace(whole.model, codebook=rules)
variables = model.init(jax.random.key(0), whole.variables.valid)
placed = jax.device_put(variables, sharding.state_shardings(variables, mesh))
found, expected = (loading.fingerprint(model, v) for v in (placed, variables))
assert found == expected


def begin(configs, make, **changes):
  changes = {name: str(value) for name, value in changes.items()}
  config = config_lib.apply_overrides(
    configs.get_config("debug"), changes | {"mesh.fsdp": "8"}
  )
  config = config_lib.validate(config_lib.inherit(config, tuple(changes)))
  data = runner.load_data(config, with_text=True)
  workdir = out / str(len(list(out.iterdir())))
  rest = workdir, runner.loop_config(config), mesh
  state = loop.train(make(config, data), *rest, until_step=0)
  params = state.variables.params["llm"]
  # It begins from what it was given, and every device has its share.
  jax.tree.map(
    np.testing.assert_array_equal,
    dict(llama.with_layers_as(params, False)),
    dict(whole.variables.params["llm"]),
  )
  check_split(params)
  state = loop.train(make(config, data), *rest, until_step=2)
  assert int(state.step) == 2


def stage_one(config, data):
  model = loading.build_model(config)
  valid = loading.valid_codes(config, data.text_tokenizer)
  return pretrain.PretrainStage(config, data, model, valid)


begin(
  pretrain_config, stage_one, llm_from=run, **{"llm.scan_layers": True}
)
begin(
  instruct_config,
  lambda config, data: instruct.InstructStage(config, data, whole),
  init_from=run,
)
"""


def test_a_start_is_split_over_the_devices_that_train(
  stage_one, tmp_path, host_devices
):
  """No device has a whole model, and both stages begin from it."""
  done = subprocess.run(
    [sys.executable, "-c", CODE, str(stage_one[0]), str(tmp_path)],
    env=host_devices(8),
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
