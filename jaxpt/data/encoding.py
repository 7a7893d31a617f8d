"""Built tokenizers: text to ids and back, special ids, and a folder that holds one.

A ``Tokenizer`` is a *base* (bytes, SentencePiece, a tokenizers file), which knows only how to cut
text, and a ``Vocabulary``. Ids that the base lacks (sentinels, mode tokens, ...) lie above
its own, so no text can ever be encoded to them. ``jaxpt/data/tokenizers.py`` has the configs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.data.words import describe
from jaxpt.errors import DataError
from jaxpt.files import write_atomic

DESCRIPTION = "vocabulary.json"  # the file beside the base's own in a saved tokenizer's folder
MOST_IDS = 1 << 24  # of any vocabulary; published ones have up to 2^18
SPACE = "\u2581"  # what SentencePiece writes for a space


def _byte_level() -> dict[int, str]:
    """Byte -> the printable character that byte-level BPE writes for it (Radford et al. 2019):
    itself where it is one in Latin-1, else the next from code 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_LEVEL = _byte_level()
BYTE_LEVEL_BACK = {ord(character): chr(byte) for byte, character in BYTE_LEVEL.items()}


class Base(Protocol):
    """What cuts text into ids in [0, size) and puts them together again."""

    kind: str
    file: str  # name of its file in a saved tokenizer's folder; "" where it needs none

    @property
    def size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: list[int]) -> str: ...

    def pieces(self) -> list[str]:
        """The text of each id, white space written out; "" for what is none."""
        ...

    def data(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ByteBase:
    """UTF-8 bytes as in ByT5 (Xue et al. 2022): pad, eos and unknown are 0 to 2, bytes follow."""

    kind = "bytes"
    file = ""
    offset = 3
    size = 259

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + self.offset

    def decode(self, ids: list[int]) -> str:
        return bytes(i - self.offset for i in ids if i >= self.offset).decode("utf-8", "replace")

    def pieces(self) -> list[str]:
        return [""] * self.offset + [chr(b) if b < 128 else "\ufffd" for b in range(256)]

    def data(self) -> bytes:
        return b""


class FileBase:
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    kind = "tokenizers"
    file = "tokenizer.json"

    def __init__(self, data: bytes, name: str = file):
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{name}: not a tokenizer.json: {error}") from error
        except BaseException as error:  # a panic of Rust is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{name}: not a sound tokenizer.json: {error}") from None
        # Special tokens that are written out in a text are text, not commands.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._data = data
        known = self.tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(known.values(), default=-1)
        if not 0 < self.size <= max(MOST_IDS // 16, 16 * len(known)):
            raise DataError(f"{name}: its {len(known)} pieces have ids up to {self.size - 1}")

    def encode(self, text: str) -> np.ndarray:
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self) -> list[str]:
        from tokenizers import models

        found = [""] * self.size
        known = self.tokenizer.get_vocab(with_added_tokens=True)
        if isinstance(self.tokenizer.model, models.WordPiece):
            mark = self.tokenizer.model.continuing_subword_prefix
            for piece, i in known.items():
                found[i] = piece[len(mark) :] if piece.startswith(mark) else f" {piece}"
        elif BYTE_LEVEL[32] in known and BYTE_LEVEL[10] in known:
            for piece, i in known.items():
                text = piece.translate(BYTE_LEVEL_BACK)
                found[i] = text.encode("latin-1", "replace").decode("utf-8", "replace")
        else:
            for piece, i in known.items():
                found[i] = piece.replace(SPACE, " ")
        return found

    def data(self) -> bytes:
        return self._data

    def __reduce__(self):
        return FileBase, (self._data,)


class SentencePieceBase:
    """A SentencePiece model file (Kudo and Richardson 2018)."""

    kind = "sentencepiece"
    file = "spm.model"

    def __init__(self, data: bytes, name: str = file):
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(data)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: not a SentencePiece model: {error}") from error
        self._data = data
        self.size = self.processor.GetPieceSize()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.processor.EncodeAsIds(text), np.int32)

    def decode(self, ids: list[int]) -> str:
        return self.processor.DecodeIds(ids)

    def pieces(self) -> list[str]:
        return [p.replace(SPACE, " ") for p in self.processor.IdToPiece(list(range(self.size)))]

    def data(self) -> bytes:
        return self._data

    def __reduce__(self):
        return SentencePieceBase, (self._data,)


BASES: dict[str, Any] = {base.kind: base for base in (ByteBase, FileBase, SentencePieceBase)}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes; what ``build()`` of a tokenizer's config returns. Picklable.

    ``names`` maps each special id to what ``decode`` shows for it: ``<extra_id_0>``, ``[R]``.
    """

    base: Base
    vocabulary: Vocabulary
    names: dict[int, str]

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of ``text``, with no special id among them and none added."""
        return self.base.encode(text)

    def decode(self, ids, *, special: bool = True) -> str:
        """Text of a sequence of ids; special ids are shown by name, or left out."""
        parts: list[str] = []
        run: list[int] = []
        for i in np.asarray(ids).tolist():
            if i not in self.names and i < self.base.size:
                run.append(i)
                continue
            if run:
                parts.append(self.base.decode(run))
                run = []
            if special:
                parts.append(self.names.get(i, f"<{i}>"))
        if run:
            parts.append(self.base.decode(run))
        return "".join(parts)

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the ids; equal fingerprints encode equally."""
        description = self._description()
        del description["vocabulary"]["pieces"]  # follows from the base's data
        described = json.dumps(description, sort_keys=True).encode()
        return hashlib.sha256(described + self.base.data()).hexdigest()[:16]

    def _description(self) -> dict:
        names = {str(i): name for i, name in sorted(self.names.items())}
        return {
            "kind": self.base.kind,
            "vocabulary": dataclasses.asdict(self.vocabulary),
            "names": names,
        }

    def save(self, folder: str | Path) -> None:
        """Writes all that ``load_tokenizer`` needs into ``folder`` (created if need be)."""
        folder = Path(folder)
        if self.base.file:
            write_atomic(folder / self.base.file, self.base.data())
        text = json.dumps(self._description(), indent=1, ensure_ascii=False)
        write_atomic(folder / DESCRIPTION, text.encode("utf-8"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``Tokenizer.save`` wrote. Raises DataError where it is not whole."""
    folder = Path(folder)
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        kind = BASES[described["kind"]]
        base = (
            kind((folder / kind.file).read_bytes(), str(folder / kind.file))
            if kind.file
            else kind()
        )
        fields = described["vocabulary"]
        modes = tuple((str(name), tuple(ids)) for name, ids in fields.pop("modes"))
        # Those saved by earlier versions have no `pieces`.
        fields |= {"sentinels": tuple(fields["sentinels"]), "modes": modes}
        vocabulary = Vocabulary(**{"pieces": describe(base.pieces())} | fields)
        names = {int(i): str(name) for i, name in described["names"].items()}
        check_ids(vocabulary, [*names], str(folder))
        return Tokenizer(base, vocabulary, names)
    except DataError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: not a saved tokenizer: {error!r}") from error


def check_ids(vocabulary: Vocabulary, more: Sequence[int], name: str) -> None:
    """Raises DataError unless all special ids are ids. Files are not to be believed: there are
    tables with an entry for each id that they claim."""
    size = vocabulary.size
    if type(size) is not int or not 0 < size <= MOST_IDS:
        raise DataError(f"{name}: a vocabulary of {size!r} ids; it can have 1 to {MOST_IDS}")
    ids = [vocabulary.pad, vocabulary.eos, *vocabulary.sentinels, *more]
    ids += [i for i in (vocabulary.bos, vocabulary.mask) if i is not None]
    ids += [i for _, mode in vocabulary.modes for i in mode]
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < size]:
        raise DataError(f"{name}: {bad[0]!r} is no id of a vocabulary of {size}")
