"""Tokenizers: there and back, special ids, a folder that holds one, training that repeats."""

import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.data.base import Source
from jaxpt.data.pretrained import Pretrained
from jaxpt.data.text import Text
from jaxpt.data.tokenizers import (
    BPE,
    UL2_MODE_TEXTS,
    Bytes,
    SentencePiece,
    TokenizerFile,
    load_tokenizer,
)
from jaxpt.errors import ConfigError, DataError

WORDS = ["the", "quick", "brown", "fox", "runs", "over", "dog", "a", "naïve", "日本", "cafés"]


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("abcdefghij"), rng.integers(3, 9))) for _ in range(300)]
    words = WORDS * 20 + made
    for name in ("a", "b"):
        lines = [" ".join(rng.choice(words, 12)) for _ in range(200)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return Text(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), document="line")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small(source: Source) -> BPE:
    return BPE(vocab_size=400, source=source, sentinels=8)


@pytest.fixture
def sentencepiece_file(tmp_path, text):
    import sentencepiece

    path = tmp_path / "spm"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text.open("train")),
        model_prefix=str(path),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=False,
        minloglevel=2,
    )
    return f"{path}.model"


@pytest.fixture
def tokenizer_file(tmp_path, text):
    """As Hugging Face's T5 has it: pad, eos and 5 sentinels of its own."""
    import tokenizers

    base = tokenizers.Tokenizer.from_buffer(small(text).train())
    base.add_special_tokens(["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(5))])
    path = tmp_path / "tokenizer.json"
    base.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "file"])
def config(request, text):
    match request.param:
        case "bytes":
            return Bytes()
        case "bpe":
            return small(text)
        case "sentencepiece":
            return SentencePiece(request.getfixturevalue("sentencepiece_file"))
        case "file":
            return TokenizerFile(request.getfixturevalue("tokenizer_file"))


SENTENCE = "the naïve fox runs over cafés"


def again(value):
    """What a worker process gets of it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301  our own


@pytest.mark.smoke
def test_there_and_back_and_special_ids(config):
    tokenizer = config.build()
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode(SENTENCE)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == SENTENCE
    special = [vocabulary.pad, vocabulary.eos, vocabulary.bos, vocabulary.mask]
    special += list(vocabulary.sentinels) + [i for _, (i,) in vocabulary.modes]
    assert len(set(special)) == len(special) == 4 + config.sentinels + 3
    assert min(special) >= 0
    assert max(special) < vocabulary.size
    assert not set(special) & set(ids.tolist())
    assert [name for name, _ in vocabulary.modes] == ["R", "S", "X"]


def test_special_ids_are_shown_and_never_come_from_text(config):
    tokenizer = config.build()
    vocabulary = tokenizer.vocabulary
    mixed = [vocabulary.modes[0][1][0], *tokenizer.encode("fox"), vocabulary.sentinels[1]]
    mixed += [*tokenizer.encode("dog"), vocabulary.eos]
    assert tokenizer.decode(mixed) == "[R]fox<extra_id_1>dog</s>"
    assert tokenizer.decode(mixed, special=False) == "foxdog"
    ids = tokenizer.encode("<extra_id_1> [R] </s> <pad>")
    special = {vocabulary.pad, vocabulary.eos, *vocabulary.sentinels, *dict(vocabulary.modes)["R"]}
    assert not special & set(ids.tolist())


def test_a_saved_tokenizer_needs_nothing_else(config, tmp_path):
    tokenizer = config.build()
    tokenizer.save(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    for other in (load_tokenizer(moved), again(tokenizer)):
        assert other.vocabulary == tokenizer.vocabulary
        assert other.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(other.encode(SENTENCE), tokenizer.encode(SENTENCE))
        ids = [*tokenizer.encode("a fox"), tokenizer.vocabulary.sentinels[0]]
        assert other.decode(ids) == tokenizer.decode(ids)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a saved tokenizer"):
        load_tokenizer(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_bytes_keep_any_text(text):
    tokenizer = Bytes().build()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == [b + 3 for b in text.encode()]


def test_bpe_keeps_any_text(text):
    tokenizer = small(text).build()
    for odd in ("  two  spaces ", "\t\n\r\n", "\x00", "🦊 日本", "' 's", ""):
        assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_appended_ids_have_t5s_order(sentencepiece_file):
    config = SentencePiece(sentencepiece_file)
    vocabulary = config.build().vocabulary
    assert (vocabulary.pad, vocabulary.eos) == (0, 1)
    assert vocabulary.sentinels == tuple(range(159, 59, -1))  # as 32,099 down to 32,000
    assert vocabulary.size == 160 + 2 + 3  # bos and mask, then modes


def test_a_files_own_sentinels_are_used_and_the_lack_appended(tokenizer_file):
    vocabulary = TokenizerFile(tokenizer_file, sentinels=7).build().vocabulary
    own = TokenizerFile(tokenizer_file, sentinels=3).build()
    first = own.base.tokenizer.token_to_id("<extra_id_0>")
    assert own.vocabulary.sentinels == (first, first + 1, first + 2)
    assert vocabulary.sentinels[:5] == tuple(range(first, first + 5))
    assert vocabulary.sentinels[5:] == (first + 6, first + 5)
    assert own.vocabulary.pad == own.base.tokenizer.token_to_id("<pad>")
    assert own.vocabulary.bos >= own.base.size


def test_modes_as_text(sentencepiece_file):
    tokenizer = SentencePiece(sentencepiece_file, mode_texts=UL2_MODE_TEXTS).build()
    modes = dict(tokenizer.vocabulary.modes)
    assert modes["S"] == tuple(tokenizer.encode("[S2S] ").tolist())
    assert len(modes["S"]) > 1
    assert tokenizer.vocabulary.size == 160 + 2


def test_bad_files_are_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"broken: not a tokenizer\.json"):
        TokenizerFile(str(broken)).build()
    with pytest.raises(DataError, match="broken: not a SentencePiece model"):
        SentencePiece(str(broken)).build()
    with pytest.raises(DataError, match="nowhere: No such file"):
        SentencePiece(str(tmp_path / "nowhere")).build()


def test_bad_choices_are_named(text):
    with pytest.raises(ConfigError, match=r"vocab_size: 300 is too small.*at least 364"):
        BPE(vocab_size=300)
    with pytest.raises(ConfigError, match="sentinels"):
        Bytes(sentinels=-1)
    with pytest.raises(ConfigError, match="modes"):
        Bytes(modes=("R", "R"))


@pytest.mark.smoke
def test_bpe_training_gives_the_same_bytes_and_the_size_asked_for(text, cache):
    config = small(text)
    first = config.train()
    assert first == config.train()
    assert config.build().vocabulary.size == 400
    assert [path.read_bytes() for path in (cache / "tokenizers").iterdir()] == [first]


def test_a_text_too_short_for_the_vocabulary_leaves_ids_unused(tmp_path):
    (tmp_path / "short.txt").write_text("a b c\nd e f")
    source = Text(str(tmp_path / "short.txt"), str(tmp_path / "short.txt"))
    tokenizer = small(source).build()
    assert tokenizer.base.size < 400 - 15
    assert tokenizer.vocabulary.size == 400
    assert min(tokenizer.vocabulary.sentinels) == 400 - 15
    assert tokenizer.decode([390, tokenizer.base.size]) == f"<extra_id_2><{tokenizer.base.size}>"


def test_bpe_is_trained_once_for_each_text_and_setting(text, monkeypatch):
    trained = []
    train = BPE.train
    monkeypatch.setattr(BPE, "train", lambda self: trained.append(self) or train(self))
    small(text).build()
    small(text).build()
    assert len(trained) == 1
    BPE(vocab_size=401, source=text, sentinels=8).build()
    assert len(trained) == 2
    with open(text.train, "a", encoding="utf-8") as file:
        file.write("\nmore text")
    small(text).build()
    assert len(trained) == 3
    assert sum(map(len, small(text).texts())) > 1000
    assert sum(map(len, BPE(source=text, characters=1000).texts())) == 1000


def _build(config: BPE, barrier, results) -> None:
    barrier.wait()
    results.put(config.build().fingerprint)


def test_two_processes_may_train_at_once(text, cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_build, args=(small(text), barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join(timeout=60)
    assert found == {small(text).build().fingerprint}
    assert len(list((cache / "tokenizers").iterdir())) == 1  # no temporary file is left


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    from jaxpt.data.cache import cache_folder

    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("JAXPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "jaxpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jaxpt"


def test_vocabularies_alone(tmp_path):
    def build(**files):
        for old in tmp_path.iterdir():
            old.unlink()
        for name, text in files.items():
            stem, _, kind = name.rpartition("_")
            (tmp_path / f"{stem}.{kind}").write_text(text)
        return Pretrained(path=str(tmp_path)).build()

    words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nfox\n##es\n"
    bert = '{"model_type": "bert"}'
    made = build(vocab_txt=words, config_json=bert)
    assert made.encode("The foxes bark").tolist() == [5, 6, 7, 1]
    assert made.decode([5, 6, 7]) == "the foxes"
    vocabulary = made.vocabulary
    assert (vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.mask) == (0, 2, 3, 4)
    pieces = '{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}'
    gpt2 = '{"model_type": "gpt2"}'
    made = build(vocab_json=pieces, merges_txt="#version: 0.2\na b\n", config_json=gpt2)
    assert made.encode("abba").tolist() == [3, 2, 1]
    for said, files in {
        "of tokenizer_class CLIPTokenizer cannot be read, only of GPT2Tokenizer and Roberta": {
            "vocab_json": pieces,
            "merges_txt": "a b\n",
            "tokenizer_config_json": '{"tokenizer_class": "CLIPTokenizerFast"}',
        },
        "of tokenizer_class None cannot be read": {"vocab_txt": words},
        "UNK. is not in it": {"vocab_txt": "a\nb\n", "config_json": bert},
        "no merge of two: 'a b c'": {
            "vocab_json": pieces,
            "merges_txt": "a b c\n",
            "config_json": gpt2,
        },
        "`c` out of vocabulary": {"vocab_json": pieces, "merges_txt": "b c", "config_json": gpt2},
        "no JSON object of ids": {
            "vocab_json": '{"a": "x"}',
            "merges_txt": "",
            "config_json": gpt2,
        },
        "an id is 999999999": {
            "vocab_json": '{"a": 999999999}',
            "merges_txt": "",
            "config_json": gpt2,
        },
        "holds no tokenizer that is known": {"vocab_json": pieces, "config_json": gpt2},
    }.items():
        with pytest.raises(DataError, match=said):
            build(**files)
