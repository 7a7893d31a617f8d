"""A run's model under the real lm_eval package, asked local tasks: no network."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from harness_cases import CHOICES, NAMES, TEXTS, write_tasks

from jaxpt import cli
from jaxpt.errors import ConfigError
from jaxpt.evaluation import Evaluate, Harness
from jaxpt.files import read_metrics
from jaxpt.generate import generate
from jaxpt.loading import load
from jaxpt.models import MLP, Attention, RelativeBias
from jaxpt.objectives import UL2, PrefixLM
from jaxpt.objectives.prompt import opening
from jaxpt.scoring import Question
from jaxpt.train import train

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tasks):
    """A decoder's folder; its training asked one task at step 3 and at the end."""
    folder = tmp_path_factory.mktemp("decoder")
    harness = Harness(("jaxpt_choices",), every=3, include_path=str(tasks), batch=4)
    run = tiny.tiny_run(folder, evaluate=Evaluate(batches=1, samples=0, harness=harness))
    # As LLaMA is.
    run = run.replace(**{"model.mlp": MLP(width=32, activation="silu", gated=True)})
    train(run.replace(**{"checkpoint.every": 3, "checkpoint.keep": 9}), folder / "run")
    return folder / "run"


def asked(model, tasks, names=NAMES):
    """Task -> its samples, as lm_eval gives them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0
    )
    return {n: sorted(found["samples"][n], key=lambda s: s["doc_id"]) for n in names}, found


def test_each_answer_is_scored_as_the_core_scores_it(decoder, tasks):
    from jaxpt.interop.lm_eval import HarnessLM

    loaded = load(decoder)
    samples, found = asked(HarnessLM(loaded, batch=3), tasks)
    tokenizer, objective = loaded.tokenizer, loaded.program.phase.objective
    right = []
    for case, sample in zip(CHOICES, samples["jaxpt_choices"], strict=True):
        scores = []
        for choice, response in zip(case["choices"], sample["filtered_resps"], strict=True):
            text = f" {choice}"  # a byte is a token: where the pair is cut is no question
            prompt = opening(
                objective, tokenizer.vocabulary, tokenizer.encode(case["context"]),
                two_streams=False,
            )  # fmt: skip
            (score,) = loaded.scorer(1)([Question(prompt, tokenizer.encode(text))])
            np.testing.assert_allclose(response[0], score.log_prob, rtol=1e-4)
            assert response[1] == score.greedy
            scores.append(score.log_prob)
        right.append(int(np.argmax(scores) == case["gold"]))
    assert found["results"]["jaxpt_choices"]["acc,none"] == np.mean(right)
    whole = [s["filtered_resps"][0] for s in samples["jaxpt_whole"]]
    empty = opening(objective, tokenizer.vocabulary, np.zeros(0, np.int32), two_streams=False)
    ids = tokenizer.encode(TEXTS[0]["text"])
    (score,) = loaded.scorer(1)([Question(empty, ids)])
    np.testing.assert_allclose(whole[0], score.log_prob, rtol=1e-5)
    assert len(tokenizer.encode(TEXTS[1]["text"])) > 2 * loaded.program.phase.length
    written = [s["filtered_resps"][0] for s in samples["jaxpt_written"]]
    texts = generate(loaded, [c["context"] for c in CHOICES[:4]], max_tokens=12)
    assert written == [t[0].output.split("e")[0] for t in texts]


def theirs(folder, tasks, names, **options):
    """Samples of the exported model under lm_eval's own backend."""
    pytest.importorskip("transformers", reason="needs the extra parity")
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, **options)
    return asked(model, tasks, names)[0]


def assert_same(mine, other):
    for task in mine:
        for a, b in zip(mine[task], other[task], strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(x, str):
                    assert x == y
                elif isinstance(x, tuple):
                    np.testing.assert_allclose(x[0], y[0], rtol=1e-4)
                    assert x[1] == y[1]
                else:
                    np.testing.assert_allclose(x, y, rtol=1e-4)


def test_the_exported_model_scores_the_same_under_its_own_backend(decoder, tasks, tmp_path):
    from jaxpt.interop.lm_eval import HarnessLM

    assert cli.main(["export", str(decoder), "--to", "hf", str(tmp_path / "out")]) == 0
    samples, _ = asked(HarnessLM(load(decoder), batch=3), tasks)
    length = load(decoder).program.phase.length
    # Their tokenizer puts bos in front of contexts; of whole texts it is given by the harness.
    for names, options in ((NAMES[::2], {}), (NAMES[1:2], {"add_bos_token": False})):
        other = theirs(tmp_path / "out", tasks, names, max_length=length, **options)
        assert_same({name: samples[name] for name in names}, other)


def test_an_exported_encoder_decoder_scores_the_same(tmp_path, tasks):
    from jaxpt.interop.lm_eval import HarnessLM

    run = tiny.tiny_run(tmp_path, kind="encoder_decoder", objective=PrefixLM())
    model = dataclasses.replace(
        run.model,
        attention=Attention(heads=4, scale=1.0),
        mlp=MLP(width=32, gated=True),
        positions=RelativeBias(),
        # As T5 1.0 is: lm_eval's backend ties every T5's output to its embedding once it is loaded.
        tied=True,
        logit_scale=run.model.width**-0.5,
    )
    phase = dataclasses.replace(run.phases[0], length=192, target_length=192, steps=3)
    train(tiny.with_phases(dataclasses.replace(run, model=model), phase), tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "out")]) == 0
    samples, _ = asked(HarnessLM(load(tmp_path / "run"), batch=3), tasks)
    # Where there is no context, ours is an encoder's end, and theirs the start unless told.
    end = load(tmp_path / "run").tokenizer.vocabulary.eos
    other = theirs(tmp_path / "out", tasks, NAMES[::2], max_length=192, prefix_token_id=end)
    choices, written = NAMES[::2]
    assert_same({choices: samples[choices]}, other)
    for mine, longer in zip(samples[written], other[written], strict=True):
        # Theirs may write as many tokens more as the encoder reads; ours ends where it is to.
        (ours,), (text,) = mine["filtered_resps"], longer["filtered_resps"]
        assert text.startswith(ours)
        # A byte each; a mark in place of what is no text stands for one to three of them.
        least = len(ours.replace("\ufffd", "?").encode())
        assert ours == text or least <= 12 <= least + 2 * ours.count("\ufffd")
    assert any(sample["filtered_resps"][0] for sample in samples[written])


def test_training_and_the_command_ask(decoder, tasks, capsys):
    rows = read_metrics(decoder / "metrics.jsonl")
    logged = {row["step"]: row["eval/jaxpt_choices/acc"] for row in rows if any(
        name.startswith("eval/jaxpt_choices/") for name in row)}  # fmt: skip
    assert logged.keys() == {3, 6}
    assert not any("stderr" in name for row in rows for name in row)
    command = ["eval", str(decoder), "--tasks", "jaxpt_choices,jaxpt_whole"]
    assert cli.main([*command, "--include-path", str(tasks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step"] == 6
    assert found["tasks"]["jaxpt_choices"]["acc"] == logged[6]
    assert found["tasks"]["jaxpt_whole"]["word_perplexity"] > 1
    assert cli.main([*command, "--include-path", str(tasks), "--limit", "2"]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert cli.main([*command, "--include-path", str(tasks), "--all-checkpoints", "--json"]) == 0
    series = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [row["step"] for row in series] == [0, 3, 6]
    assert series[1]["eval/jaxpt_choices/acc"] == logged[3]


def test_modes_of_an_encoder_decoder(tmp_path, tasks):
    from jaxpt.interop.lm_eval import HarnessLM

    run = tiny.tiny_run(tmp_path, kind="encoder_decoder", objective=UL2())
    run = tiny.with_phases(run, dataclasses.replace(run.phases[0], length=96, target_length=64))
    train(run.replace(steps=1), tmp_path / "run")
    loaded = load(tmp_path / "run")
    tokenizer = loaded.tokenizer
    totals = {}
    for mode in ("S", "X"):
        samples, _ = asked(HarnessLM(loaded, mode=mode), tasks)
        totals[mode] = [
            r[0] for s in samples["jaxpt_choices"][:2] for r in s["filtered_resps"]
        ]  # fmt: skip
        texts = [s["filtered_resps"][0] for s in samples["jaxpt_written"]]
        assert not any("<extra_id" in text for text in texts)
    case = CHOICES[0]
    prompt = opening(
        UL2(), tokenizer.vocabulary, tokenizer.encode(case["context"]), mode="S", two_streams=True
    )
    (score,) = loaded.scorer(1)([Question(prompt, tokenizer.encode(f" {case['choices'][0]}"))])
    np.testing.assert_allclose(totals["S"][0], score.log_prob, rtol=1e-4)
    assert totals["S"] != totals["X"]
    with pytest.raises(ConfigError, match="no mode 'Q'"):
        HarnessLM(loaded, mode="Q")


def test_contexts_that_are_too_long_lose_their_beginning(decoder):
    from jaxpt.interop.lm_eval import HarnessLM

    loaded = load(decoder)
    model = HarnessLM(loaded, max_length=10)
    question = model._question(list(range(10, 40)), [5, 6, 7])
    start = loaded.tokenizer.vocabulary.bos
    assert question.prompt.tokens.tolist() == [start, *range(33, 40)]
    with pytest.raises(ConfigError, match="no room for 11 more"):
        model._question([5], list(range(12)))
    with pytest.raises(ConfigError, match="knows no nonsense"):
        cli._module("examine").ask(loaded, Harness(("nonsense",)))
