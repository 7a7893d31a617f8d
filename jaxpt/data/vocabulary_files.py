"""Tokenizers of which a folder has the vocabulary alone: GPT-2's and RoBERTa's vocab.json with
merges.txt (byte-level BPE), and BERT's vocab.txt (WordPiece)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpt.data.encoding import FileBase
from jaxpt.errors import DataError

VOCAB, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
# Other classes with files of the same names cut text otherwise (CLIP, CTRL, Qwen 2, ...).
BYTE_LEVEL_BPE = ("GPT2Tokenizer", "RobertaTokenizer")
WORD_PIECE = ("BertTokenizer",)
CLASSES = {  # of folders that name none: by config.json's model_type
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "roberta": "RobertaTokenizer",
    "bert": "BertTokenizer",
}


def read(folder: Path, settings: Mapping[str, Any], model: Mapping[str, Any]) -> FileBase | None:
    """The tokenizer that these files mean, as transformers makes it; None where they are not there.

    Args:
      settings: tokenizer_config.json.
      model: config.json.

    Raises:
      DataError: files that are unsound, or of a class that cuts text in ways not known here.
    """
    names = [VOCAB, MERGES] if (folder / VOCAB).is_file() else [WORDS]
    if not all((folder / name).is_file() for name in names):
        return None
    kind = settings.get("tokenizer_class") or CLASSES.get(str(model.get("model_type")))
    kind = str(kind).removesuffix("Fast")
    wanted = BYTE_LEVEL_BPE if names[0] == VOCAB else WORD_PIECE
    if kind not in wanted:
        raise DataError(
            f"{folder}: {' and '.join(names)} of tokenizer_class {kind} cannot be read, only of "
            f"{' and '.join(wanted)}; give its tokenizer.json"
        )
    try:
        first, *rest = [(folder / name).read_text(encoding="utf-8") for name in names]
        built = _bpe(first, rest[0], settings) if rest else _word_piece(first, settings)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder}: {' and '.join(names)}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{folder}: {' and '.join(names)}: {error}") from error
    return FileBase(built.to_str().encode(), str(folder / names[0]))


def _bpe(vocab: str, merges: str, settings: Mapping[str, Any]) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ids = json.loads(vocab)
    if not isinstance(ids, dict) or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise ValueError("no JSON object of ids")
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    if bad := next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None):
        raise ValueError(f"no merge of two: {bad[:80]!r}")
    made = tokenizers.Tokenizer(
        models.BPE(vocab=_checked(ids), merges=pairs)  # pyright: ignore[reportArgumentType]
    )
    space = settings.get("add_prefix_space", False) is True
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _word_piece(vocab: str, settings: Mapping[str, Any]) -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    ids = {word: i for i, word in enumerate(vocab.removesuffix("\n").split("\n"))}
    unknown = settings.get("unk_token", "[UNK]")
    unknown = str(unknown["content"] if isinstance(unknown, dict) else unknown)
    if unknown not in ids:
        raise ValueError(f"{unknown} is not in it, which stands for unknown text")
    made = tokenizers.Tokenizer(models.WordPiece(vocab=ids, unk_token=unknown))
    accents = settings.get("strip_accents")
    made.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=settings.get("do_lower_case", True) is not False,
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    made.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _checked(ids: dict[str, int]) -> dict[str, int]:
    """Raises ValueError where an id is beyond what so many pieces can have."""
    if ids and max(ids.values()) >= 2 * len(ids) + 1024:
        raise ValueError(f"an id is {max(ids.values())}, of {len(ids)} pieces")
    return ids
