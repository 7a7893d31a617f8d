"""Hostile and broken input: an error of ours in one line or none, in bounded time and memory, no
code run, nothing outside its folder. ``python -m experiments.fuzz`` runs the same for longer."""

import ast
import copy
import gzip
import io
import json
import pathlib
import random

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import fuzz, fuzz_targets
from jaxpt.data import files
from jaxpt.data.text import Text
from jaxpt.errors import ConfigError, DataError

ROOT = pathlib.Path(__file__).parents[1]
# How many mutations of each: readers in Python first, libraries in C and slow ones fewer.
EXAMPLES = {
    "config": 40,
    "flags": 2,
    "tokenizer_json": 5,
    "tokenizer_saved": 60,
    "tokenizer_folder": 60,
    "sentencepiece": 20,
    "text": 20,
    "text_gzip": 20,
    "text_zstd": 20,
    "jsonl": 20,
    "parquet": 20,
    "arrayrecord": 20,
    "labelled": 60,
    "built": 60,
    "built_sizes": 30,
    "hf_config": 40,
    "index": 60,
    "safetensors": 60,
    "safetensors_header": 60,
    "report": 20,
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz_targets.targets(tmp_path_factory.mktemp("hostile"))


def test_every_reader_is_tried(targets):
    assert targets.keys() == EXAMPLES.keys()
    for target in targets.values():
        outcomes = [fuzz.tried(target, seed) for seed in target.seeds[:3]]
        assert outcomes[0] == "read", target.name


@pytest.mark.parametrize("name", EXAMPLES)
def test_mutations_of_valid_files(targets, name):
    target, outcomes = targets[name], set()

    @settings(max_examples=EXAMPLES[name], deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32))
    def one(number):
        rng = random.Random(number)
        outcomes.add(fuzz.tried(target, fuzz.mutated(rng.choice(target.seeds), rng)))

    one()
    assert outcomes <= {"read", "ConfigError", "DataError"}
    if name not in ("report", "flags"):
        assert outcomes - {"read"}, "no mutation was noticed"


def of(**changes):
    """A change of a seed that is JSON: its entries by dotted path; None takes one away."""

    def change(seed):
        data = json.loads(seed)
        for path, value in changes.items():
            *parents, last = [int(p) if p.isdigit() else p for p in path.split("__")]
            at = data
            for part in parents:
                at = at[part]
            at[last] = value
        return json.dumps(data).encode()

    return change


def array(value, **header):
    """A .npy file, whose header says something else."""
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    text = file.getvalue()
    for old, new in header.items():
        text = text.replace(old.encode(), new.encode())
    return lambda seed: text


class Runs:
    """What a pickle may do."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("was_run"),)


FORGED = array(np.zeros(2, int), **{"(2,)": "(2000000000000,)"})
DEEP = b'{"a":' * 5000
FILES = "splits__train__shards__0__files__0__"
# (target, number of the seed, what is made of it, what is said).
BROKEN = {
    "a number of 5000 digits": ("jsonl", 0, lambda s: b'{"text": ' + b"9" * 5000, "too long"),
    "a config that is no text": ("config", 0, lambda s: s + b"\xff", "cannot be read"),
    "a config too deep": ("config", 0, lambda s: DEEP, "is no JSON"),
    "a class of no file": (
        "config",
        0,
        of(model={"type": f"jaxpt.{'a' * 300}:A"}),
        "is no config of jaxpt",
    ),
    "a token that is no text": (
        "tokenizer_folder",
        3,
        of(**{"special_tokens_map.json": {"eos_token": "\ud800"}}),
        "no id of the end",
    ),
    "an index to elsewhere": ("index", 0, of(weight_map={"a": "../x.safetensors"}), "no file of"),
    "an index to no name": ("index", 0, of(weight_map={"a": "x\0"}), "null byte"),
    "an index too deep": ("index", 0, lambda s: DEEP, "not valid JSON"),
    "axes without end": (
        "safetensors_header",
        0,
        of(a={"dtype": "F32", "shape": [0, 10**40], "data_offsets": [0, 0]}),
        "cannot have 2 axes",
    ),
    "too many axes": (
        "safetensors_header",
        0,
        of(a={"dtype": "F32", "shape": [0] * 70, "data_offsets": [0, 0]}),
        "cannot have 70 axes",
    ),
    "layers without end": ("hf_config", 0, of(num_hidden_layers=10**9), "it has 21 tensors"),
    "architectures of no list": ("hf_config", 0, of(architectures=1.5), "no list of names"),
    "a build's file elsewhere": ("built", 0, of(**{FILES + "name": "../x"}), "file '../x'"),
    "a build's dtype": ("built", 0, of(dtype="float32"), "dtype 'float32'"),
    "a build without splits": ("built", 0, of(splits={"train": 1}), "not the manifest that"),
    "sizes without end": ("built_sizes", 0, FORGED, "no file of sizes"),
    "sizes of two axes": ("built_sizes", 0, array(np.zeros((2, 2), int)), r"int64 \(2, 2\)"),
    "sizes that are a pickle": ("built_sizes", 0, array(np.array([Runs()])), "no file of sizes"),
    "ids without end": ("tokenizer_saved", 0, of(vocabulary__size=1 << 40), "1 to 16777216"),
    "an id that is none": ("tokenizer_saved", 0, of(vocabulary__eos="1"), "'1' is no id"),
    "a saved tokenizer of lists": ("tokenizer_saved", 0, of(names=[]), "not a saved tokenizer"),
    "sentinels without end": (
        "tokenizer_folder",
        0,
        of(**{"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 1 << 31}}),
        "extra_ids: 2147483648",
    ),
    "a vocabulary without end": (
        "tokenizer_folder",
        0,
        of(**{"config.json": {"vocab_size": 1 << 40}}),
        "1 to 16777216",
    ),
    "a panic in Rust": (
        "tokenizer_json",
        0,
        of(model__continuing_subword_prefix="x" * 50),
        "not a sound tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_was_found_once(targets, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    target, seed, change, said = BROKEN[name]
    with fuzz.bounded(30), pytest.raises((ConfigError, DataError), match=said):
        targets[target].read(change(targets[target].seeds[seed]))
    assert not list(tmp_path.iterdir()), "code of the file was run"


LABELS = {
    "glue/stsb": [{"label": float("inf")}, {"label": float("nan")}, {"label": 1e300}],
    "glue/mrpc": [{"label": 1e400}, {"label": None}, {"sentence1": "\ud800"}],
    "super_glue/wsc": [{"span1_index": 1 << 60}, {"span2_index": -5}, {"text": []}],
}


def test_labels_of_other_kinds(tmp_path):
    seeds = {"glue/stsb": 5, "glue/mrpc": 1, "super_glue/wsc": 2}
    objectives = {"glue/stsb": fuzz_targets.SequenceClassification(1)}
    tokenizer = fuzz_targets.BYTES.build()
    for name, changes in LABELS.items():
        objective = objectives.get(name, fuzz_targets.TextToText())
        form = "classes" if name in objectives else "text"
        features = objective.build(tokenizer.vocabulary, length=32, target_length=None)
        encoder = features.encoder(tokenizer)
        record = json.loads(fuzz_targets.labelled_seeds()[seeds[name]])
        for i, change in enumerate([{}, *changes]):
            path = tmp_path / f"{name.replace('/', '_')}{i}.jsonl"
            path.write_text(json.dumps(record | change))
            task = fuzz_targets.Task(name, form, fuzz_targets.FromFiles(str(path)))
            if not change:
                assert len(encoder.encode(task.open("train")[0]))
                continue
            with pytest.raises((DataError, ConfigError)):
                encoder.encode(task.open("train")[0])


def test_other_separators_of_lines_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    record = {"sentence1": "a\u2028b", "sentence2": "c", "label": 1}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (case,) = fuzz_targets.Task("glue/mrpc", "classes", fuzz_targets.FromFiles(str(path))).open(
        "train"
    )
    assert case.texts == ("a\u2028b", "c")


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(files, "SMALL", 1 << 16)
    pack = gzip.compress if ending == "gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(pack(b"a" * (1 << 24)))
    with pytest.raises(DataError, match="it comes to more than"):
        Text(train=str(path), validation=str(path)).open("train")
    path.write_bytes(pack(b"text\n" * 9) + pack(b"more\n"))
    assert Text(train=str(path), validation=str(path)).open("train")[0] == "text\n" * 9 + "more\n"


def test_a_report_of_nonsense_is_whole(targets):
    seed = targets["report"].seeds[0]
    for change in (
        {"status.json__steps": "<img>", "status.json__step": []},
        {"status.json__pid": 10**40, "status.json__host": None},
        {"results.json__tasks": {"<img src=x onerror=alert(1)>": {"baseline": 2.0}}},
        {"metrics.jsonl": '{"step": 1, "loss": "<img>", "tokens": [], "</script><img": 1}\n'},
        {"config.json__model": json.loads('{"a":' * 300 + "1" + "}" * 300)},
        {"samples.json__samples": [{"</script><img src=x onerror=alert(1)>": "<img"}, 3]},
    ):
        assert fuzz.tried(targets["report"], of(**change)(seed)) == "read"


def test_messages_are_one_readable_line():
    for error in (ConfigError("a\x1b[31m", "\ud800b"), DataError("a\x1b]0;x\x07: \udc80")):
        assert str(error).isprintable()
        str(error).encode()
        assert str(copy.copy(error)) == str(error)  # as it crosses process borders
    assert str(DataError("naïve 日本\n")) == "naïve 日本\n"


# --------------------------------------------------------------------------------- our own code

RUNS = {"pickle", "_pickle", "dill", "joblib", "marshal", "shelve", "torch", "yaml"}
OPENS = {"tarfile", "zipfile"}  # whose members could lie anywhere
# Functions between processes of one run, and classes of the user's own config file.
ALLOWED = {
    ("jaxpt/config/file.py", "cloudpickle"),
    ("jaxpt/data/build_crew.py", "cloudpickle"),
    ("jaxpt/data/build_shard.py", "cloudpickle"),
}
CALLS = {"eval", "exec", "__import__", "unpack_archive", "extractall"}


def suspects(source):
    """What could run code that is in data, or write where it says."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if isinstance(node.func, ast.Attribute) and node.func.attr not in ("eval", "exec"):
                name = node.func.attr
            found |= {name} & CALLS
            if name == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value).partition(".")[0])
            for word in node.keywords:
                false = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("allow_pickle", "trust_remote_code", "weights_only") and not false:
                    found.add(word.arg)
    return found & (RUNS | OPENS | CALLS | {"cloudpickle", "allow_pickle", "trust_remote_code"})


def test_no_code_is_run_from_data_and_no_archive_unpacked():
    for text, wanted in (
        ("import torch\ntorch.load(x)", {"torch"}),
        ("np.load(x, allow_pickle=True)", {"allow_pickle"}),
        ("np.load(x, allow_pickle=flag)", {"allow_pickle"}),
        ("np.load(x, allow_pickle=False)", set()),
        ("from pickle import loads", {"pickle"}),
        ("importlib.import_module('pickle')", {"pickle"}),
        ("shutil.unpack_archive(a, b)", {"unpack_archive"}),
        ("eval(x); model.eval()", {"eval"}),
    ):
        assert suspects(text) == wanted, text
    found = set()
    for folder in ("jaxpt", "kernels", "configs", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            found |= {(name, what) for what in suspects(path.read_text())}
    assert found == ALLOWED
