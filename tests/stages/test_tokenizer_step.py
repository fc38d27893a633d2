"""What the tokenizer's step computes, and what it does not compute twice."""

from unicode_jax import compiled, config as config_lib, sharding
from unicode_jax.stages import programs


def flops(**loss):
  """Returns the FLOP of the step's products with some losses."""
  values = {f"tokenizer.loss.{name}": weight for name, weight in loss.items()}
  config = config_lib.apply_overrides(
    config_lib.load("configs/tokenizer.py:debug"), values
  )
  (program,) = programs.train_programs(config, sharding.make_mesh(1, 1, 1))
  traced = program.function.trace(*program.arguments)
  return compiled.matmul_flops(traced.jaxpr)


def test_the_critic_takes_no_more_passes_through_the_perceptual_network():
  alone, beside = (
    flops(perceptual=1.0, adversarial=critic)
    - flops(perceptual=0.0, adversarial=critic)
    for critic in (0.0, 0.5)
  )
  assert alone > 0
  assert beside == alone
