"""Low-rank factors inside the step: made even, decayed, their moments begun anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import host_batches, program_of
from tiny import tiny_run
from weight_cases import KEY, Matrices, build, matrices, run_steps, trained_state

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.growth import FrobeniusDecay, Refactorise, ResetMoments, Update
from jaxpt.growth.frobenius import gradients
from jaxpt.growth.refactorise import even
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.optimizers import SGD, AdamW, GaLore, Group
from jaxpt.state import flatten
from jaxpt.weights import Dense, Grouped, LoRA, LowRank, SparsePlusLowRank

LOW = (
    ("*/up", LowRank(4)),
    ("*/down", SparsePlusLowRank(3, 6.0, Grouped(4))),
    ("head", LoRA(99, 16.0)),  # as many as there can be: 8
)


@pytest.mark.parametrize(("n", "m", "r"), [(12, 20, 4), (20, 12, 5), (8, 6, 6), (4, 9, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_even_factors_have_the_same_product(n, m, r, dtype):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), dtype) for s in ((n, r), (r, m)))
    a = a * 30  # uneven
    left, right = jax.jit(even)(a, b)
    assert (left.shape, right.shape, left.dtype) == (a.shape, b.shape, a.dtype)
    before, after = (np.float64(x) @ np.float64(y) for x, y in ((a, b), (left, right)))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(after - before).max() < tolerance * np.abs(before).max()
    s = np.linalg.svd(before, compute_uv=False)[: min(n, m, r)]
    for gram in (np.float64(left).T @ np.float64(left), np.float64(right) @ np.float64(right).T):
        top = gram[: len(s), : len(s)]
        np.testing.assert_allclose(top, np.diag(s), atol=2 * tolerance * s[0])


def test_directions_that_the_product_lacks_stay_alive():
    rng = np.random.default_rng(0)
    a, b = (jnp.float32(rng.normal(size=s)) for s in ((12, 4), (4, 20)))
    b = b.at[2:].set(0)  # of rank 2
    left, right = even(a, b)
    np.testing.assert_allclose(left @ right, a @ b, atol=2e-5)
    lengths = np.linalg.norm(left, axis=0)
    assert (lengths > 1e-4).all()
    np.testing.assert_allclose(right[2:], 0, atol=1e-2)
    same = even(a, b * 0)  # as SLTrain and LoRA begin
    np.testing.assert_array_equal(same[0], a)
    assert not same[1].any()


@pytest.mark.parametrize("scan", [True, False])
def test_refactorise_every_so_many_updates_of_the_phase(scan):
    model = Matrices(LOW, scan=scan).build(5)
    optimizer = build(AdamW(), model)
    optimizer.start = 2  # updates of the phase before
    function = jax.jit(Refactorise(every=3).bind(model, optimizer))
    state = trained_state(model, optimizer, count=8)
    after = function(state, None, KEY)
    before, now = matrices(model, state.params), matrices(model, after.params)
    for path, matrix in before.items():
        np.testing.assert_allclose(now[path], matrix, atol=1e-5, err_msg=path)
    flat, new = flatten(state.params), flatten(after.params)
    for path in flat:
        assert np.array_equal(flat[path], new[path]) == (path[-2:] not in ("/a", "/b")), path
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    for count in (7, 9):
        other = trained_state(model, optimizer, count=count)
        jax.tree.map(np.testing.assert_array_equal, function(other, None, KEY), other)


CASES = {
    "factors": (ResetMoments(every=4), lambda path: path.endswith(("/a", "/b"))),
    "named": (
        ResetMoments(every=4, patterns=("*/up/a", "*/scale", "head/*")),
        lambda path: path in ("layers/up/a", "layers/scale", "head/a", "head/b"),
    ),
}


@pytest.mark.parametrize(("update", "meant"), CASES.values(), ids=CASES)
def test_reset_moments_resets_what_it_names_and_nothing_else(update, meant):
    weights = (*LOW[:2], ("head", LowRank(4)))
    model = Matrices(weights).build(5)
    optimizer = build(AdamW(), model)
    state = trained_state(model, optimizer, count=4)
    after = jax.jit(update.bind(model, optimizer))(state, None, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    before, now = flatten(state.opt_state.states), flatten(after.opt_state.states)
    hit = {path for path in before if not np.array_equal(before[path], now[path])}
    assert hit == {path for path in before if meant(path.rsplit("/", 1)[0])}
    assert hit
    assert not any(now[path].any() for path in hit)
    assert int(after.opt_state.count) == 4


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_pruned_moments_keep_the_asked_share(monkeypatch, reset, state_dtype):
    monkeypatch.setattr("jaxpt.optimizers.eight_bit.LEAST", 1)
    model = Matrices((("*/up", LowRank(10)), ("*", Dense()))).build(5)
    optimizer = build(AdamW(state_dtype=state_dtype), model)
    state = trained_state(model, optimizer, count=5)
    if state_dtype == "8bit":  # codes of all kinds
        codes = iter(range(10**6))
        states = jax.tree.map(
            lambda x: (
                x
                if x.dtype != jnp.uint8
                else jax.random.randint(jax.random.key(next(codes)), x.shape, 1, 256).astype(
                    x.dtype
                )
            ),
            state.opt_state.states,
        )
        state.opt_state = state.opt_state._replace(states=states)
    update = ResetMoments(every=5, reset=reset, share=0.8)
    after = jax.jit(update.bind(model, optimizer))(state, None, KEY)
    for name in ("a", "b"):
        old, new = (flatten(s.opt_state.states["layers"]["up"][name]) for s in (state, after))
        which = "mu/codes" if state_dtype == "8bit" else "mu"
        other = which.replace("mu", "nu")
        for before, mu, nu in zip(old[which], new[which], new[other], strict=True):  # each layer
            kept = np.asarray(mu) != 0
            assert kept.mean() == pytest.approx(0.2, abs=0.005 if reset == "magnitude" else 0.1)
            np.testing.assert_array_equal(np.asarray(nu) != 0, kept)
            np.testing.assert_array_equal(np.asarray(mu)[kept], np.asarray(before)[kept])
            if reset == "magnitude" and state_dtype == "float32":
                sizes = np.abs(before)
                assert sizes[kept].min() > sizes[~kept].max()


def test_frobenius_decay_is_a_step_down_its_penalty():
    model = Matrices((*LOW[:2], ("head", Dense()))).build(5)
    optimizer = build(AdamW(groups=(Group("*/b", lr_scale=0.5),)), model)
    state = trained_state(model, optimizer, count=1)
    after = jax.jit(FrobeniusDecay(0.3).bind(model, optimizer))(state, None, KEY)

    def penalty(params):
        pairs = [
            (params["layers"][name]["a"], params["layers"][name]["b"]) for name in ("up", "down")
        ]
        return 0.3 / 2 * sum(jnp.sum(jnp.square(a @ b)) for a, b in pairs)

    slopes = flatten(jax.grad(penalty, allow_int=True)(state.params))
    before, now = flatten(state.params), flatten(after.params)
    for path, old in before.items():
        rate = 0.05 if path.endswith("/b") else 0.1
        if model.tensors[path].trained:
            np.testing.assert_allclose(now[path], old - rate * slopes[path], atol=1e-6)
        else:
            np.testing.assert_array_equal(now[path], old)
    moved = [path for path in before if not np.array_equal(now[path], before[path])]
    assert len(moved) == 4
    a, b = jnp.ones((2, 5, 3)), jnp.ones((2, 3, 4))
    want = jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b)) / 2, (0, 1))(a, b)
    jax.tree.map(np.testing.assert_allclose, gradients(a, b), want)


def test_in_a_run_on_eight_devices_as_on_one_and_layer_by_layer(tmp_path):
    """Refactorised with the moments begun anew: the losses do not depend on where and how."""
    updates = (Refactorise(every=2), ResetMoments(every=2), FrobeniusDecay(0.1))
    weights = (("*/query", LowRank(6)), ("*/down", LoRA(4, 8.0)), ("*", Dense()))
    # Plain momentum: Adam's signs of gradients near 0 would differ by rounding.
    optimizer = SGD(0.3, clip=None)
    changes = {"model.weights": weights, "updates": updates, "optimizer": optimizer}
    run = tiny_run(tmp_path, **changes)
    eight = dataclasses.replace(run, mesh=Mesh(data=2, fsdp=2, tensor=2))
    losses = []
    for changed in (run, eight.replace(step=LayerwiseStep())):
        program = program_of(changed)
        found, state = run_steps(program, host_batches(program, run, 4))
        losses.append(found)
        for b in (jax.device_get(flatten(state.params))[f"decoder/layers/{w}/b"] for w in WHERE):
            gram = b @ b.swapaxes(1, 2)
            uneven = np.abs(gram - gram * np.eye(len(gram[0]))).max()
            assert uneven < 1e-5 * np.abs(gram).max()
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


WHERE = ("attention/query", "mlp/down")
ADAM = AdamW()


@pytest.mark.parametrize(
    ("update", "weights", "optimizer", "field", "words"),
    [
        (Refactorise(), (("*", Dense()),), ADAM, "", "no low-rank weight"),
        (ResetMoments(), (("*", Dense()),), ADAM, "", "no low-rank weight"),
        (FrobeniusDecay(), (("*", Dense()),), ADAM, "", "no low-rank weight"),
        (ResetMoments(patterns=("x",)), LOW, ADAM, "patterns.0", "matches no parameter"),
        (ResetMoments(patterns=("head/w",)), LOW, ADAM, "", "frozen"),
        (FrobeniusDecay(), LOW, AdamW(groups=(Group("head/b", frozen=True),)), "", "frozen"),
        (
            ResetMoments(reset="magnitude"), LOW, SGD(momentum=0.0), "reset", "no moments called"
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(update, weights, optimizer, field, words):
    model = Matrices(weights).build(5)
    with pytest.raises(ConfigError, match=words) as error:
        update.bind(model, build(optimizer, model))
    assert error.value.field == field


def test_projected_moments_begin_anew_too():
    """Any optimizer's state: here a subspace with its moments."""
    model = Matrices((*LOW[:2], ("head", Dense()))).build(5)
    optimizer = build(GaLore(rank=2), model)
    state = trained_state(model, optimizer, count=200)
    after = jax.jit(ResetMoments().bind(model, optimizer))(state, None, KEY)
    want = optimizer.init(state.params).states["layers"]["up"]
    jax.tree.map(np.testing.assert_array_equal, after.opt_state.states["layers"]["up"], want)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Refactorise(0), "every"),
        (lambda: ResetMoments(every=0), "every"),
        (lambda: ResetMoments(reset="all"), "reset"),  # type: ignore[arg-type]
        (lambda: ResetMoments(share=0.0), "share"),
        (lambda: FrobeniusDecay(0.0), "decay"),
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


@pytest.mark.parametrize(
    "value", [Refactorise(7), ResetMoments("random", 0.9), FrobeniusDecay(0.2)]
)
def test_round_trips_through_json(value):
    assert codec.from_json(codec.to_json(value), Update) == value
