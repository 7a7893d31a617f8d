"""README's blocks run as they stand, its links lead somewhere, and what it installs exists."""

import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
# The whole tiny run takes minutes; here a few steps of it with a model that compiles in seconds.
SMALL = ["--model.layers", "1", "--model.width", "64", "--model.attention.heads", "2"]
FEW_STEPS = ["--steps", "4", "--evaluate.batches", "1", *SMALL]


def commands():
    """Each simple command of the shell blocks: (its environment, its words)."""
    for line in SHELL:
        for part in line.split(" && "):
            words = shlex.split(part)
            settings = [w for w in words if re.fullmatch(r"[A-Z_]+=.*", w)]
            yield dict(w.split("=", 1) for w in settings), words[len(settings) :]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like the clone, so that runs/ is not made in the real one."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(words, folder, given=None, **environment):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XLA_FLAGS": "", "COLUMNS": "120"} | environment
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# Commands one after the other in one process: most of what each takes alone is imports.
RUNNER = """
import contextlib, io, json, sys
from jaxpt import cli
outputs = {}
for shown, words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    if code:
        sys.exit(f"{shown}: exit code {code}\\n{out.getvalue()}")
    outputs[shown] = out.getvalue()
json.dump(outputs, sys.stdout)
"""


@pytest.mark.slow
def test_every_command_runs(clone):
    """In order, as a reader types them, in one folder: later ones use what earlier ones made."""
    asked = []
    for environment, words in commands():
        if words[0] != "jaxpt":
            assert words[0] in ("pip", "pytest", "git", "cd"), f"nobody tests {words}"
            continue
        shown = shlex.join(words)
        if words[1] == "train" and not set(words) & {"--steps", "--dry-run", "--from-run"}:
            words = [*words, *FEW_STEPS]
        if words[1] == "train" and not set(words) & {*SMALL, "--dry-run", "--from-run"}:
            words = [*words, "--evaluate.batches", "1", *SMALL]
        if "--mesh.fsdp" in words and "--dry-run" not in words:
            environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        if words[1] == "bench":
            words = [*words, "--timed", "2", "--warmup", "1", *SMALL]
        asked.append((environment, shown, words[1:]))
    outputs = {}
    for environment, group in itertools.groupby(asked, key=lambda each: each[0]):
        given = json.dumps([each[1:] for each in group])
        done = run([sys.executable, "-c", RUNNER], clone, given, **environment)
        outputs |= json.loads(done)
    assert run(["jaxpt", "--version"], clone)
    first = outputs["jaxpt train configs/ul2_tiny.py"]
    for expected in ("unigram entropy", "R3", "X64_50", "model", "report: "):
        assert expected in first
    report = pathlib.Path(re.search(r"report: (\S+)", first).group(1))
    assert (clone / report).stat().st_size > 1000


@pytest.mark.slow
def test_python_blocks_run(clone):
    """The API block as it stands; the new method as a config, trained."""
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) == 2
    run([sys.executable, "-c", blocks[0]], clone)
    (clone / "suffix.py").write_text(blocks[1])
    output = run(["jaxpt", "train", "suffix.py", *FEW_STEPS], clone)
    assert "report: " in output
    # It says what its one mistake would be: the file has an inverse to hold itself against.
    assert "prefix" in output


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_installs_what_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = {
        e
        for _, words in commands()
        if words[0] == "pip"
        for e in re.findall(r"\[(.*?)\]", words[-1])
    }
    assert named
    assert named <= extras
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[test]' && pytest" in README
    assert "pip install --quiet -e '.[test]'" in ci
    assert "\npytest\n" in ci
