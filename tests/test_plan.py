"""Plans for chips that are not here: what they count, and what is said where none can be made."""

import importlib.util
import json

import jax
import pytest
from test_steps import program_of
from tiny import tiny_run

from experiments import memory_table
from jaxpt import plan as plans
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.models.transformer import Transformer
from jaxpt.optimizers import AdamW
from jaxpt.run import Run
from jaxpt.weights import Grouped, SparsePlusLowRank


def test_what_a_plan_counts(tmp_path):
    """On eight devices: the bytes of one. What the step is given comes back in its place."""
    run = tiny_run(tmp_path, mesh=Mesh(data=2, fsdp=2, tensor=2))
    program = program_of(run)
    found = plans.plan(program)
    whole = sum(x.size * 4 for x in jax.tree.leaves(program.abstract.params))
    assert found.devices == 8
    assert whole / 8 < found.parameters < whole / 2  # cut over 2 to 4 devices, but for the norms
    # Two moments, of float32 as the parameters are, and a count.
    assert found.state == 2 * found.parameters + 4
    # The rest: the step, the key, and what the step reads of the batch (tokens and targets).
    assert found.arguments >= found.parameters + found.state + 2 * 4 * 8 * 48 / 4
    assert found.aliased >= found.parameters + found.state
    assert found.temporaries > 0
    assert found.peak == (found.arguments + found.outputs - found.aliased + found.temporaries)
    assert found.flops == program.flops_per_step


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
    programs = [
        plans.program_on(deep(tmp_path, n), target, Vocabulary(256, 0, 1)) for n in (2, 10)
    ]
    few, many = (plans.plan(program) for program in programs)
    layer = (many.parameters - few.parameters) / 8
    saved = 128 * 512 * 2
    assert many.temporaries - few.temporaries < 8 * saved + 0.5 * layer
    assert many.aliased >= many.parameters + many.state
    if target == "h100:1":  # where those take a loop of compare-and-swap
        text = programs[0].train_step.program.as_text()
        scatters = [line for line in text.splitlines() if " scatter(" in line]
        assert all("unique_indices=true" in line for line in scatters), scatters


def test_every_row_of_the_memory_table_is_a_run(capsys, monkeypatch):
    for name, method in memory_table.METHODS.items():
        for size in ("60m", "13b"):
            run = memory_table.run_of(method, size)
            (phase,) = run.phases
            assert (phase.batch, phase.length) == (1, 256)
            assert isinstance(phase.step, LayerwiseStep) == name.endswith("per layer")
            assert phase.optimizer.state_dtype == ("8bit" if method.layers else "bfloat16")
            assert (run.model.dtype, run.model.compute) == ("bfloat16", "bfloat16")
            assert run.model.width == {"60m": 512, "13b": 5120}[size]
            groups = {w.support.size for _, w in run.model.weights if hasattr(w, "support")}
            assert groups == (set() if method.group is None else {method.group})

    asked = []
    monkeypatch.setattr(memory_table, "program_on", lambda *args: asked.append(args))
    found = plans.Plan(1, 30, 40, 75, 74, 9, 70, flops=1.0, seconds=2.0)
    monkeypatch.setattr(memory_table, "plan", lambda program: found)
    memory_table.main(["--models", "60m", "1b", "--methods", "Adam", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["model"], row["method"]) for row in rows] == [("60m", "Adam"), ("1b", "Adam")]
    assert {row["peak"] for row in rows} == {75 + 74 - 70 + 9}
    (run, target, vocabulary), _ = asked
    assert (run.model.width, target, vocabulary.size) == (512, "h100:1", 32_000)
    memory_table.main(["--models", "60m", "--methods", "Adam"])
    assert "parameters" in capsys.readouterr().out
