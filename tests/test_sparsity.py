"""Methods of sparse training as pure functions, each against its paper in numpy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_cases import Matrices
from weight_cases import build as built

from jaxpt.config import codec
from jaxpt.duration import share
from jaxpt.errors import ConfigError
from jaxpt.optimizers import Adafactor, AdamW, GaLore
from jaxpt.sparsity import (
    SET,
    SNIP,
    AtStart,
    Gradual,
    GraNet,
    GraSP,
    Magnitude,
    Movement,
    NearZero,
    PruneGroups,
    Random,
    RigL,
    Seen,
    StraightThrough,
    SynFlow,
)
from jaxpt.sparsity.base import dense_twin, weights_of
from jaxpt.sparsity.schedules import cosine, cubic
from jaxpt.sparsity.spread import erk
from jaxpt.weights import Blocks, Dense, Entries, Groups, Masked

SHAPES = {"up": (8, 12), "down": (12, 8)}
RNG = np.random.default_rng(0)
MATRICES = {p: RNG.normal(size=(2, *s)).astype(np.float32) for p, s in SHAPES.items()}
GRADIENTS = {p: RNG.normal(size=(2, *s)).astype(np.float32) for p, s in SHAPES.items()}
TIMES: Any = {"every": 2, "start": 0, "stop": 10}


def see(weight=Masked(0.25), matrices=MATRICES, density=None, **params):  # noqa: B008 (frozen)
    """What methods see: two layers of two matrices, their supports drawn in numpy."""
    found, rng = {}, np.random.default_rng(1)
    for path, w in matrices.items():
        d_in, d_out = w.shape[1:]
        pattern = weight.pattern
        count = pattern.count(density or weight.density, d_in, d_out)
        words = rng.random((2, *pattern.grid(d_in, d_out)))
        if isinstance(pattern, Groups):
            support = jnp.asarray(words.argsort(-2).argsort(-2) < count)
        else:
            support = jnp.asarray([first(layer, count) for layer in words])
        held = np.where(pattern.spread(support, d_in, d_out) | weight.keeps, w, 0)
        keys = jax.random.split(jax.random.key(7), 2)
        own = {name: value[path] for name, value in params.items()}
        found[path] = Seen(weight, (d_in, d_out), support, jnp.asarray(held), own, keys)
    return found


def slopes(matrices):
    return {path: jnp.asarray(GRADIENTS[path]) for path in matrices}


def first(scores, count):
    """Flat: the largest, of equal ones the first."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def renewed(method, seen, step):
    found = jax.jit(lambda step: method.renew(step, seen, slopes))(jnp.int32(step))
    return jax.tree.map(np.asarray, found)


def published_rigl(w, mask, gradient, fraction):
    """Evci et al. 2020, algorithm 1, of one layer: drop by magnitude, grow by gradient, where
    growth is among all that is not held after the drop."""
    n = mask.sum()
    keep = round((1 - fraction) * n)
    left = first(np.where(mask, np.abs(w), -1), keep)
    grown = first(np.where(left, -1, np.abs(gradient)), n - keep)
    return left | grown


def test_rigl():
    matrices = {path: w.copy() for path, w in MATRICES.items()}
    matrices["up"][:, :4] = 0  # as what has just grown: held, and smaller than none that is not
    seen, method = see(matrices=matrices), RigL(**TIMES, drop=0.4)
    step_of = jax.jit(lambda step: method.renew(step, seen, slopes))
    for step in (2, 6, 10):
        got = jax.tree.map(np.asarray, step_of(jnp.int32(step)))
        fraction = 0.4 / 2 * (1 + math.cos(math.pi * step / 10))
        for path, each in seen.items():
            mask = np.asarray(each.support)
            for i in range(2):
                args = matrices[path][i], mask[i], GRADIENTS[path][i], fraction
                np.testing.assert_array_equal(got[path][i], published_rigl(*args))
            assert (got[path] != mask).any() == (step < 10)


def test_set_exchanges_the_smallest_for_any():
    seen = see()
    got = renewed(SET(**TIMES, drop=0.5), seen, 4)
    for path, each in seen.items():
        mask = np.asarray(each.support)
        for i in range(2):
            w, n = np.abs(MATRICES[path][i]), mask[i].sum()
            left = first(np.where(mask[i], w, -1), round(0.5 * n))
            assert (got[path][i] >= left).all()
            assert got[path][i].sum() == n
    assert (got["up"][0] != got["up"][1]).any()


@pytest.mark.parametrize(
    ("method", "pattern"),
    [(SET(**TIMES, drop=0.6), Groups(4)), (RigL(**TIMES, drop=0.6), Blocks(5, 3))],
)
def test_every_competition_holds_as_many_as_before(method, pattern):
    seen = see(Masked(0.5, pattern))
    got = renewed(method, seen, 2)
    for path, each in seen.items():
        np.testing.assert_array_equal(pattern.held(got[path]), pattern.held(each.support))
        assert (got[path] != np.asarray(each.support)).any()


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.01, 1.0, exclude_max=True),
    st.sampled_from([(Entries(), (64, 1)), (Entries(), (7, 5)), (Blocks(3, 5), (8, 12))]),
)
def test_density_asked_is_density_held(density, what):
    pattern, shape = what
    units = pattern.competing(*shape)
    count = pattern.count(density, *shape)
    assert count == max(1, math.floor(density * units + 0.5))
    assert int(np.sum(drawn(pattern, shape)(count))) == count


@functools.cache
def drawn(pattern, shape):
    return jax.jit(lambda count: pattern.draw(jax.random.key(0), count, *shape))


def test_cubic_and_cosine():
    got = cubic(1.0, 0.25, 4)
    want = [1 - 0.75 * (1 - (1 - i / 4) ** 3) for i in range(5)]
    np.testing.assert_allclose(got, want)
    assert (got[0], got[-1]) == (1.0, 0.25)
    np.testing.assert_allclose(cosine(0.3, 2), [0.3, 0.15, 0], atol=1e-7)


@pytest.mark.parametrize("spread", ["uniform", "global", "erk"])
def test_gradual(spread):
    """At every update the density is the schedule's, and only what is held stays."""
    method = Gradual(density=0.25, spread=spread, **TIMES)
    seen = see(Masked(1.0))
    for i in (2, 5):
        got = renewed(method, seen, 2 * i)
        density = 0.25 + 0.75 * (1 - i / 5) ** 3
        total = sum(m.sum() for m in got.values())
        if spread == "uniform":
            for path, mask in got.items():
                counts = [math.floor(96 * density + 0.5)] * 2
                np.testing.assert_array_equal(mask.sum((1, 2)), counts)
                for layer in range(2):
                    want = first(np.abs(MATRICES[path][layer]), counts[0])
                    np.testing.assert_array_equal(mask[layer], want)
        elif spread == "global":
            everything = np.concatenate([np.abs(m).ravel() for m in MATRICES.values()])
            want = first(everything, math.floor(density * 384 + 0.5))
            flat = np.concatenate([got[path].ravel() for path in MATRICES])
            np.testing.assert_array_equal(flat, want)
        else:
            assert abs(total - density * 384) <= 2
        seen = {p: dataclasses.replace(s, support=jnp.asarray(got[p])) for p, s in seen.items()}


def test_erk():
    """Evci et al. 2020: densities in proportion to (n + m) / (n m), what would be above 1 dense."""
    shapes = [(64, 64), (64, 256), (1024, 1024)]
    got = erk(shapes, 0.2)
    sizes = np.array([n * m for n, m in shapes])
    raw = np.array([(n + m) / (n * m) for n, m in shapes])
    assert np.dot(got, sizes) == pytest.approx(0.2 * sizes.sum())
    epsilon = (0.2 * sizes.sum() - sizes[:2].sum()) / (raw * sizes)[2]
    assert epsilon * raw[1] > 1, "the second is dense by the formula too"
    np.testing.assert_allclose(got, [1, 1, epsilon * raw[2]])
    small = erk(shapes[:2], 0.1) / raw[:2]
    np.testing.assert_allclose(small, small[0])


def test_granet_prunes_and_regenerates():
    """Liu et al. 2021: to the cubic target by magnitude, then a share of that for as many by
    gradient."""
    method = GraNet(density=0.25, **TIMES, drop=0.4)
    seen = see(Masked(0.5))
    got = renewed(method, seen, 4)
    target = math.floor(96 * (0.25 + 0.25 * (1 - 2 / 5) ** 3) + 0.5)
    fraction = 0.4 / 2 * (1 + math.cos(math.pi * 2 / 5))
    for path, each in seen.items():
        for i in range(2):
            mask, w = np.asarray(each.support)[i], MATRICES[path][i]
            pruned = first(np.where(mask, np.abs(w), -1), target)
            want = published_rigl(w, pruned, GRADIENTS[path][i], fraction)
            np.testing.assert_array_equal(got[path][i], want)


def quadratic(matrices):
    """Slopes of sum(c / 2 (w - 1)^2), whose Hessian is c."""
    return {p: jnp.abs(GRADIENTS[p]) * (w - 1) for p, w in matrices.items()}


@pytest.mark.parametrize("score", [SNIP(), GraSP(), Magnitude()], ids=lambda s: type(s).__name__)
def test_scores_at_the_start(score):
    method, seen = AtStart(score, 0.25, "global"), see(Masked(1.0))
    got = jax.jit(lambda: method.renew(jnp.int32(0), seen, quadratic))()
    c = {path: np.abs(g) for path, g in GRADIENTS.items()}
    want = {
        "SNIP": lambda w, c: np.abs(w * c * (w - 1)),
        "GraSP": lambda w, c: w * c * c * (w - 1),
        "Magnitude": lambda w, c: np.abs(w),
    }[type(score).__name__]
    scores = np.concatenate([want(MATRICES[p], c[p]).ravel() for p in SHAPES])
    flat = np.concatenate([np.ravel(got[p]) for p in SHAPES])
    np.testing.assert_array_equal(flat, first(scores, 96))


def test_synflow():
    """|w| dR/d|w| of each branch, and the flow that goes through a hidden unit is conserved."""
    rng, names = np.random.default_rng(2), ("mlp/up", "mlp/gate", "mlp/down", "head")
    shapes = {"mlp/up": (4, 6), "mlp/gate": (4, 6), "mlp/down": (6, 4), "head": (4, 5)}
    shapes |= {f"at/{n}": (4, 6) for n in ("query", "key", "value")} | {"at/out": (6, 4)}
    sizes = {p: np.abs(rng.normal(size=(1, *s))).astype(np.float32) for p, s in shapes.items()}
    seen = see(Masked(1.0), sizes)
    got = jax.tree.map(np.asarray, SynFlow()(seen, sizes, None))
    a = {p: x[0].astype(np.float64) for p, x in sizes.items()}
    for name in names[:2]:
        np.testing.assert_allclose(got[name][0], a[name] * a["mlp/down"].sum(1), rtol=1e-5)
    into = a["mlp/up"].sum(0) + a["mlp/gate"].sum(0)
    np.testing.assert_allclose(got["mlp/down"][0], into[:, None] * a["mlp/down"], rtol=1e-5)
    np.testing.assert_allclose(got["at/query"][0], a["at/query"] * a["at/key"].sum(0), rtol=1e-5)
    np.testing.assert_allclose(got["at/key"][0], a["at/key"] * a["at/query"].sum(0), rtol=1e-5)
    flows = got["at/value"][0].sum(0), got["at/out"][0].sum(1)
    np.testing.assert_allclose(*flows, rtol=1e-5, err_msg="synaptic flow is conserved")
    np.testing.assert_allclose(got["head"][0], a["head"], rtol=1e-6)
    fewer = {"at/value": sizes["at/value"][:, :, :2], "at/out": sizes["at/out"]}
    with pytest.raises(ConfigError, match="heads share keys and values"):
        SynFlow()(see(Masked(1.0), fewer), fewer, None)
    shared = SynFlow(head_dim=2)(see(Masked(1.0), fewer), fewer, None)
    out = a["at/out"].sum(1).reshape(3, 2).sum(0)  # of three heads that share one
    np.testing.assert_allclose(shared["at/value"][0], a["at/value"][:, :2] * out, rtol=1e-5)


def test_synflow_in_rounds_leaves_no_layer_empty():
    """A layer of small numbers has as much flow as that behind it; by magnitude it would go."""
    small = {"mlp/up": 1e-3 * MATRICES["up"], "mlp/down": MATRICES["down"]}
    got = renewed(AtStart(SynFlow(20), 0.05, "global"), see(Masked(1.0), small), 0)
    counts = [int(np.sum(got[path])) for path in small]
    assert sum(counts) == math.floor(0.05 * 384 + 0.5)
    assert min(counts) > 5
    sizes = np.concatenate([np.abs(w).ravel() for w in small.values()])
    assert not first(sizes, sum(counts))[:192].any()


def test_random_at_the_start_by_erk():
    got = renewed(AtStart(Random(), 0.25, "erk"), see(Masked(1.0)), 0)
    for mask in got.values():
        assert (np.sum(mask, axis=(1, 2)) == 24).all()
    assert (got["up"][0] != got["up"][1]).any()


def test_straight_through_takes_the_largest_held_or_not():
    seen = see(Masked(1.0, trains="all"), density=0.1)
    got = renewed(StraightThrough(density=0.25), seen, 3)
    for path in SHAPES:
        for i in range(2):
            np.testing.assert_array_equal(got[path][i], first(np.abs(MATRICES[path][i]), 24))


def test_movement_goes_by_scores_and_lets_blocks_come_back():
    weight = Masked(1.0, Blocks(4, 4), "scores")
    scores = {p: RNG.normal(size=(2, s[0] // 4, s[1] // 4)) for p, s in SHAPES.items()}
    seen = see(weight, density=0.3, scores=scores)
    got = renewed(Movement(density=0.5, **TIMES), seen, 10)
    for path in SHAPES:
        for i in range(2):
            np.testing.assert_array_equal(got[path][i], first(np.float32(scores[path][i]), 3))


def test_when_updates_are_due():
    method = RigL(every=3, start=2, stop=12)
    assert [s for s in range(20) if method.due(s)] == [5, 8, 11]
    assert method.updates == 3
    assert [int(method.number(s)) for s in (5, 8, 11)] == [1, 2, 3]


WEIGHTS = (("*/up", Masked(0.25)), ("*", Dense()))


@pytest.mark.parametrize(
    ("method", "weights", "optimizer", "field", "message"),
    [
        (RigL(**TIMES), (("*", Dense()),), AdamW(), "", "no sparse weight"),
        (RigL(**TIMES), WEIGHTS, Adafactor(), "", "layers/up/w does not stand entry by entry"),
        (SET(**TIMES), WEIGHTS, GaLore(rank=2), "", "does not stand entry by entry"),
        (Gradual(density=0.5, **TIMES), WEIGHTS, AdamW(), "density", "0.5 is not below .* 0.25"),
        (AtStart(), WEIGHTS, AdamW(), "", "left units out before they can be scored"),
        (StraightThrough(), WEIGHTS, AdamW(), "", "give Masked.trains='all'"),
        (
            AtStart(Random(), 0.5, "global"),
            (("*", Masked(1.0, Groups(4))),),
            AdamW(),
            "spread",
            "'global' is not valid: .* of every group",
        ),
        (
            Gradual(density=0.1, **TIMES),
            (("*/up", Masked(0.25)), ("*", Masked(0.5))),
            AdamW(),
            "",
            "must begin with one density",
        ),
    ],
)
def test_what_does_not_go_together(method, weights, optimizer, field, message):
    model = Matrices(weights).build(5)
    with pytest.raises(ConfigError, match=message) as error:
        method.before(model, built(optimizer, model))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RigL(drop=1.0), "drop"),
        (lambda: Gradual(density=0.0), "density"),
        (lambda: AtStart(spread="even"), "spread"),  # pyright: ignore[reportArgumentType]
        (lambda: StraightThrough(every=0), "every"),
        (lambda: SynFlow(0), "rounds"),
        (lambda: NearZero(edges=(0.1, 0.01)), "edges"),
        (lambda: PruneGroups(channels=0.0), "channels"),
    ],
)
def test_bad_fields(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_configs_survive_json():
    for config in (
        RigL(every=share(0.1)),
        AtStart(SynFlow(5), 0.1, "erk"),
        Movement(density=0.2),
        NearZero(edges=(1e-3,)),
    ):
        assert codec.from_json(codec.to_json(config), type(config)) == config


def test_the_dense_twin_has_the_same_other_tensors():
    model = Matrices((("*/up", Masked(0.25)), ("*", Dense()))).build(5)
    twin = dense_twin(model)
    assert twin.tensors.keys() == model.tensors.keys() - {"layers/up/mask"}
    assert {t.weight for p, t in twin.tensors.items() if p.endswith("/w")} == {"Dense"}
    assert list(weights_of(model)) == ["layers/up"]
