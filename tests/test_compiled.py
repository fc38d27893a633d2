"""What is read out of compiled and traced programs, against sums by hand."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from unicode_jax import compiled

# A product whose sum runs over devices, five times in a loop.
EXCHANGES = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from unicode_jax import compiled, sharding

mesh = sharding.make_mesh(fsdp=2, tensor=4)
shape = jax.ShapeDtypeStruct
def place(*spec):
  return NamedSharding(mesh, P(*spec))

def loop(x, w):
  def body(x, _):
    y = jax.lax.with_sharding_constraint(x @ w, place("fsdp", None))
    return jnp.tanh(y), None
  return jax.lax.scan(body, x, length=5)[0]

traced = jax.jit(loop, out_shardings=place("fsdp", None)).trace(
  shape((16, 64), jnp.float32, sharding=place("fsdp", None)),
  shape((64, 64), jnp.float32, sharding=place("tensor", None)),
)
text = traced.lower().compile().as_text()
for c in compiled.read(text, 8).collectives:
  print(c.kind, c.group, c.times, c.bytes)
print(compiled.matmul_flops(traced.jaxpr, 8))
"""


def test_exchanges_count_as_often_as_their_loop_runs(host_devices):
  done = subprocess.run(
    [sys.executable, "-c", EXCHANGES],
    env=host_devices(8),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  *lines, flops = done.stdout.splitlines()
  kind, group, times, size = lines[0].split()
  assert (kind, int(group), int(times)) == ("all-reduce", 4, 5)
  # A ring hands 8 x 64 float32 around twice, less each device's own quarter.
  assert float(size) == 5 * 2 * 3 / 4 * 8 * 64 * 4
  assert float(flops) == 5 * 2 * 16 * 64 * 64


def flops(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return compiled.matmul_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_work_is_counted_in_scans_branches_and_again():
  x, w = (4, 8), (8, 8)
  one = 2 * 4 * 8 * 8
  assert flops(jnp.matmul, x, w) == one

  def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]

  assert flops(scanned, x, w) == 3 * one

  def loss(x, w):
    return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x))

  # Two products forward, again for the backward pass, and four of gradients.
  both = jax.value_and_grad(loss, argnums=(0, 1))
  assert flops(both, x, w) == 8 * one

  def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert flops(branch, x, w) == 2 * one

  def convolved(image, kernel):
    return jax.lax.conv_general_dilated(
      image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert flops(convolved, (2, 6, 6, 3), (3, 3, 3, 5)) == (
    2 * (2 * 6 * 6 * 5) * 3 * 3 * 3
  )


def test_work_whose_result_goes_nowhere_is_not_counted():
  def last_gradient(x, first, last):
    y, pullback = jax.vjp(lambda a, b: (x @ a) @ b, first, last)
    return pullback(y)[1]

  one = 2 * 4 * 8 * 8
  assert flops(last_gradient, (4, 8), (8, 8), (8, 8)) == 3 * one

  def inside(x, w):
    return jax.jit(lambda x, w: (x @ w, w @ w))(x, w)[0]

  assert flops(inside, (4, 8), (8, 8)) == one

  def scanned(x, w):
    def body(x, _):
      return x @ w, w @ w

    return jax.lax.scan(body, x, length=3)[0]

  assert flops(scanned, (4, 8), (8, 8)) == 3 * one

  def again(x, first, last):
    both = jax.checkpoint(lambda last: jnp.sum(jnp.tanh(x @ first) @ last))
    return jax.grad(both)(last)

  # Of the forward pass what the gradient needs, and the gradient.
  assert flops(again, (4, 8), (8, 8), (8, 8)) == 2 * one


def test_zeros_that_a_stride_puts_between_are_no_work():
  def convolved(image, kernel):
    return jax.lax.conv_general_dilated(
      image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def of_image(image, kernel, out):
    return jax.vjp(lambda image: convolved(image, kernel), image)[1](out)

  shapes = (2, 8, 8, 3), (4, 4, 3, 5)
  forward = 2 * (2 * 4 * 4 * 5) * 4 * 4 * 3
  assert flops(convolved, *shapes) == forward
  assert flops(of_image, *shapes, (2, 4, 4, 5)) == forward


TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %m = bf16[8,128]{1,0} multiply(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%all-reduce-scatter (i: bf16[256,128]) -> bf16[2,128] {
  %all-reduce.1 = bf16[256,128]{1,0} all-reduce(%i), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=128] {'axis_1'}, to_apply=%add
}

%body (c: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %f = bf16[8,128]{1,0} fusion(%c), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  %g = bf16[8,128]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="x"}
}

%condition (c: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} copy(%p), backend_config={"window_config":{"estimated_cycles":"5"}}
  %w = (s32[], bf16[8,128]) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_the_tpu_compiler_s_text():
  """As libtpu writes it: trips in the condition, sums that are scattered."""
  found = compiled.read(TEXT, 256)
  assert found.cycles == 5 + 32 * 10
  (exchange,) = found.collectives
  assert (exchange.kind, exchange.group) == ("reduce-scatter", 128)
  assert exchange.times == 32
  assert exchange.bytes == 32 * (256 * 128 * 2) * 127 / 128


PEELED = """%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-reduce(%c), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %turn = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %first = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one), backend_config={}
  %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%begin, %first)
  %w = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_loop_whose_first_turn_was_peeled():
  """Both exchanges share a channel; together they are four."""
  found = compiled.read(PEELED, 8).collectives
  assert sorted(exchange.times for exchange in found) == [1, 3]
  assert sum(exchange.bytes for exchange in found) == 4 * (8 * 4) * 2 * 3 / 4


@pytest.mark.parametrize(
  ("line", "size"),
  [
    (
      "(bf16[1024,4096]{1,0}, bf16[1024,4096]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})"
      " collective-permute-start(%x), channel_id=1,"
      " source_target_pairs={{0,1},{1,0}}",
      1024 * 4096 * 2,
    ),
    (
      "(f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), channel_id=1,"
      " replica_groups=[2,4]<=[8], dimensions={0}",
      32 * 16 * 4 * 3 / 4,
    ),
    (
      "(f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), channel_id=1,"
      " replica_groups=[2,4]<=[8], to_apply=%add",
      2 * 12 * 4 * 3 / 4,
    ),
  ],
)
def test_exchanges_that_only_start(line, size):
  text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %a = {line}\n}}\n"
  (found,) = compiled.read(text, 8).collectives
  assert found.bytes == size


@pytest.mark.parametrize(
  ("result", "target", "transfer", "kind", "group", "size"),
  [
    ("bf16[4,8,128]", '"{1,2}x{0:7}"', "ALL_REDUCE", "all-reduce", 2, 4096 * 2),
    ("bf16[4,8,128]", '"{1:4}x{0:7}"', "ALL_REDUCE", "all-reduce", 4, 6144 * 2),
    # Of two pairs of four slices.
    (
      *("f32[8,128]", "{{100000,200000},{300000,400000}}"),
      *("ALL_GATHER", "all-gather", 2, 512 * 4),
    ),
    (
      *("f32[8,128]", '"{1,2,3}x{0:7}"'),
      *("REDUCE_SCATTER", "reduce-scatter", 3, 2048 * 4),
    ),
    # As many bytes of each chip go to its own slice as to the other one.
    (
      *("f32[8,128]", "{{100000,100001,200000,200001}}"),
      *("ALL_TO_ALL", "all-to-all", 2, 512 * 4),
    ),
    (
      *("f32[8,128]", "{{100000->200000},{200000->100000}}"),
      *("ONE_TO_ONE", "one-to-one", 2, 1024 * 4),
    ),
  ],
)
def test_exchanges_between_slices(result, target, transfer, kind, group, size):
  """As libtpu writes them: what the hosts receive for a chip."""
  attributes = (
    "is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_"
    f'name="xla_megascale_runtime",_xla_megascale_target={target},_xla_'
    f'megascale_transfer_type="{transfer}"}}'
  )
  sent = f"({result}{{1,0}}, u32[], token[])"
  text = (
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    f"  %s = {sent} send(%x, %after), channel_id=4, {attributes}\n"
    f"  %r = {sent} recv(%after), channel_id=3, {attributes}\n"
    f"  %h = {sent} recv(%after), channel_id=5, is_host_transfer=true\n"
    "}\n"
  )
  (found,) = compiled.read(text, 16).collectives
  assert found.between_slices
  assert (found.kind, found.group, found.bytes) == (kind, group, size)


MESSAGE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.51G of 15.75G hbm. Exceeded hbm capacity by 8.76G.

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jvp(Llama)/mlp" source_file="x"
     Shape: f32[32,4096,4096]{2,1,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 512.00M
     Shape: bf16[4096,65536]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     ==========================
"""  # noqa: E501


def test_what_does_not_fit():
  assert compiled.used_memory(MESSAGE) == "24.51G of 15.75G"
  other = "HLO temporaries (29.31G) exceeds available HBM (15.75G)."
  assert compiled.used_memory(other) == "29.31G of 15.75G"
  first, second = compiled.largest_buffers(MESSAGE)
  assert first == "2.00G  f32[32,4096,4096]  jit(step)/jvp(Llama)/mlp"
  assert second == "512.00M  bf16[4096,65536]"


def test_the_largest_arrays_on_the_way():
  def function(x):
    _ = jnp.broadcast_to(x, (1000, 1000, 100)) * 2.0  # Goes nowhere.
    return jnp.sum(jnp.outer(x, x) + 1.0)

  traced = jax.jit(function).trace(jax.ShapeDtypeStruct((100,), jnp.float32))
  first, *_ = compiled.largest_arrays(traced.jaxpr)
  assert first.startswith("4e-05 GB  float32[100,100]")


@pytest.mark.parametrize("name", sorted(compiled.CHIPS))
def test_chips(name):
  """No two units of the same fact are mixed up."""
  chip = compiled.CHIPS[name]
  assert 1e14 < chip.flops < 1e16
  assert 16 * 2**30 <= chip.memory < 2**38
  assert 1e11 < chip.links < 1e12
  assert 1e9 < chip.network < chip.links / 10
