"""Parameters that are averages of others: which of them are evaluated, read back and exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.growth import Average
from jaxpt.loading import load
from jaxpt.optimizers import Group, Optimizer, ScheduleFree, WarmupStableDecay
from jaxpt.state import flatten
from jaxpt.train import train
from jaxpt.weights.base import Tensor

TENSORS = {
    "layers/up/w": Tensor((3, 4, 6), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "norm/scale": Tensor((4,), ("width",), 0.0, "norm"),
    "fixed/w": Tensor((2, 4), ("vocab", "embed"), 1.0, "embedding"),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(t.shape).astype(np.float32) for p, t in TENSORS.items()}


def nested(flat):
    return {"layers": {"up": {"w": flat["layers/up/w"]}}} | {
        name: {leaf: flat[f"{name}/{leaf}"]} for name, leaf in (("norm", "scale"), ("fixed", "w"))
    }


def transcription(config, rates, params, grads):
    """Defazio et al. 2024, algorithm 1, in float64: (y, x) of one array after all steps."""
    z = x = y = params.astype(np.float64)
    v, total, greatest = np.zeros_like(z), 0.0, 0.0
    decay = config.weight_decay if params.ndim > 1 else 0.0
    for t, (lr, g) in enumerate(zip(rates, grads, strict=True), 1):
        v = config.b2 * v + (1 - config.b2) * g.astype(np.float64) ** 2
        z = z - lr * (g / (np.sqrt(v / (1 - config.b2**t)) + config.eps) + decay * y)
        greatest = max(greatest, lr)
        weight = greatest**config.power
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        y = config.b1 * x + (1 - config.b1) * z
    return y, x


ROWS = {
    "schedule_free": ScheduleFree(
        lr=1e-2,
        schedule=WarmupStableDecay(warmup=3, decay=0),
        weight_decay=0.1,
        clip=None,
        groups=(Group("fixed/*", frozen=True),),
    )
}


def test_schedule_free_is_the_paper_s():
    config = ROWS["schedule_free"]
    assert codec.from_json(codec.to_json(config), Optimizer) == config
    rate = config.learning_rate(8, lambda duration: int(duration.value))
    built = config.build(TENSORS, rate)
    params, grads = draw(0), [draw(seed) for seed in range(1, 9)]
    state, now = built.init(nested(params)), nested(params)
    update = jax.jit(built.update)
    for g in grads:
        changes, state = update(nested(g), state, now)
        now = jax.tree.map(jnp.add, now, changes)
    rates = [float(rate(i)) for i in range(8)]
    assert rates[0] < rates[-1]
    averages = flatten(config.eval_params(state, now))
    for path, y in flatten(now).items():
        wanted_y, wanted_x = transcription(config, rates, params[path], [g[path] for g in grads])
        if path == "fixed/w":
            wanted_y = wanted_x = params[path]
        np.testing.assert_allclose(y, wanted_y, rtol=2e-4, atol=2e-6, err_msg=path)
        np.testing.assert_allclose(averages[path], wanted_x, rtol=2e-4, atol=2e-6, err_msg=path)
    assert np.abs(flatten(now)["norm/scale"] - averages["norm/scale"]).max() > 1e-3
    fresh = config.eval_params(built.init(nested(params)), nested(params))
    for path, x in flatten(fresh).items():
        np.testing.assert_allclose(x, params[path], rtol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("b1", 0.0), ("b2", 1.0), ("eps", 0), ("power", -1)])
def test_schedule_free_refuses(field, value):
    with pytest.raises(ConfigError) as error:
        ScheduleFree(**{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": ScheduleFree(lr=1e-2)}, {"updates": (Average(0.9),)}],
    ids=["schedule_free", "average"],
)
def test_what_is_evaluated_is_what_is_read_back(tmp_path, changes):
    """``load`` gives what ``generate``, ``eval``, ``merge`` and ``export`` work with."""
    run = tiny.tiny_run(tmp_path)
    run = tiny.with_phases(run, dataclasses.replace(run.phases[0], **changes))
    result = train(run, tmp_path / "run")
    loaded = load(tmp_path / "run")
    wanted = flatten(result.program.eval_params(result.state))
    raw = flatten(result.state.params)
    apart = 0.0
    for path, x in flatten(loaded.params).items():
        np.testing.assert_allclose(x, wanted[path], rtol=1e-6, atol=1e-7, err_msg=path)
        apart = max(apart, float(np.abs(np.asarray(x) - raw[path]).max()))
    assert apart > 1e-3
