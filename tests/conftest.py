"""Shared by all tests: compile fast, and nothing twice.

Nearly all the time goes into compiling programs that then run for milliseconds.
Many tests train the same small model, so JAX's persistent cache, in a folder of
this run's own, serves them all; and the compiler need not optimize. To test the
programs as they ship, in twice the time: `XLA_FLAGS= python -m pytest`.
"""

import os
import tempfile

# Read when the first device is used.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax


def pytest_configure(config):
  folder = tempfile.TemporaryDirectory(prefix="unicode_jax_tests_")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
