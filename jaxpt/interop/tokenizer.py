"""Tokenizers as files that transformers' ``AutoTokenizer`` loads and that give the same ids.

Whatever cuts the text, it is written as a ``tokenizer.json`` of the ``tokenizers`` library: bytes
as byte-level BPE without merges, SentencePiece models from their own file. Text that spells a
special token is text to us and the special token to transformers; all other text becomes the same
ids (of our own ``encode``, which adds none: there ``add_special_tokens=False``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxpt.data.encoding import BYTE_LEVEL, ByteBase, FileBase, SentencePieceBase, Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.files import write_atomic, write_json
from jaxpt.interop import sentencepiece
from jaxpt.models.base import Kind

BYTE_NAMES = ("<pad>", "</s>", "<unk>")  # of the ids before the bytes
SPIECE = "spiece.model"


def write(folder: Path, tokenizer: Tokenizer, kind: Kind) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where there is one, the SentencePiece file.

    Args:
      kind: of the model, which says where special ids are put around a text where they are asked
        for: what its objectives begin and end a text with.
    """
    file = _file(tokenizer)
    texts = _texts(tokenizer, file)
    _add(file, texts, tokenizer.vocabulary)
    if file.get("post_processor") is None or not isinstance(tokenizer.base, FileBase):
        file["post_processor"] = _around(kind, tokenizer.vocabulary, texts)
    write_atomic(folder / "tokenizer.json", json.dumps(file, ensure_ascii=False))
    if isinstance(tokenizer.base, SentencePieceBase):
        write_atomic(folder / SPIECE, tokenizer.base.data())
    vocabulary = tokenizer.vocabulary
    roles = {"pad": vocabulary.pad, "eos": vocabulary.eos, "bos": vocabulary.bos}
    roles["mask"] = vocabulary.mask
    settings: dict[str, Any] = {
        f"{role}_token": texts[i] for role, i in roles.items() if i is not None
    }
    if (unknown := _unknown(file["model"])) is not None:
        settings["unk_token"] = unknown
    more = [*vocabulary.sentinels, *(i[0] for _, i in vocabulary.modes if len(i) == 1)]
    settings["additional_special_tokens"] = [texts[i] for i in more if i in texts]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", settings)


def _file(tokenizer: Tokenizer) -> dict[str, Any]:
    """The base as a tokenizer.json."""
    base = tokenizer.base
    if isinstance(base, FileBase):
        return json.loads(base.tokenizer.to_str())
    if isinstance(base, SentencePieceBase):
        return sentencepiece.tokenizer_json(base)
    assert isinstance(base, ByteBase)
    vocab = {name: i for i, name in enumerate(BYTE_NAMES)}
    vocab |= {BYTE_LEVEL[b]: b + base.offset for b in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": False},
        "post_processor": None,
        "decoder": level | {"use_regex": False},
        "model": {"type": "BPE", "unk_token": None, "vocab": vocab, "merges": []},
    }


def _texts(tokenizer: Tokenizer, file: dict[str, Any]) -> dict[int, str]:
    """The text of each special id in the file: its own where it has one, else the name."""
    own = {row["id"]: row["content"] for row in file["added_tokens"]}
    vocab = file["model"]["vocab"]
    if isinstance(vocab, list):  # of Unigram: (piece, score)
        own |= {i: row[0] for i, row in enumerate(vocab)}
    else:
        own |= {i: text for text, i in vocab.items()}
    return {i: own.get(i, name) for i, name in tokenizer.names.items()}


def _unknown(model: dict[str, Any]) -> str | None:
    """The text of what stands for unknown text."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _add(file: dict[str, Any], texts: dict[int, str], vocabulary: Vocabulary) -> None:
    """Makes every special id a special token of the file, with the id that it has.

    The library gives added tokens that the vocabulary lacks the ids from its end on, one after
    another: so what lies between is filled up.
    """
    rows = {row["id"]: row for row in file["added_tokens"]}
    vocab = file["model"]["vocab"]
    used = range(len(vocab)) if isinstance(vocab, list) else set(vocab.values())
    for i in range(max(texts) + 1):
        if i in texts or not (i in used or i in rows):
            text = texts.get(i, f"<unused_{i}>")
            rows[i] = {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
    file["added_tokens"] = [rows[i] for i in sorted(rows)]


def _around(kind: Kind, vocabulary: Vocabulary, texts: dict[int, str]) -> dict[str, Any] | None:
    """What is put around a text: the start before a decoder's, the end after an encoder's."""
    start = None if kind == "encoder_decoder" else vocabulary.bos
    end = None if kind == "decoder" else vocabulary.eos
    if start is None and end is None:
        return None

    def around(*sequences: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for n, name in enumerate(sequences):
            if start is not None and (n == 0 or kind == "decoder"):
                found.append({"SpecialToken": {"id": texts[start], "type_id": n}})
            found.append({"Sequence": {"id": name, "type_id": n}})
            if end is not None:
                found.append({"SpecialToken": {"id": texts[end], "type_id": n}})
        return found

    special = {
        texts[i]: {"id": texts[i], "ids": [i], "tokens": [texts[i]]}
        for i in (start, end)
        if i is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": special,
    }
