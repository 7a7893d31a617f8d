"""Every shipped config loads, survives JSON, and its steps come to be from shapes alone."""

import pathlib

import jax
import pytest

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.program import Program
from jaxpt.run import from_json, load, to_json

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
# Those of one family are made of the same parts: see test_llama_configs.py.
LLAMAS = ("llama_60m_galore", "llama_60m_sltrain")
TRACED = [p for p in CONFIGS if not p.stem.startswith("llama_") or p.stem in LLAMAS]
# To compile takes ten times as long as to trace.
COMPILED = [p for p in CONFIGS if p.stem in ("ul2_base", "llama_60m_galore")]
# What a tokenizer would give, without training one.
VOCABULARY = Vocabulary(
    size=8192,
    pad=0,
    eos=1,
    bos=2,
    mask=3,
    sentinels=tuple(range(8191, 8191 - 512, -1)),
    modes=(("R", (4,)), ("S", (5,)), ("X", (6,)), ("gMASK", (7,))),
    pieces="0",  # known, if only of one id
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_loads_and_survives_json(path):
    run = load(path)
    assert from_json(to_json(run)) == run
    assert path.read_text().startswith('"""'), "a config says what it is, and how to run it"
    assert f"configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", TRACED, ids=lambda p: p.stem)
def test_steps_keep_the_shapes_of_the_state(path):
    run = load(path).replace(**{"mesh.data": 4, "mesh.fsdp": 2})
    run.validate(jax.device_count())
    for index in range(len(run.phases)):
        program = Program(run, index, VOCABULARY, run.mesh.build())
        with program.layout.active():
            state, metrics = jax.eval_shape(
                program.step_function,
                program.abstract,
                program.abstract_batch,
                jax.eval_shape(lambda: jax.random.key(0)),
            )
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert jax.tree.structure(state) == jax.tree.structure(program.abstract)
        assert {"loss", "grad_norm", "tokens"} <= metrics.keys()


@pytest.mark.parametrize("path", COMPILED, ids=lambda p: p.stem)
def test_steps_compile_from_shapes_alone(path):
    """For eight devices, with nothing allocated on any."""
    run = load(path).replace(**{"mesh.data": 4, "mesh.fsdp": 2})
    run.validate(jax.device_count())
    for index in range(len(run.phases)):
        program = Program(run, index, VOCABULARY, run.mesh.build())
        before = len(jax.live_arrays())
        memory = program.train_step.program.memory_analysis()
        assert len(jax.live_arrays()) == before
        assert memory.argument_size_in_bytes > 4 * program.model.parameters / 2  # fsdp = 2
        assert memory.alias_size_in_bytes > 4 * program.model.parameters / 2  # the state is donated
        assert program.model.parameters > 0
        assert program.flops_per_step > 0
