"""One process of several that save a checkpoint, or restore the newest one.

  python restore.py FOLDER save|restore SIDE

The state is one square array; SIDE is that of what is asked for.
"""

import os
import pathlib
import sys

import jax
import numpy as np

from unicode_jax import config as config_lib, sharding
from unicode_jax.training import checkpoint


def main():
  folder, action, side = (
    pathlib.Path(sys.argv[1]),
    sys.argv[2],
    int(sys.argv[3]),
  )
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"],
    int(os.environ["JAX_NUM_PROCESSES"]),
    int(os.environ["JAX_PROCESS_ID"]),
  )
  place = sharding.replicated(sharding.make_mesh(jax.device_count(), 1, 1))
  state = {"kernel": np.ones((side, side), np.float32)}
  with checkpoint.Checkpointer(folder, 3) as checkpointer:
    if action == "save":
      for step in (5, 10):
        checkpointer.save(step, jax.device_put(state, place), {})
        checkpointer.wait()
      return 0
    try:
      found = checkpointer.restore(sharding.placed_shapes(state, place))
    except (OSError, config_lib.ConfigError) as error:
      print(type(error).__name__, error, flush=True)
      os._exit(74)  # The other process cannot agree on how to end.
  print("restored", found and found[0])
  return 0


if __name__ == "__main__":
  sys.exit(main())
