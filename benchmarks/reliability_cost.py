"""What keeping a run safe costs its training.

Blocks of steps of stage I take turns: steps as they are, one block that begins
with saving a checkpoint, which orbax then writes in the background, and steps
without the guard that skips bad ones.

  python benchmarks/reliability_cost.py --rounds=9
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax

from unicode_jax import config as config_lib, loading, sharding
from unicode_jax.stages import pretrain, runner
from unicode_jax.training import checkpoint, checksums, phase as phase_lib


def main() -> None:
  """Measures, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/pretrain.py")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--steps", type=int, default=20, help="in a block")
  values = parser.parse_args()

  config = config_lib.validate(config_lib.load(values.config))
  data = runner.load_data(config, with_text=True)
  valid = loading.valid_codes(config, data.text_tokenizer)
  stage = pretrain.PretrainStage(
    config, data, loading.build_model(config), valid
  )
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    key = jax.random.key(0)
    shapes = jax.eval_shape(stage.init, key)
    shardings = sharding.state_shardings(shapes, mesh)
    state = jax.jit(stage.init, out_shardings=shardings)(key)
    phase = stage.phase(0)
    step = phase_lib.jit_step(phase, shardings, mesh)
    batches = stage.make_iterators({"image": 0, "text": 0}, (0, 1))["image"]
    batch = sharding.put_batch(next(batches), mesh)

    bare = jax.jit(
      phase.step,
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )

    def block(state, step=step):
      for _ in range(values.steps):
        state, _ = step(state, batch, phase.constants)
      return jax.block_until_ready(state)

    state = block(block(state), bare)
    checksums.checksums(state)
    rows = []
    saves = pathlib.Path(folder) / "checkpoints"
    with checkpoint.Checkpointer(saves, 2) as checkpointer:
      for number in range(values.rounds + 1):
        start = time.monotonic()
        checksums.checksums(state)
        summed = time.monotonic() - start
        start = time.monotonic()
        checkpointer.save(number, state, {})
        blocked = time.monotonic() - start
        state = block(state)
        saving = time.monotonic() - start
        checkpointer.wait()
        start = time.monotonic()
        state = block(state)
        alone = time.monotonic() - start
        start = time.monotonic()
        state = block(state, bare)
        unguarded = time.monotonic() - start
        if number:  # The first warms up.
          rows.append((summed, blocked, saving, alone, unguarded))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

  def spread(numbers, unit=1.0):
    numbers = [n * unit for n in numbers]
    return (
      f"{statistics.median(numbers):.3g} ({min(numbers):.3g} to "
      f"{max(numbers):.3g})"
    )

  summed, blocked, saving, alone, unguarded = zip(*rows, strict=True)
  saves = [a / b for a, b in zip(saving, alone, strict=True)]
  guards = [a / b for a, b in zip(alone, unguarded, strict=True)]
  print(f"{size / 1e6:.0f} MB of state, {values.steps} steps a block")
  print("| | median (range) |\n|---|---|")
  print(f"| checksums of the state, ms | {spread(summed, 1e3)} |")
  print(
    "| training waits for a save, checksums included, ms | "
    f"{spread(blocked, 1e3)} |"
  )
  print(f"| a block of steps, ms | {spread(alone, 1e3)} |")
  print(
    f"| a block that begins with a save, over one without | {spread(saves)} |"
  )
  print(
    f"| a block of guarded steps, over one of bare steps | {spread(guards)} |"
  )


if __name__ == "__main__":
  main()
