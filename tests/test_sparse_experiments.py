"""The studies of sparse training come to be, count what they say, and their parts are right."""

import jax
import numpy as np
import pytest
from weight_cases import Matrices

from experiments import (
    mask_overhead,
    pruning_window,
    regrowth,
    sparse_benchmark,
    sparse_then_dense,
    sparsity_curves,
)
from jaxpt.program import Program
from jaxpt.sparsity import Gradual
from jaxpt.state import flatten
from jaxpt.weights import Dense

STUDIES = [m.STUDY for m in (sparse_benchmark, sparse_then_dense, regrowth, pruning_window)]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_arm_comes_to_be(study):
    for arm in study.arms:
        run = study.run(study.sizes["smoke"], arm, 0)
        vocabulary, layout = run.tokenizer.build().vocabulary, run.mesh.build(jax.devices()[:1])
        before = None
        for index in range(len(run.phases)):
            program = Program(run, index, vocabulary, layout)
            program.check(before)
            before = program
        full = study.run(study.sizes["full"], arm, 0)
        steps = sum(phase.total_steps for phase in full.phases)
        assert steps == 300 or (arm.name.endswith("_flops") and 300 < steps < 1200)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.25, 0.75)])
def test_mean_density_is_that_of_the_updates(window):
    steps, updates = 2400, round(60 * (window[1] - window[0]))
    method = Gradual(
        density=0.25,
        every=steps // 60,
        start=round(window[0] * steps),
        stop=round(window[1] * steps),
    )
    densities, now = [], 1.0
    for step in range(steps):
        if method.due(step):
            i = int(method.number(step))
            now = 0.25 + 0.75 * (1 - i / method.updates) ** 3
        densities.append(now)
    got = sparse_benchmark.mean_density(1.0, 0.25, *window, updates)
    assert now == 0.25
    assert got == pytest.approx(np.mean(densities), abs=0.01)


def test_the_matched_dense_model_has_the_average_of_the_window():
    counts = pruning_window.averages()
    assert counts["dense_matched"] == pytest.approx(counts["middle"], rel=0.02)
    assert counts["first_half"] < counts["middle"] < counts["last_half"] < counts["dense"]


def test_equal_flops():
    """A step with nothing held costs what is not in the layers; one with all a dense one's."""
    base = sparse_benchmark.BASE
    shares = [sparse_benchmark.flops_share(base, d) for d in (0.0, 0.5, 1.0)]
    assert shares[2] == 1
    assert shares[1] == pytest.approx((shares[0] + 1) / 2)
    model, tokens = base.model.build(1024), 2 * 256
    inner = 2 * tokens * 4 * pruning_window.matrices(192, 512)
    assert shares[0] == pytest.approx(1 - inner / model.flops(2, 256))


def test_the_law_is_found_again():
    counts = np.array([1e5, 2e5, 4e5, 8e5])
    law = pruning_window.fit(counts, 2 + 30 * counts**-0.3)
    assert law["E"] == pytest.approx(2, abs=0.05)
    assert law["a"] == pytest.approx(0.3, abs=0.02)
    assert law["rmse"] < 1e-4
    runs = [{"arm": a, "loss": 2 + 1 / i} for i, a in enumerate(("dense", "middle"), 1)]
    assert set(pruning_window.law({"runs": runs})) == {"average_parameters"}


def test_one_shot_curves():
    model = Matrices((("*", Dense()),)).build(5)
    params = jax.tree.map(
        lambda a: np.random.default_rng(0).normal(size=a.shape).astype(a.dtype), model.abstract()
    )
    paths = ["layers/up/w", "layers/down/w", "head/w"]
    for scheme, density in (("global", 0.3), ("layer", 0.3), ("2:4", 0.5)):
        got = jax.tree.map(
            np.asarray, flatten(sparsity_curves.pruned(model, params, scheme, density))
        )
        old = flatten(params)
        assert (got["layers/scale"] == old["layers/scale"]).all()
        assert all(((got[p] == old[p]) | (got[p] == 0)).all() for p in paths)
        if scheme == "global":
            sizes = np.concatenate([np.abs(old[p]).ravel() for p in paths])
            kept = np.concatenate([got[p].ravel() != 0 for p in paths])
            count = int(0.3 * sizes.size + 0.5)
            np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(np.argsort(-sizes)[:count]))
        elif scheme == "layer":
            assert ((got["layers/up/w"] != 0).sum((1, 2)) == 72).all()
        else:
            groups = (got["layers/up/w"] != 0).reshape(3, 3, 4, 20)
            assert (groups.sum(2) == 2).all()
    rows = [{"scheme": "whole", "density": 1.0, "loss": 2.0}] + [
        {"scheme": "global", "density": d, "loss": loss}
        for d, loss in ((0.5, 2.04), (0.75, 2.01), (0.25, 2.5), (0.125, 2.0))
    ]
    assert sparsity_curves.essential(rows, "global", 0.05) == 0.5
    assert sparsity_curves.essential(rows, "global", 0.001) == 0


def test_masks_that_are_compared_hold_a_quarter(monkeypatch):
    monkeypatch.setattr(mask_overhead, "SHAPES", {"up": (16, 24)})
    data = mask_overhead.numbers()
    arguments = tuple(data[kind] for kind in ("w", "g", "mask", "words"))
    for name, method in mask_overhead.ours().items():
        masks, seconds = mask_overhead.timed(method, arguments, 1)
        assert int(np.sum(masks["up"])) == 96
        assert len(seconds) == 1
        assert (np.asarray(masks["up"]) != data["mask"]["up"]).any(), name
