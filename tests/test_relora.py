"""ReLoRA: the merge, the new factors, the states that begin anew, the rate that rises anew."""

import dataclasses

import jax
import numpy as np
import pytest
from test_steps import host_batches, program_of
from tiny import tiny_run, with_phases
from weight_cases import KEY, Matrices, build, matrices, run_steps, trained_state

from jaxpt.checkpoint import Checkpoint
from jaxpt.config import codec
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.growth import Average, Convert, Refactorise, ReLoRA, Restart, Transition, Update
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.optimizers import SGD, AdamW, Constant, Cosine, Group, Linear, Restarts
from jaxpt.program import Program
from jaxpt.state import flatten
from jaxpt.weights import Dense, LoRA, LowRank

LORA = (("*/up", LoRA(4, 8.0)), ("*/down", LoRA(3, 9.0, "8bit")), ("*", Dense()))
FACTORS = {f"layers/{name}/{factor}" for name in ("up", "down") for factor in "ab"}


@pytest.mark.parametrize("scan", [True, False])
def test_a_restart_does_what_it_says_and_nothing_else(scan):
    model = Matrices(LORA, scan=scan).build(5)
    optimizer = build(AdamW(), model)
    optimizer.start = 2  # updates of the phase before
    update = jax.jit(ReLoRA(reset="zero", every=3).bind(model, optimizer))
    state = trained_state(model, optimizer, count=8)
    after = update(state, None, KEY)
    # The merge: the same matrices.
    before, now = matrices(model, state.params), matrices(model, after.params)
    for path, matrix in before.items():
        scale = np.abs(matrix).max(-1, keepdims=True) / 254 if "down" in path else 0
        assert (np.abs(now[path] - matrix) <= scale + 1e-5).all(), path
    # New factors, each layer's its own; the base has changed, all else has not.
    old, new = flatten(state.params), flatten(after.params)
    same = {path for path in old if np.array_equal(old[path], new[path])}
    stay = ("/up/w", "/up/a", "/up/b", "/down/codes", "/down/scales", "/down/a", "/down/b")
    assert same == {path for path in old if not path.endswith(stay)}
    assert {"head/w"} < same
    factors = [path for path in old if path.endswith(("/a", "/b"))]
    for path in factors:
        assert path.endswith("/a") == bool(new[path].any())
    drawn = new["layers/up/a"] if scan else np.stack([new[f"layers_{i}/up/a"] for i in range(3)])
    assert np.abs(drawn).max() <= 1 / np.sqrt(12)
    assert len(np.unique(drawn)) == drawn.size
    # The states of the factors, and only theirs.
    old, new = (flatten(s.opt_state.states) for s in (state, after))
    hit = {path for path in old if not np.array_equal(old[path], new[path])}
    assert {path.rsplit("/", 1)[0] for path in hit} == set(factors)
    assert len(hit) == 2 * len(factors)
    assert not any(new[path].any() for path in hit)
    assert (int(after.opt_state.count), int(after.step)) == (8, 15)
    # Other factors the next time, and nothing in between.
    assert not np.array_equal(
        drawn[0], flatten(update(state, None, jax.random.key(9)).params)[factors[0]]
    )
    for count in (7, 9):
        other = trained_state(model, optimizer, count=count)
        jax.tree.map(np.testing.assert_array_equal, update(other, None, KEY), other)


def test_layers_draw_the_same_stacked_or_not():
    found = []
    for scan in (True, False):
        model = Matrices(LORA, scan=scan).build(5)
        optimizer = build(AdamW(), model)
        state = trained_state(model, optimizer, count=3)
        update = ReLoRA(reset="zero", every=3).bind(model, optimizer)
        new = flatten(jax.jit(update)(state, None, KEY).params)
        if not scan:
            new = {"layers/up/a": np.stack([new[f"layers_{i}/up/a"] for i in range(3)])}
        found.append(new["layers/up/a"])
    np.testing.assert_array_equal(*found)


def test_in_bfloat16_the_merge_rounds_and_the_rest_holds():
    model = Matrices(LORA, dtype="bfloat16").build(5)
    optimizer = build(AdamW(), model)
    state = trained_state(model, optimizer, count=3)
    after = jax.jit(ReLoRA(every=3).bind(model, optimizer))(state, None, KEY)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    up = state.params["layers"]["up"]
    a, b, w = (np.asarray(up[name], np.float64) for name in ("a", "b", "w"))
    want = w + 2.0 * a @ b
    got = np.asarray(after.params["layers"]["up"]["w"], np.float64)
    assert (np.abs(got - want) <= np.abs(want) * 2.0**-8 + 1e-6).all()
    assert (got != want).any()


def test_in_a_run_resumed_on_eight_devices_and_layer_by_layer(tmp_path):
    """Restarts after updates 2 and 4 of 5, the same wherever and however the step runs."""
    weights = (("*/mlp/up", LoRA(4, 8.0)), ("*/mlp/down", LoRA(6, 6.0, "8bit")), ("*", Dense()))
    changes = {
        "model.weights": weights,
        "updates": (ReLoRA(reset="zero", every=2),),
        # Plain momentum: Adam's signs of gradients near 0 would differ by rounding.
        "optimizer": SGD(0.3, clip=None, schedule=Restarts(Cosine(), every=2, warmup=1)),
    }
    run = tiny_run(tmp_path, **changes)
    program = program_of(run)
    program.check()
    batches = host_batches(program, run, 5)
    losses, last = run_steps(program, batches)
    assert losses[-1] < losses[0]
    # Saved after update 3 and restored: the restart comes after update 4 all the same.
    _, middle = run_steps(program, batches[:3])
    assert middle.params["decoder"]["layers"]["mlp"]["up"]["b"].any()
    with Checkpoint().open(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, middle, {})
        checkpoints.wait()
        saved = checkpoints.restore(3, program.abstract)
    resumed, state = run_steps(program, batches[3:], saved)
    assert resumed == losses[3:]
    jax.tree.map(np.testing.assert_array_equal, state, last)
    eight = dataclasses.replace(run, mesh=Mesh(data=2, fsdp=2, tensor=2))
    eight = program_of(eight.replace(step=LayerwiseStep()))
    np.testing.assert_allclose(run_steps(eight, batches)[0], losses, rtol=1e-5)


def test_after_a_full_rank_start_and_with_a_restart_at_a_phase(tmp_path):
    """Three phases: dense, then converted to LoRA, then restarted with the optimizer kept."""
    run = tiny_run(tmp_path, **{"model.layers": 1, "batch": 2})
    dense = run.phases[0]
    weights = (("*/mlp/*", LoRA(4, 8.0)), ("*", Dense()))
    model = dataclasses.replace(run.model, weights=weights)
    lora = dataclasses.replace(dense, name="lora", model=model, begin=(Convert(),))
    restart = dataclasses.replace(dense, name="restart", model=model, begin=(Restart("zero"),))
    run = with_phases(run, dense, lora, restart)
    run.validate()
    vocabulary = Vocabulary(size=260, pad=0, eos=1)
    layout = run.mesh.build()
    programs = [Program(run, i, vocabulary, layout) for i in range(3)]
    for before, program in zip([None, *programs[:2]], programs, strict=True):
        program.check(before)
    assert not programs[1].keeps_optimizer(programs[0])
    assert programs[2].keeps_optimizer(programs[1])
    states = [trained_state(p.model, p.optimizer, count=4) for p in programs[:2]]
    after = programs[1].follow(programs[0], states[0], KEY)
    before = flatten(states[0].params)
    for path, value in flatten(after.params).items():
        if path in before:
            np.testing.assert_array_equal(value, before[path])
        else:
            assert path.endswith("/a") == bool(value.any()), path
    assert int(after.opt_state.count) == 0
    after = programs[2].follow(programs[1], states[1], KEY)
    matrix, same = (
        matrices(p.model, s.params) for p, s in zip(programs[1:], (states[1], after), strict=True)
    )
    for path in matrix:
        np.testing.assert_allclose(same[path], matrix[path], atol=1e-5)
    assert not any(v.any() for p, v in flatten(after.params).items() if p.endswith("/b"))
    old, new = flatten(states[1].opt_state), flatten(after.opt_state)
    for path in old:
        reset = path.rsplit("/", 1)[0].endswith(("/a", "/b"))
        assert np.array_equal(new[path], old[path]) != reset, path
        assert not reset or not new[path].any()


def test_the_learning_rate_has_to_rise_with_it(tmp_path):
    changes = {"model.weights": (("*", LoRA(4)),), "updates": (ReLoRA(every=3),)}
    for schedule in (Linear(), Restarts(Linear(), every=4, warmup=1)):
        with pytest.raises(ConfigError, match="does not rise anew every 3 steps") as error:
            tiny_run(tmp_path, **changes, **{"optimizer.schedule": schedule})
        assert error.value.field == "updates.0.every"
    changes["optimizer.schedule"] = Restarts(Linear(), 3, 1)
    tiny_run(tmp_path, **changes)
    for update in (ReLoRA(every=3), Refactorise()):
        with pytest.raises(ConfigError, match="an Average would mix old and new") as error:
            tiny_run(tmp_path, **changes | {"updates": (Average(), update)})
        assert error.value.field == "updates.1"


@pytest.mark.parametrize(
    ("weights", "groups", "field", "words"),
    [
        ((("*", LowRank(3)),), (), "", "no LoRA weight"),
        (LORA, (Group("*/up/b", frozen=True),), "", "frozen"),
    ],
)
def test_what_cannot_be_done_is_said(weights, groups, field, words):
    model = Matrices(weights).build(5)
    with pytest.raises(ConfigError, match=words) as error:
        ReLoRA().bind(model, build(AdamW(groups=groups), model))
    assert error.value.field == field
    if not groups:
        with pytest.raises(ConfigError, match=words):
            Restart().validate(model, model)
        with pytest.raises(ConfigError, match="changes"):
            Restart().validate(model, Matrices(LORA).build(5))


def test_bad_values_name_their_field_and_good_ones_survive_json():
    for make, field in ((lambda: ReLoRA(every=0), "every"), (lambda: Restart("some"), "reset")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as error:
            make()
        assert error.value.field == field
    update, transition = ReLoRA("random", 0.9, every=5), Restart("zero")
    assert codec.from_json(codec.to_json(update), Update) == update
    assert codec.from_json(codec.to_json(transition), Transition) == transition
    schedule = Restarts(Constant(), every=7, warmup=2)
    assert codec.from_json(codec.to_json(schedule), Restarts) == schedule
