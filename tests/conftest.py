"""Shared by all tests: programs that were compiled once are not compiled twice.

Many tests train the same small model; JAX's persistent cache, in a folder of
this run's own, keeps that affordable without changing what is executed.
"""

import tempfile

import jax


def pytest_configure(config):
  folder = tempfile.TemporaryDirectory(prefix="unicode_jax_tests_")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
