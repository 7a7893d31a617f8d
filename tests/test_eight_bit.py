"""Moments in 8 bits: the code, what is held, and that training goes on as before."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from test_optimizers import SMALL, bytes_of, draw, run
from test_optimizers import build as build_small

from jaxpt.optimizers import APOLLO, SGD, AdamW, GaLore, Linear, in_place
from jaxpt.optimizers.eight_bit import BLOCK, Quantised, dequantise, in_eight_bits, quantise
from jaxpt.optimizers.rules import by_tensor
from jaxpt.state import flatten
from jaxpt.weights.base import Tensor

LAYERS, D_IN, D_OUT = 3, 24, 200
TENSORS = {
    "layers/up/w": Tensor((LAYERS, D_IN, D_OUT), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "norm/scale": Tensor((D_IN,), ("width",), 0.0, "norm"),
}


def codes(signed: bool) -> np.ndarray:
    """All values of the code, by the paper's figure 2: decades, and linear inside each."""
    found = [0.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        found += list(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    return np.array(found)


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_becomes_a_code_next_to_it(signed):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 700)) * 10.0 ** rng.uniform(-8, 3, (5, 700))
    x = x if signed else np.abs(x)
    x[2, :BLOCK] = 0  # a block of nothing
    q = jax.jit(lambda x: quantise(x, signed=signed))(jnp.float32(x))
    assert q.codes.dtype == jnp.uint8
    assert q.codes.shape == x.shape
    assert q.scales.shape == (5, 3)
    back = np.asarray(dequantise(q, signed=signed))
    values = codes(signed)
    assert len(values) == (128 if signed else 255)
    for row in range(5):
        for block in range(3):
            part = slice(block * BLOCK, min(700, (block + 1) * BLOCK))
            scale = np.abs(x[row, part]).max() / values[-1]
            assert float(q.scales[row, block]) == pytest.approx(scale, rel=1e-6)
            if not scale:
                assert not back[row, part].any()
                continue
            share, got = np.abs(x[row, part]) / scale, np.abs(back[row, part]) / scale
            nearest = np.abs(share[:, None] - values).argmin(1)
            chosen = np.abs(got[:, None] - values).argmin(1)
            np.testing.assert_allclose(got, values[chosen], rtol=1e-5, atol=1e-9)
            # Halfway between two codes, rounding decides.
            between = np.abs(share - values[nearest]) + 1e-5 * share
            assert (np.abs(share - values[chosen]) <= between).all()
            assert (np.sign(back[row, part]) * np.sign(x[row, part]) >= 0).all()
            largest = np.abs(x[row, part]).argmax()
            assert back[row, part][largest] == pytest.approx(x[row, part][largest], rel=1e-5)


def test_all_codes_are_used():
    values = codes(True)
    q = quantise(jnp.float32(np.concatenate([values, -values[1:]])), signed=True)
    assert len(np.unique(q.codes)) == 255
    assert len(np.unique(quantise(jnp.float32(codes(False)), signed=False).codes)) == 255


@pytest.mark.parametrize(
    "config", [AdamW(), GaLore(rank=22), SGD()], ids=["adamw", "galore", "sgd"]
)
def test_what_is_held(config):
    """A byte an entry of a moment and a scale a block; the rest as it was."""
    config = dataclasses.replace(config, state_dtype="8bit")
    state = jax.eval_shape(build_small(config, TENSORS).init, draw(0, TENSORS))
    rank = 22 if isinstance(config, GaLore) else D_IN
    moments = {"mu", "nu"} if not isinstance(config, SGD) else {"trace"}
    found = {}
    for path, leaf in flatten(state).items():
        if "layers/up/w" in path and path.endswith(("codes", "scales")):
            found[path.split("/")[-2], path.split("/")[-1]] = (leaf.shape, leaf.dtype.name)
    assert found == {
        (moment, kind): value
        for moment in moments
        for kind, value in {
            "codes": ((LAYERS, rank, D_OUT), "uint8"),
            "scales": ((LAYERS, rank, 1), "float32"),
        }.items()
    }
    plain = {p: x.dtype for p, x in flatten(state).items() if "norm/scale" in p}
    assert set(plain.values()) == {jnp.dtype("float32")}


def test_layers_in_turn_are_as_layers_at_once():
    tensors = {"layers/up/w": TENSORS["layers/up/w"]}
    rule = in_eight_bits(AdamW().rule(tensors["layers/up/w"]))
    params, grads = draw(0, tensors), [draw(i, tensors) for i in (1, 2, 3)]
    at_once, in_turn = (
        run(by_tensor(tensors, {"layers/up/w": rule}, in_turn=t), params, grads)
        for t in (False, True)
    )
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_turn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_blocks_of_rows_are_as_the_whole(monkeypatch):
    """Also the last block, whose rows are too few for 8 bits were they an array of their own."""
    monkeypatch.setattr(in_place, "BLOCK_ENTRIES", 33 * 700)
    tensor = Tensor((66, 700), ("embed", "mlp"), 0.5, "Dense")
    assert in_place.block_rows(tensor) == (1, 32)
    rule, key = in_eight_bits(AdamW().rule(tensor)), jax.random.key(0)
    rng = np.random.default_rng(0)
    params, grads = (jnp.float32(rng.normal(size=(2, 3, 66, 700))[i]) for i in (0, 1))
    stacks = params, jax.jit(jax.vmap(rule.init))(params)
    update = jax.jit(in_place.update_in_place, static_argnums=(0, 1))
    whole = jax.jit(jax.vmap(rule.update, (0, 0, 0, None, None)))
    for count in range(2):
        (old_params, old_states), scale = stacks, jnp.float32(0.5)
        for layer in range(3):
            stacks, square = update(
                rule, tensor, stacks, grads[layer], scale, jnp.int32(count), key, layer
            )
        change, states = whole(0.5 * grads, old_states, old_params, jnp.int32(count), key)
        np.testing.assert_allclose(stacks[0], old_params + change, atol=1e-6)
        np.testing.assert_allclose(square, (np.asarray(change[2]) ** 2).sum(), rtol=1e-5)
        for a, b in zip(jax.tree.leaves(stacks[1]), jax.tree.leaves(states), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_layers_in_turn_leave_no_copy_of_all():
    """Compiled for a TPU: what the update makes on the way lives for one layer of 32."""
    pytest.importorskip("libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shape = (32, 1024, 1024)
    tensors = {"layers/up/w": Tensor(shape, ("layers", None, None), 0.5, "Dense")}

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params = placed({"layers": {"up": {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}}})
    rule, temporary = in_eight_bits(AdamW().rule(tensors["layers/up/w"])), {}
    for in_turn in (True, False):
        transform = by_tensor(tensors, {"layers/up/w": rule}, in_turn=in_turn)
        state = placed(jax.eval_shape(transform.init, params))
        traced = jax.jit(transform.update, donate_argnums=(0, 1)).trace(params, state, params)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        temporary[in_turn] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[True] < 3 * 4 * 1024**2 < temporary[False] / 30


def test_trains_as_float32_does():
    """A quadratic, and 20 steps close to those of float32."""
    target, start = draw(1, TENSORS), draw(0, TENSORS)

    def distance(params):
        return sum(
            float(((a - b) ** 2).sum())
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    results = {}
    for held in ("float32", "8bit"):
        config = AdamW(0.3, Linear(), weight_decay=0.0, clip=None, state_dtype=held)
        transform, params = build_small(config, TENSORS, 100), start
        state, update = transform.init(params), jax.jit(transform.update)
        for _ in range(100):
            grads = jax.tree.map(lambda p, t: 2 * (p - t), params, target)
            changes, state = update(grads, state, params)
            params = jax.tree.map(jnp.add, params, changes)
        results[held] = distance(params)
    assert results["8bit"] < 0.02 * distance(start)
    assert results["8bit"] < 1.5 * results["float32"] + 1e-3 * distance(start)


def test_small_arrays_are_left_alone():
    for config in (AdamW(), APOLLO()):
        eight = dataclasses.replace(config, state_dtype="8bit")
        params, grads = draw(0, SMALL), [draw(1, SMALL), draw(2, SMALL)]
        (a, state), (b, _) = (run(build_small(c, SMALL), params, grads) for c in (eight, config))
        assert not any(isinstance(x, Quantised) for x in jax.tree.leaves(state))
        assert bytes_of(state) > 0
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
