"""Device mesh, and the rules that say where every array lives on it.

A rule maps a logical axis to mesh axes; parameters have their logical axes by
name (`PARAMETERS`), activations where the models call `constrain`.

  mesh axis  splits
  data       the batch; parameters are whole copies
  fsdp       the batch, and every parameter and its optimizer state along one
             more axis (ZeRO-3, arXiv 1910.02054)
  tensor     heads, the MLP's width, vocabulary and codes (Megatron-LM, arXiv
             1909.08053), between layers the length (arXiv 2205.05198), and the
             images of the tokenizer's step

What could not be split is logged, never silent. There are no pipelines of
layers, and one mesh spans all devices of all processes.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math

from absl import logging
import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
CODE_AXIS = "tensor"
_SINGLE = ("batch", "image", "length", "residual")
# Smaller arrays stay whole: splitting them costs more in latency than it saves
# in memory.
MIN_SHARDED_SIZE = 2**18
# What TPUs pad the last two axes to in bfloat16, in which parameters are
# gathered. Pieces that do not fill it cannot be put together as they are.
_TILE = (16, 128)


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axes to mesh axes.

  Attributes:
    axes: mesh axes of each logical axis, () for one that is never split.
  """

  axes: Mapping[str, tuple[str, ...]]

  def spec(
    self, names: Sequence[str | None], shape: Sequence[int], mesh
  ) -> PartitionSpec:
    """Translates an array's logical axes.

    Args:
      names: Logical axis of each axis of the array; None is never split.
      shape: Of the array.
      mesh: Mesh, or abstract mesh.

    Returns:
      What splits it; a size that does not divide by all axes of its rule is
      split over the first ones by which it does.

    Raises:
      ValueError: If a name is unknown, or two axes claim one mesh axis.
    """
    entries = []
    for name, size in zip(names, shape, strict=True):
      if name is not None and name not in self.axes:
        raise ValueError(
          f"logical axis {name!r} has no rule: use one of {sorted(self.axes)}"
        )
      chosen = tuple(
        axis for axis in self.axes.get(name, ()) if axis in mesh.axis_names
      )
      while size % (shards := math.prod(map(mesh.shape.get, chosen))):
        chosen = chosen[:-1]
      entries.append(chosen if shards > 1 else ())
    used = [axis for entry in entries for axis in entry]
    if len(used) > len(set(used)):
      raise ValueError(
        f"logical axes {tuple(names)} claim a mesh axis twice: {entries}"
      )
    return PartitionSpec(
      *((entry[0] if len(entry) == 1 else entry) or None for entry in entries)
    )


RULES = Rules(
  {
    "batch": BATCH_AXES,
    # Of the tokenizer, whose layers have nothing else to split.
    "image": AXES,
    # Of what attention sees, and of the residual stream between layers.
    "length": (),
    "residual": ("tensor",),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "code": (CODE_AXIS,),
    "layers": (),
  }
)
# Logical axes of parameters by the end of their path; a stack of layers has one
# more in front. Others are split over fsdp alone.
PARAMETERS = {
  "embed_tokens/embedding": ("vocab", "embed"),
  "lm_head/kernel": ("embed", "vocab"),
  "q_proj/kernel": ("embed", "heads"),
  "k_proj/kernel": ("embed", "kv_heads"),
  "v_proj/kernel": ("embed", "kv_heads"),
  "o_proj/kernel": ("heads", "embed"),
  "q_proj/bias": ("heads",),
  "k_proj/bias": ("kv_heads",),
  "v_proj/bias": ("kv_heads",),
  "gate_proj/kernel": ("embed", "mlp"),
  "up_proj/kernel": ("embed", "mlp"),
  "down_proj/kernel": ("mlp", "embed"),
  "codebook/table": ("code", None),
  "codebook_state/table": ("code", None),
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Builds a mesh.

  Args:
    data: Devices along `data`; of all three, -1 takes what the others leave.
    fsdp: Devices along `fsdp`.
    tensor: Devices along `tensor`.
    devices: What to build it of; None for all devices of all processes.

  Returns:
    A mesh with axes `AXES` (automatic partitioning).

  Raises:
    ValueError: If the sizes do not make up the number of devices, or `tensor`
      does not divide that of a slice.
  """
  devices = jax.devices() if devices is None else devices
  sizes = data, fsdp, tensor
  known = math.prod(size for size in sizes if size != -1)
  filled = tuple(len(devices) // known if s == -1 else s for s in sizes)
  if math.prod(filled) != len(devices):
    raise ValueError(
      f"data={data} x fsdp={fsdp} x tensor={tensor} does not cover the "
      f"{len(devices)} devices: set one of them to -1, and the others to "
      "numbers whose product divides that of the devices"
    )
  # An axis of the mesh may be a part of one of a pod's, such as 2 of 4x4x4.
  whole = {"allow_split_physical_axes": True}
  slices = count_slices(devices)
  if slices == 1:
    placed = mesh_utils.create_device_mesh(filled, devices, **whole)
  else:
    within, across = _split_over_slices(filled, slices)
    placed = mesh_utils.create_hybrid_device_mesh(
      within, across, devices, **whole
    )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence[jax.Device] | None = None) -> int:
  """Returns of how many slices TPUs are; 1 of all that is no TPU.

  Chips of a slice have links to each other, slices the hosts' network.

  Args:
    devices: Which; None for all devices of all processes.
  """
  devices = jax.devices() if devices is None else devices
  tpus = (device for device in devices if device.platform == "tpu")
  return len({getattr(tpu, "slice_index", 0) for tpu in tpus}) or 1


def _split_over_slices(
  sizes: Sequence[int], slices: int
) -> tuple[list[int], list[int]]:
  """Splits a mesh into that of a slice and that of the slices.

  Along `data` mostly gradients are exchanged; along `fsdp` all parameters are,
  and `tensor` has to stay within a slice.

  Args:
    sizes: Of `AXES`.
    slices: Which have as many devices each.

  Returns:
    Sizes within a slice, and sizes over slices.

  Raises:
    ValueError: If `tensor` does not fit into a slice.
  """
  rest, across = slices, []
  for size in sizes[:2]:
    across.append(math.gcd(size, rest))
    rest //= across[-1]
  if rest > 1:
    raise ValueError(
      f"tensor={sizes[2]} does not divide the {math.prod(sizes) // slices} "
      "devices of a slice: set it to a divisor of them"
    )
  if across[1] > 1:
    logging.warning(
      "parameters are gathered over the network between slices: set mesh.data "
      "to a multiple of %d if memory allows, and mostly gradients cross it",
      slices,
    )
  across.append(1)
  within = [size // over for size, over in zip(sizes, across, strict=True)]
  return within, across


def platform() -> str:
  """Returns what is computed on, "cpu", "gpu" or "tpu".

  Of the mesh that is set, which may be of devices that are not here, and
  JAX's default without one.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def active_mesh():
  """Returns the mesh that is set if there is work to share, else None.

  None too within `jax.shard_map`, which has shared it out already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return None
  return mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says how an activation is split over the mesh that is set, if one is.

  The first axis that cannot be split as its rule says is logged.

  Args:
    x: The activation.
    *names: Logical axis of each of its axes.

  Returns:
    x.
  """
  mesh = active_mesh()
  if mesh is None:
    return x
  spec = RULES.spec(names, x.shape, mesh)
  # A single position, or example, is not there to be split.
  several = tuple(
    None if s == 1 and n in _SINGLE else n for n, s in zip(names, x.shape)
  )
  if (unsplit := _not_split(several, x.shape, spec, mesh)) is not None:
    _log_activation(unsplit, names, x.shape)
  return jax.lax.with_sharding_constraint(x, spec)


@functools.cache
def _log_activation(unsplit: str, names, shape: tuple[int, ...]) -> None:
  """Logs, once however often it is traced, what is not split."""
  axes = ", ".join(map(str, names))
  logging.warning("not sharded over %s: [%s] %s", unsplit, axes, shape)


def constrain_batch(batch):
  """Says that a batch is split along its first axis.

  Args:
    batch: Tree of arrays [B, ...], such as numpy arrays that each process has
      whole.

  Returns:
    The same tree.
  """
  return jax.tree.map(
    lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), batch
  )


def constrain_parameters(params, num_stacked: int = 0):
  """Says that a layer's parameters, and so their gradients, stay split.

  Otherwise the compiler may add up whole gradients on every device.

  Args:
    params: Tree of arrays of one layer.
    num_stacked: Layers in the stack that they are a slice of, 0 for none.

  Returns:
    The same tree.
  """
  mesh = active_mesh()
  if mesh is None:
    return params

  def one(path, x):
    if num_stacked:
      name, shape = f"layers/{_name(path)}", (num_stacked, *x.shape)
      spec = PartitionSpec(*tuple(_spec(name, shape, mesh))[1:])
    else:
      spec = _spec(_name(path), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree_util.tree_map_with_path(one, params)


def whole_parameters(params):
  """Says that parameters are put together before they are used.

  Their gradients are asked to be split again. Otherwise the compiler may
  compute convolutions in as many pieces as the kernels lie in, each of few
  channels ("collective matmul", Wang et al., ASPLOS 2023), which leave most of
  a matrix unit empty. On a mesh there is no forward mode (`jax.jvp`) through
  it.

  Args:
    params: Tree of arrays that no rule of `PARAMETERS` is for.

  Returns:
    The same tree.
  """
  if active_mesh() is None:
    return params
  whole = jax.custom_vjp(replicate)
  whole.defvjp(
    lambda params: (replicate(params), None),
    lambda _, grads: (constrain_parameters(grads),),
  )
  return whole(params)


def replicate(tree):
  """Says that results are whole on every device: each process can read them."""
  if active_mesh() is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def gather(tree):
  """Fetches what other processes have of arrays.

  Args:
    tree: Tree of arrays; every process calls this.

  Returns:
    The tree, with numpy arrays in place of those that this process has only in
    part.
  """
  return jax.tree.map(
    lambda x: (
      multihost_utils.process_allgather(x, tiled=True)
      if isinstance(x, jax.Array) and not x.is_fully_addressable
      else x
    ),
    tree,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: along its first axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch, mesh: Mesh):
  """Makes global arrays of this process's share of a batch.

  Args:
    batch: Tree of numpy arrays with the process-local batch in front.
    mesh: The mesh.

  Returns:
    Tree of jax.Array, split over `data` and `fsdp` along the first axis.
  """
  sharding, (_, count) = batch_sharding(mesh), batch_share(mesh)

  def put(x):
    x = np.asarray(x)
    shape = (x.shape[0] * count, *x.shape[1:])
    return jax.make_array_from_process_local_data(sharding, x, shape)

  return jax.tree.map(put, batch)


@functools.lru_cache(maxsize=8)  # Asked of every batch that is put.
def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Says which part of every global batch this process reads.

  Processes whose devices share rows, as along `tensor`, read the same part.

  Args:
    mesh: The mesh.

  Returns:
    The number of the part, and how many parts there are.

  Raises:
    ValueError: If processes share some of their rows, but not all.
  """
  rows = num_batch_shards(mesh)
  held: dict[int, set[int]] = {}
  for row, devices in enumerate(mesh.devices.reshape(rows, -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(row)
  parts = sorted({tuple(sorted(part)) for part in held.values()})
  if sum(map(len, parts)) != rows or len({*map(len, parts)}) != 1:
    raise ValueError(
      f"the mesh {dict(mesh.shape)} gives processes parts of the batch that "
      f"overlap ({parts}): choose a mesh.tensor that fits into a process, or "
      "that whole processes fit into"
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def divisible_batch(size: int) -> int:
  """Rounds a batch up so that it splits over the mesh that is set."""
  mesh = active_mesh()
  if mesh is None:
    return size
  shards = num_batch_shards(mesh)
  return -(-size // shards) * shards


def num_batch_shards(mesh) -> int:
  """Returns into how many parts a mesh, or an abstract one, splits a batch."""
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def placed_shapes(tree, shardings):
  """Returns a tree's shapes and dtypes with their places, without its values.

  Args:
    tree: Tree of arrays or `jax.ShapeDtypeStruct`.
    shardings: Tree of the same structure, or one sharding for all.

  Returns:
    Tree of `jax.ShapeDtypeStruct`.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def state_shardings(tree, mesh: Mesh):
  """Chooses where every leaf of a state lives.

  Args:
    tree: Tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: The mesh.

  Returns:
    Tree of NamedSharding of the same structure.
  """

  def choose(path, leaf):
    name = _name(path)
    spec = _spec(name, leaf.shape, mesh)
    if (
      mesh.shape["fsdp"] > 1
      and math.prod(leaf.shape) >= MIN_SHARDED_SIZE
      and "fsdp" not in jax.tree.leaves(tuple(spec))
    ):
      logging.warning(
        "not sharded over fsdp=%d (no axis of %s divides): %s",
        mesh.shape["fsdp"],
        leaf.shape,
        name,
      )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(choose, tree)


def put_state(tree, mesh: Mesh):
  """Puts arrays where `state_shardings` says.

  Args:
    tree: Tree of arrays, spread over all processes, or the same in each.
    mesh: The mesh.

  Returns:
    Tree of jax.Array.
  """

  def known_to_all(x):
    # What lies on a device of this process alone cannot be sent from there.
    several = jax.process_count() > 1 and isinstance(x, jax.Array)
    return np.asarray(x) if several and x.is_fully_addressable else x

  shardings = state_shardings(tree, mesh)
  return jax.device_put(jax.tree.map(known_to_all, tree), shardings)


def _name(path) -> str:
  """Returns a leaf's path as "params/llm/lm_head/kernel"."""
  keys = (
    getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))
    for key in path
  )
  return "/".join(map(str, keys))


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Splits a parameter as its rule says, and over fsdp along one axis more."""
  if math.prod(shape) < MIN_SHARDED_SIZE:
    return PartitionSpec()
  logical = next(
    (axes for end, axes in PARAMETERS.items() if name.endswith(end)), ()
  )
  if len(logical) > len(shape):  # Of an optimizer that keeps less.
    logical = ()
  stacked = len(shape) - len(logical)
  names = (None,) * stacked + tuple(logical)
  entries = list(RULES.spec(names, shape, mesh))
  if (unsplit := _not_split(names, shape, entries, mesh)) is not None:
    logging.warning("not sharded over %s: %s %s", unsplit, name, shape)
  fsdp = mesh.shape["fsdp"]
  if fsdp == 1:
    return PartitionSpec(*entries)

  local = [s // mesh.shape.get(e, 1) for s, e in zip(shape, entries)]

  def padded_bytes(axis):
    part = [s // fsdp if i == axis else s for i, s in enumerate(local)]
    padding = (1,) * (len(part) - 2) + _TILE[-len(part) :]
    return math.prod(-(-s // p) * p for s, p in zip(part, padding))

  # Not over layers, of which a step of the scan wants one on every device.
  first = 1 if "layers/" in name else 0
  free = [a for a in range(first, len(shape)) if local[a] % fsdp == 0]
  if free:
    best = min(free, key=lambda a: (padded_bytes(a), -shape[a]))
    entries[best] = (entries[best], "fsdp") if entries[best] else "fsdp"
  return PartitionSpec(*entries)


def _not_split(names, shape, entries, mesh) -> str | None:
  """Names the first rule that could not be followed, None if all were."""
  for name, size, entry in zip(names, shape, entries):
    wanted = [a for a in RULES.axes.get(name, ()) if mesh.shape.get(a, 1) > 1]
    if left := [axis for axis in wanted if axis not in jax.tree.leaves(entry)]:
      axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in left)
      return f"{axes} ({name} {size})"
  return None
