"""A SentencePiece model file as a ``tokenizer.json`` (Unigram and BPE models)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from jaxpt.data.encoding import SPACE, SentencePieceBase
from jaxpt.errors import ConfigError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
# Numbers of the fields that are read, of sentencepiece_model.proto.
TRAINER, NORMALIZER = 2, 3
MODEL_TYPE, BYTE_FALLBACK = 3, 35  # of TrainerSpec
CHARSMAP, DUMMY_PREFIX, REMOVE_WHITESPACE = 2, 3, 4  # of NormalizerSpec


def tokenizer_json(base: SentencePieceBase) -> dict[str, Any]:
    """The model as ``tokenizers`` has it: the same ids for the same text.

    Raises:
      ConfigError: a word or character model, which ``tokenizers`` has not.
    """
    model = dict(fields(base.data()))
    trainer, rules = dict(fields(model.get(TRAINER, b""))), dict(fields(model.get(NORMALIZER, b"")))
    kind, prefix = trainer.get(MODEL_TYPE, UNIGRAM), bool(rules.get(DUMMY_PREFIX, 1))
    if kind not in (UNIGRAM, BPE):
        raise ConfigError("tokenizer", "a SentencePiece model of words or characters has no export")
    steps: list[dict[str, Any]] = []
    if rules.get(CHARSMAP):
        charsmap = base64.b64encode(rules[CHARSMAP]).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.get(REMOVE_WHITESPACE, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    space = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": kind == UNIGRAM,
    }
    make = _unigram if kind == UNIGRAM else _bpe
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": _decoder(space, bool(trainer.get(BYTE_FALLBACK, 0)), prefix),
        "model": make(base, bool(trainer.get(BYTE_FALLBACK, 0))),
    }


def _decoder(space: dict[str, Any], bytes_too: bool, prefix: bool) -> dict[str, Any]:
    if not bytes_too:
        return space
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(base: SentencePieceBase, byte_fallback: bool) -> dict[str, Any]:
    model = base.processor
    vocab = [[model.IdToPiece(i), model.GetScore(i)] for i in range(base.size)]
    return {
        "type": "Unigram",
        "unk_id": model.unk_id(),
        "vocab": vocab,
        "byte_fallback": byte_fallback,
    }


def _bpe(base: SentencePieceBase, byte_fallback: bool) -> dict[str, Any]:
    """Merges follow from scores: of the pairs that make up a piece, the best pieces come first."""
    model = base.processor
    vocab = {model.IdToPiece(i): i for i in range(base.size)}
    pieces = [p for p, i in vocab.items() if not (model.IsControl(i) or model.IsByte(i))]
    found = []
    for piece in pieces:
        rank = -model.GetScore(vocab[piece]), vocab[piece]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((rank, vocab[left], vocab[right], left, right))
    return {
        "type": "BPE",
        "unk_token": model.IdToPiece(model.unk_id()),
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in sorted(found)],
    }


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: int, or bytes of what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, data[at : at + size]
        at += size
