"""The command line: overrides, help, what is refused, exit codes, and that it is quick."""

import dataclasses
import errno
import json
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest

from jaxpt import cli
from jaxpt.config import flags, tree
from jaxpt.config.flags import parse_texts
from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import Bytes
from jaxpt.duration import Duration
from jaxpt.errors import ConfigError, DataError, Exit
from jaxpt.models.transformer import Transformer
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.optimizers import AdamW, Group
from jaxpt.run import LENGTHS, Phase, Run, override, to_json

CONFIG = """
    from jaxpt.data.corpus import Corpus
    from jaxpt.data.tokenizers import Bytes
    from jaxpt.models.transformer import Transformer
    from jaxpt.objectives.causal import CausalLM
    from jaxpt.optimizers import AdamW
    from jaxpt.run import Phase, Run

    run = Run(
        model=Transformer(),
        tokenizer=Bytes(),
        phases=(
            Phase(
                steps=100, data=Corpus(), objective=CausalLM(), optimizer=AdamW(),
                batch=8, length=64,
            ),
        ),
    )
"""


def phase(**changes) -> Phase:
    fields = {"data": Corpus(), "objective": CausalLM(), "optimizer": AdamW()}
    return Phase(**({"steps": 100, **fields, "batch": 8, "length": 64} | changes))


def run_of(*phases: Phase, **changes) -> Run:
    fields = {"model": Transformer(), "tokenizer": Bytes(), "phases": phases or (phase(),)}
    return Run(**(fields | changes))


TWO = run_of(phase(name="first"), phase(name="second", objective=MaskedLM()))


def overridden(run: Run, line: str) -> Run:
    return override(run, line.split())[0]


# ----------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {}),
        (
            "--steps 40 --batch 8 --model.width 64 --optimizer.lr 1e-3 --checkpoint.every 10",
            {
                "steps": 40,
                "model.width": 64,
                "optimizer.lr": 1e-3,
                "checkpoint.every": 10,
            },
        ),
        ("--batch=16", {"batch": 16}),
        ("--model.logit-softcap 30", {"model.logit_softcap": 30.0}),
        ("--model.logit_softcap none", {"model.logit_softcap": None}),
        ("--tokens 5e9", {"tokens": 5_000_000_000}),
        ("--batch 1e3", {"batch": 1000}),
        ("--batch 1_024", {"batch": 1024}),
        ("--model.tied true --model.scan false", {"model.tied": True, "model.scan": False}),
        ("--model.tied --batch 4", {"model.tied": True, "batch": 4}),
        ("--model.placement sandwich", {"model.placement": "sandwich"}),
        ("--mesh.data -1 --mesh.fsdp 1", {}),
        ("--mesh.data 4 --mesh.fsdp -1", {"mesh.data": 4, "mesh.fsdp": -1}),
        ("--monitor.every 10seconds", {"monitor.every": Duration(10.0, "seconds")}),
        ("--checkpoint.every 5%", {"checkpoint.every": Duration(0.05, "share")}),
        ("--evaluate.every 1e6tokens", {"evaluate.every": Duration(1e6, "tokens")}),
        ("--evaluate.every None", {"evaluate.every": None}),
        ("--monitor.profile 3 5", {"monitor.profile": (3, 5)}),
        ("--monitor.profile=3,5", {"monitor.profile": (3, 5)}),
        ("--monitor.profile none", {"monitor.profile": None}),
        ("--tokenizer.modes A B C", {"tokenizer.modes": ("A", "B", "C")}),
        ("--tokenizer.modes", {"tokenizer.modes": ()}),
        ("--model.weights.0.0 */mlp/*", {"model.weights.0.0": "*/mlp/*"}),
        ('--mesh.rules [["batch",["data"]]]', {"mesh.rules": (("batch", ("data",)),)}),
        ("--phases.train.batch 4", {"batch": 4}),
        ("--name pretrain --init-seed 3", {"name": "pretrain", "init_seed": 3}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_overrides(line, changes):
    changed = overridden(run_of(), line)
    expected = run_of().replace(**changes)
    assert changed == expected
    assert repr(changed) == repr(expected)  # types too: 1000, not 1000.0


def test_overrides_of_several_phases_name_the_phase():
    changed = overridden(TWO, "--phases.second.steps 40 --phases.first.optimizer.lr 0.5 --seed 3")
    assert [p.steps for p in changed.phases] == [100, 40]
    assert [p.optimizer.lr for p in changed.phases] == [0.5, AdamW().lr]
    with pytest.raises(ConfigError, match=r"--phases.first.steps, --phases.second.steps"):
        overridden(TWO, "--steps 40")
    with pytest.raises(ConfigError, match=r"second.batch: 0 is not valid"):
        overridden(TWO, "--phases.second.batch 0")


def test_the_length_on_the_command_line_wins():
    run = run_of(phase(steps=None, tokens=5e9))
    for unit in LENGTHS:
        changed = overridden(run, f"--{unit} 7").phases[0]
        assert changed.duration == Duration(7, unit)


def test_a_field_inside_a_tuple_is_set_by_index():
    groups = (Group("*/norm/*", weight_decay=0.0), Group("*", lr_scale=0.5))
    run = run_of(phase(optimizer=AdamW(groups=groups)))
    changed = overridden(run, "--optimizer.groups.1.lr_scale 2")
    assert changed.phases[0].optimizer.groups == (groups[0], Group("*", lr_scale=2.0))


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("--widht 3", "--widht", r"nearest: --model.width"),
        ("--model.widht 3", "--model.widht", r"nearest: --model.width,"),
        ("--model.foo.bar 3", "--model.foo.bar", "no such field"),
        ("--lr 3", "--lr", r"nearest: --optimizer.lr"),
        ("--batch x", "--batch", "'x' is not valid; it must be int"),
        ("--batch 4.5", "--batch", "it must be int"),
        ("--batch 1e300", "--batch", "it must be int"),
        ("--batch", "--batch", "takes one value, got none"),
        ("--batch 1 2", "--batch", "takes one value, got 2: 1 2"),
        ("--optimizer.lr fast", "--optimizer.lr", "it must be float"),
        ("--optimizer.lr nan", "--optimizer.lr", "it must be float"),
        ("--optimizer.lr inf", "--optimizer.lr", "it must be float"),
        ("--model.tied maybe", "--model.tied", "true or false"),
        ("--model.kind enc", "--model.kind", "'decoder' or 'encoder' or 'encoder_decoder'"),
        ("--monitor.profile 1", "--monitor.profile", "takes 2 values, got 1"),
        ("--monitor.every often", "--monitor.every", "600seconds or 5%"),
        ("--mesh.rules x", "--mesh.rules", "as JSON"),
        ('--mesh.rules [["batch",[3]]]', "--mesh.rules.0.1.0", "it must be str"),
        ('--begin [{"type":"os:system"}]', "--begin.0.type", "only those are ever built"),
        ("--model 3", "--model", r"set part by part: --model.kind"),
        ("--monitor.profile.x 3", "--monitor.profile.x", "monitor.profile is None in this config"),
        ("steps 40", "steps", "flags look like"),
        ("--steps 40 --help-me", "--help_me", "no such field"),
        # What the dataclasses say.
        ("--model.width 63", "model.attention.heads", "does not divide the width 63"),
        ("--optimizer.lr 0", "optimizer.lr", "> 0"),
        ("--target-length 3", "target_length", "only an encoder-decoder"),
        ("--mesh.data -1 --mesh.fsdp -1", "mesh.data", "only one"),
        ("--steps 3 --tokens 4", "steps", "exactly one"),
        ('--mesh.rules [["batc",[]]]', "mesh.rules", "unknown logical axis"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("-") else "",
)
def test_bad_overrides_are_one_clear_line(line, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        overridden(run_of(), line)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "kind", "value"),
    [
        (["none"], str | None, None),
        (["x"], str | None, "x"),
        (["7"], str | int, 7),
        (["7"], int | float | Duration, 7),
        (["1e-3"], int | float | Duration, 1e-3),
        (["1e3"], int | float, 1000),
        (["-2"], int, -2),
        (["NO"], bool, False),
        ([], bool | None, True),
        (["a,b"], tuple[str, ...], ("a,b",)),
        (["1,2,3"], tuple[int, ...], (1, 2, 3)),
        (["()"], tuple[int, ...], ()),
    ],
)
def test_words_become_values(texts, kind, value):
    found = parse_texts(texts, kind)
    assert found == value
    assert type(found) is type(value)


# ----------------------------------------------------------------------- help


def test_help_lists_every_field_with_default_and_meaning(capsys, config):
    assert cli.main(["train", str(config), "--help"]) == Exit.OK
    shown = capsys.readouterr().out
    text = " ".join(shown.replace("│", " ").split())
    assert "--workdir" in text
    assert "--dry_run" in text

    def walk(value, prefix):
        meanings = tree.meanings(type(value))
        for name, kind in tree.field_types(type(value)).items():
            inner = getattr(value, name)
            if (type(value), name) == (Phase, "model"):
                continue  # a single phase's model is the run's
            if dataclasses.is_dataclass(inner) and not isinstance(inner, Duration):
                walk(inner, f"{prefix}{name}.")
            elif not (isinstance(inner, tuple) and flags.is_branch(inner)):
                assert f"--{prefix}{name} {flags.metavar(kind)}" in text
                assert " ".join(meanings[name].split()) in text
            else:
                assert f"--{prefix}{name}.0" in text

    run = run_of()
    walk(run.phases[0], "")
    for name in ("model", "tokenizer", "mesh", "checkpoint", "evaluate", "monitor", "loader"):
        walk(getattr(run, name), f"{name}.")
    assert "AdamW: " in text
    assert "(default: 600seconds)" in text


def test_help_shows_a_percent_sign_as_it_is(capsys, config):
    cli.main(["train", str(config), "--help"])
    shown = capsys.readouterr().out
    assert "5%" in shown
    assert "%%" not in shown


@pytest.mark.parametrize("own", [v for k, v in vars(cli).items() if k.endswith("Flags")])
def test_no_flag_of_a_command_hides_a_field(own):
    taken = {f.name for c in (Run, Phase) for f in dataclasses.fields(c)}
    names = {f.name for f in dataclasses.fields(own)}
    if own is cli.GenerateFlags:  # takes the mesh alone of the run's fields
        taken = {"mesh"}
    if own is cli.BuildFlags:  # takes none of them
        taken = set()
    assert not names & taken
    assert set(tree.meanings(own)) == names


def test_run_and_phase_share_no_field_but_the_model():
    names = [{f.name for f in dataclasses.fields(c)} for c in (Run, Phase)]
    assert names[0] & names[1] == {"model"}


# ----------------------------------------------------------------------- commands


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "configs" / "tiny.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(CONFIG))
    return path


@pytest.fixture
def called(monkeypatch):
    """What the commands' modules are called with, instead of doing it."""
    calls = []

    def module(name):
        def main(*args, **keywords):
            calls.append((name, args, keywords))

        return types.SimpleNamespace(main=main)

    monkeypatch.setattr(cli, "_module", module)
    return calls


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(run_of()))
    return folder


def test_train(called, config):
    assert cli.main(["train", str(config)]) == 0
    several = ["--coordinator", "h:1", "--processes", "2", "--process-id", "1"]
    flags = ["--dry-run", "--workdir", "x", "--batch", "4"]
    assert cli.main(["train", str(config), *flags, *several]) == 0
    alone = {"coordinator": None, "processes": None, "process_id": None}
    others = {"coordinator": "h:1", "processes": 2, "process_id": 1}
    new = {"dry_run": False, "restart": False}
    assert called == [
        ("train", (run_of(),), {"workdir": pathlib.Path("runs/tiny")} | new | alone),
        (
            "train",
            (run_of(phase(batch=4)),),
            {"workdir": pathlib.Path("x")} | new | {"dry_run": True} | others,
        ),
    ]
    called.clear()
    assert cli.main(["train", str(config), "--workdir", "gs://bucket/run"]) == Exit.CONFIG
    assert not called


def test_bench_and_data_show(called, config):
    assert cli.main(["bench", str(config), "--input-only", "--json", "--timed", "5"]) == 0
    assert cli.main(["data", "show", str(config), "--count", "2", "--split", "validation"]) == 0
    assert called == [
        (
            "bench",
            (run_of(),),
            {"name": "tiny", "input_only": True, "json": True, "timed": 5, "warmup": 3},
        ),
        (
            "data.show",
            (run_of(),),
            {"count": 2, "split": "validation", "phase": None, "at_batch": None, "json": False},
        ),
    ]


def test_eval_and_generate_take_the_run_from_its_folder(called, saved):
    assert cli.main(["eval", str(saved), "--mesh.fsdp", "2", "--batch", "4", "--json"]) == 0
    prompts = ["--prompt", "def main(", "return", "--mode", "S", "--top-p", "0.9"]
    assert cli.main(["generate", str(saved), *prompts]) == 0
    assert cli.main(["generate", str(saved), "--prompt=--x 1=2"]) == 0
    (_, args, keywords), (_, other, generate), (_, _, dashed) = called
    assert dashed["prompt"] == ("--x 1=2",)
    assert args == (run_of().replace(**{"mesh.fsdp": 2, "batch": 4}),)
    given = {"workdir": saved, "split": "validation", "at_step": None, "json": True}
    assert given.items() <= keywords.items()
    assert not any(keywords[name] for name in keywords.keys() - given.keys())
    assert other == (run_of(),)
    assert generate["prompt"] == ("def main(", "return")
    assert (generate["mode"], generate["top_p"], generate["seed"]) == ("S", 0.9, 0)


def test_eval_of_a_run_with_classes_of_its_own_needs_the_file(called, config, saved, capsys):
    with config.open("a") as file:
        file.write(
            textwrap.dedent(
                """
                import dataclasses
                @dataclasses.dataclass(frozen=True)
                class Mine(CausalLM):
                    pass
                run = run.replace(objective=Mine())
                """
            )
        )
    text = to_json(run_of()).replace("jaxpt.objectives.causal:CausalLM", "config:Mine")
    (saved / "config.json").write_text(text)
    assert cli.main(["eval", str(saved)]) == Exit.CONFIG
    assert "must be given" in capsys.readouterr().err
    for given in (["--config", str(config)], [f"--config={config}"]):
        assert cli.main(["eval", str(saved), *given]) == 0
        assert type(called[-1][1][0].phases[0].objective).__name__ == "Mine"


def test_doctor(called):
    assert cli.main(["doctor", "--json"]) == 0
    assert called == [("doctor", (), {"json": True})]


def test_data_show_prints_examples(config, capsys):
    assert cli.main(["data", "show", str(config), "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"]
    assert [row["task"] for row in found["lengths"]] == list(found["tasks"])
    longest = max(example["token_count"] for example in found["examples"])
    assert longest <= max(row["targets"] for row in found["lengths"])
    assert cli.main(["data", "show", str(config)]) == 0
    assert "Longest examples" in capsys.readouterr().out
    assert cli.main(["data", "show", str(config), "--phase", "nope"]) == Exit.CONFIG
    assert "phases: train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no such command; nearest: train"),
        (["data"], "no such command; nearest: data show"),
        (["data", "shwo"], "no such command; nearest: data show"),
        (["show"], "no such command; nearest: data show"),
        (["xyzzy"], "no such command; commands: train, eval"),
        (["train"], "CONFIG: missing"),
        (["train", "--steps", "3"], "CONFIG: missing"),
        (["eval"], "DIR: missing"),
        (["train", "nowhere.py"], "nowhere.py: no such config file"),
        (["eval", "nowhere"], "nowhere holds no run"),
        (["doctor", "--jsn"], "--jsn: no such field; nearest: --json"),
        (["generate", "SAVED"], "--prompt: missing"),
        (
            ["generate", "SAVED", "--prompt", "x", "--model.width", "3"],
            "--model.width: no such field",
        ),
        (["train", "CONFIG", "--widht", "3"], "--widht: no such field; nearest: --model.width"),
        (["train", "CONFIG", "--batch", "x"], "--batch: 'x' is not valid; it must be int"),
        (["train", "CONFIG", "--model.width", "63"], "model.attention.heads: 8 does not divide"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_is_refused_is_one_line_and_nothing_is_written(
    args, message, config, saved, called, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    paths = {"CONFIG": str(config), "SAVED": str(saved)}
    assert cli.main([paths.get(a, a) for a in args]) == Exit.CONFIG
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not called
    after = sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    assert after == before


@pytest.mark.parametrize(
    "args", [["--help"], ["-h"], ["help"], ["train", "--help"], ["eval", "-h"]]
)
def test_help_of_commands(args, capsys):
    assert cli.main(args) == Exit.OK
    assert "usage: jaxpt" in capsys.readouterr().out


def test_version_and_nothing(capsys):
    assert cli.main(["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith("jaxpt 0.")
    assert cli.main([]) == Exit.CONFIG
    assert "jaxpt data show" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("model.width", "odd"), 2, "error: model.width: odd\n"),
        (DataError("a.txt, line 3: is\nbinary"), 3, "error: a.txt, line 3: is binary\n"),
        (FloatingPointError("loss is nan at step 3"), 4, "error: loss is nan at step 3\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore"), 5, "3 GiB; lower --batch or --length"),
        (MemoryError(), 5, "error: MemoryError; lower --batch"),
        (OSError(errno.ENOSPC, "No space left", "x/y"), 6, "No space left: 'x/y'; make room"),
        (OSError(errno.EACCES, "Permission denied", "x"), 6, "Permission denied: 'x'; make room"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_exit_codes(error, code, line, monkeypatch, config, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "_module", lambda _: types.SimpleNamespace(main=fail))
    assert cli.main(["train", str(config)]) == code
    shown = capsys.readouterr().err
    assert line in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(not pathlib.Path("/sys").is_dir(), reason="no folder that none may write to")
def test_a_workdir_that_cannot_be_made_is_a_matter_of_the_disk(config, capsys):
    assert cli.main(["train", str(config), "--workdir", "/sys/run"]) == Exit.DISK
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "/sys/run" in shown
    assert "another --workdir" in shown


def test_bugs_keep_their_traceback(monkeypatch, config):
    monkeypatch.setattr(cli, "_module", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(config)])


def test_the_code_of_a_command_is_handed_on(monkeypatch, config):
    ends = types.SimpleNamespace(main=lambda *_, **__: Exit.TERMINATED)
    monkeypatch.setattr(cli, "_module", lambda _: ends)
    assert cli.main(["train", str(config)]) == 143


def test_errors_are_red_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["trian"])
    assert capsys.readouterr().err.startswith("\x1b[31merror: trian")
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["trian"])
    assert capsys.readouterr().err.startswith("error: trian")


# ----------------------------------------------------------------------- quick, and no backend


@pytest.mark.smoke
def test_help_imports_the_standard_library_alone():
    command = [sys.executable, "-X", "importtime", "-m", "jaxpt", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    heavy = {"jax", "flax", "numpy", "tyro", "cattrs", "rich", "orbax", "grain", "optax"}
    assert not imported & heavy
    assert "usage: jaxpt" in shown.stdout


@pytest.mark.smoke
def test_loading_a_config_starts_no_backend(config):
    code = f"""
        import sys, jaxpt
        assert not {{"jax", "numpy", "tyro"}} & set(sys.modules), "import jaxpt is not light"
        run = jaxpt.load({str(config)!r})
        from jaxpt.run import from_json, override, to_json
        assert from_json(to_json(override(run, ["--batch", "16"])[0])).phases[0].batch == 16
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
