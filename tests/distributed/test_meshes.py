"""Every mesh of eight devices takes the steps that one device takes."""

import subprocess
import sys

import pytest

# Of losses of size 1 to 10 in float32, added up in another order; gradients
# pass through ten or so of such sums, and AdamW divides by their own size, so
# that a parameter whose gradient is next to nothing may move either way.
CODE = """
import collections, sys
import jax
import numpy as np
from configs import instruct as instruct_config, pretrain as pretrain_config
from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.stages import instruct, pretrain, runner
from unicode_jax.training import phase as phase_lib

stage, paradigm, run = sys.argv[1:4]
critic = stage == "critic"
stage = "pretrain" if critic else stage
shapes = [tuple(map(int, text.split("x"))) for text in sys.argv[4:]]
sharding.MIN_SHARDED_SIZE = 256
chosen = {
  "llm.num_heads": 8, "llm.num_kv_heads": 4, "llm.head_dim": 4,
  "data.num_workers": 0, "schedule.tokenizer_steps": 2, "schedule.llm_steps": 2,
  "codebook.paradigm": paradigm, "llm.scan_layers": stage == "pretrain",
}
if stage == "instruct":
  chosen = {
    "init_from": run, "data.num_workers": 0,
    "microbatches": 2, "instruct.global_batch_size": 16,
  }
if critic:
  chosen |= {
    "tokenizer.loss.adversarial": 0.5, "tokenizer.loss.disc_start": 0,
  }
configs = {"pretrain": pretrain_config, "instruct": instruct_config}
config = config_lib.apply_overrides(
  configs[stage].get_config("debug"), chosen
)
config = config_lib.validate(config_lib.inherit(config, tuple(chosen)))
data = runner.load_data(config, with_text=True)
# A critic's updates soon tell apart what differs in the last bit.
STEPS = 1 if critic else 6


def make():
  if stage == "pretrain":
    valid = loading.valid_codes(config, data.text_tokenizer)
    return pretrain.PretrainStage(
      config, data, loading.build_model(config), valid
    )
  return instruct.InstructStage(config, data, loading.load(run))


def train(mesh):
  made = make()
  key = jax.random.key(0)
  losses = []
  with jax.set_mesh(mesh):
    start = made.start(mesh)
    shapes = jax.eval_shape(made.init, key, start)
    places = sharding.state_shardings(shapes, mesh)
    state = jax.jit(made.init, out_shardings=places)(key, start)
    iterators = made.make_iterators(collections.Counter(), (0, 1))
    for step in range(STEPS):
      phase = made.phase(step)
      batch = sharding.put_batch(next(iterators[phase.stream]), mesh)
      if phase.step not in programs:
        programs[phase.step] = phase_lib.jit_step(phase, places, mesh)
      state, metrics = programs[phase.step](state, batch, None)
      losses.append(
        [
          float(v)
          for k, v in sorted(metrics.items())
          if "loss" in k or "gradient_norm" in k
        ]
      )
      move = made.transition(step + 1)
      if move is not None:
        state = jax.jit(move, out_shardings=places)(state)
  return np.concatenate(losses), state


def share(state):
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  return max(
    sum(
      shard.data.nbytes
      for x in jax.tree.leaves(state)
      for shard in x.addressable_shards
      if shard.device == device
    )
    for device in jax.devices()
  ) / whole


programs = {}
one = jax.sharding.Mesh(
  np.array(jax.devices()[:1]).reshape(1, 1, 1),
  sharding.AXES,
  axis_types=(jax.sharding.AxisType.Auto,) * 3,
)
expected, _ = train(one)
assert len(expected) > STEPS / 2
for shape in shapes:
  programs.clear()
  found, state = train(sharding.make_mesh(*shape))
  np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=str(shape))
  print(shape, np.abs(found / expected - 1).max(), share(state))
  # Split over fsdp, and what has a rule over tensor.
  if shape[1] == 8:
    assert share(state) < 0.3, share(state)
"""
ALL = [
  f"{data}x{fsdp}x{8 // data // fsdp}"
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if data * fsdp <= 8
]
FEW = ["1x8x1", "1x1x8", "2x2x2"]
PARADIGMS = ("frozen", "dual", "language_driven", "projected")


def check(stage, paradigm, run, shapes, host_devices):
  done = subprocess.run(
    [sys.executable, "-c", CODE, stage, paradigm, str(run), *shapes],
    env=host_devices(8),
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert done.stdout.count("(") == len(shapes)


def test_stage_one(host_devices):
  check("pretrain", "language_driven", "-", FEW, host_devices)


def test_a_critic(host_devices):
  check("critic", "language_driven", "-", ["1x8x1", "2x2x2"], host_devices)


def test_stage_two(host_devices, stage_one_of_eight_heads):
  check("instruct", "-", stage_one_of_eight_heads, FEW, host_devices)


@pytest.mark.slow
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_every_mesh_and_paradigm(paradigm, host_devices):
  check("pretrain", paradigm, "-", ALL, host_devices)


@pytest.mark.slow
def test_stage_two_on_every_mesh(host_devices, stage_one_of_eight_heads):
  check("instruct", "-", stage_one_of_eight_heads, ALL, host_devices)
