"""PELA: a factorised model learns from the dense one that it was made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import host_batches, program_of
from tiny import tiny_run, with_phases
from weight_cases import KEY, matrices, run_steps

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.growth import Convert, Keep
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.models.distilled import Distilled
from jaxpt.models.electra import electra_small
from jaxpt.models.stack import watched
from jaxpt.objectives import PELA, CausalLM, Objective, ReplacedTokens, SpanCorruption
from jaxpt.program import Program
from jaxpt.state import flatten, trainable, whole
from jaxpt.steps import accumulated_gradients, loss_function
from jaxpt.weights import Dense, LoRA, LowRank

LOW = (("*/attention/*", LowRank(0.5)), ("*/mlp/*", LoRA(2)), ("*", Dense()))


def models(run, **changes):
    """(teacher, both), as small as ``tiny``'s."""
    teacher = dataclasses.replace(run.model, **changes)
    return teacher, Distilled(dataclasses.replace(teacher, weights=LOW), teacher)


def drawn(model, seed=0):
    """Parameters in numpy: norms about 1, all else by its standard deviation."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray((t.weight == "norm") + 0.2 * rng.normal(size=t.shape), t.dtype)
        for path, t in model.tensors.items()
    }
    return jax.tree.unflatten(jax.tree.structure(model.abstract()), flat.values())


def distilled_run(tmp_path, objective, **changes):
    kind = "encoder_decoder" if isinstance(objective.objective, SpanCorruption) else "decoder"
    run = tiny_run(tmp_path, kind=kind, objective=objective.objective)
    _, both = models(run)
    return run.replace(model=both, objective=objective, **changes)


def padded(batch):
    """The batch with padding at the end of its rows, other in each."""
    ends = np.random.default_rng(0).uniform(0.4, 1, len(batch["tokens"]))
    return {
        name: np.where(np.arange(x.shape[1]) < ends[:, None] * x.shape[1], x, 0).astype(x.dtype)
        for name, x in batch.items()
    }


@pytest.mark.parametrize("inner", [CausalLM(), SpanCorruption()], ids=["causal", "spans"])
def test_the_loss_is_what_it_says(tmp_path, inner):
    """Each term against numpy, from the layers' outputs, the logits and the matrices."""
    objective = PELA(inner, features=0.5, logits=0.25, perturbation=2.0)
    run = distilled_run(tmp_path, objective, **{"model.student.scan": False})
    run = run.replace(**{"model.teacher.scan": False})
    program = program_of(run)
    program.check()
    batch = padded(host_batches(program, run, 1)[0])
    params = drawn(program.model)

    @jax.jit
    def all_of_it(params):
        network = program.model.bind(params)
        found = objective.loss(network, batch, None)
        (states, mine), (targets, taught) = network.both(batch, None)
        plain = inner.loss(network.student, batch, None)
        pair = network.student.logits(states), network.teacher.logits(targets)
        return found, plain, mine, taught, *map(jax.nn.log_softmax, pair)

    with program.layout.active():
        found, plain, mine, taught, log_mine, log_taught = jax.device_get(all_of_it(params))
    weights = batch["weights"].astype(np.float64)
    count = weights.sum()
    streams = ["input_segments", "segments"][-len(mine) :]
    features = 0.0
    for row, weight in enumerate(weights.sum(1)):
        layers = [
            np.mean(np.square(x - y)[row][batch[name][row] != 0])
            for xs, ys, name in zip(mine, taught, streams, strict=True)
            for x, y in zip(np.float64(xs), np.float64(ys), strict=True)
        ]
        assert len(layers) == 2 * len(streams)
        features += weight * np.mean(layers)
    divergence = np.sum(weights * np.sum(np.exp(log_taught) * (log_taught - log_mine), -1))
    held = matrices(program.model, params)
    pairs = [
        (held[path], held[path.replace("student", "teacher")])
        for path, product in program.model.products.items()
        if not isinstance(product.weight, Dense)
    ]
    distance = np.mean([np.sum((new - old) ** 2) / np.sum(old**2) for new, old in pairs])
    for name, want in (
        ("features", features),
        ("logits", divergence),
        ("perturbation", count * distance),
    ):
        got, over = found.metrics[name]
        assert float(over) == count
        assert float(got) == pytest.approx(want, rel=1e-4), name
        assert want > 0
    total = plain.total + 0.5 * features + 0.25 * divergence + 2 * count * distance
    assert float(found.total) == pytest.approx(float(total), rel=1e-4)
    assert float(found.metrics["cross_entropy"][0]) == pytest.approx(float(plain.total), rel=1e-6)


def test_gradients_go_to_the_student_alone_and_do_not_depend_on_how_the_batch_is_cut(tmp_path):
    objective = PELA(CausalLM(), logits=0.5)
    run = distilled_run(tmp_path, objective, batch=8)
    program = program_of(run)
    batch = host_batches(program, run, 1)[0]
    batch = padded(batch)
    params, loss = drawn(program.model), loss_function(program.model, objective)
    trained = program.optimizer.rules

    @jax.jit
    def both(params):
        return [
            accumulated_gradients(loss, params, batch, KEY, parts, trained)[1] for parts in (1, 4)
        ]

    with program.layout.active():
        one, four = both(params)
    for path, grad in flatten(one).items():
        np.testing.assert_allclose(grad, flatten(four)[path], 1e-4, 1e-3, err_msg=path)
    paths = set(flatten(one))
    assert paths == {p for p, t in program.model.tensors.items() if t.trained}
    assert all(path.startswith("student/") for path in paths)
    assert not any(path.endswith("up/w") for path in paths)
    assert len(flatten(trainable(params))) > len(paths)
    assert whole(one, params)["teacher"] is not None


def test_three_phases_dense_then_taught_then_alone(tmp_path):
    """The student begins as truncated decompositions, learns while its teacher stays, and goes on
    with what it learned; on eight devices as on one."""
    run = tiny_run(tmp_path, steps=4)
    dense = run.phases[0]
    _, both = models(run)
    taught = dataclasses.replace(
        dense, name="pela", model=both, begin=(Convert(),), objective=PELA(CausalLM())
    )
    alone = dataclasses.replace(dense, name="alone", model=both.student, begin=(Keep("student"),))
    run = with_phases(run, dense, taught, alone)
    run.validate()
    vocabulary, losses, last = program_of(run).vocabulary, [], []
    for mesh in (Mesh(devices=1), Mesh(data=2, fsdp=2, tensor=2)):
        layout = mesh.build()
        programs = [Program(run, i, vocabulary, layout) for i in range(3)]
        for before, program in zip([None, *programs], programs, strict=False):
            program.check(before)
        first = jax.device_put(
            dataclasses.replace(
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), programs[0].abstract),
                params=drawn(programs[0].model),
            ),
            jax.tree.map(lambda x: x.sharding, programs[0].abstract),
        )
        start = programs[1].follow(programs[0], first, KEY)
        if mesh.devices == 1:
            begins_as_its_teacher(programs, first, jax.device_get(start))
        kept = jax.device_get(start.params)
        found, state = run_steps(programs[1], host_batches(program_of(run), run, 4), start)
        losses.append(found)
        last.append(jax.device_get(state))
    np.testing.assert_allclose(*losses, rtol=2e-4)
    assert losses[0][-1] < losses[0][0]
    before, after = flatten(kept), flatten(last[0].params)
    for path, tensor in programs[1].model.tensors.items():
        assert np.array_equal(before[path], after[path]) != tensor.trained, path
    states = {p.removeprefix("states/").rsplit("/", 1)[0] for p in flatten(last[0].opt_state)}
    assert not any(path.startswith("teacher") for path in states)
    end = jax.device_get(programs[2].follow(programs[1], state, KEY))
    want = last[1].params["student"]
    jax.tree.map(np.testing.assert_array_equal, end.params, want)


def begins_as_its_teacher(programs, first, start):
    held = matrices(programs[0].model, jax.device_get(first).params)
    now = matrices(programs[1].model, start.params)
    for path, matrix in held.items():
        np.testing.assert_array_equal(now[f"teacher/{path}"], matrix)
        mine = now[f"student/{path}"]
        if "/attention/" not in path:
            np.testing.assert_array_equal(mine, matrix)
            continue
        rank = 4  # half of 16 x 16 numbers
        tail = np.linalg.svd(matrix, compute_uv=False)[:, rank:]
        error = np.linalg.norm(mine - matrix, axis=(1, 2))
        np.testing.assert_allclose(error, np.linalg.norm(tail, axis=1), rtol=1e-3)
    jax.tree.map(
        np.testing.assert_array_equal, start.params["teacher"], jax.device_get(first).params
    )


@pytest.mark.parametrize("window", [(None,), (None, 16)])
def test_what_is_watched_is_what_the_layers_give(tmp_path, window):
    run = tiny_run(tmp_path, **{"model.attention.window": window})
    batch = {"tokens": np.arange(16).reshape(2, 8)}
    found = {}
    for scan in (True, False):
        model = dataclasses.replace(run.model, scan=scan).build(260)
        params = drawn(run.model.build(260))
        if not scan:
            layers = params["decoder"].pop("layers")
            for i in range(2):
                params["decoder"][f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)

        @jax.jit
        def states(params, model=model):
            with watched() as outputs:
                watched_states = model.bind(params)(batch)
            return outputs, watched_states, model.bind(params)(batch)

        with run.mesh.build().active():
            ((outputs,), watched_states, plain) = states(params)
        assert len(outputs) == 2 // len(window)
        np.testing.assert_allclose(watched_states, plain, atol=1e-6)
        found[scan] = outputs
    np.testing.assert_allclose(found[True], found[False], atol=2e-5)
    assert np.abs(found[True][-1]).max() > 0.1


def test_what_cannot_be_done_is_said(tmp_path):
    run = tiny_run(tmp_path)
    teacher, both = models(run)
    for make, field in (
        (lambda: PELA(CausalLM(), features=-1.0), "features"),
        (lambda: PELA(ReplacedTokens()), "objective"),
        (lambda: Distilled(teacher, dataclasses.replace(teacher, kind="encoder")), "student.kind"),
        (lambda: Distilled(electra_small().discriminator, electra_small().generator), "student"),
        (lambda: run.replace(objective=PELA(CausalLM())), "objective"),
        (lambda: run.replace(model=both), "objective"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert error.value.field == field
    deeper = dataclasses.replace(teacher, layers=3)
    for model, objective, field, step in (
        (Distilled(teacher, teacher), PELA(CausalLM(), features=0.0), "model", None),
        (Distilled(both.student, deeper), PELA(CausalLM(), perturbation=0.0), "features", None),
        (both, PELA(CausalLM()), "step", LayerwiseStep()),
    ):
        changes = {"model": model, "objective": objective} | ({"step": step} if step else {})
        program = program_of(run.replace(**changes))
        with pytest.raises(ConfigError) as error, program.layout.active():
            jax.eval_shape(program.step_function, program.abstract, program.abstract_batch, KEY)
        assert error.value.field == field


def test_round_trips_through_json():
    objective = PELA(CausalLM(z_loss=1e-4), features=2.0, logits=0.5, perturbation=0.0)
    assert codec.from_json(codec.to_json(objective), Objective) == objective
    assert objective.validated == ("features", "logits")
