"""The layerwise step: the ordinary step's losses, with one layer's gradient at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_steps import host_batches, program_of
from tiny import tiny_run

from jaxpt.errors import ConfigError
from jaxpt.growth.average import Average
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.models.attention import Attention
from jaxpt.models.position import RelativeBias
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.optimizers import SGD, AdamW, GaLore, Group, in_place
from jaxpt.state import flatten
from jaxpt.steps import Step
from jaxpt.weights import Dense, Grouped, LowRank, SparsePlusLowRank, Uniform

STEPS = 6
FACTORED = (
    ("*/attention/*", LowRank(6)),
    ("*/mlp/up", SparsePlusLowRank(4, 8.0, Grouped(4))),
    ("*/mlp/*", SparsePlusLowRank(4, 8.0, Uniform(0.25))),
    ("*", Dense()),
)


def trained(run, steps=STEPS):
    """(losses, gradient norms, state) after some steps."""
    program = program_of(run)
    state, key = program.init(jax.random.key(0)), jax.random.key(1)
    losses, norms = [], []
    for batch in host_batches(program, run, steps):
        state, metrics = program.train_step(state, program.put(batch), key)
        total, count = metrics["loss"]
        losses.append(float(total) / float(count))
        norms.append([float(metrics[f"{name}_norm"]) for name in ("grad", "update", "param")])
    return losses, norms, jax.device_get(state)


CASES = {
    "decoder": (
        "decoder",
        CausalLM(),
        {
            "model.attention": Attention(heads=4, window=(None, 16)),
            "model.dropout": 0.1,
            "model.weights": FACTORED,
        },
    ),
    "encoder": ("encoder", MaskedLM(), {"model.tied": True}),
    "encoder-decoder": (
        "encoder_decoder",
        SpanCorruption(),
        {"model.positions": RelativeBias(), "model.layers": 1},
    ),
}


@pytest.mark.parametrize(("kind", "objective", "changes"), CASES.values(), ids=CASES)
def test_equals_the_ordinary_step(tmp_path, monkeypatch, kind, objective, changes):
    monkeypatch.setattr(in_place, "BLOCK_ENTRIES", 512)  # the embedding in blocks, the last shorter
    optimizer = AdamW(1e-2, clip=None, groups=(Group("*norm*", frozen=True),))
    if kind == "encoder":
        optimizer = GaLore(1e-2, clip=None, rank=4, period=3)
    run = tiny_run(tmp_path, kind=kind, objective=objective, optimizer=optimizer, **changes)
    results = [trained(run.replace(step=step)) for step in (Step(), LayerwiseStep())]
    (losses, norms, state), (own_losses, own_norms, own_state) = results
    np.testing.assert_allclose(own_losses, losses, rtol=1e-6)
    np.testing.assert_allclose(own_norms, norms, rtol=1e-4)
    flat, own = flatten(state.opt_state), flatten(own_state.opt_state)
    assert flat.keys() == own.keys()
    assert int(own["count"]) == STEPS
    assert losses[-1] < losses[0]


def test_eight_devices_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(in_place, "BLOCK_ENTRIES", 256)
    optimizer = GaLore(1e-2, clip=None, rank=4, period=3)
    weights = (("*/mlp/up", Dense()), *FACTORED)
    changes = {"model.weights": weights, "step": LayerwiseStep(), "optimizer": optimizer}
    run = tiny_run(tmp_path, **changes)
    runs = [dataclasses.replace(run, mesh=m) for m in (Mesh(devices=1), Mesh(fsdp=2, tensor=2))]
    one, eight = (trained(each, 4)[0] for each in runs)
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    # What GaLore keeps is cut as its parameters are: along the side that it has of them.
    state = flatten(program_of(runs[1]).abstract.opt_state)
    cut = {path: leaf.sharding.spec for path, leaf in state.items() if "mlp/up/w" in path}
    assert cut == {
        "states/decoder/layers/mlp/up/w/projector": PartitionSpec(None, "fsdp", None),
        "states/decoder/layers/mlp/up/w/moments/mu": PartitionSpec(None, None, "tensor"),
        "states/decoder/layers/mlp/up/w/moments/nu": PartitionSpec(None, None, "tensor"),
    }


def test_clipping_bounds_the_norm_of_all_parts(tmp_path):
    """Plain gradient descent: the change is lr times the clipped gradient."""
    optimizer = SGD(1.0, momentum=0.0, clip=0.01)
    run = tiny_run(tmp_path, optimizer=optimizer, step=LayerwiseStep())
    _, ((grad, update, _), *_), _ = trained(run, 1)
    assert grad > 0.1
    assert update <= 0.01 * (1 + 1e-5)
    # All four parts, two layers, what is behind and before them, were longer than their share.
    assert update == pytest.approx(0.01, rel=1e-4)


def test_what_it_needs_is_said(tmp_path):
    with pytest.raises(ConfigError) as error:
        LayerwiseStep(accumulate=2)
    assert error.value.field == "accumulate"

    @dataclasses.dataclass(frozen=True)
    class Curious(Average):
        needs_gradients = True

    run = tiny_run(tmp_path, step=LayerwiseStep(), updates=(Curious(),))
    with pytest.raises(ConfigError, match="Curious needs gradients") as error:
        program_of(run).check()
    assert error.value.field == "updates.0"
    run = tiny_run(tmp_path, step=LayerwiseStep(), **{"model.scan": False})
    with pytest.raises(ConfigError, match="scan=True") as error:
        program_of(run).check()
    assert error.value.field == "step"
