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


def vocabularies(lines, folder, kind: str) -> None:
    """Files of a vocabulary alone, as the first GPT-2, RoBERTa and BERT had them."""
    import tokenizers

    if kind == "bert":
        made = tokenizers.BertWordPieceTokenizer()
        made.train_from_iterator(lines, vocab_size=300, show_progress=False)
    else:
        ends = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "roberta" else []
        made = tokenizers.ByteLevelBPETokenizer()
        special = ends or ["<|endoftext|>"]
        made.train_from_iterator(lines, 400, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    start = {"bos_token_id": 0} if kind == "gpt2" else {}  # as the published ones have
    write_json(folder / "config.json", {"model_type": kind, **start})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        ("roberta", {"tokenizer_class": "RobertaTokenizer"}),
        ("bert", {}),
        ("bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
        ("bert", {"tokenize_chinese_chars": False, "strip_accents": False}),
    ],
)
def test_vocabularies_alone(lines, kind, settings, tmp_path):
    import transformers

    vocabularies(lines, tmp_path, kind)
    write_json(tmp_path / "tokenizer_config.json", settings)
    name = {"gpt2": "GPT2", "roberta": "Roberta", "bert": "Bert"}[kind]
    there = getattr(transformers, f"{name}Tokenizer").from_pretrained(tmp_path)
    back = Pretrained(path=str(tmp_path)).build()
    for text in (*TEXTS, *lines[:20], "Naïve Café ISN'T"):
        ids = back.encode(text).tolist()
        assert there(text, add_special_tokens=False).input_ids == ids, text
        if there.unk_token_id not in ids:
            assert there.decode(ids, clean_up_tokenization_spaces=False) == back.decode(ids)
    vocabulary = back.vocabulary
    first, last = ("cls", "sep") if kind == "bert" else ("bos", "eos")
    assert vocabulary.bos == getattr(there, f"{first}_token_id")
    assert vocabulary.eos == getattr(there, f"{last}_token_id")
    assert vocabulary.mask == (None if kind == "gpt2" else there.mask_token_id)
    if kind != "gpt2":
        assert vocabulary.pad == there.pad_token_id
