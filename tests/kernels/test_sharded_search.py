"""The search split over devices and processes, against a single device."""

import socket
import subprocess
import sys

import pytest

# Arguments: number of processes, this one's, port of the first.
_SEARCH = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

processes, process, port = map(int, sys.argv[1:])
if processes > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
assert jax.device_count() == 8

from unicode_jax.kernels.nearest_code import nearest_code, stacked_nearest_code

rng = np.random.default_rng(0)
# Neither divides by any number of devices.
z = rng.standard_normal((1003, 24)).astype(np.float32)
codebook = rng.standard_normal((777, 24)).astype(np.float32)
# The same rows in several shards, and ties of different ones.
codebook[400:500], codebook[700:750] = codebook[:100], codebook[50:100]
codebook[300:320] = rng.integers(-1, 2, (20, 24))
z[:200] = codebook[rng.permutation(777)[:200]]
z[200:300] = 0
z[300, 0], codebook[5] = np.nan, np.inf
valid = rng.random(777) < 0.8

# One device, with no mesh set.
expected = jax.tree.map(np.asarray, nearest_code(z, codebook, valid=valid))
stacked = np.asarray(
    stacked_nearest_code(z, codebook, [1.0, 0.5], valid=valid).indices)
split = 0
for shape in ((8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2), (2, 1, 4)):
  mesh = jax.make_mesh(
      shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  place = lambda x, *spec: jax.make_array_from_callback(
      x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
  with jax.set_mesh(mesh):
    # As a train step has them: queries split, the rest wherever it is.
    inputs = place(z[:1000], ("data", "fsdp")), place(codebook), place(valid)
    whole = NamedSharding(mesh, P())
    search = jax.jit(
        lambda z, c, v: nearest_code(z, c, valid=v), out_shardings=whole)
    found = search(*inputs)
    text = search.lower(*inputs).as_text()
    split += "shard_map" in text or "manual" in text.lower()
    # Their kernel too, which XLA could not split by itself.
    for_tpu = search.trace(*inputs).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in for_tpu.as_text()
    deep = jax.jit(lambda z, c, v: stacked_nearest_code(
        z, c, [1.0, 0.5], valid=v).indices, out_shardings=whole)(*inputs)
  local = lambda x: np.asarray(x.addressable_data(0))
  np.testing.assert_array_equal(local(found.indices), expected.indices[:1000])
  np.testing.assert_allclose(
      local(found.distances), expected.distances[:1000], rtol=1e-5, atol=1e-12)
  np.testing.assert_array_equal(local(deep), stacked[:1000])
  if processes == 1:
    with jax.set_mesh(mesh):  # A number that does not divide.
      found = nearest_code(z, codebook, valid=valid)
    np.testing.assert_array_equal(found.indices, expected.indices)
assert split == 5, split
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_indices_on_eight_devices(processes, host_devices):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  running = [
    subprocess.Popen(
      [sys.executable, "-c", _SEARCH, *map(str, (processes, number, port))],
      env=host_devices(8 // processes),
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(processes)
  ]
  errors = [process.communicate(timeout=600)[1] for process in running]
  for process, error in zip(running, errors, strict=True):
    assert process.returncode == 0, error[-4000:]
