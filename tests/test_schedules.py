"""Exact values of the schedules where their pieces meet, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.config import codec
from jaxpt.duration import Duration, examples, seconds, share, steps, tokens
from jaxpt.errors import ConfigError
from jaxpt.optimizers import (
    AdamW,
    Constant,
    Cosine,
    Linear,
    ReciprocalSqrt,
    Restarts,
    Schedule,
    WarmupStableDecay,
)

TOTAL = 100


def in_steps(duration: Duration) -> int | None:
    return duration.in_steps(tokens_per_step=50, batch=5, phase_steps=TOTAL)


def in_steps_of_unknown_phase(duration: Duration) -> int | None:
    return duration.in_steps(tokens_per_step=50, batch=5, phase_steps=None)


# (schedule, {step: multiplier}); a warmup of 9 steps rises by tenths.
VALUES = [
    (Constant(), {0: 1, 99: 1, 10**6: 1}),
    (Constant(warmup=9), {0: 0.1, 1: 0.2, 8: 0.9, 9: 1, 10: 1, 99: 1}),
    (Constant(warmup=1), {0: 0.5, 1: 1}),
    (Linear(), {0: 1, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0, 200: 0}),
    (Linear(warmup=20, final=0.2), {0: 1 / 21, 19: 20 / 21, 20: 1, 60: 0.6, 100: 0.2, 101: 0.2}),
    (Cosine(final=0.0), {0: 1, 25: 0.5 + 0.5**1.5, 50: 0.5, 100: 0, 200: 0}),
    (Cosine(warmup=20), {0: 1 / 21, 20: 1, 60: 0.55, 100: 0.1, 150: 0.1}),
    (Cosine(warmup=100), {0: 1 / 101, 99: 100 / 101, 100: 1, 101: 0.1}),
    (ReciprocalSqrt(), {0: 1, 99: 1, 10_000: 1, 40_000: 0.5, 1_000_000: 0.1}),
    (ReciprocalSqrt(warmup=4), {0: 1, 4: 1, 16: 0.5, 64: 0.25, 100: 0.2}),
    (ReciprocalSqrt(warmup=4, ramp=True), {0: 0.2, 3: 0.8, 4: 1, 16: 0.5}),
    (ReciprocalSqrt(warmup=4, decay=72), {16: 0.5, 28: 28**-0.5 * 2, 64: 0.125, 100: 0}),
    (ReciprocalSqrt(warmup=0), {0: 1, 1: 1, 4: 0.5}),
    (WarmupStableDecay(), {0: 1, 89: 1, 90: 1, 95: 0.5, 99: 0.1, 100: 0, 101: 0}),
    (
        WarmupStableDecay(warmup=9, decay=20, final=0.5),
        {0: 0.1, 8: 0.9, 9: 1, 80: 1, 90: 0.75, 100: 0.5},
    ),
    (WarmupStableDecay(decay=64, shape="sqrt"), {36: 1, 40: 0.75, 52: 0.5, 100: 0}),
    (WarmupStableDecay(decay=64, shape="cosine"), {36: 1, 68: 0.5, 100: 0}),
    (WarmupStableDecay(warmup=50, decay=50), {49: 50 / 51, 50: 1, 75: 0.5, 100: 0}),
    (WarmupStableDecay(decay=0), {0: 1, 99: 1}),
    # Linear from 1 to 0 but for rises of 4 steps at 20, 40, 60, 80.
    (
        Restarts(Linear(), every=20, warmup=4),
        {0: 1, 19: 0.81, 20: 0.2 * 0.8, 23: 0.8 * 0.77, 24: 0.76, 80: 0.2 * 0.2, 99: 0.01},
    ),
    (Restarts(Constant(warmup=9), every=40, warmup=3), {0: 0.1, 9: 1, 39: 1, 40: 0.25, 43: 1}),
]
values = pytest.mark.parametrize(
    ("schedule", "expected"), [pytest.param(s, e, id=f"{s}") for s, e in VALUES]
)


@values
def test_values(schedule, expected):
    function = schedule.build(TOTAL, in_steps)
    at = jnp.asarray(list(expected), jnp.int32)
    got = jax.jit(jax.vmap(function))(at)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, list(expected.values()), 2e-6, 2e-7)
    assert function(0).dtype == jnp.float32  # also outside of a trace, with a plain number
    np.testing.assert_allclose(function(0), got[0] if 0 in expected else function(at * 0)[0])


@values
def test_multipliers_lie_between_0_and_1_and_rise_and_fall_once(schedule, expected):
    curve = np.asarray(jax.jit(jax.vmap(schedule.build(TOTAL, in_steps)))(jnp.arange(TOTAL + 50)))
    assert ((curve >= 0) & (curve <= 1)).all()
    assert curve[:TOTAL].min() > 0  # no update of the phase is wasted
    ends = (
        range(schedule.every, len(curve), schedule.every) if isinstance(schedule, Restarts) else []
    )
    for piece in np.split(curve, ends):
        top = int(piece.argmax())
        assert (np.diff(piece[: top + 1]) >= 0).all()
        assert (np.diff(piece[top:]) <= 1e-7).all()


@pytest.mark.parametrize(
    "warmup", [20, 20.0, 0.2, share(0.2), steps(20), tokens(1000), examples(100)]
)
def test_lengths_in_every_unit(warmup):
    function = Linear(warmup=warmup).build(TOTAL, in_steps)
    reference = Linear(warmup=20).build(TOTAL, in_steps)
    at = jnp.arange(TOTAL)
    np.testing.assert_array_equal(jax.vmap(function)(at), jax.vmap(reference)(at))


@pytest.mark.parametrize(
    ("schedule", "field", "words"),
    [
        (Linear(), "", "needs the phase's length"),
        (Restarts(Linear()), "schedule", "needs the phase's length"),
        (Restarts(Constant(), every=9, warmup=9), "warmup", "do not fit between restarts"),
        (Cosine(), "", "needs the phase's length"),
        (WarmupStableDecay(decay=10), "", "needs the phase's length"),
        (ReciprocalSqrt(decay=10), "", "needs the phase's length"),
        (Constant(warmup=0.1), "warmup", "cannot be told in steps"),
        (Constant(warmup=seconds(3)), "warmup", "cannot be told in steps"),
        (ReciprocalSqrt(warmup=share(0.1)), "warmup", "cannot be told in steps"),
    ],
)
def test_unknown_length(schedule, field, words):
    with pytest.raises(ConfigError, match=words) as error:
        schedule.build(None, in_steps_of_unknown_phase)
    assert error.value.field == field


def test_some_schedules_need_no_length():
    for schedule in (Constant(warmup=4), ReciprocalSqrt(warmup=4), Constant(warmup=tokens(200))):
        assert schedule.build(None, in_steps_of_unknown_phase)(4) == 1


@pytest.mark.parametrize(
    ("schedule", "field", "words"),
    [
        (Constant(warmup=101), "warmup", "101 steps do not fit into a phase of 100"),
        (Linear(warmup=tokens(5050)), "warmup", "101 steps do not fit"),
        (ReciprocalSqrt(warmup=101, ramp=True), "warmup", "do not fit"),
        (WarmupStableDecay(decay=101), "decay", "do not fit"),
        (WarmupStableDecay(warmup=60, decay=50), "decay", "exceed the phase's 100"),
    ],
)
def test_longer_than_the_phase(schedule, field, words):
    with pytest.raises(ConfigError, match=words) as error:
        schedule.build(TOTAL, in_steps)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Constant(warmup=-1), "warmup.value"),
        (lambda: Constant(warmup=2.5), "warmup"),
        (lambda: Cosine(final=1.5), "final"),
        (lambda: Linear(final=-0.1), "final"),
        (lambda: WarmupStableDecay(decay=-3), "decay.value"),
        (lambda: WarmupStableDecay(shape="cubic"), "shape"),
    ],
)
def test_bad_values_name_their_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_learning_rate_is_lr_times_the_schedule():
    rate = AdamW(lr=0.004, schedule=Linear()).learning_rate(TOTAL, in_steps)
    assert rate(jnp.int32(50)).dtype == jnp.float32
    np.testing.assert_allclose(rate(jnp.int32(50)), 0.002, 1e-6)


@values
def test_round_trips_through_json(schedule, expected):
    assert codec.from_json(codec.to_json(schedule), Schedule) == schedule


def test_every_schedule_has_values():
    assert {type(s) for s, _ in VALUES} == set(Schedule.__subclasses__())
