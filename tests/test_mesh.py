"""The mesh: losses do not depend on it, and the compiled programs exchange what they should.

Of the 15 cases of three architectures on five meshes, five are always run, one on each mesh;
``--all-meshes`` runs all.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_run

from jaxpt.errors import ConfigError
from jaxpt.hlo import traffic
from jaxpt.mesh import Layout, Mesh, Placement, _grid, constrain, recorded
from jaxpt.models import MLP, Attention, RelativeBias
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.ul2 import UL2
from jaxpt.plan import devices_of
from jaxpt.program import Program
from jaxpt.run import from_json, to_json
from jaxpt.state import flatten
from jaxpt.steps import Step
from jaxpt.summary import activation_table
from jaxpt.weights import Dense, Grouped, LowRank, SparsePlusLowRank, Uniform

MESHES = {
    "replicas": Mesh(replica=2, data=2, fsdp=2),
    "sequence": Mesh(data=2, fsdp=2, tensor=2, sequence=True),
    "ring": Mesh(data=2, context=2, tensor=2, ring=True),
    "gathered keys": Mesh(fsdp=2, context=4),
    "sharded state": Mesh(data=4, tensor=2, shard_state=True),
}
OBJECTIVES = {"decoder": CausalLM(), "encoder": MaskedLM(), "encoder_decoder": UL2()}
ALWAYS = (
    ("decoder", "replicas"),
    ("decoder", "sequence"),
    ("encoder", "gathered keys"),
    ("encoder", "sharded state"),
    ("encoder_decoder", "ring"),
)
WEIGHTS = (
    ("*/query", LowRank(4)),
    ("*/mlp/up", SparsePlusLowRank(4, 8.0, Grouped(4))),
    ("*/mlp/*", SparsePlusLowRank(4, 8.0, Uniform(0.25))),
    ("*", Dense()),
)
STEPS, LAYERS = 20, 3
VOCAB = 368  # rows of the tiny runs' embedding


def program_of(run, mesh):
    run = dataclasses.replace(run, mesh=mesh)
    run.validate(jax.device_count())
    return Program(run, 0, run.tokenizer.build().vocabulary, run.mesh.build())


def losses_of(program, state, batches):
    """The losses of the batches' steps, and the state after them."""
    key, losses = jax.random.key(1), []
    for batch in batches:
        state, metrics = program.train_step(state, program.put(batch), key)
        total, count = metrics["loss"]
        losses.append(float(total) / float(count))
    return losses, state


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """kind -> (run, batches, state at first and losses on one device) of a run with dropout,
    accumulation, packed rows, and four kinds of weights."""

    @functools.cache
    def made(kind):
        changes = {
            "batch": 16,
            "step": Step(accumulate=2),
            "optimizer.lr": 2e-3,
            "model.layers": LAYERS,
            "model.weights": WEIGHTS,
            "model.dropout": 0.1,
            "model.attention": Attention(heads=4, dropout=0.1),
            "model.mlp": MLP(width=32, dropout=0.1),
        }
        if kind == "encoder_decoder":
            changes["model.positions"] = RelativeBias(8, 16)
        folder = tmp_path_factory.mktemp(kind)
        run = tiny_run(folder, kind=kind, objective=OBJECTIVES[kind], **changes)
        one = program_of(run, Mesh(devices=1))
        with one.loader(run.tokenizer.build()) as loader:
            batches = [next(loader) for _ in range(STEPS)]
        assert max(batch["segments"].max() for batch in batches) > 1, "rows are packed"
        first = one.init(jax.random.key(0))
        start = jax.device_get(first)
        losses, _ = losses_of(one, first, batches)
        assert losses[-1] < losses[0] - 0.1
        return run, batches, start, losses

    return made


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_do_not_depend_on_the_mesh(on_one_device, kind, mesh, request):
    """20 steps with everything that could: to 1e-5 of those of one device."""
    if (kind, mesh) not in ALWAYS and not request.config.getoption("all_meshes"):
        pytest.skip("one of the cases that --all-meshes runs")
    run, batches, start, expected = on_one_device(kind)
    program = program_of(run, MESHES[mesh])
    if mesh == "sequence":
        first = program.init(jax.random.key(0))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), first, start
        )
    else:
        first = jax.device_put(start, jax.tree.map(lambda a: a.sharding, program.abstract))
    losses, state = losses_of(program, first, batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    fresh = flatten(start.params)
    for path, trained in flatten(state.params).items():
        assert np.array_equal(fresh[path], trained) == path.endswith("indices"), path
    placed = {name for path in flatten(state.params) for name in axes_of(program, path)}
    assert {"fsdp", "tensor"} & placed == {
        n for n in ("fsdp", "tensor") if program.layout.mesh.shape[n] > 1
    }
    CHECKS.get(mesh, lambda program: None)(program)


def axes_of(program, path):
    """The mesh axes over which a parameter is cut."""
    found = jax.tree.leaves(tuple(flatten(program.abstract.params)[path].sharding.spec))
    return [name for name in found if name is not None]


# What the compiled programs exchange.


def exchanges(program):
    sizes = {name: int(size) for name, size in program.layout.mesh.shape.items()}
    return traffic(program.train_step.program.as_text(), sizes).collectives


def gathered_shapes(program):
    """Shapes of what all-gathers make."""
    text = program.train_step.program.as_text()
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^ ]* all-gather(?:-start)?\(", text)
    return {tuple(int(n) for n in dims.split(",") if n) for dims in found}


def check_replicas(program):
    """Parameters are gathered over fsdp alone, a layer at a time; over the slow network go sums."""
    found = exchanges(program)
    assert {c.axes for c in found if c.kind == "all-gather"} == {("fsdp",)}
    assert {c.kind for c in found if "replica" in c.axes} == {"all-reduce"}
    shapes = gathered_shapes(program)
    assert shapes
    assert not any(shape[0] == LAYERS for shape in shapes), shapes
    placed = [x.sharding.spec for x in jax.tree.leaves(program.abstract.params)]
    assert not any("replica" in str(spec) for spec in placed)
    assert program.batch_shardings["tokens"].spec[0] == ("replica", "data", "fsdp")


def check_sequence(program):
    """Residuals are of a device's share of the positions, and are gathered for the products; no
    device has the whole vocabulary's logits or embedding."""
    over_tensor = {c.kind for c in exchanges(program) if c.axes == ("tensor",)}
    assert "all-gather" in over_tensor
    text = program.train_step.program.as_text()
    assert f"[{VOCAB // 2}," in text
    assert not re.search(rf"[\[,]{VOCAB}[,\]]", text)


def check_sharded_state(program):
    """A device holds a fourth of the optimizer's state of the parameters that it has; what it
    changes of them is gathered by all."""
    state, params = flatten(program.abstract.opt_state), flatten(program.abstract.params)
    assert all("data" in str(x.sharding.spec) for x in state.values() if x.size > 1)
    assert not any("data" in str(x.sharding.spec) for x in params.values())

    def held(tree):
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in tree)

    arguments = program.train_step.program.memory_analysis().argument_size_in_bytes
    batch = sum(4 * x.size for x in program.abstract_batch.values()) / 4
    assert arguments < held(params.values()) + batch + 0.3 * 2 * held(params.values())
    assert any(c.kind == "all-gather" and c.axes == ("data",) for c in exchanges(program))


def check_ring(program):
    """Keys go round; nobody gathers them."""
    found = [c for c in exchanges(program) if c.axes == ("context",)]
    assert any(c.kind == "collective-permute" for c in found)


CHECKS = {
    "replicas": check_replicas,
    "sequence": check_sequence,
    "sharded state": check_sharded_state,
    "ring": check_ring,
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_on_tpus_sums_that_are_cut_are_scattered(tmp_path):
    """As compiled for four chips: FSDP's gradients, and, with sequence parallelism, what comes out
    of the products, which without it is summed on all."""
    shape = {"model.width": 256, "model.mlp": MLP(width=512), "length": 256, "batch": 8}
    run = tiny_run(tmp_path, **shape, **{"model.compute": "bfloat16"})
    devices = devices_of("v5e:2x2")

    def found(mesh):
        program = dataclasses.replace(program_of(run, Mesh()), layout=mesh.build(devices))
        sent = {}
        for c in exchanges(program):
            sent[c.kind, c.axes] = sent.get((c.kind, c.axes), 0) + c.bytes
        return sent

    fsdp = found(Mesh(fsdp=4))
    trained = 4 * sum(x.size for x in jax.tree.leaves(program_of(run, Mesh()).abstract.params))
    assert fsdp["all-gather", ("fsdp",)] > 0
    assert fsdp["reduce-scatter", ("fsdp",)] > 0.5 * trained / 2
    assert fsdp.get(("all-reduce", ("fsdp",)), 0) < 0.1 * trained
    alone, cut = (found(Mesh(tensor=4, sequence=sequence)) for sequence in (False, True))
    assert ("reduce-scatter", ("tensor",)) not in alone
    assert cut["reduce-scatter", ("tensor",)] > 0
    assert cut["all-gather", ("tensor",)] > 0
    assert cut["all-reduce", ("tensor",)] < 0.5 * alone["all-reduce", ("tensor",)]


# Layouts, without compiling.


def device(index, slice_index=0, process_index=0, platform="gpu"):
    return types.SimpleNamespace(
        id=index, slice_index=slice_index, process_index=process_index, platform=platform
    )


def test_replicas_lie_on_slices_or_nodes():
    sizes = Mesh(replica=2, data=1, fsdp=4).sizes(8)
    for name in ("slice_index", "process_index"):
        mixed = [device(i, **{name: i % 2}) for i in range(8)]
        grid = _grid(mixed, sizes, whole=True)
        assert grid.shape == (2, 1, 4, 1, 1)
        for replica in grid:
            assert len({getattr(d, name) for d in replica.flat}) == 1
    assert [d.id for d in _grid([device(i) for i in range(8)], sizes, whole=True).flat] == [
        *range(8)
    ]
    three = [device(i, i // 4) for i in range(12)]
    assert _grid(three, (1, 1, 12, 1, 1), whole=True).size == 12  # one over all slices
    assert _grid(three, (6, 1, 2, 1, 1), whole=True).size == 12  # several on each
    with pytest.raises(ConfigError, match="2 replicas of 6 devices would cut through slices"):
        _grid(three, (2, 1, 6, 1, 1), whole=True)


def test_replicas_are_inferred():
    assert Mesh(replica=-1, data=1, fsdp=4).sizes(8) == (2, 1, 4, 1, 1)
    assert Mesh(replica=2, fsdp=2).sizes(8) == (2, 2, 2, 1, 1)


def test_parameters_may_have_rules_of_their_own(tmp_path):
    """By path; their optimizer state goes with them."""
    own = Placement("*/mlp/*", (("embed", ()), ("mlp", ("fsdp", "tensor"))))
    mesh = Mesh(data=2, fsdp=2, tensor=2, placements=(own,), rules=(("vocab", ()),))
    program = program_of(tiny_run(tmp_path), mesh)
    state = flatten(program.abstract)
    for name in ("params/{}", "opt_state/states/{}/mu", "opt_state/states/{}/nu"):
        up, query = (
            state[name.format(f"decoder/layers/{part}/w")].sharding.spec
            for part in ("mlp/up", "attention/query")
        )
        assert up == P(None, None, ("fsdp", "tensor"))
        assert query == P(None, "fsdp", "tensor")
        assert state[name.format("embedding/w")].sharding.spec == P(None, "fsdp")
    run = program.run
    assert from_json(to_json(run)) == run
    other = Mesh(placements=(Placement("*/mpl/*", (("embed", ()),)),)).build()
    with pytest.raises(ConfigError, match=r"mesh\.placements\.0\.pattern: '\*/mpl/\*' matches no"):
        program.model.shardings(other)
    with pytest.raises(ConfigError, match="unknown mesh axis 'rows'"):
        Placement("*", (("embed", ("rows",)),))


def test_state_is_cut_along_what_is_longest():
    layout = Mesh(data=2, fsdp=2, tensor=2, shard_state=True).build()
    for axes, shape, spec in (
        (("embed", "mlp"), (8, 16), P("fsdp", ("tensor", "data"))),
        ((None, "mlp"), (3, 8), P(None, ("tensor", "data", "fsdp"))),
        (("width",), (6,), P("data")),
        ((None,), (3,), P(None)),
        ((), (), P()),
    ):
        assert layout.spread(layout.sharding(axes), shape).spec == spec


def test_every_activation_has_a_name_and_a_place(tmp_path):
    mesh = Mesh(data=2, fsdp=2, tensor=2, sequence=True)
    program = program_of(tiny_run(tmp_path), mesh)
    table = activation_table(program)
    names = list(table.columns[0].cells)
    assert {"tokens", "attention/query", "residual", "mlp/hidden", "states"} <= set(names)
    rows = {name: tuple(c._cells[i] for c in table.columns) for i, name in enumerate(names)}
    assert rows["residual"][-1] == "data+fsdp tensor -"
    assert rows["mlp/input"][-1] == "data+fsdp - -"
    assert rows["mlp/hidden"][1:] == (
        "8 x 48 x 32", "float32", "batch length mlp", "data+fsdp - tensor",
    )  # fmt: skip
    with program.layout.active(), recorded() as found:
        constrain(jnp.zeros((8, 4)), "batch", None, name="x")
    (one,) = found
    assert (one.name, one.shape, one.spec) == ("x", (8, 4), P(("data", "fsdp"), None))


def test_rows_are_held_against_sequence_parallelism(tmp_path):
    run = dataclasses.replace(
        tiny_run(tmp_path, length=44), mesh=Mesh(tensor=4, context=2, data=1, sequence=True)
    )
    with pytest.raises(ConfigError, match=r"length: 44 cannot be cut equally over mesh.context"):
        run.validate(8)
    assert isinstance(Mesh(sequence=True).build(), Layout)
    assert Mesh(sequence=True).table["residual"] == ("context", "tensor")
