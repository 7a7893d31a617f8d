"""Objectives that learn from labels: their examples, losses and figures, and phases with a head."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jaxpt import examine
from jaxpt.answers import Answers
from jaxpt.config import codec
from jaxpt.data.labelled import Case, FromFiles
from jaxpt.data.mixture import Mixture as Sources
from jaxpt.data.packing import Packer
from jaxpt.data.sentence_order import SentenceOrder
from jaxpt.data.tasks import Task
from jaxpt.data.tokenizers import Bytes
from jaxpt.errors import ConfigError, DataError
from jaxpt.files import read_json, read_metrics
from jaxpt.growth.keep import Keep
from jaxpt.loading import Loaded, load
from jaxpt.mesh import single
from jaxpt.models import Headed, Transformer, headed
from jaxpt.objectives import (
    CausalLM,
    MaskedLM,
    Objective,
    SequenceClassification,
    SpanAnswer,
    TextToText,
    TokenClassification,
)
from jaxpt.objectives.figures import figures
from jaxpt.objectives.prompt import prompt
from jaxpt.program import Program
from jaxpt.state import flatten, unflatten
from jaxpt.train import train

TOKENIZER = Bytes().build()
VOCABULARY = TOKENIZER.vocabulary
START = VOCABULARY.bos
EOS = VOCABULARY.eos
RNG = np.random.default_rng(0)


def example(objective, case, length=24, target_length=None):
    features = objective.build(VOCABULARY, length=length, target_length=target_length)
    ids = features.encoder(TOKENIZER).encode(case)
    assert len(ids) <= features.lengths[0].raw
    return features, features.example(ids, 0, RNG)


def ids(text):
    return TOKENIZER.encode(text).tolist()


def test_a_pair_and_its_class_by_hand():
    _, found = example(SequenceClassification(3), Case(("ab", "c"), 2))
    assert found["tokens"].tolist() == [START, *ids("ab"), EOS, *ids("c"), EOS]
    assert found["targets"].tolist() == [2, 0, 0, 0, 0, 0]
    assert found["weights"].tolist() == [1, 0, 0, 0, 0, 0]
    _, found = example(SequenceClassification(1, pool="last"), Case(("ab",), 3.25))
    assert found["tokens"].tolist() == [START, *ids("ab"), EOS]
    assert (found["targets"].tolist(), found["weights"].tolist()) == ([0, 0, 0, 3250], [0, 0, 0, 1])
    # Of two texts the longer loses its end, until both fit.
    _, found = example(SequenceClassification(2), Case(("a" * 40, "bc"), 0), length=12)
    assert found["tokens"].tolist() == [START, *ids("aaaaaaa"), EOS, *ids("bc"), EOS]
    _, found = example(SequenceClassification(2), Case(("a" * 40, "b" * 39), 0), length=12)
    assert len(found["tokens"]) == 12
    assert found["tokens"].tolist().count(ids("a")[0]) in (4, 5)


def test_words_and_their_classes_by_hand():
    objective = TokenClassification(4)
    _, found = example(objective, Case(("ab", "c"), (3, 0)))
    assert found["tokens"].tolist() == [START, *ids("ab c"), EOS]
    assert found["targets"].tolist() == [0, 3, 0, 0, 0, 0]
    assert found["weights"].tolist() == [0, 1, 0, 1, 0, 0]
    _, found = example(objective, Case(("ab", "cdefgh"), (3, 1)), length=7)
    assert found["tokens"].tolist() == [START, *ids("ab"), EOS]


def test_an_answer_in_its_text_by_hand():
    text = "it was Big Ben."
    case = Case(("who", text), (7, 14), answers=("Big Ben",))
    features, found = example(SpanAnswer(), case)
    assert found["tokens"].tolist() == [START, *ids("who"), EOS, *ids(text), EOS]
    # The answer's words are whole: its last one has the full stop.
    assert (found["targets"][0], found["ends"][0], found["ends"][1]) == (5 + 6, 5 + 14, 5)
    assert found["weights"].tolist() == [1] + [0] * 20
    _, none = example(SpanAnswer(), Case(("who", text), (0, 0)))
    assert (none["targets"][0], none["ends"][0]) == (0, 0)
    [(read, owners)], spans = features.windows(case, TOKENIZER)
    assert len(read) == len(owners)
    assert [text[a:b] for a, b in spans] == ["it", "was", "Big", "Ben."]


def test_a_long_text_is_read_in_windows():
    text = "it was Big Ben."  # 15 tokens, of which 6 to 14 are the answer's words
    case = Case(("who", text), (7, 14), answers=("Big Ben",))

    def windows(length, stride):
        features = SpanAnswer(stride=stride).build(VOCABULARY, length=length, target_length=None)
        made = features.examples(case, TOKENIZER)
        room = length - 6  # START who eos, and eos
        parts = []
        for one in made:
            asked, part = one["tokens"][:5].tolist(), one["tokens"][5:-1].tolist()
            assert asked == [START, *ids("who"), EOS]
            assert one["tokens"][-1] == EOS
            assert one["ends"][1] == 5
            parts.append(TOKENIZER.decode(np.array(part)))
        assert all(len(one["tokens"]) == length for one in made[:-1])
        assert all(len(part) == room for part in parts[:-1])
        # What the loader cuts is the same: all but the last are as long as it asks for.
        _, wanted = features.request(RNG)
        raw = features.encoder(TOKENIZER).encode(case)
        assert all(
            np.array_equal(
                features.example(raw[i * wanted : (i + 1) * wanted], 0, RNG)["tokens"],
                one["tokens"],
            )
            for i, one in enumerate(made)
        )
        return parts, [(int(one["targets"][0]), int(one["ends"][0])) for one in made]

    parts, places = windows(18, 5)
    assert parts == ["it was Big B", "s Big Ben."]
    assert places == [(0, 0), (5 + 1, 5 + 9)]  # in the first it is cut off
    parts, places = windows(16, 3)
    assert parts == ["it was Big", "was Big Be", " Big Ben."]
    assert places == [(0, 0), (0, 0), (5 + 1 - 1, 5 + 8)]
    # A stride that would leave text out is as long as the window.
    assert windows(16, 99)[0] == ["it was Big", " Ben."]


def test_text_by_hand():
    case = Case(("ask it",), 1, target="yes")
    features, found = example(TextToText(mode="S"), case, target_length=8)
    mode = list(dict(VOCABULARY.modes)["S"])
    assert found["inputs"].tolist() == [*mode, *ids("ask it"), EOS]
    assert found["tokens"].tolist() == [VOCABULARY.pad, *ids("yes")]
    assert found["targets"].tolist() == [*ids("yes"), EOS]
    raw = features.encoder(TOKENIZER).encode(case)
    assert features.text(found).tolist() == raw.tolist()
    for prefix in (False, True):
        features, found = example(TextToText(prefix=prefix), case)
        before = [*([] if prefix else [START]), *ids("ask it")]
        assert found["tokens"].tolist() == [*before, *ids("yes")]
        assert found["targets"].tolist() == [*before[1:], *ids("yes"), EOS]
        n = len(before)
        assert found["weights"].tolist() == [0] * (n - 1) + [1] * 4
        assert found["prefix"].tolist() == [prefix] * n + [0] * 3
        assert features.text(found).tolist() == raw.tolist()
        asked = prompt(
            TextToText(prefix=prefix), VOCABULARY, np.array(ids("ask it")), two_streams=False
        )
        assert (asked.tokens.tolist(), asked.prefix) == (before, prefix)
    _, found = example(TextToText(), Case(("x" * 50,), target="yes"), length=12)
    assert found["tokens"].tolist() == [START, *ids("x" * 8), *ids("yes")]
    _, found = example(TextToText(), Case(("x" * 50,), target="y" * 50), 12, 6)
    assert (len(found["inputs"]), len(found["tokens"])) == (12, 6)


class Fake:
    """A network whose head's logits are given."""

    config = Headed(width=4, attention=tiny.Attention(heads=2))

    def __init__(self, logits):
        self.given = logits

    def __call__(self, batch, key=None):
        return None

    def classes(self, x, key=None):
        return self.given


def rows(objective, cases, length=24):
    features = objective.build(VOCABULARY, length=length, target_length=None)
    encoder = features.encoder(TOKENIZER)
    made = [features.example(encoder.encode(case), 0, RNG) for case in cases]
    # A pad id that is no class and no place.
    packer = features.packer(Packer(length, pad=200, extra=features.extra))
    assert not packer.pack
    filled = packer.fill(made, packer.sizes(made), np.arange(len(made)))
    spare = packer.empty(1)
    return {name: np.concatenate([filled[name], spare[name]]) for name in filled}


def test_losses_in_float64():
    rng = np.random.default_rng(2)
    cases = [Case(("ab", "c"), 2), Case(("d",), 0)]
    batch, logits = rows(SequenceClassification(3), cases), rng.normal(size=(3, 24, 3))
    found = SequenceClassification(3).loss(Fake(logits.astype(np.float32)), batch, None)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -log_probs[0, 0, 2] - log_probs[1, 0, 0]
    np.testing.assert_allclose(found.total, wanted, rtol=1e-5)
    assert found.count == 2
    cases = [Case(("ab",), 3.0), Case(("d",), 1.5)]
    objective = SequenceClassification(1, pool="last")
    found = objective.loss(Fake(logits.astype(np.float32)), rows(objective, cases), None)
    wanted = (logits[0, 3, 0] - 3) ** 2 + (logits[1, 2, 0] - 1.5) ** 2
    np.testing.assert_allclose(found.total, wanted, rtol=1e-5)
    assert objective.baseline(np.array([3000, 1500])) == pytest.approx(0.75**2)
    assert SequenceClassification(2).baseline(np.array([0, 1])) is None
    text = "it was Big Ben."
    cases = [Case(("who", text), (7, 14)), Case(("x", "y"), (0, 0))]
    batch, logits = rows(SpanAnswer(), cases), rng.normal(size=(3, 24, 2))
    found = SpanAnswer().loss(Fake(logits.astype(np.float32)), batch, None)

    def nll(row, allowed, start, end):
        parts = []
        for c, place in enumerate((start, end)):
            kept = logits[row, allowed, c]
            parts.append(np.log(np.exp(kept).sum()) - logits[row, place, c])
        return np.mean(parts)

    wanted = nll(0, [0, *range(5, 20)], 11, 19) + nll(1, [0, 3], 0, 0)
    np.testing.assert_allclose(found.total, wanted, rtol=1e-5)
    assert found.count == 2
    grad = jax.grad(lambda x: SpanAnswer().loss(Fake(x), batch, None).total)(
        logits.astype(np.float32)
    )
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[2] == 0).all()


def test_the_likeliest_answer_is_one_that_can_be():
    objective = SpanAnswer(longest=3)
    text = "it was Big Ben."
    batch = rows(objective, [Case(("who", text), (7, 14))])
    logits = np.zeros((2, 24, 2), np.float32)
    logits[0, 2, 0] = 50  # of the question
    logits[0, 10, 0], logits[0, 19, 1] = 9, 9  # too long together
    logits[0, 12, 1], logits[0, 8, 1] = 5, 8
    assert np.asarray(objective._said(Fake(logits), batch))[0].tolist() == [10, 12, 14, 0]
    logits[0, 0] = 30
    assert np.asarray(objective._said(Fake(logits), batch))[0].tolist() == [10, 12, 14, 60]


def test_the_answer_is_that_of_the_best_window():
    objective = SpanAnswer(stride=5)
    features = objective.build(VOCABULARY, length=18, target_length=None)
    cases = [Case(("who", "it was Big Ben."), (7, 14)), Case(("x", ""), (0, 0))]

    def said(*rows):
        class Given:
            tokenizer = TOKENIZER

            def pieces(self, function, asked):
                assert asked is cases
                return [[np.array(row, np.float32) for row in rows], [np.array([0, 0, -np.inf, 1])]]

        Given.features = features
        return objective.predictions(Given(), cases)

    assert said([5, 7, 3, 1], [6, 10, 4, 2]) == ["Big Ben.", ""]
    assert said([5, 7, 5, 1], [6, 10, 4, 2]) == ["it was", ""]
    # "None" only where every window says so.
    assert said([5, 7, 5, 1], [6, 10, 4, 9]) == ["it was", ""]
    assert said([5, 7, 5, 8], [6, 10, 4, 9]) == ["", ""]


# ---------------------------------------------------------------------------------------- training


def write(folder, name, records):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return FromFiles(str(path), str(path))


def easy(n=24):
    """Sentences whose class is their first letter."""
    return [
        {"sentence": f"{'go' if i % 2 else 'no'} {i}", "label": i % 2, "idx": i} for i in range(n)
    ]


def finetuned(folder, kind, objective, data, classes, **more):
    """Two steps of pretraining, then a phase with a head."""
    base = tiny.tiny_run(folder, kind=kind, objective=MaskedLM() if kind == "encoder" else None)
    first = dataclasses.replace(base.phases[0], name="pretrain", steps=2)
    second = dataclasses.replace(
        first,
        name="finetune",
        steps=more.pop("steps", 1),
        data=data,
        objective=objective,
        model=headed(base.model, classes, head_dropout=0.0),
        begin=(Keep(fresh=("head*",)),),
        keep_optimizer=False,
    )
    run = tiny.with_phases(base, first, second).replace(
        **{"checkpoint.every": 1, "checkpoint.keep": 99} | more
    )
    assert codec.from_json(codec.to_json(run), type(run)) == run
    return run


@pytest.fixture(scope="module")
def sst2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    data = Task("glue/sst2", "classes", write(folder, "data", easy()))
    run = finetuned(folder, "encoder", SequenceClassification(2), data, 2, steps=40)
    run = run.replace(**{"evaluate.batches": 3})
    return folder / "run", train(run, folder / "run")


def test_a_head_learns_what_can_be_learnt(sst2):
    folder, result = sst2
    found = result.results["classes"]
    assert found["loss"] < 0.3 < found["baseline"] == pytest.approx(np.log(2))
    assert found["accuracy"] == 1.0
    assert found["targets"] == 24
    assert read_metrics(folder / "metrics.jsonl")[-1]["eval/classes/accuracy"] == 1.0
    assert read_json(folder / "results.json")["tasks"]["classes"]["accuracy"] == 1.0
    loaded = load(folder)
    cases = loaded.program.phase.data.open("validation")
    said = loaded.program.phase.objective.predictions(Answers(loaded), cases)
    assert said == [case.label for case in cases]
    assert len(said) == 24


def test_all_but_the_head_goes_on(sst2):
    folder, _ = sst2
    before, after = flatten(load(folder, step=2).params), flatten(load(folder, step=3).params)
    assert {p for p in after if p not in before} == {
        "head_hidden/w", "head_hidden_bias", "head_out/w", "head_out_bias",
    }  # fmt: skip
    # One step at 1e-2 of AdamW moves nothing further than about that.
    for path in before.keys() & after.keys():
        assert np.abs(np.asarray(before[path]) - after[path]).max() < 0.03, path


def untrained(run):
    """A run's model with lively parameters, without a step of training."""
    program = Program(run, 0, VOCABULARY, run.mesh.build())
    rng = np.random.default_rng(0)
    params = {
        path: (t.weight == "norm") + max(t.std, 0.1) * rng.standard_normal(t.shape, np.float32)
        for path, t in program.model.tensors.items()
    }
    loaded = Loaded(pathlib.Path("nowhere"), program, unflatten(params), TOKENIZER, 0)
    return loaded, examine.losses(loaded, program.validations(TOKENIZER, 3))


@pytest.mark.parametrize("kind", ["tags", "span", "score"])
def test_other_heads_are_judged(tmp_path, kind):
    if kind == "tags":
        records = [{"tokens": ["Ada", "went"], "ner_tags": [1, 0]}] * 9
        task = ("conll2003", "tags")
        objective, names = TokenClassification(9), {"entity_f1", "accuracy"}
    elif kind == "span":
        answers = {"text": ["Big Ben"], "answer_start": [7]}
        context = "it was Big Ben. " + "and so on " * 6  # in two windows
        records = [{"question": "who", "context": context, "answers": answers}] * 9
        task, objective, names = ("squad", "span"), SpanAnswer(), {"exact_match", "token_f1"}
    else:
        records = [{"sentence1": "a", "sentence2": "b" * i, "label": i / 2} for i in range(9)]
        task, names = ("glue/stsb", "classes"), {"pearson", "spearman"}
        objective = SequenceClassification(1, pool="last")
    data = Task(*task, origin=write(tmp_path, "data", records))
    model = "decoder" if kind == "score" else "encoder"
    base = tiny.tiny_run(tmp_path, kind=model, objective=MaskedLM(), **{"model.layers": 1})
    phase = dataclasses.replace(base.phases[0], data=data, objective=objective)
    run = dataclasses.replace(base, model=headed(base.model, objective.classes), phases=(phase,))
    loaded, results = untrained(run)
    found = results[objective.tasks[0]]
    assert names <= found.keys()
    assert np.isfinite([found["loss"], *(found[name] for name in names)]).all()
    cases = data.open("validation")
    said = objective.predictions(Answers(loaded), cases)
    wanted = figures(cases.metrics, said, list(cases), cases.labels)
    assert {name: found[name] for name in names} == wanted
    assert len(said) == 9
    if kind == "span":  # the loader's validation has the examples of both windows
        assert found["targets"] == 2 * len(records)
    if kind == "score":  # of different texts
        assert len(set(said)) == 9
    else:  # of one text nine times, in two batches
        assert len(set(said)) == 1


def test_text_learns_and_is_judged_by_what_it_writes(tmp_path):
    data = Task("glue/sst2", origin=write(tmp_path, "data", easy(16)))
    run = tiny.tiny_run(tmp_path, objective=TextToText(longest=12))
    phase = dataclasses.replace(run.phases[0], data=data, steps=120)
    result = train(tiny.with_phases(run, phase), tmp_path / "run")
    found = result.results["text"]
    assert found["loss"] < 0.2
    # The figure of the written texts takes the place of the tokens' accuracy.
    loaded = load(tmp_path / "run")
    cases = data.open("validation")
    said = phase.objective.predictions(Answers(loaded), cases)
    assert found["accuracy"] == np.mean([s == c.label for s, c in zip(said, cases, strict=True)])
    assert found["accuracy"] > 0.9


def test_several_tasks_are_judged_each_by_itself(tmp_path):
    stsb = [{"sentence1": "a", "sentence2": "b", "label": i / 2} for i in range(9)]
    tasks = (
        (Task("glue/sst2", origin=write(tmp_path, "sst2", easy(8))), 1.0),
        (Task("glue/stsb", origin=write(tmp_path, "stsb", stsb)), 1.0),
    )
    run = tiny.tiny_run(tmp_path, kind="encoder_decoder", objective=TextToText(longest=4))
    phase = dataclasses.replace(run.phases[0], data=Sources(tasks))
    _, results = untrained(tiny.with_phases(run, phase))
    assert results["sst2"].keys() == {"accuracy"}
    assert results["stsb"].keys() == {"pearson", "spearman"}
    assert "loss" in results["text"]


def test_what_cannot_be_is_said_first(tmp_path):
    base = tiny.tiny_run(tmp_path)
    phase = base.phases[0]

    def refused(match, **changes):
        run = tiny.with_phases(base, dataclasses.replace(phase, **changes))
        with pytest.raises(ConfigError, match=match):
            train(run, tmp_path / "never")

    refused("Text gives no labels, and TextToText wants labels", objective=TextToText())
    refused("SentenceOrder gives labels, and CausalLM wants no labels", data=SentenceOrder())
    refused("gives classes", objective=CausalLM(), model=headed(base.model, 2))
    data = Task("glue/sst2", "classes", write(tmp_path, "data", easy()))
    heads = {"data": data, "begin": (Keep(fresh=("head*",)),), "model": headed(base.model, 2)}
    more = SequenceClassification(3, pool="last")
    refused("needs model.classes of 3 or more", objective=more, **heads)
    refused("has read nothing there", objective=SequenceClassification(2), **heads)
    assert not (tmp_path / "never" / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="no head of classes"):
        headed(Transformer(kind="encoder_decoder"), 2)
    with pytest.raises(ConfigError, match="2 classes, and a case has label 5"):
        example(SequenceClassification(2), Case(("a",), 5))
    with pytest.raises(DataError, match="the source gave str"):
        SpanAnswer().build(VOCABULARY, length=20, target_length=None).encoder(TOKENIZER).encode("a")
    for objective in (SpanAnswer(), TextToText(mode="S"), SequenceClassification(3, pool="last")):
        assert codec.from_json(codec.to_json(objective), Objective) == objective


def test_keep_of_one_network_says_what_does_not_fit():
    before = Transformer(width=16, layers=1, attention=tiny.Attention(heads=2)).build(32)
    after = headed(before.config, 3).build(32)
    with pytest.raises(ConfigError, match=r"head_hidden/w is .* the model has no such tensor"):
        Keep().validate(before, after)
    with pytest.raises(ConfigError, match="no network 'encoder'; known: ''"):
        Keep("encoder").validate(before, after)
    with single().active():
        params = jax.jit(before.init)(jax.random.key(0))
        made = Keep(fresh=("head*",))(params, before, after, jax.random.key(1))
    assert flatten(made).keys() == after.tensors.keys()
    np.testing.assert_array_equal(made["embedding"]["w"], params["embedding"]["w"])
    assert np.std(made["head_out"]["w"]) > 0
