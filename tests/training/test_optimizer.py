"""The learning rate's shape, and what is decayed."""

import dataclasses

import jax
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


def test_only_embeddings_take_larger_steps():
  params = {
    "llm": {
      "embed_tokens": {"embedding": jnp.ones((3, 2))},
      "lm_head": {"kernel": jnp.ones((2, 3))},
    }
  }
  grads = jax.tree.map(lambda p: 0.1 * p, params)
  found = {}
  for factor in (1.0, 10.0):
    adamw = optimizer.make_optimizer(
      dataclasses.replace(CONFIG, embedding_factor=factor), 100
    )
    state = adamw.init(params)
    for _ in range(3):
      updates, state = adamw.update(grads, state, params)
    found[factor] = updates["llm"]
  assert np.all(np.asarray(found[1.0]["lm_head"]["kernel"]) < 0)
  np.testing.assert_array_equal(
    found[10.0]["lm_head"]["kernel"], found[1.0]["lm_head"]["kernel"]
  )
  np.testing.assert_allclose(
    found[10.0]["embed_tokens"]["embedding"],
    10 * found[1.0]["embed_tokens"]["embedding"],
    rtol=1e-6,
  )
