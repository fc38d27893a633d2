"""Device mesh and the two placement rules: batches and everything else.

Batches are split over the mesh axes `data` and `fsdp`. Parameters and optimizer
state are split over `fsdp` along their largest divisible axis (ZeRO-3 style)
and replicated over `data`. What could not be split is logged, never silent.
It does no tensor parallelism.
"""

import math

from absl import logging
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

BATCH_AXES = ("data", "fsdp")
# Rows of the codebook: where a mesh has this axis the search is split over it;
# those of `make_mesh` have not.
CODE_AXIS = "tensor"
# Smaller arrays stay whole: splitting them costs more in latency than it saves
# in memory.
MIN_SHARDED_SIZE = 2**18


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
  """Builds the mesh over all devices of all processes.

  Args:
    data: Number of batch shards with replicated parameters; -1 takes what
      `fsdp` leaves over.
    fsdp: Number of shards of parameters and optimizer state.

  Returns:
    A mesh with axes `data` and `fsdp` (automatic partitioning).

  Raises:
    ValueError: If the product is not the number of devices.
  """
  num_devices = jax.device_count()
  if data == -1:
    data = num_devices // fsdp
  if data * fsdp != num_devices:
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} needs {data * fsdp} devices, but there "
      f"are {num_devices}: set config.mesh.data=-1 and a config.mesh.fsdp that "
      "divides the number of devices"
    )
  return jax.make_mesh(
    (data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch, mesh: Mesh):
  """Makes global arrays of this process's share of a batch.

  Args:
    batch: Tree of numpy arrays with the process-local batch in front.
    mesh: The mesh.

  Returns:
    Tree of jax.Array, split over `data` and `fsdp` along the first axis.
  """
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def fsdp_shardings(tree, mesh: Mesh):
  """Chooses where every leaf of a state lives.

  Args:
    tree: Tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: The mesh.

  Returns:
    Tree of NamedSharding of the same structure.
  """
  fsdp = mesh.shape["fsdp"]

  def choose(path, leaf):
    if fsdp == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE:
      return replicated(mesh)
    by_size = sorted(range(len(leaf.shape)), key=lambda i: -leaf.shape[i])
    for axis in by_size:
      if leaf.shape[axis] % fsdp == 0:
        spec = [None] * len(leaf.shape)
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))
    logging.warning(
      "not sharded over fsdp=%d (no axis of %s divides): %s",
      fsdp,
      leaf.shape,
      jax.tree_util.keystr(path),
    )
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(choose, tree)
