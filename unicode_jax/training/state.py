"""The training state: one tree that a checkpoint can hold whole."""

from typing import Any

from flax import struct
import jax

from unicode_jax.models import unicode as unicode_lib


@struct.dataclass
class TrainState:
  """All that changes while training.

  Attributes:
    step: int32[], steps done, of either kind.
    rng: uint32[...], raw key data of the run's PRNG key; a step uses the key
      folded with its number, so that nothing depends on where a run restarted.
    variables: The model.
    discriminator: Parameters of the PatchGAN critic, {} where it is off.
    opt_state: One optimizer state per name: "tokenizer", "llm", "discriminator"
      (only those in use).
  """

  step: jax.Array
  rng: jax.Array
  variables: unicode_lib.Variables
  discriminator: Any
  opt_state: dict[str, Any]

  def step_key(self) -> jax.Array:
    """Returns the PRNG key of the current step."""
    return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)
