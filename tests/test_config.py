"""Configs: strict types, JSON, files, deep replace, and what Run and Phase refuse."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import sys
import textwrap
import types
from typing import Literal

import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpt
from jaxpt.config import codec, edit, tree
from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import Bytes
from jaxpt.duration import UNITS, Duration
from jaxpt.errors import ConfigError
from jaxpt.growth.base import Update
from jaxpt.mesh import Mesh
from jaxpt.models.position import Learned
from jaxpt.models.transformer import Transformer
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.mixture import Mixture, Part
from jaxpt.optimizers import AdamW, WarmupStableDecay
from jaxpt.run import Phase, Run, from_json, load, load_with_module, to_json
from jaxpt.steps import Step

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))


def phase(**changes) -> Phase:
    fields = {
        "steps": 100,
        "data": Corpus(),
        "objective": CausalLM(),
        "optimizer": AdamW(),
        "batch": 8,
        "length": 64,
    }
    return Phase(**(fields | changes))


def one_phase(**changes) -> Run:
    return Run(**({"model": Transformer(), "tokenizer": Bytes(), "phases": (phase(),)} | changes))


def two_phases() -> Run:
    second = phase(name="masked", steps=None, tokens=5e4, objective=MaskedLM())
    return one_phase(phases=(phase(name="causal"), second))


# Every form that a field's type may take. These classes stand in no jaxpt module, so they are
# "classes of the config file", which is here this test module.


@dataclasses.dataclass(frozen=True)
class Leaf:
    number: int | float = 0


@dataclasses.dataclass(frozen=True)
class OtherLeaf(Leaf):
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Tree:
    # how many
    # there are
    count: int = 1
    rate: float = 0.5  # share of it
    flag: bool = False
    kind: Literal["a", "b", 3] = "a"
    maybe: int | None = None
    """below it"""
    every: int | float | Duration | None = 10
    leaf: Leaf = Leaf()
    betas: tuple[float, float] = (0.9, 0.99)
    names: tuple[str, ...] = ()
    rules: tuple[tuple[str, Leaf], ...] = ()

    def __post_init__(self):
        if isinstance(self.count, int) and self.count < 0:
            raise ConfigError("count", "below 0")


@dataclasses.dataclass
class Thawed:
    number: int = 0


HERE = sys.modules[__name__]
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
durations = st.builds(Duration, st.floats(0, 1), st.sampled_from(UNITS))
leaves = st.builds(Leaf, numbers) | st.builds(OtherLeaf, numbers, st.text())
trees = st.builds(
    Tree,
    count=st.integers(0, 2**70),
    rate=numbers,
    flag=st.booleans(),
    kind=st.sampled_from(["a", "b", 3]),
    maybe=st.none() | st.integers(),
    every=st.none() | numbers | durations,
    leaf=leaves,
    betas=st.tuples(numbers, numbers),
    names=st.lists(st.text()).map(tuple),
    rules=st.lists(st.tuples(st.text(), leaves)).map(tuple),
)


@given(trees)
@settings(deadline=None)
def test_json_gives_an_equal_value_of_equal_types(value):
    codec.check(value)
    back = codec.from_json(codec.to_json(value), Tree, HERE)
    assert back == value
    assert repr(back) == repr(value)  # 1 stays an int where a float may stand, -0.0 stays -0.0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model.layers": st.integers(1, 200),
            "model.dropout": st.floats(0, 0.9),
            "model.logit_softcap": st.none() | st.floats(1e-300, 1e300),
            "model.positions": st.builds(Learned, st.integers(64, 10**9)),
            "tokens": st.integers(1, 10**15),
            "batch": st.integers(1, 10**6),
            "optimizer.lr": st.floats(1e-300, 1e300),
            "checkpoint.every": durations | st.integers(1, 10**9),
            "mesh.rules": st.just((("batch", ("data",)), ("length", ()))),
            "seed": st.integers(0, 2**32 - 1),
            "monitor.profile": st.none() | st.tuples(st.integers(5, 8), st.integers(9, 20)),
        },
    )
)
@settings(deadline=None, max_examples=30)
def test_runs_round_trip(changes):
    run = one_phase().replace(**changes)
    assert from_json(to_json(run)) == run


def test_two_phases_round_trip():
    run = two_phases()
    assert from_json(to_json(run)) == run
    assert from_json(to_json(run)) != run.replace(**{"phases.masked.tokens": 1})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_load_round_trip_and_explain_themselves(path):
    run, module = load_with_module(path)
    assert from_json(to_json(run), module) == run
    assert module.__doc__, "says what it is and where it comes from"

    def walk(value, where):
        if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
            meanings = tree.meanings(type(value))
            for name in tree.field_types(type(value)):
                assert meanings.get(name), f"{type(value).__name__}.{name} has no comment"
                walk(getattr(value, name), f"{where}.{name}")
        elif isinstance(value, tuple):
            for i, inner in enumerate(value):
                walk(inner, f"{where}.{i}")

    walk(run, "run")


def test_json_is_plain_and_tagged():
    data = json.loads(to_json(one_phase()))
    assert data["type"] == "jaxpt.run:Run"
    assert data["phases"][0]["objective"]["type"] == "jaxpt.objectives.causal:CausalLM"
    assert data["phases"][0]["steps"] == 100


# ----------------------------------------------------------------------- strict types


@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"count": "64"}, "count", "int"),
        ({"count": 64.5}, "count", "int"),
        ({"count": True}, "count", "int"),
        ({"rate": "0.1"}, "rate", "float"),
        ({"rate": True}, "rate", "float"),
        ({"flag": 1}, "flag", "true or false"),
        ({"kind": "c"}, "kind", "'a' or 'b' or 3"),
        ({"kind": "3"}, "kind", "'a' or 'b' or 3"),
        ({"maybe": 1.0}, "maybe", "int or none"),
        ({"leaf": Duration(1)}, "leaf", "Leaf"),
        ({"leaf": None}, "leaf", "Leaf"),
        ({"leaf": Leaf("x")}, "leaf.number", "int or float"),  # type: ignore[arg-type]
        ({"betas": (0.9,)}, "betas", "2"),
        ({"betas": [0.9, 0.99]}, "betas", "write a tuple"),
        ({"betas": (0.9, "x")}, "betas.1", "float"),
        ({"names": ("a", 1)}, "names.1", "str"),
        ({"rules": (("a", Leaf()), ("b", "c"))}, "rules.1.1", "Leaf"),
        ({"rate": math.nan}, "rate", "not a number"),
        ({"rate": math.inf}, "rate", "not a number"),
        ({"leaf": Thawed()}, "leaf", "frozen"),
        ({"names": {"a": 1}}, "names", "dict"),
        ({"every": print}, "every", "cannot stand"),
    ],
    ids=str,
)
def test_wrong_types_are_named(change, field, valid):
    with pytest.raises(ConfigError, match=valid) as caught:
        codec.check(Tree(**change))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_an_int_is_fine_where_a_float_is_due():
    assert codec.check(Tree(rate=1, betas=(0, 1))).rate == 1


def test_two_classes_of_one_name_are_refused():
    twin = dataclasses.make_dataclass("OtherLeaf", [("x", int, 0)], bases=(Leaf,), frozen=True)
    twin.__module__ = "elsewhere"
    with pytest.raises(ConfigError, match="two classes are called OtherLeaf"):
        codec.to_json(Tree(leaf=OtherLeaf(), rules=(("a", twin()),)))


def test_meanings_come_from_comments():
    meanings = tree.meanings(Tree)
    assert meanings == {
        "count": "how many there are",
        "rate": "share of it",
        "maybe": "below it",
    }


# ----------------------------------------------------------------------- JSON from elsewhere


def edited(**changes) -> str:
    data = json.loads(to_json(one_phase()))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = data
        for name in parents:
            node = node[int(name)] if name.isdigit() else node[name]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "tag",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "this:x",
        "jaxpt.cli:main",
        "jaxpt.cli:sys",
        "jaxpt.run:Run.replace",
        "jaxpt.run.Run:replace",
        "jaxpt.run:importlib",
        "jaxpt..run:Run",
        "jaxpt:Run",
        "jaxpt.__main__:main",
        "jaxpt.objectives.base:Loss",  # a dataclass, not frozen
        "jaxpt.objectives.base:Objective\n",
        "jaxpt.objectives.causal:Objective",  # not where it is defined
        "jaxpt.folder:RunFolder",  # frozen and of jaxpt, but no objective
        "jaxpt/../os:system",
        "tests.test_config:Leaf",
        "config:Leaf",
        "config:os.system",
        "",
        7,
        ["jaxpt.run:Run"],
        {"type": "jaxpt.run:Run"},
    ],
    ids=repr,
)
def test_nothing_else_is_ever_instantiated(tag, monkeypatch):
    imported = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: imported.append(n) or real(n, *a))
    with pytest.raises(ConfigError) as caught:
        from_json(edited(phases__0__objective={"type": tag}))
    assert caught.value.field.startswith("phases.0.objective")
    # What the rest of the JSON names, and the two modules that do define a class so called.
    honest = {m.group(1) for m in re.finditer(r'"(jaxpt[\w.]+):', to_json(one_phase()))}
    assert set(imported) <= honest | {"jaxpt.objectives.base", "jaxpt.folder"}
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("", "config.json", "no JSON"),
        ("[" * 100_000, "config.json", "no JSON"),
        ('{"type": "jaxpt.run:Run", "seed": ' + "1" * 5000 + "}", "config.json", "no JSON"),
        ("[]", "", "must be Run"),
        ("{}", "type", "missing"),
        ('{"type": "jaxpt.mesh:Mesh"}', "", "Mesh is not valid; it must be Run"),
        ('{"type": "jaxpt.run:Run", "type": "jaxpt.run:Run"}', "type", "twice"),
        (edited(model__widht=3), "model.widht", "nearest: width"),
        (edited(model=None), "model", "missing"),
        (edited(phases__0__batch="8"), "phases.0.batch", "int"),
        (edited(phases__0__steps=1e400), "phases.0.steps", "int or float"),
        (edited(model__width=True), "model.width", "int"),
        (edited(model__attention__heads=7), "model.attention.heads", "does not divide"),
        (edited(model__weights=[["*"]]), "model.weights.0", "must have 2"),
        (
            edited(model__weights=[["*", {"type": "jaxpt.mesh:Mesh"}]]),
            "model.weights.0.1",
            "Weight",
        ),
        (edited(phases=[]), "phases", "at least one"),
    ],
)
def test_bad_json_is_named(text, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_json(text)
    assert caught.value.field == field


def test_what_json_leaves_out_takes_its_default():
    assert from_json(edited(seed=None, mesh=None)) == one_phase()


def test_classes_of_the_config_file_need_the_file(tmp_path):
    path = write(
        tmp_path / "configs" / "own.py",
        CONFIG
        + """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Mine(CausalLM):
            bonus: float = 0.0  # mine
        class NotAConfig:
            pass
        run = run.replace(objective=Mine(bonus=0.25))
        """,
    )
    run, module = load_with_module(path)
    text = to_json(run)
    assert '"config:Mine"' in text
    assert from_json(text, module) == run
    with pytest.raises(ConfigError, match="class of a config file, which must be given") as caught:
        from_json(text)
    assert caught.value.field == "phases.0.objective.type"
    for name in ("NotAConfig", "Run.replace", "dataclasses", "run"):
        with pytest.raises(ConfigError, match=r"it shows: .*Mine"):
            from_json(text.replace("config:Mine", f"config:{name}"), module)


def test_classes_of_a_parent_config_are_found_through_the_run(tmp_path):
    own = """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Mine(CausalLM):
            pass
        run = run.replace(objective=Mine())
        """
    write(tmp_path / "configs" / "parent.py", CONFIG + own)
    path = write(
        tmp_path / "configs" / "child.py",
        "from configs.parent import run as base\nrun = base.replace(steps=7)\n",
    )
    run, module = load_with_module(path)
    assert from_json(to_json(run), module) == run


# ----------------------------------------------------------------------- files

CONFIG = """
        from jaxpt.data.corpus import Corpus
        from jaxpt.data.tokenizers import Bytes
        from jaxpt.models.transformer import Transformer
        from jaxpt.objectives.causal import CausalLM
        from jaxpt.optimizers import AdamW
        from jaxpt.run import Phase, Run
        run = Run(
            model=Transformer(width=64),
            tokenizer=Bytes(),
            phases=(
                Phase(
                    steps=100, data=Corpus(), objective=CausalLM(), optimizer=AdamW(),
                    batch=8, length=64,
                ),
            ),
        )
"""


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture(autouse=True)
def _same_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_config_derives_from_a_parent_which_is_read_afresh(tmp_path):
    parent = tmp_path / "configs" / "base.py"
    write(parent, CONFIG)
    child = write(
        tmp_path / "configs" / "child.py",
        """
        from configs.base import run as base
        run = base.replace(**{"model.width": 128, "steps": 40, "optimizer.lr": 0.5})
        """,
    )
    run = load(child)
    assert (run.model.width, run.phases[0].steps, run.phases[0].optimizer.lr) == (128, 40, 0.5)
    write(parent, CONFIG.replace("batch=8", "batch=16"))
    assert load(child).phases[0].batch == 16
    # Another folder of the same name has its own parent.
    write(tmp_path / "other" / "configs" / "base.py", CONFIG.replace("batch=8", "batch=32"))
    other = write(tmp_path / "other" / "configs" / "child.py", child.read_text())
    sys.path.insert(0, str(tmp_path / "other"))
    assert load(other).phases[0].batch == 32


def test_classes_of_a_config_reach_data_workers(tmp_path):
    own = """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Mine(CausalLM):
            bonus: float = 0.0  # mine
            def twice(self): return 2 * self.bonus
        run = run.replace(objective=Mine(bonus=0.25))
        """
    run, module = load_with_module(write(tmp_path / "configs" / "own.py", CONFIG + own))
    sent = cloudpickle.dumps(run.phases[0].objective)
    # A worker is a new process: it knows nothing of this module, and cannot import it.
    del sys.modules[module.__name__]
    assert cloudpickle.loads(sent).twice() == 0.5


def test_run_may_be_a_function(tmp_path):
    path = write(tmp_path / "a.py", CONFIG.replace("run = Run", "def run(): return Run"))
    assert load(path).model.width == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", r"line 1: .*never closed"),
        ("x = 1\n", "defines no `run`"),
        ("run = 3\n", "`run` is a int; it must be a Run"),
        ("def run(): return None\n", "`run` is a NoneType"),
        ("from jaxpt.models.transformer import Transfomer\n", "line 1: cannot import name"),
        ("import jaxptt\n", "line 1: No module named 'jaxptt'"),
        (
            "\nfrom jaxpt import Mesh\nMesh(dta=3)\n",
            "line 3: Mesh: dta: no such field; nearest: data",
        ),
        ("from jaxpt import Phase\nPhase(steps=3)\n", "line 2: Phase: missing 5 required"),
        ("from jaxpt import Mesh\nMesh(data=-3)\n", "line 2: data: -3 is not valid"),
        (CONFIG.replace("width=64", 'width="64"'), r"line 9: Transformer.width: '64' is not valid"),
        (CONFIG.replace("width=64", "width=64.0"), r"model.width: 64.0 is not valid; .* int"),
        (CONFIG.replace("batch=8", "batch=8.0"), "batch: 8.0 is not valid; it must be int"),
        (CONFIG.replace("batch=8", "batch=8, target_length=8"), "target_length: only an encoder-d"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, message):
    path = write(tmp_path / "bad.py", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_bugs_in_a_file_keep_their_traceback(tmp_path):
    path = write(tmp_path / "bug.py", "def f():\n    return 1 / 0\nrun = f()\n")
    with pytest.raises(ZeroDivisionError) as caught:
        load(path)
    assert str(caught.traceback[-1].path) == str(path)


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "ul2_tiny.py", "")
    with pytest.raises(ConfigError, match=r"no such config file; nearest: .*ul2_tiny\.py"):
        load(tmp_path / "ul2_tny.py")
    with pytest.raises(ConfigError, match="it is a folder"):
        load(tmp_path)


# ----------------------------------------------------------------------- deep replace


def test_replace_reaches_any_depth_and_makes_changes_together():
    value = Tree(rules=(("a", Leaf(1)), ("b", OtherLeaf(2, "x"))))
    changed = edit.replace(value, {"rules.1.1.text": "y", "rules.0.0": "c", "leaf.number": 3})
    assert changed.rules == (("c", Leaf(1)), ("b", OtherLeaf(2, "y")))
    assert changed.leaf == Leaf(3)
    assert edit.replace(value, {"leaf": OtherLeaf(1), "leaf.text": "z"}).leaf == OtherLeaf(1, "z")
    # 63 is not divisible by 8 heads, nor 64 by 7: only both at once are right.
    run = one_phase().replace(**{"model.width": 84, "model.attention.heads": 7})
    assert run.model.width == 84


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"model.widht": 1}, "model.widht", "nearest: width"),
        ({"widht": 1}, "widht", "nearest: model.width"),
        ({"model.width": "64"}, "model.width", "int"),
        ({"model.width": 63}, "model.attention.heads", "divide"),
        ({"model.weights.1.0": "x"}, "model.weights.1", "valid: 0"),
        ({"model.width.x": 3}, "model.width", "no fields"),
        ({"batch": 0}, "batch", "more than 0"),
        ({"phases.train.batch": 0}, "batch", "more than 0"),
        ({"phases.x.batch": 0}, "phases.x", "phases: train"),
        ({"steps": 1, "tokens": 2}, "steps", "exactly one"),
        ({"objective": Mesh()}, "objective", "Objective"),
        ({"updates": (Mesh(),)}, "updates.0", "Update"),
        ({"begin": (Update(),)}, "begin.0", "Transition"),
    ],
    ids=str,
)
def test_replace_names_what_is_wrong(changes, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        one_phase().replace(**changes)
    assert caught.value.field == field


def test_a_new_length_takes_the_place_of_the_old():
    run = one_phase().replace(tokens=5e9)
    assert (run.phases[0].steps, run.phases[0].tokens) == (None, 5e9)
    both = two_phases().replace(**{"phases.causal.epochs": 2, "phases.masked.steps": 3})
    assert [p.duration for p in both.phases] == [Duration(2, "epochs"), Duration(3, "steps")]


# ----------------------------------------------------------------------- Run and Phase


def test_length_of_a_phase():
    model = phase(tokens=10_000, steps=None)
    assert model.duration == Duration(10_000, "tokens")
    assert model.tokens_per_step == 512
    assert model.total_steps == 20  # 19.53, to the nearest
    assert phase(target_length=32).tokens_per_step == 8 * 96
    assert phase(examples=80, steps=None).total_steps == 10
    assert phase(epochs=2, steps=None).total_steps is None
    assert phase(seconds=2.5, steps=None).total_steps is None
    assert phase().in_steps(Duration(0.25, "share")) == 25


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (lambda: phase(steps=None), "steps", "exactly one .* got none"),
        (lambda: phase(seconds=3), "steps", "got steps and seconds"),
        (lambda: phase(steps=0), "steps", "more than 0"),
        (lambda: phase(steps=1.5), "steps", "whole"),
        (lambda: phase(length=-1), "length", "more than 0"),
        (lambda: phase(target_length=0), "target_length", "more than 0"),
        (lambda: phase(name="a.b"), "name", "letters"),
        (lambda: one_phase(phases=()), "phases", "at least one"),
        (lambda: one_phase(phases=(phase(), phase())), "phases", "two phases are called 'train'"),
        (lambda: one_phase(seed=-1), "seed", "0 to"),
        (lambda: one_phase(model=Transformer(kind="encoder_decoder")), "target_length", "needs it"),
        (lambda: one_phase(phases=(phase(target_length=3),)), "target_length", "only an encoder"),
        (lambda: one_phase(model=ENCODER), "objective", "read the targets of CausalLM ahead"),
        (lambda: one_phase(model=ENCODER).replace(objective=MIXED), "objective", "Mixture ahead"),
        (
            lambda: one_phase(phases=(phase(step=Step(accumulate=3)),)),
            "batch",
            "multiple of step.accumulate = 3",
        ),
        (
            lambda: one_phase(model=Transformer(positions=Learned(max_length=63))),
            "model.positions.max_length",
            "64",
        ),
        (
            lambda: one_phase(
                phases=(
                    phase(name="a"),
                    phase(name="b", model=Transformer(positions=Learned(max_length=63))),
                )
            ),
            "phases.b.model.positions.max_length",
            "64",
        ),
        (
            lambda: one_phase(phases=(phase(steps=None, epochs=1, optimizer=AdamW(schedule=WSD)),)),
            "optimizer.schedule",
            "needs the phase's length in steps",
        ),
        (
            lambda: one_phase(
                phases=(phase(name="a"), phase(name="b", steps=9, optimizer=AdamW(schedule=LONG)))
            ),
            "phases.b.optimizer.schedule.warmup",
            "do not fit",
        ),
    ],
)
def test_impossible_runs_are_refused(make, field, message):
    def validated():
        value = make()
        return value.validate() if isinstance(value, Run) else value

    with pytest.raises(ConfigError, match=message) as caught:
        validated()
    assert caught.value.field == field


def test_an_encoder_takes_masked_lm():
    masked = Mixture(parts=(Part(MaskedLM()), Part(MaskedLM(rate=0.5), name="more")))
    for objective in (MaskedLM(), masked):
        one_phase(model=ENCODER, phases=(phase(objective=objective),)).validate()


ENCODER = Transformer(kind="encoder")
MIXED = Mixture(parts=(Part(MaskedLM()), Part(CausalLM())))
WSD = WarmupStableDecay(warmup=0.1, decay=0.2)
LONG = WarmupStableDecay(warmup=50, decay=50)


@pytest.mark.parametrize(
    ("mesh", "batch", "accumulate", "field", "message"),
    [
        (Mesh(), 8, 1, None, ""),
        (Mesh(), 12, 1, "batch", "mesh.data = 8; give a multiple of 8"),
        (Mesh(fsdp=2), 8, 2, "batch", "mesh.data = 4 x mesh.fsdp = 2 x step.accumulate = 2"),
        (Mesh(data=2, tensor=4), 2, 1, None, ""),
        (Mesh(data=1, context=8), 1, 1, None, ""),
        (Mesh(data=3), 3, 1, "mesh", "there are 8 devices"),
        (Mesh(fsdp=3), 3, 1, "mesh", "8 devices cannot be cut"),
    ],
)
def test_a_run_is_held_against_the_devices(mesh, batch, accumulate, field, message):
    run = one_phase(mesh=mesh).replace(**{"batch": batch, "step.accumulate": accumulate})
    if field is None:
        assert run.validate(devices=8) is run
        return
    with pytest.raises(ConfigError, match=message) as caught:
        run.validate(devices=8)
    assert caught.value.field == field


def test_rows_are_held_against_the_context_axis():
    with pytest.raises(ConfigError, match=r"mesh.context = 8; give a multiple of 8") as caught:
        one_phase(mesh=Mesh(data=1, context=8)).replace(length=60).validate(devices=8)
    assert caught.value.field == "length"


def test_the_model_of_a_phase_is_the_last_that_was_set():
    small, large = Transformer(width=64), Transformer(width=128)
    run = one_phase(
        model=small,
        phases=(phase(name="a"), phase(name="b", model=large), phase(name="c")),
    )
    assert [run.model_of(i) for i in range(3)] == [small, large, large]


# ----------------------------------------------------------------------- durations, errors


@given(durations | st.builds(Duration, st.floats(0, 1e300), st.just("tokens")))
def test_durations_are_read_as_they_are_written(duration):
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("100", 100, "steps"),
        ("1_000", 1000, "steps"),
        ("5e9tokens", 5e9, "tokens"),
        ("1 epoch", 1, "epochs"),
        ("0.5seconds", 0.5, "seconds"),
        (".5share", 0.5, "share"),
        ("5%", 0.05, "share"),
        ("1e-3 examples", 1e-3, "examples"),
    ],
)
def test_durations(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text", ["", "x", "-3", "5x", "5 %%", "nan", "infseconds", "101%", "s", "5e"]
)
def test_no_durations(text):
    with pytest.raises(ConfigError):
        Duration.parse(text)


def test_errors_know_where_they_are():
    error = ConfigError("width", "odd").within("model").within("")
    assert str(error) == "model.width: odd"
    assert str(ConfigError("", "odd")) == "odd"


def test_the_package_shows_its_names_lazily():
    assert set(jaxpt.__all__) <= set(dir(jaxpt))
    for name in jaxpt.__all__:
        assert getattr(jaxpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxpt.nothing
    assert isinstance(jaxpt, types.ModuleType)
