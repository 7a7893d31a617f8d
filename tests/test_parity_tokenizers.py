"""Tokenizers that are exported give the same ids in transformers, and the same when imported."""

import io

import numpy as np
import pytest
from parity import needs_transformers

from jaxpt.data.encoding import SentencePieceBase
from jaxpt.data.pretrained import Pretrained
from jaxpt.data.text import Text
from jaxpt.data.tokenizers import BPE, Bytes, SentencePiece
from jaxpt.files import write_json
from jaxpt.interop import tokenizer as files

pytestmark = needs_transformers
TEXTS = (
    "the quick brown fox",
    " naïve  cafés, 日本 and 🦊\nnew line\t",
    "It's 1,234.56 — isn't it?",
    "",
    "fi ½ Ⅷ",
)
WORDS = [*"0123456789", "the", "quick", "brown", "fox", "runs", "over", "a", "naïve", "isn't"]


@pytest.fixture(scope="module")
def lines():
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("abcdefghij"), rng.integers(3, 9))) for _ in range(300)]
    return [" ".join(rng.choice(WORDS * 5 + made, 12)) for _ in range(200)]


def spm(lines, folder, kind: str, fallback: bool) -> SentencePiece:
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type=kind,
        vocab_size=400 if fallback else 120,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=fallback,
        minloglevel=2,
    )
    folder.joinpath("spiece.model").write_bytes(file.getvalue())
    return SentencePiece(str(folder / "spiece.model"), sentinels=10)


@pytest.fixture(params=["bytes", "bpe", "unigram", "unigram_bytes", "sp_bpe", "sp_bpe_bytes"])
def tokenizer(request, lines, tmp_path):
    name = request.param
    if name == "bytes":
        return Bytes(sentinels=10).build()
    if name == "bpe":
        path = tmp_path / "text.txt"
        path.write_text("\n".join(lines))
        source = Text(str(path), str(path), document="line")
        return BPE(vocab_size=400, source=source, sentinels=10).build()
    kind = "bpe" if "bpe" in name else "unigram"
    return spm(lines, tmp_path, kind, name.endswith("bytes")).build()


def test_there_and_back(tokenizer, tmp_path):
    import transformers

    out, vocabulary = tmp_path / "out", tokenizer.vocabulary
    out.mkdir()
    files.write(out, tokenizer, "encoder_decoder")
    there = transformers.AutoTokenizer.from_pretrained(out)
    back = Pretrained(path=str(out), modes=("R", "S", "X")).build()
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert there(text, add_special_tokens=False).input_ids == ids, text
        assert there(text).input_ids == [*ids, vocabulary.eos]
        assert back.encode(text).tolist() == ids
        if there.unk_token_id not in ids:  # which the libraries write differently
            assert there.decode(ids) == tokenizer.decode(ids)
    marks = there.convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(10)])
    assert tuple(marks) == vocabulary.sentinels == back.vocabulary.sentinels
    assert (there.pad_token_id, there.eos_token_id) == (vocabulary.pad, vocabulary.eos)
    assert back.vocabulary.modes == vocabulary.modes
    assert back.vocabulary.pad == vocabulary.pad
    assert back.vocabulary.mask == vocabulary.mask


def test_byt5s_own_files(tmp_path):
    import transformers

    there = transformers.ByT5Tokenizer()
    there.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {"vocab_size": 384})
    back = Pretrained(path=str(tmp_path)).build()
    for text in TEXTS:
        assert there(text, add_special_tokens=False).input_ids == back.encode(text).tolist()
    assert back.vocabulary.size == 384
    names = [f"<extra_id_{n}>" for n in range(125)]
    assert back.vocabulary.sentinels == tuple(there.convert_tokens_to_ids(names))
    assert (back.vocabulary.pad, back.vocabulary.eos) == (0, 1)
    more = Pretrained(path=str(tmp_path), sentinels=127, modes=("R",)).build().vocabulary
    assert more.sentinels[125:] == (385, 384)
    assert more.modes == (("R", (386,)),)


def test_sentencepiece_files_of_t5(lines, tmp_path):
    spm(lines, tmp_path, "unigram", False)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    write_json(tmp_path / "config.json", {"vocab_size": 256, "pad_token_id": 0, "eos_token_id": 1})
    back = Pretrained(path=str(tmp_path)).build()
    assert isinstance(back.base, SentencePieceBase)
    assert back.vocabulary.sentinels == tuple(range(219, 119, -1))
    assert back.vocabulary.size == 256
