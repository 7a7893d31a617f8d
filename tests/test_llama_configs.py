"""The configs of the low-rank and memory-efficient pretraining papers: complete, and as published.

That each loads and survives JSON is in test_configs.py.
"""

import dataclasses
import pathlib
import re
from typing import Any

import pytest
from test_configs import CONFIGS, VOCABULARY

from jaxpt.config.file import load_module
from jaxpt.data.tfds import Tfds
from jaxpt.growth import ReLoRA
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.program import Program
from jaxpt.run import check, load
from jaxpt.weights import Uniform

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
LLAMA: Any = load_module(FOLDER / "_llama.py")
METHODS = (
    *("full", "low_rank", "sltrain", "relora", "loro"),
    *("galore", "fira", "grass", "apollo", "apollo_mini", "spam", "stable_spam"),
)
SIZES = ("60m", "130m", "350m", "1b", "7b")
BILLIONS = dict(zip(SIZES, (1.3, 2.6, 7.8, 13.1, 19.7), strict=True))
# Millions of parameters: Han et al. 2024, table 2 (sparse: density 0.03); Touvron et al. 2023.
PUBLISHED = {
    "full": (58, 134, 368, 1339, 6738),
    "low_rank": (43, 94, 185, 609, None),
    "sltrain": (44, 97, 194, 646, None),
}

# From the authors' scripts.
SCRIPTS = {
    "60m_sltrain": {"lr": 0.003},
    "130m_galore": {"lr": 0.01, "rank": 256, "period": 200, "scale": 0.25},
    "1b_galore": {"lr": 0.01, "rank": 512, "period": 200, "scale": 0.25},
    "7b_galore": {"lr": 0.005, "rank": 1024, "period": 500, "scale": 0.25},
    "350m_fira": {"lr": 0.01, "rank": 256, "period": 200, "scale": 0.25},
    "1b_fira": {"lr": 0.01, "rank": 512, "period": 200, "scale": 0.0625},
    "7b_fira": {"lr": 0.005, "rank": 64, "period": 500, "scale": 0.0625},
    "130m_apollo": {"lr": 0.01, "rank": 192, "period": 200, "scale": 1.0, "scaling": "channel"},
    "130m_apollo_mini": {"lr": 0.01, "rank": 1, "scale": 192.0, "scaling": "tensor"},
    "350m_apollo_mini": {"lr": 0.01, "rank": 1, "scale": 128.0, "scaling": "tensor"},
    "60m_loro": {"lr": 0.01, "period": 500},
    "1b_loro": {"lr": 0.005, "period": 200},
    "350m_spam": {"lr": 4e-4, "threshold": 5000, "period": 500, "warmup": 150, "density": 1.0},
    "130m_stable_spam": {"lr": 8e-4, "gamma1": 0.85, "gamma2": 0.99999, "gamma3": 0.999},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_are_those_of_the_scripts(name):
    size, method = name.split("_", 1)
    (phase,) = getattr(LLAMA, method)(size).phases
    ours = {field: getattr(phase.optimizer, field) for field in SCRIPTS[name]}
    assert ours == SCRIPTS[name]


def test_there_is_a_file_of_every_size_and_method():
    found = {path.stem for path in CONFIGS if path.stem.startswith("llama_")}
    wanted = {f"llama_{size}_{method}" for size in SIZES for method in METHODS}
    assert found == wanted | {"llama_7b_sltrain_8bit"}
    for stem in found:
        _, size, method = stem.split("_", 2)
        assert (FOLDER / f"{stem}.py").read_text().endswith(f'\nrun = {method}("{size}")\n')
    assert tuple(LLAMA.SIZES) == SIZES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_what_all_have_in_common(method, size):
    """Tokens of Zhao et al. 2024, table 2 and section 5.3; and what the authors' trainer does."""
    run: Any = check(getattr(LLAMA, method)(size))
    steps = sum(phase.total_steps for phase in run.phases)
    assert steps * 512 * 256 / 1e9 == pytest.approx(BILLIONS[size], rel=0.02)
    for phase in run.phases:
        assert (phase.batch, phase.length) == (512, 256)
        assert phase.optimizer.clip == (1.0 if size == "7b" else None)
        assert phase.optimizer.weight_decay == 0
        assert phase.optimizer.b2 == 0.999
        model = phase.model or run.model
        assert model.dtype == "bfloat16"


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_rises_over_a_tenth_and_falls_to_a_tenth(method):
    for phase in getattr(LLAMA, method)("60m").phases:
        peak, total = phase.optimizer.lr, phase.total_steps
        rate = phase.optimizer.learning_rate(total, phase.in_steps)
        begin, top, end = (float(rate(step)) / peak for step in (0, 1100, total - 1))
        assert begin < 0.01
        assert top == pytest.approx(1, abs=0.02)
        assert end == pytest.approx(1 if phase.name == "full" else 0.1, rel=0.02)


@pytest.mark.parametrize("method", PUBLISHED)
def test_parameters_are_those_of_the_paper(method):
    for size, published in zip(SIZES, PUBLISHED[method], strict=True):
        model = getattr(LLAMA, method)(size).model
        if method == "sltrain":  # one of 32 is a little more than 0.03
            weights = tuple(
                (path, dataclasses.replace(w, support=Uniform(0.03)) if path != "*" else w)
                for path, w in model.weights
            )
            model = dataclasses.replace(model, weights=weights)
        if published is not None:
            assert round(model.build(32_000).parameters / 1e6) == published


@pytest.mark.parametrize("method", METHODS)
def test_every_phase_can_follow_the_one_before(method):
    """All that is checked before any work; nothing is compiled."""
    run, before = getattr(LLAMA, method)("60m"), None
    for index in range(len(run.phases)):
        program = Program(run, index, VOCABULARY, Mesh(devices=1).build())
        program.check(before)
        before = program


def test_restarts_end_where_the_run_does():
    """Every quarter; so that what was learnt is in the matrices at the end."""
    for size in SIZES:
        run = LLAMA.relora(size)
        (restart,) = run.phases[1].updates
        assert isinstance(restart, ReLoRA)
        assert run.phases[0].steps == restart.every
        assert run.phases[1].steps == 3 * restart.every


def test_the_8_bit_one_is_per_layer_and_keeps_no_indices():
    run = load(FOLDER / "llama_7b_sltrain_8bit.py")
    plain = LLAMA.sltrain("7b", stored=False)
    (phase,) = run.phases
    assert isinstance(phase.step, LayerwiseStep)
    assert phase.optimizer.state_dtype == "8bit"
    assert run.model == plain.model
    own = dataclasses.replace(phase.optimizer, state_dtype="float32")
    assert own == plain.phases[0].optimizer


def test_the_data_can_be_swapped_in_one_line(tmp_path):
    """For what the file says to put there, which needs nothing until it is read."""
    text = (FOLDER / "_llama.py").read_text()
    found = re.search(r"^DATA = .*(Tfds\(.*\)), from ([\w.]+)$", text, re.MULTILINE)
    assert found is not None
    line = f"from {found[2]} import Tfds\n\nDATA = {found[1]}"
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "swapped.py"
    path.write_text(text.replace(found[0], line))
    run = check(load_module(path).galore("1b"))
    assert run.phases[0].data == Tfds("c4/en:3.0.1")
