"""The learning rate's shape, and what is decayed."""

import jax.numpy as jnp
import numpy as np

from unicode_jax.training import optimizer

CONFIG = optimizer.OptimizerConfig(
  learning_rate=1e-2,
  warmup_steps=10,
  final_fraction=0.1,
  weight_decay=0.5,
  b1=0.9,
  b2=0.95,
  clip_norm=1.0,
)


def test_schedule_warms_up_and_ends_at_the_final_fraction():
  schedule = optimizer.learning_rate_schedule(CONFIG, 100)
  np.testing.assert_allclose(schedule(0), 0.0, atol=1e-9)
  np.testing.assert_allclose(schedule(10), 1e-2, rtol=1e-6)
  np.testing.assert_allclose(schedule(100), 1e-3, rtol=1e-6)


def test_a_run_shorter_than_the_warmup_still_trains():
  schedule = optimizer.learning_rate_schedule(CONFIG, 4)
  assert max(float(schedule(i)) for i in range(4)) > 5e-3


def test_only_matrices_decay():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  adamw = optimizer.make_optimizer(CONFIG, 100)
  state = adamw.init(params)
  zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  for _ in range(3):
    updates, state = adamw.update(zeros, state, params)
  assert np.all(np.asarray(updates["kernel"]) < 0)
  np.testing.assert_array_equal(updates["bias"], 0.0)
