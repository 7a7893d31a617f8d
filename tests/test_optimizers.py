"""Every optimizer against a float64 transcription of its published update, and what all share.

A new optimizer is one row of ``ROWS``: its config, the update written down once more in numpy for
one tensor of one layer, a tolerance, and a learning rate with which it solves a quadratic.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.mesh import Mesh
from jaxpt.optimizers import (
    SGD,
    SPAM,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Group,
    Linear,
    Lion,
    Muon,
    Optimizer,
    ReciprocalSqrt,
    StableSPAM,
)
from jaxpt.paths import matches
from jaxpt.state import flatten, unflatten
from jaxpt.weights.base import Tensor

LAYERS = 5  # more than the smaller side of the stacked matrix: no rule may take them for a side
TENSORS = {
    "decoder/layers/mlp/up/w": Tensor((LAYERS, 4, 6), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "decoder/layers/mlp/up_bias": Tensor((LAYERS, 6), ("layers", "mlp"), 0.0, "bias"),
    "decoder/mix/w": Tensor((8, 4), ("embed", "mlp"), 0.5, "Dense"),
    "decoder/narrow/w": Tensor((3, 6), (None, "mlp"), 0.5, "Dense"),
    "decoder/norm/scale": Tensor((4,), ("width",), 0.0, "norm"),
    "embedding/w": Tensor((10, 4), ("vocab", "embed"), 1.0, "embedding"),
    "lm_head/w": Tensor((4, 10), ("embed", "vocab"), 0.5, "Dense"),
}
MATRICES = {"decoder/layers/mlp/up/w", "decoder/mix/w", "decoder/narrow/w", "lm_head/w"}
# Enough where options and paths are not the question: each tensor more is seconds of compiling.
SMALL = {p: TENSORS[p] for p in ("decoder/layers/mlp/up/w", "decoder/norm/scale", "embedding/w")}
STEPS = 20


# ------------------------------------------------- the published updates, one tensor of one layer
# (config, state, gradient, parameter, t = 1, 2, ..., orthogonalise: bool) -> direction


def adam(c, s, g, p, t, _):
    """Kingma and Ba 2015, algorithm 1."""
    s["m"] = c.b1 * s.get("m", 0) + (1 - c.b1) * g
    s["v"] = c.b2 * s.get("v", 0) + (1 - c.b2) * g**2
    return (s["m"] / (1 - c.b1**t)) / (np.sqrt(s["v"] / (1 - c.b2**t)) + c.eps)


def lion(c, s, g, p, t, _):
    """Chen et al. 2023, algorithm 2."""
    m = s.get("m", np.zeros_like(g))
    s["m"] = c.b2 * m + (1 - c.b2) * g
    return np.sign(c.b1 * m + (1 - c.b1) * g)


def sgd(c, s, g, p, t, _):
    """Sutskever et al. 2013, equations 1 to 4 (in the form that evaluates at p)."""
    s["m"] = c.momentum * s.get("m", 0) + g
    return g + c.momentum * s["m"] if c.nesterov else s["m"]


def adafactor(c, s, g, p, t, _):
    """Shazeer and Stern 2018, algorithms 4 and 5."""
    b = 1 - t**-c.decay_exponent
    square = g**2 + c.eps
    if g.ndim == 2 and min(g.shape) >= c.min_dim_to_factor:
        s["r"] = b * s.get("r", 0) + (1 - b) * square.mean(1)
        s["c"] = b * s.get("c", 0) + (1 - b) * square.mean(0)
        v = np.outer(s["r"], s["c"]) / s["r"].mean()
    else:
        v = s["v"] = b * s.get("v", 0) + (1 - b) * square
    u = g / np.sqrt(v)
    if c.threshold is not None:
        u = u / max(1.0, np.sqrt((u**2).mean()) / c.threshold)
    if c.scale_by_parameter:
        u = u * max(1e-3, np.sqrt((p**2).mean()))
    if c.momentum:
        u = s["m"] = c.momentum * s.get("m", 0) + (1 - c.momentum) * u
    return u


def newton_schulz(x, steps):
    """Jordan et al. 2024: the quintic iteration on the smaller side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps).T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(c, s, g, p, t, orthogonalise):
    """Jordan et al. 2024 with the scale of Liu et al. 2025, equation 4; Adam for the rest."""
    if not orthogonalise:
        return c.adam_lr_scale * adam(c, s, g, p, t, False)
    m = s["m"] = c.beta * s.get("m", 0) + (1 - c.beta) * g
    if c.nesterov:
        m = c.beta * m / (1 - c.beta ** (t + 1)) + (1 - c.beta) * g / (1 - c.beta**t)
    d_in, d_out = g.shape
    scale = max(1, d_out / d_in) ** 0.5 if c.rms is None else c.rms * max(d_in, d_out) ** 0.5
    return scale * newton_schulz(m, c.ns_steps)


def spam(c, s, g, p, t, _):
    """Huang et al. 2025 ("SPAM"), algorithm 1."""
    since = (t - 1) % c.period
    if since == 0:
        s.clear()
    if since >= c.patience:
        spike = (g**2 > c.threshold * s["v"]) & (s["v"] > 0)
        g = np.where(spike, np.sign(g) * np.sqrt(c.threshold * s["v"]), g)
    annealed = 0.99 * (1 + np.cos(np.pi * since / (c.warmup + 1))) / 2
    rising = t > c.period and since <= c.warmup
    return (1 - annealed if rising else 1) * adam(c, s, g, p, t, _)


def stable_spam(c, s, g, p, t, _):
    """Huang et al. 2025 ("Stable-SPAM"), algorithm 1: AdaClip, AdaGN, momentum reset, Adam."""

    def average(name, x, decay):
        s[name] = decay * s.get(name, 0) + (1 - decay) * x
        return s[name] / (1 - decay**t)

    largest = abs(g).max()
    bound = average("largest", largest, c.gamma3)
    g = np.where(abs(g) > bound, g / largest * bound, g)
    norm = np.linalg.norm(g)
    expected, square = average("norm", norm, c.gamma1), average("square", norm**2, c.gamma2)
    if (t - 1) % c.period == 0:
        s["m"] = s["v"] = 0
    g = g / norm * expected / (np.sqrt(square) + c.eps)
    return adam(c, s, g, p, (t - 1) % c.period + 1, _)


@dataclasses.dataclass(frozen=True)
class Row:
    optimizer: Optimizer
    reference: Callable
    tolerance: float = 1e-5  # of the parameters after 20 steps, absolute and relative
    quadratic_lr: float = 0.1


COSINE = Cosine(warmup=5, final=0.1)
ROWS = {
    "adamw": Row(AdamW(1e-2, COSINE), adam),
    "adamw_unclipped": Row(AdamW(1e-2, clip=None, b2=0.999, eps=1e-6), adam),
    "lion": Row(Lion(1e-2, COSINE), lion),
    "sgd": Row(SGD(0.1, COSINE, weight_decay=0.1), sgd, quadratic_lr=0.5),
    "sgd_nesterov": Row(SGD(0.1, nesterov=True), sgd, quadratic_lr=0.5),
    "sgd_plain": Row(SGD(0.1, momentum=0.0), sgd, quadratic_lr=0.5),
    "adafactor": Row(Adafactor(0.1, min_dim_to_factor=4), adafactor, quadratic_lr=0.2),
    "adafactor_momentum": Row(
        Adafactor(
            0.1,
            COSINE,
            weight_decay=0.1,
            clip=1.0,
            threshold=None,
            scale_by_parameter=False,
            momentum=0.9,
            min_dim_to_factor=4,
        ),
        adafactor,
    ),
    "spam": Row(SPAM(1e-2, COSINE, threshold=2.0, period=6, warmup=3, patience=2), spam),
    "stable_spam": Row(StableSPAM(1e-2, weight_decay=0.1, gamma3=0.6, period=7), stable_spam),
    "muon": Row(Muon(1e-2, COSINE), muon, tolerance=3e-5, quadratic_lr=0.3),
    "muon_jordan": Row(
        Muon(1e-2, rms=None, adam_lr_scale=0.3, nesterov=False, ns_steps=6), muon, tolerance=3e-5
    ),
}
every_row = pytest.mark.parametrize("row", [pytest.param(r, id=name) for name, r in ROWS.items()])
# One row of each class has the whole battery; options need to be right, not to compose anew.
rows = pytest.mark.parametrize(
    "row", [pytest.param(r, id=name) for name, r in ROWS.items() if "_" not in name]
)


# --------------------------------------------------------------------------------------- helpers


def in_steps(duration):
    return duration.in_steps(tokens_per_step=64, batch=4, phase_steps=STEPS)


def build(optimizer, tensors=TENSORS, steps: int = STEPS, start: int = 0):
    return optimizer.build(tensors, optimizer.learning_rate(steps, in_steps), start)


def draw(seed: int, tensors=TENSORS, dtype="float32"):
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(size=t.shape).astype(jnp.dtype(dtype)) for path, t in tensors.items()}
    return unflatten(flat)


def compiled(transform):
    """(params, state, grads) -> (params, state), compiled, as the train step does it."""

    @jax.jit
    def step(params, state, grads):
        changes, state = transform.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    return step


def run(transform, params, gradients):
    step, state = compiled(transform), jax.jit(transform.init)(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return jax.device_get((params, state))


def assert_close(a, b, tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], tolerance, tolerance, err_msg=path)


def bytes_of(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def unstacked(tree, layers=LAYERS):
    """The same parameters with layers that stand alone: layers/x -> layers_0/x, layers_1/x, ..."""
    flat = {}
    for path, value in flatten(tree).items():
        if "layers/" in path:
            for i in range(layers):
                flat[path.replace("layers/", f"layers_{i}/")] = value[i]
        else:
            flat[path] = value
    return unflatten(flat)


def unstacked_table(tensors=TENSORS, layers=LAYERS):
    table = {}
    for path, t in tensors.items():
        if t.stacked:
            one = dataclasses.replace(t, shape=t.shape[1:], axes=t.axes[1:])
            table |= {path.replace("layers/", f"layers_{i}/"): one for i in range(layers)}
        else:
            table[path] = t
    return table


# ------------------------------------------------------------------------------ the whole battery


def schedule_in_numpy(schedule, step):
    if isinstance(schedule, Cosine):
        warmup = schedule.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / (STEPS - warmup)
        return schedule.final + (1 - schedule.final) * (1 + np.cos(np.pi * progress)) / 2
    assert isinstance(schedule, Constant | ReciprocalSqrt)  # the latter's first 10,000 steps
    return 1.0


def published(row: Row, params, gradients):
    """20 steps of the published update in float64, layer by layer."""
    c = row.optimizer
    params = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(params)).items()}
    state = {path: {} for path in params}
    for t, grads in enumerate(gradients, 1):
        grads = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(grads)).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        lr = c.lr * schedule_in_numpy(c.schedule, t - 1)
        for path, g in grads.items():
            table_path = next(p for p in TENSORS if matches(p, path))
            g = g * (1.0 if c.clip is None else min(1.0, c.clip / norm))
            matrix = table_path in MATRICES
            u = row.reference(c, state[path], g, params[path], t, matrix and "head" not in path)
            u = u + (c.weight_decay if matrix else 0) * params[path]
            params[path] = params[path] - lr * u
    return unflatten(params)


@every_row
def test_equals_the_published_update(row):
    params = draw(0)
    gradients = [draw(i + 1) for i in range(STEPS)]
    ours, _ = run(build(row.optimizer), params, gradients)
    assert_close(unstacked(ours), published(row, params, gradients), row.tolerance)


@rows
def test_stacked_layers_are_trained_as_layers_that_stand_alone(row):
    params, gradients = draw(0, SMALL), [draw(i + 1, SMALL) for i in range(3)]
    stacked, _ = run(build(row.optimizer, SMALL), params, gradients)
    alone, _ = run(
        build(row.optimizer, unstacked_table(SMALL)),
        unstacked(params),
        [unstacked(g) for g in gradients],
    )
    assert_close(unstacked(stacked), alone, 2e-6)


ONE_OF_EACH = {type(row.optimizer): name for name, row in reversed(ROWS.items())}
BY_ROWS = [
    name
    for name in ONE_OF_EACH.values()
    if ROWS[name].optimizer.rule(TENSORS["decoder/mix/w"]).elementwise
]


@pytest.mark.parametrize("name", BY_ROWS)
def test_what_is_elementwise_may_be_updated_by_blocks_of_rows(name):
    """Each block with a key of its own, as steps do that update layers in place."""
    path = "decoder/mix/w"
    rule = build(ROWS[name].optimizer, {path: TENSORS[path]}).rules[path]
    param, *grads = (jnp.asarray(flatten(draw(i))[path]) for i in range(10))

    @functools.partial(jax.jit, static_argnums=0)
    def trained(parts):
        found = []
        for i, start in enumerate(range(0, len(param), len(param) // parts)):
            p, *gs = (x[start : start + len(param) // parts] for x in (param, *grads))
            state = rule.init(p)
            for t, g in enumerate(gs):
                change, state = rule.update(g, state, p, jnp.int32(t), jax.random.key(i))
                p = p + change
            found.append(p)
        return jnp.concatenate(found)

    np.testing.assert_allclose(trained(4), trained(1), 1e-6, 1e-7)


@rows
@pytest.mark.smoke
def test_solves_a_quadratic(row):
    steps = 300
    optimizer = dataclasses.replace(
        row.optimizer, lr=row.quadratic_lr, weight_decay=0.0, schedule=Linear()
    )
    transform, target = build(optimizer, SMALL, steps), draw(1, SMALL)
    start = draw(0, SMALL)

    def distance(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target), squared=True)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            changes, state = transform.update(jax.grad(distance)(params), state, params)
            return (optax.apply_updates(params, changes), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, steps)[0][0]

    after, before = jax.jit(distance)(descend(start)), jax.jit(distance)(start)
    assert after < 1e-2 * before


def signature(x):
    """All that decides whether a compiled step must be compiled again."""
    return x.shape, x.dtype, x.weak_type


@rows
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_keeps_types_so_that_it_compiles_once(row, state_dtype):
    transform = build(dataclasses.replace(row.optimizer, state_dtype=state_dtype))
    params = draw(0, dtype="bfloat16")
    state = jax.eval_shape(transform.init, params)
    before = jax.tree.map(signature, (jax.eval_shape(lambda: jax.device_put(params)), state))
    after = jax.tree.map(signature, jax.eval_shape(compiled(transform), params, state, params))
    assert before == after
    moments = {x.dtype for path, x in flatten(state).items() if parameter_of(path)}
    assert moments <= {jnp.dtype(state_dtype)}


def test_first_moment_may_be_smaller():
    for optimizer in (AdamW(mu_dtype="bfloat16"), Lion(mu_dtype="bfloat16")):
        transform, params = build(optimizer), draw(0)
        state = jax.eval_shape(transform.init, params)
        _, state = jax.eval_shape(compiled(transform), params, state, params)
        dtypes = {p.split("/")[-1]: x.dtype for p, x in flatten(state).items() if parameter_of(p)}
        assert dtypes.pop("mu") == jnp.bfloat16
        assert set(dtypes.values()) <= {jnp.dtype("float32")}


@rows
def test_accumulated_gradients_give_the_same_update(row):
    params, a, b = (draw(i, SMALL) for i in range(3))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    whole, _ = run(build(row.optimizer, SMALL), params, [mean])
    parts, _ = run(optax.MultiSteps(build(row.optimizer, SMALL), 2), params, [a, b])
    assert_close(whole, parts, 1e-5)


def parameter_of(path: str) -> str | None:
    """The parameter that a leaf of the state belongs to."""
    return next((name for name in TENSORS if f"/{name}/" in f"{path}/"), None)


@rows
def test_state_is_keyed_like_the_parameters(row):
    state = jax.eval_shape(build(row.optimizer).init, draw(0))
    shapes = {t.shape for t in TENSORS.values()}
    for path, leaf in flatten(state).items():
        name = parameter_of(path)
        assert name is not None or leaf.shape == (), path
        if leaf.shape in shapes and name is not None and "v_" not in path:
            assert leaf.shape == TENSORS[name].shape, path


@rows
def test_frozen_parameters_stay_and_have_no_state(row):
    frozen = ("decoder/layers/mlp/up/w",)
    groups = tuple(Group(path, frozen=True) for path in frozen)
    optimizer = dataclasses.replace(row.optimizer, groups=groups)
    params, grads = draw(0, SMALL), draw(1, SMALL)
    after, state = run(build(optimizer, SMALL), params, [grads] * 2)
    trained = {path: t for path, t in SMALL.items() if path not in frozen}
    rest, rest_state = run(
        build(row.optimizer, trained), without(params, frozen), [without(grads, frozen)] * 2
    )
    assert bytes_of(state) == bytes_of(rest_state)
    assert_close(without(after, frozen), rest, 1e-6)
    for path in frozen:
        np.testing.assert_array_equal(flatten(after)[path], flatten(params)[path])


def without(tree, paths):
    return unflatten({path: x for path, x in flatten(tree).items() if path not in paths})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_eight_devices_give_the_same_update(name):
    row = ROWS[name]
    layout = Mesh(data=2, fsdp=2, tensor=2).build()
    transform = build(row.optimizer, SMALL)
    params, *gradients = (draw(i, SMALL) for i in range(3))
    places = unflatten({p: layout.sharding(t.axes, t.shape) for p, t in SMALL.items()})
    cut = functools.partial(jax.device_put, device=places)
    ours, _ = run(transform, cut(params), [cut(g) for g in gradients])
    assert_close(ours, run(transform, params, gradients)[0], 1e-5)


@every_row
def test_round_trips_through_json(row):
    optimizer = dataclasses.replace(row.optimizer, groups=(Group("*norm*", lr_scale=0.5),))
    assert codec.from_json(codec.to_json(optimizer), Optimizer) == optimizer


def test_every_optimizer_has_a_row():
    import jaxpt.optimizers as package

    public = {c for c in vars(package).values() if inspect.isclass(c) and issubclass(c, Optimizer)}
    tested = {type(row.optimizer) for row in ROWS.values()}
    for module in ("test_projected_optimizers", "test_loro", "test_grass", "test_averages"):
        tested |= {type(config) for config in importlib.import_module(module).ROWS.values()}
    assert public - {Optimizer} == tested


# -------------------------------------------------------------------------- groups, clipping, time


def changes_of(optimizer, step=1, start=0, grads=None, tensors=TENSORS):
    """The first update (step 1), or a later one, flat."""
    params = draw(0, tensors)
    transform = build(optimizer, tensors, start=start)
    state, update = jax.jit(transform.init)(params), jax.jit(transform.update)
    for _ in range(step):
        changes, state = update(grads or draw(1, tensors), state, params)
    return flatten(jax.device_get(changes))


def test_weight_decay_reaches_matrices_alone_unless_a_group_says_otherwise():
    zero = jax.tree.map(np.zeros_like, draw(0))
    changes = changes_of(SGD(0.5, weight_decay=0.1), grads=zero)
    params = flatten(draw(0))
    for path, change in changes.items():
        expected = -0.05 * params[path] if path in MATRICES else 0 * params[path]
        np.testing.assert_allclose(change, expected, 1e-6, err_msg=path)
    groups = (
        Group("embedding/*", weight_decay=0.2),
        Group("decoder/layers/mlp/up/*", weight_decay=0.0),
        Group("decoder/layers/*", weight_decay=0.7),
    )
    changes = changes_of(SGD(0.5, weight_decay=0.1, groups=groups), grads=zero)
    np.testing.assert_allclose(changes["embedding/w"], -0.1 * params["embedding/w"], 1e-6)
    assert not changes["decoder/layers/mlp/up/w"].any()
    # the third group takes what the second leaves: the bias, although it is no matrix
    bias = "decoder/layers/mlp/up_bias"
    np.testing.assert_allclose(changes[bias], -0.35 * params[bias], 1e-6)


def test_lr_scale_multiplies_the_whole_update():
    groups = (Group("*/mlp/*", lr_scale=0.25), Group("decoder/*"))
    scaled = changes_of(AdamW(groups=groups), tensors=SMALL)
    for path, plain in changes_of(AdamW(), tensors=SMALL).items():
        scale = 0.25 if "/mlp/" in path else 1.0
        np.testing.assert_allclose(scaled[path], scale * plain, 1e-6, err_msg=path)


def test_a_pattern_matches_layers_with_or_without_their_numbers():
    assert matches("decoder/layers/mlp/*", "decoder/layers_12/mlp/up/w")
    assert matches("decoder/layers_12/*", "decoder/layers_12/mlp/up/w")
    assert not matches("decoder/layers_1/*", "decoder/layers_12/mlp/up/w")
    assert not matches("*/MLP/*", "decoder/layers/mlp/up/w")


@pytest.mark.parametrize(
    ("groups", "field", "words"),
    [
        ((Group("decoder/*"), Group("*/atention/*")), "groups.1.pattern", "decoder/mix/w, "),
        ((Group("decoder/*"), Group("*/mlp/*")), "groups.1.pattern", "put it before"),
    ],
)
def test_a_group_without_parameters_is_an_error(groups, field, words):
    with pytest.raises(ConfigError, match=words) as error:
        build(AdamW(groups=groups))
    assert error.value.field == field


def test_known_paths_name_each_layer_once():
    with pytest.raises(ConfigError) as error:
        build(AdamW(groups=(Group("nothing"),)), unstacked_table())
    assert error.value.message.count("decoder/layers/mlp/up/w") == 1
    assert "layers_" not in error.value.message


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: AdamW(lr=0.0), "lr"),
        (lambda: AdamW(clip=0.0), "clip"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay"),
        (lambda: AdamW(b2=1.0), "b2"),
        (lambda: AdamW(eps=0.0), "eps"),
        (lambda: AdamW(state_dtype="float16"), "state_dtype"),
        (lambda: Lion(b1=-0.1), "b1"),
        (lambda: SGD(momentum=0.0, nesterov=True), "nesterov"),
        (lambda: Muon(ns_steps=0), "ns_steps"),
        (lambda: Muon(rms=0.0), "rms"),
        (lambda: Adafactor(threshold=0.0), "threshold"),
        (lambda: Adafactor(momentum=1.0), "momentum"),
        (lambda: Group("*", lr_scale=-1.0), "lr_scale"),
        (lambda: Group("*", weight_decay=-1.0), "weight_decay"),
        (lambda: Group("*", frozen=True, lr_scale=0.5), "frozen"),
    ],
)
def test_bad_values_name_their_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def norm_of(tree) -> float:
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_clip_bounds_the_global_norm(size):
    grads = jax.tree.map(lambda x: np.float32(size) * x, draw(1))
    norm = norm_of(grads)
    changes = changes_of(SGD(1.0, momentum=0.0, clip=2.0), grads=grads)
    assert norm_of(changes) == pytest.approx(min(norm, 2.0), rel=1e-5)


def test_clip_counts_what_is_trained_alone():
    groups = (Group("embedding/w", frozen=True),)
    grads = flatten(draw(1)) | {"embedding/w": np.full((10, 4), 1e6, np.float32)}
    optimizer = SGD(1.0, momentum=0.0, clip=2.0, groups=groups)
    changes = changes_of(optimizer, grads=unflatten(grads))
    assert norm_of(changes) == pytest.approx(2.0, rel=1e-5)


def test_learning_rate_is_that_of_the_phase():
    """With the state of an earlier phase, the schedule counts from the phase's first update."""
    optimizer = SGD(1.0, Cosine(warmup=5), momentum=0.0, clip=None)
    rate, grads = optimizer.learning_rate(STEPS, in_steps), flatten(draw(1, SMALL))
    for step, start, at in ((3, 0, 2), (8, 7, 0)):
        for path, change in changes_of(optimizer, step, start, tensors=SMALL).items():
            np.testing.assert_allclose(change, -rate(np.int32(at)) * grads[path], 1e-6)


def test_schedule_errors_name_the_schedule():
    with pytest.raises(ConfigError) as error:
        AdamW(schedule=Cosine()).learning_rate(None, in_steps)
    assert error.value.field == "schedule"
    with pytest.raises(ConfigError) as error:
        AdamW(schedule=Cosine(warmup=STEPS + 1)).learning_rate(STEPS, in_steps)
    assert error.value.field == "schedule.warmup"


def test_eval_params_are_the_parameters():
    params = draw(0)
    state = jax.eval_shape(build(AdamW()).init, params)
    assert AdamW().eval_params(state, params) is params


def test_muon_orthogonalises_each_matrix():
    """Singular values of an update lie near 1, whatever those of the gradient; head uses Adam."""
    optimizer = Muon(1.0, rms=None, weight_decay=0.0, clip=None)
    matrices = ("decoder/layers/mlp/up/w", "decoder/mix/w")
    tensors = {path: TENSORS[path] for path in (*matrices, "lm_head/w")}
    changes = changes_of(optimizer, tensors=tensors)
    for path in matrices:
        d_in, d_out = changes[path].shape[-2:]
        sizes = np.linalg.svd(changes[path], compute_uv=False) / max(1, d_out / d_in) ** 0.5
        assert sizes.shape[-1] == 4
        assert sizes.min() > 0.3
        assert sizes.max() < 1.3
    np.testing.assert_allclose(np.abs(changes["lm_head/w"]), 1.0, 1e-4)


def test_adafactor_factors_the_two_matrix_axes():
    params = draw(0)
    state = flatten(jax.eval_shape(build(Adafactor(min_dim_to_factor=4)).init, params))
    up = {p.split("/")[-1]: x.shape for p, x in state.items() if "mlp/up/w/" in p}
    assert up == {"v_row": (LAYERS, 4), "v_col": (LAYERS, 6), "v": (LAYERS, 1)}
    plain = {p.split("/")[-1]: x.shape for p, x in state.items() if "up_bias/" in p}
    assert plain["v"] == (LAYERS, 6)
