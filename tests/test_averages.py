"""Parameters that are averages of others: which of them are evaluated, read back and exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpt import cli
from jaxpt.config import codec
from jaxpt.duration import seconds
from jaxpt.errors import ConfigError
from jaxpt.evaluate import series
from jaxpt.evaluation import Evaluate, Harness
from jaxpt.files import read_metrics
from jaxpt.growth import Average, merge
from jaxpt.interop import hf
from jaxpt.loading import load
from jaxpt.models import MLP
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


# ------------------------------------------------------------------------------------------ merges


def state(seed, shape=(2, 3)):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    half = rng.standard_normal(5).astype(jnp.bfloat16)
    return {"a": {"w": w}, "b": {"half": half, "ids": np.arange(4, dtype=np.int32)}}


def test_the_uniform_soup_is_the_mean():
    states = [state(seed) for seed in range(3)]
    found = jax.jit(merge.uniform)(states)
    wanted = np.mean([s["a"]["w"].astype(np.float64) for s in states], 0)
    np.testing.assert_allclose(found["a"]["w"], wanted, rtol=1e-6)
    # Of bfloat16 the mean is rounded once.
    exact = np.mean([s["b"]["half"].astype(np.float32) for s in states], 0)
    assert found["b"]["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["b"]["half"], exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(found["b"]["ids"], np.arange(4))


def test_task_arithmetic_adds_what_was_learnt():
    base, one, two = (state(seed) for seed in range(3))
    found = merge.task_arithmetic(base, [one, two], scale=0.5)["a"]["w"]
    b, x, y = (s["a"]["w"].astype(np.float64) for s in (base, one, two))
    np.testing.assert_allclose(found, b + 0.5 * ((x - b) + (y - b)), rtol=1e-5)
    again = merge.task_arithmetic(base, [one])
    np.testing.assert_allclose(again["a"]["w"], one["a"]["w"], rtol=1e-5, atol=1e-6)
    away = merge.task_arithmetic(base, [one], scale=-1.0)["a"]["w"]
    np.testing.assert_allclose(away, 2 * b - x, rtol=1e-5, atol=1e-6)


def test_the_greedy_soup_keeps_what_helps():
    """Numbers near 10 are good: 8 is best alone, 13 brings the mean nearer, 20 does not."""
    states = [{"x": np.float32([v])} for v in (20.0, 13.0, 8.0, 2.0)]
    asked = []

    def score(params):
        asked.append(float(params["x"][0]))
        return -abs(asked[-1] - 10)

    found, kept = merge.greedy_soup(states, score)
    assert kept == [2, 1]
    assert found["x"].tolist() == [10.5]
    # Each alone; then in order of score: 13, 2 (7.67) and 20 (13.67).
    assert asked[:5] == [20.0, 13.0, 8.0, 2.0, 10.5]
    assert sorted(np.round(asked[5:], 2)) == [7.67, 13.67]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"w": np.zeros((3, 3), np.float32)}, "b": state(0)["b"]}, r"at a/w it has \(3, 3\)"),
        ({"a": state(0)["a"]}, "at b/half it has nothing at all"),
        (
            {"a": state(0)["a"], "b": state(0)["b"] | {"ids": np.int32([0, 1, 3, 2])}},
            "integers at b/ids",
        ),
    ],
)
def test_what_has_no_mean(other, message):
    with pytest.raises(ConfigError, match=message) as error:
        merge.uniform([state(1), state(2), other])
    assert error.value.field == "states.2"
    with pytest.raises(ConfigError, match="none given"):
        merge.uniform([])


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run's folder with an average, saved at every second step."""
    folder = tmp_path_factory.mktemp("averaged")
    run = tiny.tiny_run(folder, updates=(Average(0.9),))
    # As LLaMA is, so that it can be exported; with no rows of padding, which are not.
    gated = MLP(width=32, activation="silu", gated=True)
    run = run.replace(**{"model.mlp": gated, "model.vocab_multiple": 1})
    train(run.replace(**{"checkpoint.every": 2, "checkpoint.keep": 9}), folder / "run")
    return folder / "run"


def test_the_command_merges_what_is_evaluated(averaged, tmp_path, capsys):
    runs = [f"{averaged}@{step}" for step in (2, 4)] + [str(averaged)]
    assert cli.main(["merge", str(tmp_path / "soup"), "--uniform", *runs, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["merge"], said["of"]) == ("uniform", runs)
    parts = [flatten(load(averaged, step).params) for step in (2, 4, 6)]
    merged = load(tmp_path / "soup")
    for path, x in flatten(merged.params).items():
        mean = np.mean([np.asarray(p[path], np.float64) for p in parts], 0)
        np.testing.assert_allclose(x, mean, rtol=1e-5, atol=1e-6, err_msg=path)
    assert merged.step == 0
    assert merged.run.phases[0].updates == ()
    text = "what was taken out"
    assert merged.tokenizer.encode(text).tolist() == load(averaged).tokenizer.encode(text).tolist()
    # Its losses are those of its parameters, and it can be merged again.
    assert cli.main(["eval", str(tmp_path / "soup"), "--json"]) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    command = ["merge", str(tmp_path / "greedy"), "--greedy", *runs, str(tmp_path / "soup")]
    assert cli.main([*command, "--json"]) == 0
    used = json.loads(capsys.readouterr().out.splitlines()[-1])["of"]
    assert cli.main(["eval", str(tmp_path / "greedy"), "--json"]) == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert used
    assert best <= loss + 1e-6


def test_what_is_evaluated_is_what_is_exported(averaged, tmp_path):
    assert cli.main(["export", str(averaged), "--to", "hf", str(tmp_path / "out")]) == 0
    loaded = load(averaged)
    found = flatten(hf.read(tmp_path / "out").params(loaded.program.model.config))
    wanted = flatten(loaded.params)
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_the_command_says_what_cannot_be(averaged, tmp_path, capsys):
    def refused(*args):
        assert cli.main(["merge", str(tmp_path / "out"), *args]) != 0
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "give one of --uniform, --greedy" in refused()
    both = ("--uniform", str(averaged), "--greedy", str(averaged))
    assert "give one of" in refused(*both)
    assert "a base" in refused("--task-arithmetic", str(averaged))
    assert "none of step 5" in refused("--uniform", f"{averaged}@5")
    assert "no figure 'loss/x'; there are: causal/loss" in refused(
        "--greedy", str(averaged), "--by", "loss/x"
    )
    assert cli.main(["merge", str(averaged), "--uniform", str(averaged)]) != 0
    assert "is there already" in capsys.readouterr().err


def test_any_evaluation_over_all_checkpoints(averaged, capsys):
    assert cli.main(["eval", str(averaged), "--all-checkpoints", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["tokens"] for row in rows] == [0, 2 * 8 * 48, 4 * 8 * 48, 6 * 8 * 48]
    losses = [row["eval/causal/loss"] for row in rows]
    assert losses[-1] < losses[0]
    assert cli.main(["eval", str(averaged), "--at-step", "4", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert losses[2] == pytest.approx(alone, rel=1e-6)

    def parameters(loaded):
        return {"size": {"norm": float(np.linalg.norm(loaded.params["embedding"]["w"]))}}

    more = series(averaged, parameters)
    assert [row["step"] for row in more] == [0, 2, 4, 6]
    kept = read_metrics(averaged / "probes" / "metrics.jsonl")
    assert all({"eval/causal/loss", "eval/size/norm"} <= row.keys() for row in kept)
    page = (averaged / "probes" / "report.html").read_text()
    assert '"axis":"tokens"' in page.replace(" ", "")
    assert "eval/size/norm" in page
    assert cli.main(["eval", str(averaged), "--all-checkpoints", "--at-step", "4"]) != 0
    assert cli.main(["eval", str(averaged), "--limit", "4"]) != 0
    assert "is for --tasks" in capsys.readouterr().err


def test_training_says_that_lm_eval_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = tiny.tiny_run(tmp_path, evaluate=Evaluate(harness=Harness(("lambada",), every=2)))
    with pytest.raises(ConfigError, match=r"pip install 'jaxpt\[eval\]'"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert codec.from_json(codec.to_json(run), type(run)) == run
    for field, value in (("tasks", ()), ("limit", 0), ("fewshot", -1), ("every", seconds(9))):
        with pytest.raises(ConfigError) as error:
            Harness(**({"tasks": ("a",)} | {field: value}))
        assert error.value.field == field
