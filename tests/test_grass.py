"""Grass, of whole gradients and of rows alone, against its algorithm in numpy and one another."""

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layerwise import trained
from test_optimizers import adam, assert_close, build, draw, run, unstacked
from test_optimizers import unstacked_table as alone_table
from test_steps import host_batches, program_of
from tiny import tiny_run

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.layerwise import LayerwiseStep, _sparing
from jaxpt.mesh import Mesh
from jaxpt.objectives.base import Loss
from jaxpt.optimizers import AdamW, Grass, Group
from jaxpt.paths import without_number
from jaxpt.state import TrainState, flatten, trainable, unflatten, whole
from jaxpt.steps import loss_function, train_step
from jaxpt.weights import Dense, FanIn, Rows
from jaxpt.weights.base import Record, Rules, Scope, Tensor, replaced
from jaxpt.weights.module import split

LAYERS, STEPS, RANK = 2, 20, 3
TENSORS = {
    "layers/wide/w": Tensor((LAYERS, 5, 7), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "tall/w": Tensor((8, 5), ("mlp", "embed"), 0.5, "Dense"),
    "square/w": Tensor((5, 5), ("mlp", "embed"), 0.5, "Dense"),
    "thin/w": Tensor((3, 6), (None, "embed"), 0.5, "Dense"),  # rank >= its smaller side
    "norm/scale": Tensor((4,), ("width",), 0.0, "norm"),
}
SOME = {path: TENSORS[path] for path in ("layers/wide/w",)}
OPTIONS = {"lr": 1e-2, "clip": None, "rank": RANK, "period": 6}
ROWS = {
    "top": Grass(**OPTIONS),
    "kept": Grass(**OPTIONS, reset=False, side="larger", scale=0.5, weight_decay=0.1),
    "norm": Grass(**OPTIONS, choice="norm"),
    "square": Grass(**OPTIONS, choice="square", replace=False, side="out"),
    "uniform": Grass(**OPTIONS, choice="uniform", replace=False, side="in"),
}


def key_of(config, path, layer):
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(without_number(path).encode()))
    return jax.random.fold_in(key, layer)


def drawn(c, g, key):
    """P [n, R] as in section 3.3, one column for each draw; the draws are JAX's."""
    n = len(g)
    norms = np.linalg.norm(g, axis=1)
    if c.choice == "top":
        return np.eye(n)[:, np.sort(np.argsort(-norms)[: c.rank])]
    q = {"norm": norms, "square": norms**2, "uniform": np.ones(n)}[c.choice]
    q = q / q.sum()
    if c.replace:
        rows = np.sort(jax.random.categorical(key, jnp.log(jnp.float32(q)), shape=(c.rank,)))
        return np.eye(n)[:, rows] / np.sqrt(c.rank * q[rows])
    times = np.asarray(jax.random.exponential(key, (n,)), np.float64) / q
    order = np.argsort(times)
    rows = np.sort(order[: c.rank])
    chance = 1 - np.exp(-q[rows] * times[order[c.rank]])
    return np.eye(n)[:, rows] / np.sqrt(c.rank / n if c.choice == "uniform" else chance)


def published(c, s, g, t, key):
    """Muhamed et al. 2024, algorithm 1, for one matrix whose projected side comes first."""
    if (t - 1) % c.period == 0:
        s["p"] = drawn(c, g, jax.random.fold_in(key, t - 1))
        if c.reset:
            s["m"] = s["v"] = 0
    since = (t - 1) % c.period + 1 if c.reset else t
    return c.scale * s["p"] @ adam(c, s, s["p"].T @ g, None, since, None)


def reference(c, params, gradients):
    params = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(params, LAYERS)).items()}
    states = {path: {} for path in params}
    for t, grads in enumerate(gradients, 1):
        for path, g in flatten(unstacked(grads, LAYERS)).items():
            g, name = np.asarray(g, np.float64), without_number(path)
            layer = int(path.split("/")[0].rpartition("_")[2]) if name != path else 0
            d_in, d_out = g.shape if g.ndim == 2 else (0, 0)
            first = {"in": True, "out": False, "smaller": d_in <= d_out, "larger": d_in > d_out}
            turned = g if first[c.side] or g.ndim < 2 else g.T
            if g.ndim == 2 and len(turned) > c.rank:
                u = published(c, states[path], turned, t, key_of(c, name, layer))
            else:
                u = adam(c, states[path], turned, None, t, None)
            decay = c.weight_decay * params[path] if g.ndim == 2 else 0
            params[path] = params[path] - c.lr * ((u if turned is g else u.T) + decay)
    return params


@pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)
def test_equals_the_published_update(config):
    """20 steps: wide and stacked, tall, square, rank above the smaller side."""
    # Of draws few, which take long to compile.
    tensors = TENSORS if config.choice == "top" else SOME
    params, gradients = draw(0, tensors), [draw(i + 1, tensors) for i in range(STEPS)]
    ours, _ = run(build(config, tensors), params, gradients)
    want, got = reference(config, params, gradients), flatten(unstacked(ours, LAYERS))
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=2e-5, rtol=2e-5, err_msg=path)


def test_stacked_layers_are_trained_as_layers_that_stand_alone():
    tensors = {"layers/wide/w": TENSORS["layers/wide/w"]}
    params, gradients = draw(0, tensors), [draw(i + 1, tensors) for i in range(3)]
    stacked, _ = run(build(ROWS["uniform"], tensors), params, gradients)
    alone, _ = run(
        build(ROWS["uniform"], alone_table(tensors, LAYERS)),
        unstacked(params, LAYERS),
        [unstacked(g, LAYERS) for g in gradients],
    )
    assert_close(unstacked(stacked, LAYERS), alone, 2e-6)


def test_all_rows_are_adam():
    config = dataclasses.replace(ROWS["top"], rank=8)
    plain = AdamW(config.lr, clip=None, weight_decay=0.0, b2=config.b2)
    params, gradients = draw(0, TENSORS), [draw(i + 1, TENSORS) for i in range(3)]
    ours, theirs = (run(build(c, TENSORS), params, gradients)[0] for c in (config, plain))
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("name", ["top", "norm"])
def test_bytes_of_the_state(name):
    """Moments [rank, m], the rows' numbers and, where they are drawn, two scales for each."""
    tensors = {"layers/up/w": Tensor((LAYERS, 64, 96), ("layers", None, None), 1.0, "Dense")}
    config = dataclasses.replace(ROWS[name], rank=8)
    state = jax.eval_shape(build(config, tensors).init, draw(0, tensors))
    numbers = 2 * 8 * 96 + 8 + (0 if name == "top" else 2 * 8)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held == 4 * LAYERS * numbers + 4


@pytest.mark.parametrize(
    ("choice", "replace"),
    [("norm", True), ("square", False), ("uniform", False)],
)
def test_sampled_projections_are_unbiased(choice, replace):
    """The mean of P P^T over many draws is 1: within five standard errors."""
    n, rank, count = 6, 3, 20_000
    config = dataclasses.replace(ROWS["norm"], choice=choice, replace=replace)
    squares = jnp.arange(1.0, n + 1) ** 2

    def diagonal(key):
        rows, scales = config.chosen(squares, rank, key)
        assert scales is not None
        return jnp.zeros(n).at[rows].add(scales[0] * scales[1], mode="drop"), rows

    found, rows = jax.jit(jax.vmap(diagonal))(jax.random.split(jax.random.key(0), count))
    error = np.std(found, axis=0) / np.sqrt(count)
    assert (np.abs(np.mean(found, axis=0) - 1) < 5 * error + 1e-6).all()
    assert np.max(error) < 0.05
    assert (np.diff(rows, axis=1) > 0).all()
    if replace:
        assert (rows[:, -1] >= n).any(), "some draws are the same"
    else:
        assert (rows < n).all()


# ------------------------------------------------------------------ rows of which alone G is made


def weight(config, d_in, d_out) -> tuple[Any, Record]:
    scope = Scope(jax.random.key(0), Rules((("*", config),)), Record(), path="model")
    return scope.weight("up", d_in, d_out, ("embed", "mlp"), FanIn()), scope.record


@pytest.mark.parametrize(("d_in", "d_out", "side"), [(6, 9, "smaller"), (9, 6, "smaller")])
def test_gradient_is_that_of_the_chosen_rows(d_in, d_out, side):
    module, record = weight(Rows(4, side), d_in, d_out)
    inputs, n = module.inputs, d_in if module.inputs else d_out
    # As after draws with replacement: three of four are held, one of them twice.
    scales = np.asarray([[1.5, 0.5, 1, 0], [1.5, 1.0, 1, 0]], np.float32)
    delta = jax.random.normal(jax.random.key(1), module.delta.shape)
    rows = jnp.int32([0, 2, 5, n + 3])
    module = replaced(module, rows=rows, scales=jnp.asarray(scales), delta=delta)
    down, up = np.zeros((2, n, 4), np.float32)
    down[rows[:3], range(3)], up[rows[:3], range(3)] = scales[:, :3]
    matrix = module.w[...] + (up @ delta if inputs else delta @ up.T)
    np.testing.assert_allclose(module.dense(), matrix, atol=1e-6)
    x = jax.random.normal(jax.random.key(2), (2, 3, d_in))
    g = jax.random.normal(jax.random.key(3), (2, 3, d_out))

    @jax.jit
    def passes(delta, squares, x, g):
        def apply(delta, squares, x):
            return replaced(module, delta=delta, squares=squares)(x)

        y, pull = jax.vjp(apply, delta, squares, x)
        return y, *pull(g)

    y, d_delta, d_squares, dx = passes(delta, module.squares[...], x, g)
    whole = np.einsum("bti,bto->io", x, g)
    np.testing.assert_allclose(y, x @ matrix, atol=1e-5)
    np.testing.assert_allclose(dx, g @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(d_delta, down.T @ whole if inputs else whole @ down, atol=1e-5)
    norms = np.sum(whole**2, axis=1 if inputs else 0)
    np.testing.assert_allclose(d_squares, norms, rtol=1e-5)
    trained_numbers = sum(np.prod(t.shape) for t in record.tensors.values() if t.trained)
    assert trained_numbers == record.products["model/up"].weight.parameters(d_in, d_out)


def test_begins_as_dense_and_converts():
    module, _ = weight(Rows(4), 6, 9)
    dense, _ = weight(Dense(), 6, 9)
    assert_close({"w": module.dense()}, {"w": dense.dense()}, 0)
    module = replaced(module, delta=jnp.ones(module.delta.shape))
    again = module.from_dense(module.dense())
    assert_close({"w": again.dense()}, {"w": module.dense()}, 0)
    assert not again.delta[...].any()
    with pytest.raises(ConfigError, match="model/up: rank 6 is not less than 6") as error:
        weight(Rows(6), 6, 9)
    assert error.value.field == "weights"


@pytest.mark.parametrize("stacked", [True, False])
def test_what_a_step_begins_with(stacked):
    """At every period's first step delta goes into w, and rows are chosen by the norms."""
    shapes = {"w": (9, 6), "delta": (9, 4), "rows": (4,), "scales": (2, 4), "squares": (6,)}
    stack, layers = ((LAYERS,), ("layers",)) if stacked else ((), ())
    at = "layers/up" if stacked else "up"
    tensors = {
        f"{at}/{name}": Tensor(stack + s, layers + (None,) * len(s), 0.0, kind)
        for (name, s), kind in zip(shapes.items(), ("frozen", "rows", *["frozen"] * 3), strict=True)
    }
    params = flatten(draw(0, tensors))
    params[f"{at}/rows"] = np.broadcast_to(np.asarray([1, 2, 4, 5], np.int32), (*stack, 4))
    norms = jnp.asarray(np.random.default_rng(1).random((*stack, 6)), jnp.float32)
    before = build(Grass(**OPTIONS), tensors).before
    assert before is not None

    @jax.jit
    def begin(params, count):
        return flatten(before(unflatten(params), count, lambda paths: dict.fromkeys(paths, norms)))

    for count in (0, 1, 12):
        new = begin(params, jnp.int32(count))
        if count % 6:
            assert_close(new, params, 0)
            continue
        want = params[f"{at}/w"].copy()
        want[..., [1, 2, 4, 5]] += params[f"{at}/delta"] * params[f"{at}/scales"][..., 1:, :]
        np.testing.assert_allclose(new[f"{at}/w"], want, atol=1e-6)
        assert not new[f"{at}/delta"].any()
        np.testing.assert_array_equal(new[f"{at}/rows"], np.sort(np.argsort(-norms)[..., :4]))
        assert (new[f"{at}/scales"] == 1).all()
    frozen = Grass(**OPTIONS, groups=(Group("*delta", frozen=True),))
    assert build(frozen, tensors).before is None
    with pytest.raises(ConfigError, match="does not reach Rows") as error:
        build(Grass(weight_decay=0.1), tensors)
    assert error.value.field == "weight_decay"


def held_as(tmp_path, optimizer, *, rows: bool, **changes):
    """A run that trains the MLP's matrices [16, 32] and [32, 16] alone, as they are or as rows."""
    groups = (Group("*/mlp/*"), Group("*", frozen=True))
    weights = (("*/mlp/*", Rows(optimizer.rank)), ("*", Dense())) if rows else (("*", Dense()),)
    run = tiny_run(tmp_path, optimizer=dataclasses.replace(optimizer, groups=groups))
    return run.replace(**{"model.weights": weights}, **changes)


def summed_over_devices(run):
    """Shapes of the matrices that a compiled step sums over the mesh."""
    text = program_of(run).train_step.program.as_text()
    given = re.findall(r"= (.*?) all-reduce\(", text)
    return {s for part in given for s in re.findall(r"\[(\d+,\d+)\]", part)}


def network(config):
    """(loss of two matrices, their table, their parameters): [8, 12], with rows of inputs, and
    [12, 8], of outputs."""
    rules = Rules((("*", config),))
    scope, sizes = Scope(jax.random.key(0), rules, Record()), {"up": (8, 12), "down": (12, 8)}
    made = {n: scope.weight(n, *shape, ("embed", "mlp"), FanIn()) for n, shape in sizes.items()}

    def loss(params, batch, key):
        up, down = (replaced(made[name], **params[name]) for name in sizes)
        error = down(jnp.tanh(up(batch["x"]))) - batch["y"]
        return Loss(jnp.sum(error**2), jnp.float32(len(error)))

    return loss, scope.record.tensors, {name: split(module)[1] for name, module in made.items()}


def test_rows_alone_give_what_whole_gradients_do():
    """20 steps, rows drawn four times."""
    optimizer, rng = (
        dataclasses.replace(ROWS["norm"], lr=0.03, side="smaller"),
        np.random.default_rng(0),
    )
    batches = [
        {k: jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for k in "xy"} for _ in range(3)
    ]
    products = []
    for config in (Dense(), Rows(RANK)):
        loss, tensors, params = network(config)
        transform = build(optimizer, tensors)
        state = TrainState(jnp.int32(0), params, transform.init(params))
        step, losses = jax.jit(train_step(loss, transform)), []
        for i in range(STEPS):
            state, metrics = step(state, batches[i % 3], jax.random.key(0))
            losses.append(float(metrics["loss"][0]))
        assert losses[-1] < losses[0]
        template = {
            name: weight(config, *shape)[0] for name, shape in (("up", (8, 12)), ("down", (12, 8)))
        }
        products.append(
            {name: replaced(template[name], **state.params[name]).dense() for name in template}
            | {"losses": np.asarray(losses)}
        )
    assert_close(products[0], products[1], 1e-4)


def test_rows_alone_layer_by_layer_on_eight_devices(tmp_path):
    """A model, each device with a row of the batch, trains as with whole gradients on one."""
    optimizer = dataclasses.replace(ROWS["top"], lr=3e-2, rank=6)
    whole, _, _ = trained(held_as(tmp_path, optimizer, rows=False), 14)
    assert whole[-1] < whole[0] - 0.05
    changes = {"mesh": Mesh(data=8), "step": LayerwiseStep()}
    run = held_as(tmp_path, optimizer, rows=True, **changes)
    np.testing.assert_allclose(trained(run, 14)[0], whole, rtol=2e-5)
    # All that is summed, also where rows are chosen: so many rows' gradient, of each matrix.
    assert summed_over_devices(run) == {"6,32"}


def test_layer_by_layer_the_norms_take_little_memory(tmp_path):
    """The backward pass that finds them keeps one array of each layer, and not a dozen."""
    program = program_of(held_as(tmp_path, ROWS["top"], rows=True))
    (batch,) = host_batches(program, program.run, 1)
    loss = loss_function(program.model, program.phase.objective)

    def kept(loss):
        def backward(params, batch):
            squares = trainable(params, {p for p in flatten(params) if p.endswith("/squares")})
            return jax.vjp(lambda s: loss(whole(s, params), batch, None).total, squares)[1]

        with program.layout.active():
            shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(backward, params, batch))]
        activations = [s for s in shapes if s[:3] == (2, *batch["weights"].shape)]
        return sum(np.prod(s) for s in activations) / (2 * batch["weights"].size * 16)

    params = program.model.abstract()
    assert kept(_sparing(loss)) == 1
    assert kept(loss) > 12


def test_configs_round_trip_and_wrong_choices_are_named():
    for config in (*ROWS.values(), Rows(4, "out")):
        assert codec.from_json(codec.to_json(config), type(config)) == config
    for make, field in (
        (lambda: Grass(choice="rank"), "choice"),  # type: ignore[arg-type]
        (lambda: Grass(scale=0.0), "scale"),
        (lambda: Grass(rank=0), "rank"),
        (lambda: Rows(0), "rank"),
        (lambda: Rows(1, "both"), "side"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert error.value.field == field
