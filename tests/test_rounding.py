"""Stochastic rounding of bfloat16 parameters: unbiased, and the same however layers are updated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizers import SMALL, build, draw, run, unstacked, unstacked_table

from jaxpt.errors import ConfigError
from jaxpt.optimizers import SGD, SPAM, AdamW
from jaxpt.optimizers.in_place import update_in_place
from jaxpt.optimizers.rounding import stochastic
from jaxpt.optimizers.rules import keys_of, one_layer
from jaxpt.state import flatten
from jaxpt.weights.base import Tensor

STOCHASTIC = AdamW(1e-2, clip=None, rounding="stochastic")


def bits_of(tree):
    return {path: np.asarray(x).view(np.uint16) for path, x in flatten(tree).items()}


def only(tree):
    """What stands at the end of a single path."""
    while isinstance(tree, dict):
        (tree,) = tree.values()
    return tree


def test_the_mean_is_the_number():
    """Of each sign and size, also across a power of two; only the two neighbours occur."""
    numbers = np.array([1.0003, -1.0003, 3.14159, -2.7e-5, 1.9999, 6.1e8, 1e-30], np.float32)
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda key: stochastic(jnp.asarray(numbers), key)))(
            jax.random.split(jax.random.key(0), 20_000)
        )
    )
    assert (drawn == drawn.astype(jnp.bfloat16)).all()
    for x, found in zip(numbers, drawn.T, strict=True):
        values = np.unique(found).astype(np.float64)
        assert len(values) == 2
        low, high = values
        assert low < x < high
        near = np.float32(x).astype(jnp.bfloat16)
        assert near in values
        assert high - low <= abs(x) * 2.0**-7
        share = (x - low) / (high - low)  # of those that are rounded up
        spread = np.sqrt(share * (1 - share) / len(found))
        assert abs((found == high).mean() - share) < 5 * spread + 1e-6


def test_bfloat16_numbers_stay():
    rng = np.random.default_rng(0)
    numbers = np.asarray(rng.normal(size=4096) * 10.0 ** rng.uniform(-30, 30, 4096), jnp.bfloat16)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -2.0]
    x = np.concatenate([numbers.astype(np.float32), np.array(special, np.float32)])
    np.testing.assert_array_equal(stochastic(jnp.asarray(x), jax.random.key(0)), x)
    nans = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(stochastic(jnp.asarray(nans), jax.random.key(0))).all()


def test_small_changes_add_up():
    """50 changes of 1/4000 each, half of what a bfloat16 near 1 could lose at most."""
    tensors = {"up/w": Tensor((64, 64), (None, None), 1.0, "Dense")}
    ones = {"up": {"w": np.ones((64, 64), jnp.bfloat16)}}
    after = {}
    for rounding in ("nearest", "stochastic"):
        plain = SGD(1 / 4000, momentum=0.0, clip=None, rounding=rounding)
        params = run(build(plain, tensors), ones, [ones] * 50)[0]
        after[rounding] = params["up"]["w"].astype(np.float64)
    assert (after["nearest"] == 1).all()
    # A change below 1 goes by 1/256: the variance of one is p (1 - p) of that squared.
    share = 256 / 4000
    error = np.sqrt(50 * share * (1 - share)) / 256 / 64
    assert abs(after["stochastic"].mean() - (1 - 50 / 4000)) < 5 * error


def test_stacked_layers_are_rounded_as_layers_that_stand_alone():
    """To the bit; and what the optimizer adds up is what it was without."""
    params, gradients = draw(0, SMALL, "bfloat16"), [draw(i + 1, SMALL) for i in range(3)]
    stacked, state = run(build(STOCHASTIC, SMALL), params, gradients)
    alone, _ = run(
        build(STOCHASTIC, unstacked_table(SMALL)),
        unstacked(params),
        [unstacked(g) for g in gradients],
    )
    ours, theirs = bits_of(unstacked(stacked)), bits_of(alone)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    # Each layer has bits of its own: equal layers do not stay equal.
    path = "decoder/layers/mlp/up/w"
    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), (params, gradients[0]))
    after = flatten(run(build(STOCHASTIC, SMALL), same[0], [same[1]])[0])[path]
    assert len(np.unique(after.reshape(len(after), -1).astype(np.float32), axis=0)) > 1
    nearest = dataclasses.replace(STOCHASTIC, rounding="nearest")
    _, plain = run(build(nearest, SMALL), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, state, plain)


def test_no_bits_are_drawn_twice():
    """Neither from step to step nor for parameters of one shape."""
    tensors = {f"{name}/w": Tensor((64, 64), (None, None), 1.0, "Dense") for name in "ab"}
    ones = {name: {"w": np.ones((64, 64), jnp.bfloat16)} for name in "ab"}
    transform = build(SGD(1 / 1000, momentum=0.0, clip=None, rounding="stochastic"), tensors)
    update, state, changes = jax.jit(transform.update), transform.init(ones), []
    for _ in range(2):
        change, state = update(ones, state, ones)
        changes += [np.asarray(change[name]["w"]) for name in "ab"]
        for name in "ab":  # the sum is a bfloat16 number already
            total = np.float32(1) + np.asarray(change[name]["w"])
            np.testing.assert_array_equal(total, total.astype(jnp.bfloat16).astype(np.float32))
    share = np.mean(changes[0] != 0)
    for i, first in enumerate(changes):
        for second in changes[:i]:
            assert np.mean((first != 0) & (second != 0)) < 2 * share**2


def test_float32_parameters_are_as_they_were():
    params, gradients = draw(0, SMALL), [draw(1, SMALL)]
    nearest = dataclasses.replace(STOCHASTIC, rounding="nearest")
    ours, theirs = (run(build(c, SMALL), params, gradients)[0] for c in (STOCHASTIC, nearest))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_layers_updated_in_place_are_rounded_alike():
    """As the layerwise step does it; with a rule that draws, too: sparse momentum."""
    path = "decoder/layers/mlp/up/w"
    tensors, config = {path: SMALL[path]}, SPAM(1e-2, density=1 / 2, rounding="stochastic")
    params, *gradients = (draw(i, tensors, "bfloat16") for i in range(3))
    built = build(config, tensors)
    state: Any = built.init(params)
    want, want_state = run(built, params, gradients)
    stacks = (jnp.asarray(flatten(params)[path]), only(state.states))
    keys, row = keys_of(path, tensors[path], config.rule_seed), one_layer(tensors[path])
    update = jax.jit(functools.partial(update_in_place, built.rules[path], row))
    for t, grads in enumerate(gradients):
        grads = flatten(grads)[path]
        for at in reversed(range(len(grads))):
            stacks, _ = update(stacks, grads[at], jnp.float32(1), jnp.int32(t), keys[at], at)
    np.testing.assert_array_equal(np.asarray(stacks[0]).view(np.uint16), only(want).view(np.uint16))
    jax.tree.map(np.testing.assert_array_equal, stacks[1], only(want_state.states))


def test_wrong_choices_are_named():
    with pytest.raises(ConfigError) as error:
        AdamW(rounding="down")  # type: ignore[arg-type]
    assert error.value.field == "rounding"
