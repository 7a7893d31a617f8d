"""The tokenizer of a model that is there already: of a run's or an imported model's folder, or of a
folder as Hugging Face has them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpt.data import vocabulary_files
from jaxpt.data.encoding import (
    DESCRIPTION,
    SPACE,
    Base,
    ByteBase,
    FileBase,
    SentencePieceBase,
    Tokenizer,
    check_ids,
    load_tokenizer,
)
from jaxpt.data.tokenizers import SPELLINGS, TokenizerConfig
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.data.words import describe
from jaxpt.errors import DataError

MOST_SENTINELS = 1 << 14  # published tokenizers have up to 300
Find = Callable[[str], int | None]
TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model")
# Roles of our vocabulary -> how Hugging Face's files call them; the first that is given counts.
ROLES = {
    "pad": ("pad_token",),
    "eos": ("eos_token", "sep_token"),
    "bos": ("bos_token", "cls_token"),
    "mask": ("mask_token",),
}
BYTE_LEVEL_CLASSES = ("ByT5Tokenizer", "PerceiverTokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(TokenizerConfig):
    """The tokenizer in ``path`` with its ids and its special ids.

    The vocabulary is as large as the model's (``vocab_size`` of config.json); ids that have no text
    stay unused. Special ids that are asked for and lacking are put where that begins, or appended.
    Then the model has other rows than the one that it starts from: see
    ``jaxpt.growth.ResizeVocabulary``.
    """

    path: str  # folder of a run, of an imported model, or of a Hugging Face model
    sentinels: int = 0  # ids that mark a denoiser's spans, at least so many; 0: those it has
    modes: tuple[str, ...] = ()  # names of the mode tokens that it is to have

    def build(self) -> Tokenizer:
        """The tokenizer. Raises DataError where the folder holds none."""
        folder = Path(self.path).expanduser()
        for place in (folder / "tokenizer", folder):
            if (place / DESCRIPTION).is_file():
                return self._extended(load_tokenizer(place), None)
        tokenizer, free = read(folder)
        return self._extended(tokenizer, free)

    def _extended(self, tokenizer: Tokenizer, free: int | None) -> Tokenizer:
        """With the special ids that are lacking, at ``free``, or where the vocabulary ends."""
        old, names = tokenizer.vocabulary, dict(tokenizer.names)
        at = old.size if free is None else free
        texts = dict(self.mode_texts)
        known = dict(old.modes)
        lacking = max(0, self.sentinels - len(old.sentinels))
        # T5's order: the one that is used first has the highest id.
        more = tuple(range(at + lacking - 1, at - 1, -1))
        names |= {i: f"<extra_id_{len(old.sentinels) + n}>" for n, i in enumerate(more)}
        at += lacking
        for mode in self.modes:
            if mode in known or mode in texts:
                continue
            own = _find(f"[{mode}]", tokenizer.base)
            known[mode] = (at if own is None else own,)
            names[known[mode][0]] = f"[{mode}]"
            at += own is None
        known |= {mode: tuple(tokenizer.encode(text).tolist()) for mode, text in texts.items()}
        vocabulary = dataclasses.replace(
            old,
            size=max(old.size, at),
            sentinels=old.sentinels + more,
            modes=tuple(known.items()),
        )
        return Tokenizer(tokenizer.base, vocabulary, names)


def read(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a folder as Hugging Face has them, and the first id that has no text.

    Raises:
      DataError: files that are missing or unsound.
    """
    settings = {**_object(folder / "special_tokens_map.json")}
    settings |= _object(folder / "tokenizer_config.json")
    model = _object(folder / "config.json")
    base = _base(folder, settings, model)
    added = _added(base, settings)

    def find(text: str) -> int | None:
        own = (i for i, added_text in added.items() if added_text == text)
        return next(own, _find(text, base))

    ids = {role: _role(role, settings, model, find) for role in ROLES}
    if ids["eos"] is None:
        raise DataError(f"{folder}: no id of the end (eos_token or sep_token) in its files")
    pad = ids["eos"] if ids["pad"] is None else ids["pad"]  # who has none, pads with the end
    sentinels = []
    while (i := find(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(i)
    free = 1 + max([base.size - 1, *added])
    vocabulary = Vocabulary(
        size=max(free, _whole(model.get("vocab_size"), 0)),
        pad=pad,
        eos=ids["eos"],
        bos=ids["bos"],
        mask=ids["mask"],
        sentinels=tuple(sentinels),
        pieces=describe(base.pieces()),
    )
    shown = {"pad": "<pad>", "bos": "<s>", "mask": "<mask>", "eos": "</s>"}
    names = {i: shown[role] for role in shown if (i := ids[role]) is not None}
    names |= {i: f"<extra_id_{n}>" for n, i in enumerate(sentinels)}
    check_ids(vocabulary, [*names], str(folder))
    return Tokenizer(base, vocabulary, names), free


def _base(folder: Path, settings: Mapping[str, Any], model: Mapping[str, Any]) -> Base:
    if (folder / TOKENIZER_JSON).is_file():
        return FileBase((folder / TOKENIZER_JSON).read_bytes(), str(folder / TOKENIZER_JSON))
    for name in SENTENCEPIECE:
        if (folder / name).is_file():
            return SentencePieceBase((folder / name).read_bytes(), str(folder / name))
    if settings.get("tokenizer_class") in BYTE_LEVEL_CLASSES:
        return ByteBase()
    if (found := vocabulary_files.read(folder, settings, model)) is not None:
        return found
    raise DataError(
        f"{folder} holds no tokenizer that is known: {TOKENIZER_JSON}, {', '.join(SENTENCEPIECE)}, "
        f"vocab.json with merges.txt, vocab.txt, or a tokenizer_config.json of "
        f"{BYTE_LEVEL_CLASSES[0]}"
    )


def _added(base: Base, settings: Mapping[str, Any]) -> dict[int, str]:
    """Ids beyond the base's own, with their texts."""
    if isinstance(base, FileBase):
        return {}
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict):
        rows = {str(i): _text(row) for i, row in added.items()}
        return {int(i): row for i, row in rows.items() if i.isdecimal() and len(i) < 9}
    sentinels = _whole(settings.get("extra_ids"), 125 if isinstance(base, ByteBase) else 0)
    if not 0 <= sentinels <= MOST_SENTINELS:
        raise DataError(f"extra_ids: {sentinels} is not valid; it can be up to {MOST_SENTINELS}")
    if isinstance(base, ByteBase):
        ids = {0: "<pad>", 1: "</s>", 2: "<unk>"}
        return ids | {base.size + n: f"<extra_id_{n}>" for n in range(sentinels)}
    if "extra_ids" not in settings and settings.get("tokenizer_class") == "T5Tokenizer":
        sentinels = 100
    return {base.size + sentinels - 1 - n: f"<extra_id_{n}>" for n in range(sentinels)}


def _role(role: str, settings: dict, model: dict, find: Find) -> int | None:
    """The id of a role: by the text that the files give it, else by config.json, else by the usual
    spellings."""
    given = [_text(settings[name]) for name in ROLES[role] if settings.get(name)]
    ids = [i for text in given if (i := find(text)) is not None]
    if not ids and (value := model.get(f"{role}_token_id")) is not None:
        ids = value if isinstance(value, list) else [value]
    if not ids and not given:
        ids = [i for text in SPELLINGS[role] if (i := find(text)) is not None]
    return _whole(ids[0], None) if ids else None


def _find(text: str, base: Base) -> int | None:
    """The id of a special text among the base's own."""
    if isinstance(base, FileBase):
        return base.tokenizer.token_to_id(text)
    if isinstance(base, SentencePieceBase):
        for piece in (text, SPACE + text):  # mT5 has its sentinels with a space
            i = base.processor.PieceToId(piece)
            if base.processor.IdToPiece(i) == piece:
                return i
    return None


def _text(row: Any) -> str:
    text = str(row.get("content", "")) if isinstance(row, dict) else str(row)
    return text.encode(
        "utf-8", "backslashreplace"
    ).decode()  # JSON may have half of a surrogate pair


def _whole(value: Any, default: Any) -> Any:
    return value if type(value) is int else default


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file. Raises DataError where it is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: no JSON object")
    return found
