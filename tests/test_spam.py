"""SPAM and Stable-SPAM: spikes do no lasting harm, and momentum may be sparse.

That they equal the published updates is in test_optimizers.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_optimizers import SMALL, adam, build, draw, run, unstacked, unstacked_table

from jaxpt.errors import ConfigError
from jaxpt.optimizers import SPAM, AdamW, StableSPAM
from jaxpt.optimizers.eight_bit import Quantised
from jaxpt.state import flatten
from jaxpt.weights.base import Tensor

LAYERS, PERIOD, N = 2, 4, 4
SPARSE = SPAM(1e-2, threshold=2.0, period=PERIOD, warmup=2, patience=2, density=1 / N)
TENSORS = {
    "layers/up/w": Tensor((LAYERS, 6, 10), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "down/w": Tensor((10, 3), ("mlp", "embed"), 0.5, "Dense"),  # rows shorter than a group
    "head/w": Tensor((6, 5), ("embed", "vocab"), 0.5, "Dense"),
    "norm/scale": Tensor((5,), ("width",), 0.0, "norm"),
}
INNER = ("layers/up/w", "down/w")


def changes_of(config, gradients, tensors=TENSORS):
    """The change of every step, flat."""
    transform = build(config, tensors)
    update, params = jax.jit(transform.update), draw(0, tensors)
    state, found = transform.init(params), []
    for g in gradients:
        change, state = update(g, state, params)
        found.append(flatten(jax.device_get(change)))
    return found


def test_sparse_momentum_updates_one_entry_of_each_group_as_if_all_were():
    """20 steps: moments and spikes are matters of each entry, so that those whose turn it is
    change as they do where all have their turn. Other entries stay where they are."""
    gradients = [draw(i + 1, TENSORS) for i in range(20)]
    sparse = changes_of(SPARSE, gradients)
    dense = changes_of(dataclasses.replace(SPARSE, density=1.0), gradients)
    turns = {path: [] for path in INNER}
    for ours, theirs in zip(sparse, dense, strict=True):
        for path, change in ours.items():
            expected = theirs[path]
            if path in INNER:
                turns[path].append(change != 0)
                expected = np.where(change != 0, expected, 0)
                rows = change.reshape(-1, change.shape[-1])
                for at in range(0, rows.shape[1], N):
                    assert ((rows[:, at : at + N] != 0).sum(1) == 1).all(), (path, at)
            np.testing.assert_allclose(change, expected, 1e-6)
    for masks in turns.values():
        new = [t for t in range(1, 20) if not np.array_equal(masks[t], masks[t - 1])]
        assert new == [4, 8, 12, 16]
    assert any(not np.array_equal(*layers) for layers in turns["layers/up/w"])


def test_every_entry_has_its_turn():
    gradients = [draw(1, TENSORS)] * 60
    every = changes_of(dataclasses.replace(SPARSE, period=1), gradients)
    turns = np.mean([change["layers/up/w"] != 0 for change in every], 0)
    assert turns.min() > 0
    # 8 groups of 4 and, of the row's last 2 entries, one.
    assert turns[..., :8].mean() == pytest.approx(1 / N)
    assert abs(turns[..., :8] - 1 / N).max() < 5 * np.sqrt(1 / N * (1 - 1 / N) / 60)


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_bytes_of_the_state(state_dtype):
    """Moments of [d_in, ceil(d_out / n)], 4 bytes an entry, or one and 4 a block of 256; three
    averages a tensor of Stable-SPAM's."""
    d_in, d_out = 64, 600
    tensors = {"layers/up/w": Tensor((LAYERS, d_in, d_out), ("layers", None, None), 1.0, "Dense")}
    for config, columns, more in ((SPARSE, -(-d_out // N), 0), (StableSPAM(), d_out, 3 * 4)):
        config = dataclasses.replace(config, state_dtype=state_dtype)
        state = jax.eval_shape(build(config, tensors).init, draw(0, tensors))
        row = 4 * columns if state_dtype == "float32" else columns + 4 * -(-columns // 256)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert held - 4 == LAYERS * (2 * d_in * row + more)  # 4: the count


def test_a_spike_does_no_lasting_harm():
    """One entry of one gradient a thousand times too large: how far off are the others' changes,
    and that entry's, 20 steps later, in the units of a usual change?"""
    tensors = {"up/w": Tensor((8, 16), (None, None), 1.0, "Dense")}
    rng = np.random.default_rng(0)
    steps = np.asarray(1 + 0.1 * rng.normal(size=(51, 8, 16)), np.float32)
    spike = np.ones_like(steps)
    spike[30, 2, 3] = 1000
    calm, spiked = ([{"up": {"w": g}} for g in gs] for gs in (steps, steps * spike))
    lr, worst = 1e-2, {}
    for config in (
        AdamW(lr, weight_decay=0.0, clip=None, b2=0.999),
        SPAM(lr, threshold=50.0, period=None),
        StableSPAM(lr, period=None),
    ):
        a, b = (changes_of(config, gs, tensors)[50]["up/w"] for gs in (calm, spiked))
        worst[type(config).__name__] = np.abs(a - b).max() / lr
    assert worst["AdamW"] > 0.8  # the entry hardly moves any more
    assert worst["SPAM"] < 0.3
    assert worst["StableSPAM"] < 0.6


def test_an_entry_that_was_never_seen_is_no_spike():
    """A token's row whose first gradient comes late moves all the same."""
    tensors = {"up/w": Tensor((4, 8), (None, None), 1.0, "Dense")}
    zeros, ones = ({"up": {"w": np.full((4, 8), x, np.float32)}} for x in (0, 1))
    first = changes_of(SPAM(1e-2, patience=2), [zeros] * 5 + [ones], tensors)[-1]["up/w"]
    assert (first < -1e-3).all()


def test_without_what_is_theirs_they_are_adam():
    params, gradients = draw(0, SMALL), [draw(i + 1, SMALL) for i in range(5)]
    plain = AdamW(1e-2, clip=None, weight_decay=0.0, b2=0.999, eps=1e-6)
    ours = SPAM(1e-2, threshold=None, period=None, eps=1e-6)
    (a, _), (b, _) = (run(build(c, SMALL), params, gradients) for c in (ours, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-7), a, b)
    # Without memory of norms: Adam on gradients of norm 1.
    bare = StableSPAM(1e-2, gamma1=0.0, gamma2=0.0, gamma3=0.0, period=None)
    (ours, _), state = run(build(bare, SMALL), params, gradients), {}
    path = "embedding/w"
    p = np.float64(flatten(params)[path])
    for t, grads in enumerate(gradients, 1):
        g = np.float64(flatten(grads)[path])
        p = p - bare.lr * adam(bare, state, g / np.linalg.norm(g), None, t, None)
    np.testing.assert_allclose(flatten(ours)[path], p, 1e-5, 1e-5)


def test_stable_spam_of_stacked_layers_is_that_of_layers_that_stand_alone():
    """Each layer has its own averages."""
    params, gradients = draw(0, SMALL), [draw(i + 1, SMALL) for i in range(3)]
    sizes = np.array([1, 10, 0.1, 3, 0], np.float32)[:, None, None]
    for grads in gradients:
        grads["decoder"]["layers"]["mlp"]["up"]["w"] *= sizes
    config = StableSPAM(1e-2, gamma3=0.5, period=2)
    stacked, _ = run(build(config, SMALL), params, gradients)
    alone, _ = run(
        build(config, unstacked_table(SMALL)),
        unstacked(params),
        [unstacked(g) for g in gradients],
    )
    ours, theirs = flatten(unstacked(stacked)), flatten(alone)
    for path in theirs:
        assert np.isfinite(ours[path]).all()  # one layer has no gradient at all
        np.testing.assert_allclose(ours[path], theirs[path], 2e-6, 2e-6, err_msg=path)


def test_moments_in_eight_bits():
    tensors = {"layers/up/w": Tensor((LAYERS, 64, 256), ("layers", None, None), 1.0, "Dense")}
    gradients = [draw(i + 1, tensors) for i in range(6)]
    for config in (SPARSE, StableSPAM(1e-2, period=PERIOD)):
        eight = dataclasses.replace(config, state_dtype="8bit")
        params = draw(0, tensors)
        ours, state = run(build(eight, tensors), params, gradients)
        theirs, _ = run(build(config, tensors), params, gradients)
        held = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantised))
        assert sum(isinstance(x, Quantised) for x in held) == 2
        a, b, start = (flatten(x)["layers/up/w"] for x in (ours, theirs, params))
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b - start)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SPAM(threshold=0.0), "threshold"),
        (lambda: SPAM(period=0), "period"),
        (lambda: SPAM(warmup=-1), "warmup"),
        (lambda: SPAM(patience=-1), "patience"),
        (lambda: SPAM(density=0.0), "density"),
        (lambda: SPAM(density=0.75), "density"),
        (lambda: SPAM(density=1.5), "density"),
        (lambda: SPAM(eps=0.0), "eps"),
        (lambda: StableSPAM(gamma3=1.0), "gamma3"),
        (lambda: StableSPAM(period=0), "period"),
        (lambda: StableSPAM(eps=0.0), "eps"),
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field
