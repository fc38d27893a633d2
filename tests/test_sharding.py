"""Rules, meshes, and where arrays are put."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
import numpy as np
import pytest

from unicode_jax import sharding


def mesh(data=1, fsdp=1, tensor=1):
  """A mesh without devices."""
  return AbstractMesh(
    (data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3
  )


def spec(name, *shape, **sizes):
  shapes = jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = {}
  branch = tree
  *path, last = name.split("/")
  for key in path:
    branch[key] = branch = {}
  branch[last] = shapes
  (found,) = jax.tree.leaves(sharding.state_shardings(tree, mesh(**sizes)))
  return found.spec


def test_rules_translate_as_far_as_sizes_divide():
  sizes = mesh(2, 2, 4)
  names = ("batch", "length", "heads", "head_dim")
  assert sharding.RULES.spec(names, (8, 5, 8, 3), sizes) == P(
    ("data", "fsdp"), None, "tensor", None
  )
  assert sharding.RULES.spec(names, (6, 5, 6, 3), sizes) == P(
    "data", None, None, None
  )
  assert sharding.RULES.spec(("image",), (32,), sizes) == P(
    ("data", "fsdp", "tensor")
  )
  assert sharding.RULES.spec(("image",), (12,), sizes) == P(("data", "fsdp"))
  assert sharding.RULES.spec(("image",), (3,), sizes) == P(None)
  one = mesh()
  assert sharding.RULES.spec(names, (8, 5, 8, 3), one) == P(*(None,) * 4)


def test_a_collision_and_an_unknown_axis_raise():
  with pytest.raises(ValueError, match="twice"):
    sharding.RULES.spec(("heads", "mlp"), (8, 8), mesh(tensor=4))
  with pytest.raises(ValueError, match="'head' has no rule"):
    sharding.RULES.spec(("head",), (8,), mesh())


@pytest.mark.parametrize(
  ("name", "shape", "sizes", "expected"),
  [
    # Rows for fsdp: of 16 columns a chip would pad to 128.
    ("llm/x/gate_proj/kernel", (4096, 11008), {"fsdp": 256}, P("fsdp", None)),
    (
      "llm/x/gate_proj/kernel",
      (4096, 11008),
      {"fsdp": 128, "tensor": 2},
      P("fsdp", "tensor"),
    ),
    (
      "llm/x/down_proj/kernel",
      (11008, 4096),
      {"fsdp": 32, "tensor": 4},
      P("tensor", "fsdp"),
    ),
    # Where an axis is as good as taken, both share it.
    (
      "llm/embed_tokens/embedding",
      (32000, 4096),
      {"fsdp": 128, "tensor": 2},
      P(("tensor", "fsdp"), None),
    ),
    # Layers of a stack stay together, in the optimizer's moments too.
    (
      "opt/mu/llm/layers/attention/q_proj/kernel",
      (32, 4096, 4096),
      {"fsdp": 32, "tensor": 2},
      P(None, "fsdp", "tensor"),
    ),
    ("decoder/conv/kernel", (512, 1024), {"fsdp": 8}, P(None, "fsdp")),
    # Too small to be worth it.
    ("llm/final_norm/scale", (4096,), {"fsdp": 8, "tensor": 2}, P()),
  ],
)
def test_parameters_are_split_by_name(name, shape, sizes, expected):
  assert spec(name, *shape, **sizes) == expected


def test_what_cannot_be_split_is_logged(caplog):
  assert spec("odd/kernel", 999, 1001, fsdp=8) == P(None, None)
  assert "not sharded over fsdp=8" in caplog.text
  assert "odd/kernel" in caplog.text
  caplog.clear()
  assert spec("q_proj/kernel", 1024, 999, tensor=2) == P(None, None)
  assert "tensor=2" in caplog.text


def test_an_activation_that_cannot_be_split_is_logged_once(caplog):
  sharding._log_activation.cache_clear()
  with jax.sharding.use_abstract_mesh(mesh(data=2, fsdp=2, tensor=2)):
    for shape in [(4, 5, 8), (4, 5, 8), (6, 2, 8), (1, 1, 8)]:
      jax.make_jaxpr(
        lambda x: sharding.constrain(x, "batch", "residual", "embed")
      )(jnp.zeros(shape))
  assert [record.getMessage() for record in caplog.records] == [
    "not sharded over tensor=2 (residual 5): "
    "[batch, residual, embed] (4, 5, 8)",
    "not sharded over fsdp=2 (batch 6): [batch, residual, embed] (6, 2, 8)",
  ]
  caplog.clear()
  # Attention with one head of keys.
  with jax.sharding.use_abstract_mesh(mesh(data=2, fsdp=2, tensor=2)):
    jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", None, "kv_heads"))(
      jnp.zeros((4, 5, 1))
    )
  assert "not sharded over tensor=2 (kv_heads 1)" in caplog.text


def test_a_layer_of_a_stack_has_the_stack_s_places():
  """Or its gradient would be moved before it is added to the stack's."""
  assert sharding.MIN_SHARDED_SIZE > 2**12
  stacked = spec("layers/mlp/up_proj/kernel", 128, 64, 64, fsdp=8)
  assert stacked == P(None, "fsdp", None)

  def constrained(x):
    tree = {"mlp": {"up_proj": {"kernel": x}}}
    return sharding.constrain_parameters(tree, 128)

  with jax.sharding.use_abstract_mesh(mesh(fsdp=8)):
    jaxpr = jax.make_jaxpr(constrained)(jnp.zeros((64, 64)))
  assert "('fsdp'" in str(jaxpr) or "'fsdp', None" in str(jaxpr)


def test_whole_parameters_have_split_gradients():
  tree = {"encoder": {"conv": {"kernel": jnp.ones((3, 3, 64, 512))}}}

  def places(function):
    """The constraints of a traced function, in order."""
    with jax.sharding.use_abstract_mesh(mesh(fsdp=8)):
      jaxpr = jax.make_jaxpr(function)(tree)
    return [
      equation.params["sharding"].spec
      for equation in equations(jaxpr.jaxpr)
      if equation.primitive.name == "sharding_constraint"
    ]

  def equations(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for value in equation.params.values():
        if hasattr(value, "eqns"):
          yield from equations(getattr(value, "jaxpr", value))

  split = spec("encoder/conv/kernel", 3, 3, 64, 512, fsdp=8)
  assert "fsdp" in split
  assert places(sharding.whole_parameters) == [P()]
  total = jax.grad(
    lambda tree: jnp.sum(
      sharding.whole_parameters(tree)["encoder"]["conv"]["kernel"] ** 2
    )
  )
  assert places(total) == [P(), split]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3, 1, 1), "data=3 x fsdp=1 x tensor=1"),
    ((-1, 7, 1), "data=-1 x fsdp=7"),
  ],
)
def test_a_mesh_that_does_not_cover_the_devices(sizes, message):
  devices = jax.devices()[:1]
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes, devices=devices)


@dataclasses.dataclass(frozen=True)
class Chip:
  """As JAX says of a TPU's."""

  id: int
  slice_index: int
  coords: tuple[int, ...]
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0
  process_index: int = 0


def chips(slices):
  """Slices of 4 x 2 chips, in an order that says nothing of them."""
  found = [
    Chip(8 * number + 4 * y + x, number, (x, y, 0))
    for number in range(slices)
    for y in range(2)
    for x in range(4)
  ]
  return found[::2] + found[1::2]


@pytest.mark.parametrize(
  ("slices", "sizes", "warns"),
  [
    (1, (1, 8, 1), False),
    (2, (2, 8, 1), False),
    (2, (-1, 4, 2), False),
    (3, (6, 2, 2), False),
    (2, (1, -1, 2), True),
    (4, (2, 16, 1), True),
  ],
)
def test_slices_lie_along_data_and_then_fsdp(slices, sizes, warns, caplog):
  devices = chips(slices)
  assert sharding.count_slices(devices) == slices
  with caplog.at_level("WARNING"):
    mesh = sharding.make_mesh(*sizes, devices=devices)
  assert ("between slices" in caplog.text) == warns
  assert mesh.devices.size == len(set(mesh.devices.flat)) == 8 * slices
  number = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  assert (number == number[:, :, :1]).all()  # Never along `tensor`.
  assert (number != number[:, :1]).any() == warns


def test_tensor_does_not_cross_slices():
  with pytest.raises(ValueError, match="tensor=16 does not divide the 8"):
    sharding.make_mesh(1, 1, 16, devices=chips(2))


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((3, 5))
  assert sharding.constrain(x, "batch", "vocab") is x
  assert sharding.replicate(x) is x
  assert sharding.active_mesh() is None
  assert sharding.platform() == jax.default_backend()
