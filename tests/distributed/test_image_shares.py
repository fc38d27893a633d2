"""Every device of a mesh computes its own images in a tokenizer's step."""

import subprocess
import sys

CODE = """
import re
import jax
from configs import pretrain as pretrain_config
from unicode_jax import config as config_lib, sharding
from unicode_jax.stages import programs

config = config_lib.apply_overrides(
  pretrain_config.get_config("debug"), {"llm.num_heads": 4}
)
for shape in ((2, 2, 2), (1, 2, 4), (8, 1, 1)):
  mesh = sharding.make_mesh(*shape)
  (program,) = (
    p for p in programs.train_programs(config, mesh) if p.name == "tokenizer"
  )
  with jax.set_mesh(mesh):
    text = program.function.lower(*program.arguments).compile().as_text()
  # Activations of both networks, [B, 4, 4, 8].
  batches = {int(n) for n in re.findall(r"f32\\[(\\d+),4,4,8\\]", text)}
  assert batches == {1}, (shape, batches)
print("done")
"""


def test_no_image_is_computed_twice(host_devices):
  done = subprocess.run(
    [sys.executable, "-c", CODE],
    env=host_devices(8),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout == "done\n"
