"""Plans for chips that are not here: what they count, and what is said where none can be made."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import pytest
from test_steps import program_of
from tiny import tiny_run

from experiments import memory_table
from jaxpt import cli, plan_command
from jaxpt import plan as plans
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, Exit
from jaxpt.expected import Asked, compare, expected
from jaxpt.hlo import Collective
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.models.transformer import Transformer
from jaxpt.operations import operations
from jaxpt.optimizers import AdamW
from jaxpt.run import Run
from jaxpt.weights import Dense, Grouped, LoRA, SparsePlusLowRank


def test_what_a_plan_counts(tmp_path):
    """On eight devices: the bytes of one. What the step is given comes back in its place."""
    run = tiny_run(tmp_path, mesh=Mesh(data=2, fsdp=2, tensor=2))
    program = program_of(run)
    found = plans.plan(program)
    whole = sum(x.size * 4 for x in jax.tree.leaves(program.abstract.params))
    assert found.devices == 8
    assert whole / 8 < found.parameters < whole / 2  # cut over 2 to 4 devices, but for the norms
    # Two moments, of float32 as the parameters are, a count, and what the guard knows.
    guard = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.guard.init()))
    assert found.state == 2 * found.parameters + 4 + guard
    # The rest: the step, the key, and what the step reads of the batch (tokens and targets).
    assert found.arguments >= found.parameters + found.state + 2 * 4 * 8 * 48 / 4
    assert found.aliased >= found.parameters + found.state
    assert found.temporaries > 0
    assert found.peak == (found.arguments + found.outputs - found.aliased + found.temporaries)
    assert found.flops == program.flops_per_step


@pytest.mark.parametrize("weight", [Dense(), LoRA(rank=4)])
def test_flops_by_hand(tmp_path, weight):
    """Of a step: 6 for each number of a matrix and token, and of a frozen one 4; attention's two
    products forward and four backward. The model's, and what the traced step has: it makes no
    gradient of what is frozen."""
    model = {"model.weights": (("*/layers/*", weight), ("*", Dense()))}
    program = program_of(tiny_run(tmp_path, mesh=Mesh(devices=1), **model))
    width, hidden, layers, rows, length = 16, 32, 2, 8, 48
    vocabulary = program.model.config.padded_vocab(program.model.vocab_size)
    shapes = 4 * [(width, width)] + 2 * [(width, hidden)]
    by_hand = 6.0 * width * vocabulary
    for d_in, d_out in layers * shapes:
        frozen = isinstance(weight, LoRA)
        by_hand += (4 if frozen else 6) * d_in * d_out + 6 * frozen * 4 * (d_in + d_out)
    by_hand = rows * (length * by_hand + layers * 3 * 4 * width * length**2)
    assert program.flops_per_step == pytest.approx(by_hand, rel=0.02)
    batch = [program.abstract_batch, jax.eval_shape(lambda: jax.random.key(0))]
    with program.layout.active():
        traced = jax.make_jaxpr(program.step_function)(program.abstract, *batch)
    scores = rows * layers * 2 * width * length**2  # which the backward pass makes again
    assert operations(traced) == pytest.approx(by_hand + scores, rel=0.02)


def test_what_the_sharding_asks_for(tmp_path):
    """By hand: each of 2 x 6 matrices is gathered twice along fsdp, its gradient scattered there
    and added up over data; after and before 2 branches of a layer rows are added up over tensor.
    What is beyond that is found."""
    run = tiny_run(tmp_path, mesh=Mesh(data=2, fsdp=2, tensor=2))
    asked = {
        (a.what, a.exchange.kind, a.exchange.axes): a.exchange for a in expected(program_of(run))
    }
    matrix = 4 * (4 * 16 * 16 + 2 * 16 * 32) / 2  # bytes on the devices of a layer, over tensor
    vocabulary = 4 * 368 * 16 / 2
    gathered = asked["parameters", "all-gather", ("fsdp",)]
    assert (gathered.count, gathered.bytes) == (2 * 12 + 1, 2 * 2 * matrix + vocabulary)
    scattered = asked["gradients", "reduce-scatter", ("fsdp",)]
    assert (scattered.count, scattered.bytes) == (12 + 1, 2 * matrix + vocabulary)
    # The embedding's is made where it lies: of rows that are handed round.
    added = asked["gradients", "all-reduce", ("data",)].bytes
    assert added == (scattered.bytes + vocabulary) / 2
    handed = asked["embedding's rows", "all-to-all", ("fsdp",)]
    assert (handed.count, handed.bytes) == (2, 2 * 4 * 2 * 48 * 16)
    assert asked["gradients", "all-reduce", ("data", "fsdp")].bytes == 4 * (2 * 2 + 1) * 16
    rows = 4 * 8 * 48 * 16 // 4
    assert asked["branches", "all-reduce", ("tensor",)].bytes == 2 * 4 * rows
    assert expected(program_of(tiny_run(tmp_path, mesh=Mesh(devices=1)))) is None

    def compared(**more):
        found = [one.exchange for one in expected(program_of(run))]
        return compare(
            [*found, Collective("all-gather", ("data",), 2, 1, more["bytes"])], asked_for
        )

    asked_for = expected(program_of(run))
    assert compared(bytes=1000)[1]
    rows, explained = compared(bytes=10**6)
    assert not explained
    assert {row.axes: row.excess for row in rows}["data",] == pytest.approx(5e5)
    ring = Collective("collective-permute", ("fsdp",), 16, 17, 17 * 100)
    gather = Asked("parameters", Collective("all-gather", ("fsdp",), 16, 1, 1600))
    assert compare([ring], [gather])[0][0].excess == 0  # 17 rounds where 15 would do


def test_topologies_that_nothing_can_compile_for(monkeypatch):
    found = importlib.util.find_spec
    missing = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )
    cases = {
        "v9:1": "known: v4, v5e, v5p, v6e, h100, h200",
        "v5p": "is not CHIP:NUMBER or CHIP:AxBxC",
        "v5p:2x0": "is not CHIP:NUMBER or CHIP:AxBxC",
        "h100:1": r"pip install .jax\[cuda12\]",
        "v5e:1": r"pip install .jax\[tpu\]",
    }
    for topology, message in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            plans.devices_of(topology)
        assert error.value.field == "topology"


def test_devices_of_tpus():
    pytest.importorskip("libtpu")
    assert len(plans.devices_of("v5p:2x2x1")) == 4
    assert len(plans.devices_of("v5e:1")) == 1
    assert plans.devices_of("v5e:2x4")[0].device_kind == "TPU v5 lite"
    with pytest.raises(ConfigError, match="no more than the 4 of v5e:2x2"):
        plans.devices_of("v5e:8")
    with pytest.raises(ConfigError, match="libtpu says"):
        plans.devices_of("v5e:3x5")


def deep(folder, layers: int) -> Run:
    """Wide enough that a layer is more than all else."""
    model = Transformer(
        kind="decoder",
        width=512,
        layers=layers,
        weights=(("*", SparsePlusLowRank(128, 16.0, Grouped(32))),),
        dtype="bfloat16",
        compute="bfloat16",
    )
    run = tiny_run(folder, optimizer=AdamW(clip=None, state_dtype="8bit"), step=LayerwiseStep())
    return run.replace(model=model, batch=1, length=128)


@pytest.mark.parametrize(
    ("package", "target"), [("libtpu", "v5e:1"), ("jax_cuda12_plugin", "h100:1")]
)
def test_temporaries_do_not_grow_with_depth(tmp_path, package, target):
    """Compiled for the chip: what a layer more adds is its saved input, and neither a gradient nor
    a copy of anything."""
    pytest.importorskip(package)
    programs = [plans.program_on(deep(tmp_path, n), target, Vocabulary(256, 0, 1)) for n in (2, 10)]
    few, many = (plans.plan(program) for program in programs)
    layer = (many.parameters - few.parameters) / 8
    saved = 128 * 512 * 2
    assert many.temporaries - few.temporaries < 8 * saved + 0.5 * layer
    assert many.aliased >= many.parameters + many.state
    if target == "h100:1":  # where those take a loop of compare-and-swap
        text = programs[0].train_step.program.as_text()
        scatters = [line for line in text.splitlines() if " scatter(" in line]
        assert all("unique_indices=true" in line for line in scatters), scatters


def plan_of(**fields) -> plans.Plan:
    values = {field.name: 0 for field in dataclasses.fields(plans.Plan)}
    known = {"device": "TPU v5", "devices": 1, "mesh": {"data": 1}, "collectives": (), "loops": ()}
    known |= {"asked": None, "carried": {}}
    return plans.Plan(**values | known | fields)


def test_every_row_of_the_memory_table_is_a_run(capsys, monkeypatch):
    for name, method in memory_table.METHODS.items():
        for size in ("60m", "13b"):
            run = memory_table.run_of(method, size)
            (phase,) = run.phases
            assert (phase.batch, phase.length) == (1, 256)
            assert isinstance(phase.step, LayerwiseStep) == ("per layer" in name)
            assert phase.optimizer.state_dtype == ("8bit" if method.layers else "bfloat16")
            assert (run.model.dtype, run.model.compute) == ("bfloat16", "bfloat16")
            assert run.model.width == {"60m": 512, "13b": 5120}[size]
            supports = {w.support for _, w in run.model.weights if hasattr(w, "support")}
            assert supports == (set() if method.support is None else {method.support})
            assert all(s.stored != ("no indices" in name) for s in supports)

    asked = []
    monkeypatch.setattr(memory_table, "program_on", lambda *args: asked.append(args))
    found = plan_of(arguments=75, outputs=74, aliased=70, temporaries=9)
    monkeypatch.setattr(memory_table, "plan", lambda program: found)
    memory_table.main(["--models", "60m", "1b", "--methods", "Adam", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["model"], row["method"]) for row in rows] == [("60m", "Adam"), ("1b", "Adam")]
    assert {row["peak"] for row in rows} == {75 + 74 - 70 + 9}
    (run, target, vocabulary), _ = asked
    assert (run.model.width, target, vocabulary.size) == (512, "h100:1", 32_000)
    memory_table.main(["--models", "60m", "--methods", "Adam"])
    assert "parameters" in capsys.readouterr().out


# The command.


def test_floors_of_a_plan():
    """By hand: of 100 TFLOP on 4 chips at half of 459 a second, and so on."""
    gather = Collective("all-gather", ("fsdp",), 4, 2, 800_000_000)
    found = plan_of(
        devices=4, operations=1e14, moved=2_765_000_000, collectives=(gather,), arguments=95 * 2**30
    )
    assert found.floors(0.5) == pytest.approx(
        {"compute": 1e14 / 4 / (0.5 * 459e12), "memory": 1e-3, "interconnect": 1e-3}
    )
    assert found.fits
    assert not dataclasses.replace(found, temporaries=1).fits
    unknown = dataclasses.replace(found, device="cpu")
    assert (unknown.floors(), unknown.fits) == ({}, None)
    far = plan_of(device="NVIDIA H200", collectives=(gather,), across=gather.sent)
    assert far.floors()["network"] == gather.sent / 50e9
    assert "interconnect" not in far.floors()


def test_what_the_compiler_refuses(tmp_path, monkeypatch):
    program = program_of(tiny_run(tmp_path, mesh=Mesh(devices=1)))

    def refused(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm. "
            "Exceeded hbm capacity by 4.4G."
        )

    monkeypatch.setattr("jaxpt.program.compile_train_step", refused)
    with pytest.raises(plans.DoesNotFit, match=r"does not fit: Used 20.1G of 15.75G hbm"):
        plans.plan(program)


def test_the_command(tmp_path, monkeypatch, capsys):
    """On the devices that are here, in place of chips that are not; then held against what is
    printed."""
    run = tiny_run(tmp_path, mesh=Mesh(data=2, fsdp=2, tensor=2))
    for module in (plans, plan_command):
        monkeypatch.setattr(module, "devices_of", lambda topology: jax.devices())
    own = {"name": "tiny", "topology": "v5p:8", "share": 0.5, "search": False}
    own |= {"batches": (), "limit": 12}
    assert plan_command.main(run, **own, json=True) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["mesh"] == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert row["operations"] == pytest.approx(row["flops"], rel=0.05)
    assert {"fsdp", "tensor"} <= {axis for c in row["collectives"] for axis in c["axes"]}
    assert row["fits"] is None  # no figures for a CPU

    found = plan_of(
        device="TPU v5", devices=8, mesh={"data": 8}, operations=1e15, flops=9e14, moved=10**9,
        arguments=10**9, tokens=1000, steps=86_400, loops=("while.7",),
        collectives=(Collective("all-reduce", ("data",), 8, 3, 10**9),),
    )  # fmt: skip
    monkeypatch.setattr(plan_command, "plan", lambda program: found)
    assert plan_command.main(run, **own, json=False) == 0
    shown = " ".join(capsys.readouterr().out.split())
    seconds = 1e15 / 8 / (0.5 * 459e12)
    for words in (
        "fits, 1% of 102.0", "not known: while.7",
        "TPU v5p: https://docs.cloud.google.com", f"{1e3 * seconds:,.2f}",
        "bound by compute", "all-reduce", f"{1000 / seconds:,.0f} tokens/s",
        f"{seconds:,.2f} days, {24 * 8 * seconds:,.0f} chip-",
    ):  # fmt: skip
        assert words in shown, words
    large = dataclasses.replace(found, temporaries=10**12)
    monkeypatch.setattr(plan_command, "plan", lambda program: large)
    assert plan_command.main(run, **own, json=False) == Exit.OUT_OF_MEMORY
    assert "does not fit" in capsys.readouterr().out


def test_a_search(tmp_path, monkeypatch, capsys):
    """Layouts that the config's sizes allow are compiled, and those that fit ranked by speed."""
    run = tiny_run(tmp_path)
    monkeypatch.setattr(plan_command, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(plan_command, "program_on", lambda run, *_: program_of(run))

    def planned(program):
        mesh, model = dict(program.layout.mesh.shape), program.model.config
        if mesh["tensor"] > 1:
            raise plans.DoesNotFit("Used 20G of 15G hbm")
        peak = 10**12 if model.remat == "none" and mesh["data"] > 1 else 10**9
        slower = {"none": 1, "elementwise": 1.5, "dots": 2, "full": 3}[model.remat] * (
            1 + mesh["data"]
        )
        return plan_of(operations=slower * 1e12, arguments=peak, tokens=program.phase.batch)

    monkeypatch.setattr(plan_command, "plan", planned)
    own = {"name": "tiny", "topology": "v5p:8", "share": 0.5, "search": True, "limit": 100}
    assert plan_command.main(run, **own, batches=(8, 16), json=True) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["fit"][0]["name"]
    assert best == "data 1 x fsdp 8 x tensor 1, batch 16, remat none"
    rates = [row["tokens_per_second"] for row in found["fit"]]
    assert rates == sorted(rates, reverse=True)
    assert not any("tensor 2" in row["name"] for row in found["fit"])
    refused = found["refused"]
    assert refused["data 2 x fsdp 4 x tensor 1, batch 8, remat none"] == "1000.0 GB"
    assert "20G of 15G" in refused["data 1 x fsdp 4 x tensor 2, batch 8, remat none"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology: missing"),
        (["--topology", "v9:1"], "known: v4, v5e"),
        (["--topology", "v5e:1", "--share", "1.5"], "--share: 1.5 is not valid"),
        (["--topology", "v5e:1", "--batches", "8"], "--search alone"),
        (["--topology", "v5e:1", "--search", "--limit", "0"], "--limit: 0 is not valid"),
    ],
)
def test_what_the_command_refuses(flags, message, capsys):
    config = pathlib.Path(__file__).parent.parent / "configs" / "bench_decoder_cpu.py"
    assert cli.main(["plan", str(config), *flags]) == Exit.CONFIG
    assert message in capsys.readouterr().err
