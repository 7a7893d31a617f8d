"""What ``experiments.fuzz`` feeds: valid files of each kind, and what reads them."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpt.data import pretrained
from jaxpt.data.arrayrecord import ArrayRecord
from jaxpt.data.build import build
from jaxpt.data.built import Built, array_record, verify
from jaxpt.data.encoding import SentencePieceBase, load_tokenizer
from jaxpt.data.jsonl import Jsonl
from jaxpt.data.labelled import FromFiles
from jaxpt.data.parquet import Parquet
from jaxpt.data.tasks import Task
from jaxpt.data.text import Text
from jaxpt.data.tokenizers import BPE, Bytes
from jaxpt.errors import ConfigError, DataError
from jaxpt.folder import RunFolder
from jaxpt.interop import hf
from jaxpt.interop.safetensors import SafeTensors, write
from jaxpt.interop.shards import Shards
from jaxpt.models import MLP, Attention, LayerNorm, Learned, RelativeBias, Transformer
from jaxpt.objectives import (
    CausalLM,
    PrefixLM,
    SequenceClassification,
    SpanAnswer,
    TextToText,
)
from jaxpt.optimizers import AdamW
from jaxpt.report.page import page
from jaxpt.report.records import read_record
from jaxpt.run import Phase, Run, check, override, to_json

TEXT = "the first line has words\nnaïve cafés, 日本\n\n  another line, number 3\n" * 3
BYTES = Bytes(sentinels=10)


@dataclasses.dataclass(frozen=True)
class Target:
    """Valid inputs, and what reads one; it may raise ConfigError and DataError alone."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], Any]


def targets(folder: Path) -> dict[str, Target]:
    """All of them by name; they write below ``folder``."""
    made = [
        *_configs(folder),
        *_tokenizers(folder),
        *_sources(folder),
        *_models(folder),
        *_runs(folder),
    ]
    return {target.name: target for target in made}


def _counted(folder: Path) -> Callable[[str], Path]:
    """Paths that have not been given yet: what is read once is remembered by its path."""
    numbers = itertools.count()
    folder.mkdir(parents=True, exist_ok=True)
    last: list[Path] = []

    def fresh(ending: str) -> Path:
        for path in last:
            path.unlink(missing_ok=True)
        last[:] = [folder / f"{next(numbers)}{ending}"]
        return last[0]

    return fresh


# ------------------------------------------------------------------------------ configs


def _run(**model: Any) -> Run:
    small: dict[str, Any] = {"width": 16, "layers": 2, "attention": Attention(heads=2)}
    data = Text(train="a/*.txt", holdout=0.5)
    phase = Phase(steps=4, data=data, objective=CausalLM(), optimizer=AdamW(), batch=2, length=16)
    return Run(model=Transformer(**small | model), tokenizer=BYTES, phases=(phase,))


def _configs(folder: Path) -> list[Target]:
    runs = (_run(), _run(kind="encoder_decoder").replace(objective=PrefixLM(), target_length=8))
    flags = [
        ["--steps", "3", "--batch", "8", "--model.width", "64"],
        ["--optimizer.lr", "1e-3", "--model.attention.heads=4", "--mesh.fsdp", "2"],
        ["--phases.0.length", "32", "--evaluate.every", "5", "--no-model.scan"],
    ]

    def config(data: bytes) -> None:
        home = RunFolder(_emptied(folder / "configured"))
        home.config.write_bytes(data)
        check(home.load())

    def words(data: bytes) -> None:
        try:
            found = json.loads(data)
        except ValueError:
            return
        override(runs[0], [str(word) for word in found] if isinstance(found, list) else [])

    return [
        Target("config", tuple(to_json(run).encode() for run in runs), config),
        Target("flags", tuple(json.dumps(each).encode() for each in flags), words),
    ]


# ------------------------------------------------------------------------------ tokenizers


def _asked(tokenizer: Any) -> None:
    tokenizer.decode(tokenizer.encode(TEXT).tolist())
    tokenizer.base.pieces()


def _tokenizers(folder: Path) -> list[Target]:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text(TEXT * 9)
    source = Text(str(folder / "corpus" / "*.txt"), str(folder / "corpus" / "*.txt"))
    bpe = BPE(vocab_size=300, source=source, sentinels=4).build()
    bpe.save(folder / "bpe")
    description = next((folder / "bpe").glob("*.json"))
    names = {path.name for path in (folder / "bpe").iterdir()}
    (tokenizer_json,) = (folder / "bpe").glob("tokenizer.json")
    seed = tokenizer_json.read_bytes()
    (description,) = [folder / "bpe" / name for name in names - {"tokenizer.json"}]
    described = description.read_bytes()
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 5, "eos_token": "</s>"}
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    bpe_files = {"vocab.json": vocab, "merges.txt": "#version: 0.2\na b\n"}
    bert = {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n##es\n"}
    folders = [
        {"tokenizer_config.json": settings, "config.json": {"vocab_size": 300}},
        {**bpe_files, "config.json": {"model_type": "gpt2"}},
        {**bert, "config.json": {"model_type": "bert", "pad_token_id": 0}},
        {"tokenizer.json": json.loads(seed), "special_tokens_map.json": {"eos_token": "</s>"}},
    ]

    def file(data: bytes) -> None:
        home = _emptied(folder / "one")
        (home / "tokenizer.json").write_bytes(data)
        (home / "config.json").write_text('{"eos_token_id": 1}')
        _asked(pretrained.Pretrained(path=str(home)).build())

    def saved(data: bytes) -> None:
        (folder / "bpe" / description.name).write_bytes(data)
        _asked(load_tokenizer(folder / "bpe"))

    def sides(data: bytes) -> None:
        _written(_emptied(folder / "sides"), data)
        _asked(pretrained.Pretrained(path=str(folder / "sides"), modes=("R",)).build())

    def piece(data: bytes) -> None:
        base = SentencePieceBase(data)
        base.decode(base.encode(TEXT).tolist())
        base.pieces()

    return [
        Target("tokenizer_json", (seed,), file),
        Target("tokenizer_saved", (described,), saved),
        Target("tokenizer_folder", tuple(json.dumps(f).encode() for f in folders), sides),
        Target("sentencepiece", (_sentencepiece(),), piece),
    ]


def _sentencepiece() -> bytes:
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.split("\n") * 9),
        model_writer=file,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _written(folder: Path, data: bytes) -> None:
    """Files of a folder, from JSON: name -> content. What is no name of a file is none."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return
    for name, content in files.items() if isinstance(files, dict) else ():
        text = content if isinstance(content, str) else json.dumps(content)
        usual = name.isascii() and name.isprintable() and 0 < len(name) < 99
        if usual and Path(name).name == name != "..":
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))


# ------------------------------------------------------------------------------ sources


def _read_all(source: Any) -> None:
    """Both splits, whole. An empty one is no reason not to read the other."""
    for split in ("train", "validation"):
        try:
            documents = source.open(split)
        except ConfigError:
            continue
        for i in range(min(len(documents), 200)):
            try:
                documents[i]
            except DataError:
                continue
        documents.sizes()


def _sources(folder: Path) -> list[Target]:
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    lines = [{"text": f"line {i}", "n": i} for i in range(9)]
    jsonl = "".join(json.dumps(line) + "\n" for line in lines).encode()
    buffer = io.BytesIO()
    table = pa.table({"text": [line["text"] for line in lines], "n": range(9)})
    pyarrow.parquet.write_table(table, buffer, row_group_size=4)
    record = folder / "seed.arrayrecord"
    writer = array_record().ArrayRecordWriter(str(record), "group_size:2")
    for line in lines:
        writer.write(line["text"].encode())
    writer.close()

    def of(name: str, ending: str, seeds: tuple[bytes, ...], source: Any, **more: Any) -> Target:
        fresh = _counted(folder / name)

        def read(data: bytes) -> None:
            path = fresh(ending)
            path.write_bytes(data)
            options = {"holdout": 0.5} | more
            for errors in ("skip", "raise"):
                _read_all(source(train=str(path), errors=errors, **options))
            if "check" in source.__dataclass_fields__:
                unread = source(train=str(path), validation=str(path), check=False, **more)
                _read_all(unread)

        return Target(name, seeds, read)

    packed = zstandard.ZstdCompressor().compress(TEXT.encode())
    return [
        of("text", ".txt", (TEXT.encode(),), Text, document="paragraph"),
        of("text_gzip", ".txt.gz", (gzip.compress(TEXT.encode()),), Text, document="line"),
        of("text_zstd", ".txt.zst", (packed, packed * 2), Text, document="line"),
        of("jsonl", ".jsonl", (jsonl, json.dumps(lines[0]).encode()), Jsonl),
        of("parquet", ".parquet", (buffer.getvalue(),), Parquet),
        of("arrayrecord", ".arrayrecord", (record.read_bytes(),), ArrayRecord),
        *_labelled(folder),
        *_built(folder),
    ]


def labelled_seeds() -> tuple[bytes, ...]:
    """A record of each kind of task."""
    answers = {"text": ["Big Ben"], "answer_start": [7]}
    squad = {"question": "who", "context": "it was Big Ben.", "answers": answers}
    mrpc = {"sentence1": "a b", "sentence2": "c", "label": 1}
    words = {"text": "Tom saw Bo as he ran", "span1_text": "Bo", "span2_text": "he", "label": 0}
    wsc = {**words, "span1_index": 2, "span2_index": 4}
    place = {"paragraph": 0, "question": 1}
    multirc = {"paragraph": "a <b>b", "question": "q", "answer": "a", "label": 1, "idx": place}
    record = {"passage": "p.\n@highlight\nq", "query": "q", "entities": ["A"], "answers": ["A"]}
    stsb = {"sentence1": "a", "sentence2": "b", "label": 2.5}
    records = [squad, mrpc, wsc, multirc, record, stsb]
    return tuple(json.dumps(each).encode() for each in records)


def _labelled(folder: Path) -> list[Target]:
    fresh, tokenizer = _counted(folder / "labelled"), BYTES.build()
    objectives = [
        ("squad", "span", SpanAnswer()),
        ("squad", "text", TextToText()),
        ("glue/mrpc", "classes", SequenceClassification(2)),
        ("glue/stsb", "classes", SequenceClassification(1)),
        ("super_glue/wsc", "text", TextToText()),
        ("super_glue/multirc", "text", TextToText()),
        ("super_glue/record", "text", TextToText()),
    ]

    def read(data: bytes) -> None:
        path = fresh(".jsonl")
        path.write_bytes(data)
        for name, form, objective in objectives:
            cases = Task(name, form, FromFiles(str(path))).open("train")
            features = objective.build(tokenizer.vocabulary, length=32, target_length=None)
            for i in range(len(cases)):
                try:
                    features.encoder(tokenizer).encode(cases[i])
                except (ConfigError, DataError):
                    continue

    return [Target("labelled", labelled_seeds(), read)]


def _built(folder: Path) -> list[Target]:
    home = folder / "build"
    source = Text(str(folder / "corpus" / "*.txt"), document="line", holdout=0.5)
    build(source, BYTES.build(), home, shards=1, workers=1)
    manifest = home / "manifest.json"
    sizes = next(home.glob("train*.sizes.npy"))
    good = {path: path.read_bytes() for path in (manifest, sizes)}

    def of(name: str, path: Path) -> Target:
        def read(data: bytes) -> None:
            for each, content in good.items():
                each.write_bytes(content)
            path.write_bytes(data)
            if path == sizes:  # as a forger would leave it
                said = json.loads(good[manifest])
                for file in said["splits"]["train"]["shards"][0]["files"]:
                    file["size"] = (home / file["name"]).stat().st_size
                manifest.write_text(json.dumps(said))
            verify(home)
            _read_all(Built(str(home)))

        return Target(name, (good[path],), read)

    return [of("built", manifest), of("built_sizes", sizes)]


# ------------------------------------------------------------------------------ models


def _models(folder: Path) -> list[Target]:
    attention, gated = Attention(heads=4), MLP(24, "silu", gated=True)
    small: dict[str, Any] = {"width": 16, "layers": 2, "vocab_multiple": 1}
    models = [
        Transformer(**small, attention=attention, mlp=gated),
        Transformer(
            **small,
            kind="encoder_decoder",
            positions=RelativeBias(8, 12),
            attention=Attention(heads=4, scale=1.0),
            mlp=MLP(24, gated=True),
        ),
        Transformer(
            **small,
            kind="encoder",
            positions=Learned(16),
            attention=Attention(heads=4, bias=True),
            mlp=MLP(24, activation="gelu", bias=True),
            norm=LayerNorm(epsilon=1e-12),
            placement="post",
            embedding_norm=True,
            tied=True,
            output_bias=True,
            head_transform=True,
            token_types=2,
        ),
    ]
    seeds: list[bytes] = []
    for i, each in enumerate(models):
        model = each.build(30)
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.abstract())
        hf.write(folder / f"model{i}", model, params, shard_bytes=3000 if i == 0 else 10**9)
        seeds.append((folder / f"model{i}" / "config.json").read_bytes())
    seeds += [json.dumps(json.loads(seeds[0]) | other).encode() for other in _OTHERS]
    index = folder / "model0" / "model.safetensors.index.json"
    good_index = index.read_bytes()
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.int8)}
    write(folder / "seed.safetensors", arrays, {"format": "pt"})

    def config(data: bytes) -> None:
        index.write_bytes(good_index)
        wrong: list[Exception] = []
        for i in range(len(models)):
            (folder / f"model{i}" / "config.json").write_bytes(data)
            try:
                hf.read(folder / f"model{i}").params()
            except (ConfigError, DataError) as error:
                wrong.append(error)
        if len(wrong) == len(models):
            raise wrong[0]

    def indexed(data: bytes) -> None:
        index.write_bytes(data)
        for array in Shards(folder / "model0", "model.").values():
            np.sum(array)

    def header(data: bytes) -> None:
        (folder / "one.safetensors").write_bytes(data)
        for array in SafeTensors(folder / "one.safetensors").values():
            np.sum(array)

    def json_header(data: bytes) -> None:  # with its length as it should be
        header(len(data).to_bytes(8, "little") + data + bytes(48))

    whole = (folder / "seed.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return [
        Target("hf_config", tuple(seeds), config),
        Target("index", (good_index,), indexed),
        Target("safetensors", (whole,), header),
        Target("safetensors_header", (whole[8 : 8 + length].strip(),), json_header),
    ]


_OTHERS: tuple[dict[str, Any], ...] = tuple(
    {"model_type": kind, "architectures": None, **more}
    for kind, more in {
        "mistral": {"sliding_window": 8},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"head_dim": 4},
        "olmo2": {},
        "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "llama": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16},
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
        "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4},
        "roberta": {"type_vocab_size": 1},
        "umt5": {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    }.items()
)


# ------------------------------------------------------------------------------ runs


def _runs(folder: Path) -> list[Target]:
    row = {"step": 2, "tokens": 64, "seconds": 1.5, "loss": 3.0, "phase": "a", "eval/R/loss": 2.0}
    files = {
        "config.json": json.loads(to_json(_run())),
        "metrics.jsonl": json.dumps(row) + "\n" + json.dumps(row | {"step": 4}) + "\n",
        "status.json": {
            "state": "running",
            "step": 4,
            "steps": 9,
            "command": ["jaxpt", "train", "a.py"],
            "versions": {"jax": "0.10"},
        },
        "results.json": {"step": 4, "tasks": {"R": {"loss": 2.0, "baseline": 3.0, "targets": 9}}},
        "samples.json": {"step": 4, "samples": [{"task": "R", "input": "a", "output": "b"}]},
    }

    def read(data: bytes) -> None:
        _written(_emptied(folder / "run"), data)
        found = page(read_record(folder / "run"))
        assert "<img" not in found.partition("<script")[0], "not escaped"

    return [Target("report", (json.dumps(files).encode(),), read)]
