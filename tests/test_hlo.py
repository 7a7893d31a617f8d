"""What programs move and compute, counted from their text and their trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpt.hlo import Collective, carried, size_of, traffic
from jaxpt.operations import operations

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

TEXT = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: bf16[64,32]) -> bf16[32,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = bf16[32,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={32,32}
}

%sliced (q: f32[10,64,32], n: s32[]) -> f32[64,32] {
  %q = f32[10,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[1,64,32]{2,1,0} dynamic-slice(%q, %n), dynamic_slice_sizes={1,64,32}
  ROOT %row = f32[64,32]{1,0} bitcast(%one)
}

%put (r: f32[10,64,32], u: f32[1,64,32], k: s32[]) -> f32[10,64,32] {
  %r = f32[10,64,32]{2,1,0} parameter(0)
  %u = f32[1,64,32]{2,1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %new = f32[10,64,32]{2,1,0} dynamic-update-slice(%r, %u, %k)
}

%body (t: (s32[], f32[10,64,32])) -> (s32[], f32[10,64,32]) {
  %t = (s32[], f32[10,64,32]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[10,64,32]{2,1,0} get-tuple-element(%t), index=1
  %y = f32[64,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %gathered = f32[128,32]{1,0} all-gather(%y), dimensions={0}, replica_groups={{0,2},{1,3},{4,6},{5,7}}
  %v = f32[1,64,32]{2,1,0} bitcast(%y)
  %w = f32[10,64,32]{2,1,0} fusion(%x, %v, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[10,64,32]) tuple(%i, %w)
}

%more (c: (s32[], f32[10,64,32])) -> pred[] {
  %c = (s32[], f32[10,64,32]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (z: f32[10,64,32], h: bf16[64,32]) -> f32[10,64,32] {
  %z = f32[10,64,32]{2,1,0} parameter(0)
  %h = bf16[64,32]{1,0} parameter(1)
  %first = s32[] constant(0)
  %started = (s32[], f32[10,64,32]) tuple(%first, %z)
  %loop = (s32[], f32[10,64,32]) while(%started), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %half = bf16[32,32]{1,0} fusion(%h), kind=kCustom, calls=%scattered
  %passed = f32[10,64,32]{2,1,0} collective-permute(%z), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %result = f32[10,64,32]{2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_text():
    """A loop's part counts by its trips, an all-reduce that is sliced is a reduce-scatter, groups
    are found on the mesh however they are written, slices count as what is sliced."""
    found = traffic(TEXT, MESH)
    row = 64 * 32 * 4
    assert set(found.collectives) == {
        Collective("all-gather", ("fsdp",), 2, 10, 10 * 2 * row),
        Collective("reduce-scatter", ("tensor",), 2, 1, 64 * 32 * 2),
        Collective("collective-permute", ("data",), 2, 1, 10 * row),
    }
    # In the loop: a row is read and written, then written into its place (read, and put there).
    # Outside: the fused reduce-scatter's operand and result.
    assert found.bytes == 10 * (row + row + 4 + row + row + 4) + 64 * 32 * 2 + 32 * 32 * 2
    assert (found.loops, found.across) == ((), 0)
    assert traffic(TEXT, MESH, host=4).across == 10 * row  # data lies over two hosts
    unknown = TEXT.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")
    assert traffic(unknown, MESH).loops == ("loop",)


TPU = """\
HloModule step, is_scheduled=true

%first (p: bf16[64,32]) -> bf16[128,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,32]{1,0} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="9"}
}

%last (q: bf16[64,32]) -> bf16[128,32] {
  %q = bf16[64,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[128,32]{1,0} all-gather(%q), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="9"}
}

%scattered (a: f32[64], b: f32[32]) -> (f32[32], f32[16]) {
  %a = f32[64]{0} parameter(0)
  %b = f32[32]{0} parameter(1)
  %both = (f32[64]{0}, f32[32]{0}) all-reduce(%a, %b), channel_id=6, replica_groups=mesh['x'=8] {'x':(2)2}
  %one = f32[64]{0} get-tuple-element(%both), index=0
  %n = s32[] constant(0)
  %own = f32[32]{0} dynamic-slice(%one, %n), dynamic_slice_sizes={32}
  ROOT %parts = (f32[32], f32[16]) tuple(%own, %own)
}

%body (t: (u32[], f32[64])) -> (u32[], f32[64]) {
  %t = (u32[], f32[64]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[64]{0} get-tuple-element(%t), index=1
  %started = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %passed = f32[64]{0} collective-permute-done(%started)
  %next = u32[] add(%i, %two)
  ROOT %out = (u32[], f32[64]) tuple(%next, %passed)
}

%more (c: (u32[], f32[64])) -> pred[] {
  %eight = u32[] constant(7)
  %c = (u32[], f32[64]) parameter(0)
  %at = u32[] get-tuple-element(%c), index=0
  ROOT %yes = pred[] compare(%at, %eight), direction=LT
}

ENTRY %main (z: bf16[64,32], y: f32[64], h: f32[32]) -> f32[64] {
  %z = bf16[64,32]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %h = f32[32]{0} parameter(2)
  %begun = bf16[128,32]{1,0} fusion(%z), kind=kCustom, calls=%first
  %done = bf16[128,32]{1,0} fusion(%z), kind=kCustom, calls=%last
  %sums = (f32[32], f32[16]) fusion(%y, %h), kind=kCustom, calls=%scattered
  %whole = f32[32]{0} all-reduce(%h), channel_id=8, replica_groups=mesh['x'=8], device_ids=(0,4,1,5,2,6,3,7) {'x'}
  %zero = u32[] constant(0)
  %first.0 = (u32[], f32[64]) tuple(%zero, %y)
  %loop = (u32[], f32[64]) while(%first.0), condition=%more, body=%body
  ROOT %result = f32[64]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_text_of_a_tpu():
    """A gather that is spread over two fused operations is one; a fused all-reduce of which slices
    are used is a reduce-scatter, of an array that is not sliced too; groups lie along axes of a
    mesh of the program's own; a loop that counts by twos to 7 runs 4 times; what an asynchronous
    operation carries beside its arrays is not sent."""
    found = traffic(TPU, MESH)
    assert set(found.collectives) == {
        Collective("all-gather", ("fsdp",), 2, 1, 128 * 32 * 2),
        Collective("reduce-scatter", ("fsdp",), 2, 1, (64 + 32) * 4),
        Collective("all-reduce", ("data", "fsdp", "tensor"), 8, 1, 32 * 4),
        Collective("collective-permute", ("tensor",), 2, 4, 4 * 64 * 4),
    }
    assert found.loops == ()
    with pytest.raises(ValueError, match="nothing here can read"):
        traffic(TPU.replace("replica_groups=mesh", "replica_groups=web"), MESH)


def test_what_a_backward_pass_carries():
    """By hand: the inputs of 6 layers, the gradients of their matrices, and the matrices, which are
    cast before the loops."""

    def value(w, x):
        w = w.astype(jnp.float16)
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    w, x = jnp.zeros((6, 64, 64)), jnp.zeros((16, 64), jnp.float16)
    text = jax.jit(jax.grad(value)).lower(w, x).compile().as_text()
    found = carried(text)
    matrices, rows = 6 * 64 * 64 * 2, 16 * 64 * 2
    assert found["made"] == pytest.approx(matrices + rows, rel=0.03)
    # Inputs, and two arrays of tanh's derivative; the matrices pass through the loop before.
    assert found["kept"] == pytest.approx(3 * 6 * rows, rel=0.03)
    assert found["copies"] == pytest.approx(matrices, rel=0.03)
    assert carried(TEXT) == {"arguments": 10 * 64 * 32 * 4, "kept": 0, "made": 4, "copies": 0}
    assert carried(TEXT.replace(" while(", " custom-call(")) == {}


def test_sent():
    """On a ring of n each device sends n - 1 of n parts, and twice that in an all-reduce."""
    assert Collective("all-gather", (), 4, 1, 400).sent == 300
    assert Collective("reduce-scatter", (), 4, 1, 400).sent == 300
    assert Collective("all-reduce", (), 4, 1, 400).sent == 600
    assert Collective("collective-permute", (), 4, 1, 400).sent == 400


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]{1,0:T(8,128)}", 60),
        ("bf16[7]{0}", 14),
        ("pred[9]", 9),
        ("s4[3]", 2),
        ("f8e4m3fn[4]", 4),
        ("(s32[], u8[2,2]{1,0}, token[])", 8),
    ],
)
def test_sizes(shape, size):
    assert size_of(shape) == size


def test_a_compiled_program():
    """Exchanges that were asked for are found, with their axes, sizes and trips."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "fsdp"), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def f(w, x):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", tiled=True)
            return jnp.tanh(x @ whole), None

        y = jax.lax.scan(layer, x, w)[0]
        part = jax.lax.psum_scatter(y, "fsdp", tiled=True)
        part = jax.lax.ppermute(part, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.psum(jnp.sum(part), ("data", "fsdp"))

    w, x = jnp.zeros((6, 64, 64)), jnp.zeros((16, 64))
    found = traffic(jax.jit(f).lower(w, x).compile().as_text(), {"data": 2, "fsdp": 4})
    assert set(found.collectives) == {
        Collective("all-gather", ("fsdp",), 4, 6, 6 * 64 * 64 * 4),
        Collective("reduce-scatter", ("fsdp",), 4, 1, 8 * 64 * 4),
        Collective("collective-permute", ("fsdp",), 4, 1, 2 * 64 * 4),
        Collective("all-reduce", ("data", "fsdp"), 8, 1, 4),
    }
    assert found.loops == ()
    assert found.bytes > 6 * 64 * 64 * 4


def count(f, *shapes):
    return operations(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)))


def test_operations():
    product = 2 * 3 * 5 * 7
    assert count(jnp.matmul, (3, 5), (5, 7)) == product
    assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 4 * product
    grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    assert count(grad, (5, 7), (3, 5)) == 2 * product  # none for x

    def layers(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0])

    def again(w, x):
        step = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return jnp.sum(jax.lax.scan(step, x, w)[0])

    square = 2 * 3 * 5 * 5
    assert count(layers, (6, 5, 5), (3, 5)) == 6 * square
    assert count(jax.grad(layers), (6, 5, 5), (3, 5)) == 6 * 3 * square
    assert count(jax.grad(again), (6, 5, 5), (3, 5)) == 6 * 4 * square
    branches = functools.partial(jax.lax.cond, True, lambda w, x: x @ w @ w, lambda w, x: x @ w)
    assert count(branches, (5, 5), (3, 5)) == 2 * square
