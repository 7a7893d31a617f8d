"""Scores of answers, batched and bucketed, against the whole forward pass of each by itself."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxpt.data.tokenizers import Bytes
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.generator import Generator
from jaxpt.mesh import Mesh, single
from jaxpt.models import MLP, Attention, Learned, RelativeBias, Rotary, Transformer
from jaxpt.objectives import (
    UL2,
    BlankInfilling,
    CausalLM,
    Infilling,
    MaskedLM,
    PrefixLM,
    SpanCorruption,
)
from jaxpt.objectives.prompt import Prompt, opening
from jaxpt.scoring import Question, Scorer, cut, windows, write
from jaxpt.state import unflatten

PAD, EOS = 0, 1
MODES = (("R", (40,)), ("S", (41, 42)), ("X", (43,)))
VOCABULARY = Vocabulary(
    size=48, pad=PAD, eos=EOS, mask=3, sentinels=(47, 46, 45), modes=(*MODES, ("gMASK", (44,)))
)
ROTARY = Rotary()
ROW = 40  # positions of the reference's only shape


@functools.cache
def made(kind="decoder", positions=ROTARY, **more):
    """A model with lively random parameters, its Scorer of 3 rows, and its whole logits."""
    import jax

    config = Transformer(
        kind=kind, width=16, layers=2, attention=Attention(heads=4), mlp=MLP(width=32),
        positions=positions, vocab_multiple=16, **more,
    )  # fmt: skip
    model = config.build(VOCABULARY.size)
    rng = np.random.default_rng(0)

    def drawn(path, tensor):
        std = tensor.std * (3 if "attention" in path or "bias" in path else 1)
        mean = 1.0 if tensor.weight == "norm" else 0.0
        return (mean + std * rng.normal(size=tensor.shape)).astype(np.float32)

    params = unflatten({path: drawn(path, tensor) for path, tensor in model.tensors.items()})

    @jax.jit
    def logits(batch):
        network = model.bind(params)
        return network.logits(network(batch))

    return model, params, Scorer(model, params, VOCABULARY, single(), batch=3), logits


def alone(logits, question):
    """(log-probability, greedy) of one question: a row of its own, softmax in float64."""
    prompt, answer = question.prompt, question.answer
    tokens = np.concatenate([prompt.tokens, answer])
    read = len(prompt.tokens)
    batch = {name: np.zeros((1, ROW), np.int32) for name in ("tokens", "segments", "positions")}
    batch["tokens"][0, : len(tokens)], batch["segments"][0, : len(tokens)] = tokens, 1
    batch["positions"][0] = np.arange(ROW)
    index = np.arange(ROW)
    batch["prefix"] = (prompt.prefix & (index < read - prompt.given)).astype(np.int32)[None]
    if prompt.blank is not None:
        inside = index >= read - 1
        batch["prefix"][0, read - 1 :] = 0
        batch["positions"][0, inside] = prompt.blank
        batch["inner_positions"] = np.where(inside, np.minimum(index - read + 2, 7), 0)[None]
    if prompt.inputs is not None:
        m = len(prompt.inputs)
        inputs, segments = np.zeros((1, ROW), np.int32), np.zeros((1, ROW), np.int32)
        inputs[0, :m], segments[0, :m] = prompt.inputs, 1
        batch |= {"inputs": inputs, "input_segments": segments, "input_positions": index[None]}
    with single().active():
        found = np.asarray(logits(batch), np.float64)[0, read - 1 : read - 1 + len(answer)]
    peak = found.max(-1, keepdims=True)
    log_probs = found - peak - np.log(np.exp(found - peak).sum(-1, keepdims=True))
    picked = log_probs[np.arange(len(answer)), answer]
    return picked.sum(), bool((found.argmax(-1) == answer).all())


def questions(objective, two_streams, mode=None, vocabulary=VOCABULARY):
    rng = np.random.default_rng(1)
    found = []
    # Of one bucket all but the fourth, so that there is little to compile.
    for context, answer in ((0, 3), (5, 1), (9, 2), (20, 8), (1, 4), (7, 1)):
        ids = rng.integers(4, 40, context).astype(np.int32)
        asked = opening(objective, vocabulary, ids, mode=mode, two_streams=two_streams)
        found.append(Question(asked, rng.integers(4, 40, answer).astype(np.int32)))
    return found


CASES = {
    "causal": (CausalLM(), "decoder", None, {}),
    "prefix": (PrefixLM(), "decoder", None, {"positions": Learned(64)}),
    "ul2_prefix_S": (UL2(), "decoder", None, {}),
    "ul2_prefix_X": (UL2(), "decoder", "X", {}),
    "blank": (BlankInfilling(), "decoder", None, {"inner_positions": 8}),
    "ul2_two_streams": (UL2(), "encoder_decoder", "S", {"positions": RelativeBias(buckets=8)}),
    "spans_two_streams": (
        SpanCorruption(),
        "encoder_decoder",
        None,
        {"positions": RelativeBias(buckets=8)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_each_alone(case):
    objective, kind, mode, more = CASES[case]
    _, _, scorer, logits = made(kind, **more)
    asked = questions(objective, kind == "encoder_decoder", mode)
    found = scorer(asked)
    for question, score in zip(asked, found, strict=True):
        log_prob, greedy = alone(logits, question)
        np.testing.assert_allclose(score.log_prob, log_prob, rtol=2e-5, atol=2e-5)
        assert score.greedy == greedy
    backwards = scorer(asked[::-1])[::-1]  # in other batches
    np.testing.assert_allclose([s.log_prob for s in backwards], [s.log_prob for s in found], 1e-6)


def test_greedy_answers_are_known_to_be():
    model, params, scorer, _ = made()
    prompts = [q.prompt for q in questions(CausalLM(), False)]
    written = Generator(model, params, VOCABULARY, single()).sample(prompts, max_tokens=5)
    asked = [Question(p, w.tokens) for p, w in zip(prompts, written, strict=True) if len(w.tokens)]
    assert len(asked) > 3
    for question, score in zip(asked, scorer(asked), strict=True):
        assert score.greedy
        other = question.answer.copy()
        other[-1] = 4 if other[-1] != 4 else 5
        assert not scorer([Question(question.prompt, other)])[0].greedy
    log_probs = [w.log_prob for w in written if not w.ended]
    kept = [s for s, w in zip(scorer(asked), written, strict=True) if not w.ended]
    np.testing.assert_allclose([s.log_prob for s in kept], log_probs, rtol=1e-5)


def test_programs_are_compiled_once_for_a_bucket():
    model, params, _, _ = made()
    scorer = Scorer(model, params, VOCABULARY, single(), batch=4)
    rng = np.random.default_rng(3)

    def ask(lengths):
        scorer(
            [
                Question(Prompt(rng.integers(4, 40, n).astype(np.int32)), np.array([5], np.int32))
                for n in lengths
            ]
        )
        return scorer._score._cache_size()

    assert ask([3, 9, 16, 5, 6]) == 1
    assert ask([20, 31]) == 2
    assert ask([4, 25, 32, 1, 2, 3, 17]) == 2


def test_a_mesh_changes_nothing():
    model, params, scorer, _ = made()
    asked = questions(CausalLM(), False)[:3]
    layout = Mesh(data=2, tensor=2, devices=4).build()
    found = Scorer(model, params, VOCABULARY, layout, batch=3)(asked)
    wanted = [s.log_prob for s in scorer(asked)]
    np.testing.assert_allclose([s.log_prob for s in found], wanted, rtol=2e-5, atol=2e-5)


def test_logits_are_made_part_by_part(monkeypatch):
    model, params, scorer, _ = made()
    asked = questions(CausalLM(), False)[:3]
    wanted = scorer(asked)
    monkeypatch.setattr("jaxpt.scoring.LOGITS", 2 * 3 * 48)
    found = Scorer(model, params, VOCABULARY, single(), batch=3)(asked)
    assert [s.greedy for s in found] == [s.greedy for s in wanted]
    np.testing.assert_allclose([s.log_prob for s in found], [s.log_prob for s in wanted], 1e-5)


def test_openings():
    """What stands before the answer, by hand."""
    ids = np.array([5, 6], np.int32)

    def of(objective, ids=ids, mode=None, two_streams=False):
        p = opening(objective, VOCABULARY, ids, mode=mode, two_streams=two_streams)
        inputs = None if p.inputs is None else p.inputs.tolist()
        return p.tokens.tolist(), inputs, p.prefix, p.given

    none = ids[:0]
    assert of(CausalLM()) == ([PAD, 5, 6], None, False, 0)
    assert of(CausalLM(), none) == ([PAD], None, False, 0)
    assert of(PrefixLM()) == ([5, 6], None, True, 0)
    assert of(PrefixLM(), none) == ([PAD], None, True, 0)
    assert of(UL2()) == ([41, 42, 5, 6], None, True, 0)
    assert of(UL2(modes=False)) == ([5, 6], None, True, 0)
    assert of(UL2(), mode="R") == ([40, 5, 6, 47, 47], None, True, 1)
    assert of(UL2(), two_streams=True) == ([PAD], [41, 42, 5, 6, EOS], False, 0)
    assert of(UL2(), none, two_streams=True) == ([PAD], [41, 42, EOS], False, 0)
    assert of(UL2(), mode="X", two_streams=True) == ([PAD, 47], [43, 5, 6, 47, EOS], False, 1)
    assert of(Infilling()) == ([PAD, 5, 6], None, False, 0)
    with pytest.raises(ConfigError, match="fills masks"):
        of(MaskedLM())
    with pytest.raises(ConfigError, match="no mode 'Q'"):
        of(UL2(), mode="Q")


@pytest.mark.parametrize(("n", "most"), [(10, 4), (3, 4), (4, 4), (5, 4), (9, 1), (8, 4)])
def test_windows_predict_everything_once_with_context(n, most):
    ids = np.arange(100, 100 + n, dtype=np.int32)
    found = windows(ids, most)
    assert np.concatenate([answer for _, answer in found]).tolist() == ids.tolist()
    assert len(found[0][0]) == 0
    for context, answer in found[1:]:
        at = int(answer[0]) - 100
        assert context.tolist() == ids[at - len(context) : at].tolist()
        assert len(context) == min(at, most + 1 - len(answer))


def test_writing_stops_at_a_string_and_goes_on_until_it(monkeypatch):
    tokenizer = Bytes().build()
    config = Transformer(width=8, layers=1, attention=Attention(heads=2), mlp=MLP(width=8))
    model = dataclasses.replace(config, vocab_multiple=8).build(tokenizer.vocabulary.size)
    rng = np.random.default_rng(0)
    params = unflatten(
        {p: rng.normal(size=t.shape).astype(np.float32) for p, t in model.tensors.items()}
    )
    generator = Generator(model, params, tokenizer.vocabulary, single())
    asked = [Prompt(tokenizer.encode(text)) for text in ("a", "the words", "xyz", "or")]

    def decode(ids):
        return tokenizer.decode(ids, special=False)

    whole = [decode(c.tokens) for c in generator.sample(asked, max_tokens=24)]
    assert len(set(whole)) > 2
    stop = next(c for c in reversed(whole[0]) if c.isprintable())
    monkeypatch.setattr("jaxpt.scoring.FIRST_ROUND", 6)
    found = write(generator, asked, decode, until=[stop, ""], max_tokens=24, batch=4)
    assert found == [text.split(stop)[0] for text in whole]
    assert found != whole
    assert write(generator, asked, decode, max_tokens=24, batch=4) == whole
    assert cut("one two three", ["th", "wo", ""]) == "one t"


def test_refuses_what_cannot_be_scored():
    model, params = made()[0], {}
    model = dataclasses.replace(model.config, kind="encoder").build(VOCABULARY.size)
    with pytest.raises(ConfigError, match="writes no text"):
        Scorer(model, params, VOCABULARY, single())
    _, _, scorer, _ = made(positions=Learned(8))
    with pytest.raises(ConfigError, match="beyond the model's 8 positions"):
        scorer([Question(Prompt(np.arange(6, dtype=np.int32)), np.arange(4, dtype=np.int32))])
    with pytest.raises(ConfigError, match="max_length"):
        windows(np.arange(3), 0)
