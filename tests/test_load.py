"""A trained run read back from its folder, asked for text, and shown on validation examples."""

import dataclasses
import io
import json
import re
import types

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from jaxpt import cli
from jaxpt.errors import ConfigError, DataError
from jaxpt.evaluation import Validation
from jaxpt.filling import fill
from jaxpt.generate import generate
from jaxpt.loading import load
from jaxpt.mesh import Mesh
from jaxpt.objectives import MaskedLM, Mixture, Part, PrefixLM, SpanCorruption
from jaxpt.objectives.prompt import Prompt
from jaxpt.optimizers import AdamW
from jaxpt.samples import _answers, samples, show
from jaxpt.sampling import Sampling
from jaxpt.state import flatten
from jaxpt.train import train

DENOISERS = Mixture(
    (
        Part(SpanCorruption(3.0, 0.15, mode="R"), name="R3"),
        Part(SpanCorruption(2.0, 0.15, mode="R"), name="R2"),
        Part(PrefixLM(0.25, mode="S"), name="S"),
        Part(SpanCorruption(3.0, 0.5, mode="X"), name="X3"),
    )
)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    """An encoder-decoder's folder, and how its training ended."""
    folder = tmp_path_factory.mktemp("denoiser")
    run = tiny.tiny_run(folder, kind="encoder_decoder", objective=DENOISERS)
    return folder / "run", train(run, folder / "run")


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """A decoder's folder: 3 steps causal, 3 masked, every one saved."""
    folder = tmp_path_factory.mktemp("phases")
    run = tiny.tiny_run(folder, **{"checkpoint.every": 1, "checkpoint.keep": 9})
    first = dataclasses.replace(run.phases[0], name="causal", steps=3)
    second = dataclasses.replace(first, name="masked", objective=MaskedLM(mask=1.0, random=0.0))
    run = tiny.with_phases(run, first, second)
    return folder / "run", train(run, folder / "run")


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert np.array_equal(a[path], b[path]), path


def test_load_gives_what_was_trained(denoiser):
    folder, result = denoiser
    loaded = load(folder)
    assert loaded.step == 6
    assert loaded.run == result.program.run
    assert loaded.notes == ()
    assert_same(loaded.params, result.state.params)
    before = load(folder, step=0)
    assert before.step == 0
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (before.params, loaded.params)), strict=True)
    )
    text = "what was taken out"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text


def test_load_knows_the_phase_of_a_checkpoint(phases):
    folder, result = phases
    assert (load(folder, step=2).program.phase.name, load(folder).program.phase.name) == (
        "causal",
        "masked",
    )
    assert_same(load(folder).params, result.state.params)


def test_load_lays_parameters_on_any_mesh(denoiser):
    folder, result = denoiser
    layout = Mesh(data=2, fsdp=2, tensor=2).build()
    loaded = load(folder, layout=layout)
    assert_same(loaded.params, result.state.params)
    spread = [x for x in jax.tree.leaves(loaded.params) if not x.sharding.is_fully_replicated]
    assert spread
    other = dataclasses.replace(result.program.run, mesh=Mesh(data=3))
    loaded = load(folder, run=other)
    assert loaded.program.layout.mesh.size == 1
    assert "does not fit" in loaded.notes[0]


@dataclasses.dataclass(frozen=True)
class Doubled(AdamW):
    """Evaluates with what is in its state."""

    def eval_params(self, state, params):
        mu = next(v for k, v in flatten(state).items() if "mu" in k and v.ndim)
        return jax.tree.map(lambda p: 2 * p + 0 * mu.sum(), params)


def test_load_asks_the_optimizer_what_to_evaluate(denoiser):
    folder, result = denoiser
    run = result.program.run
    phase = run.phases[0]
    fields = {f.name: getattr(phase.optimizer, f.name) for f in dataclasses.fields(phase.optimizer)}
    run = tiny.with_phases(run, dataclasses.replace(phase, optimizer=Doubled(**fields)))
    assert_same(load(folder, run=run).params, jax.tree.map(lambda p: 2 * p, result.state.params))


def test_load_says_what_is_not_there(denoiser, tmp_path):
    folder, result = denoiser
    with pytest.raises(ConfigError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="it has: 0, 6"):
        load(folder, step=5)
    run = result.program.run
    for change in ({"width": 32}, {"layers": 3}, {"tied": True, "output_bias": True}):
        other = dataclasses.replace(run, model=dataclasses.replace(run.model, **change))
        with pytest.raises(
            DataError, match=r"does not hold these parameters: at .* it has .*, the run "
        ):
            load(folder, run=other)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    with pytest.raises(ConfigError, match="no checkpoint"):
        load(tmp_path)


# Text.


def test_spans_are_filled_and_texts_continued(denoiser):
    loaded = load(denoiser[0])
    asked = ["the <extra_id_0> reads a <extra_id_1> of text", "what was"]
    generator = loaded.generator()
    (filled,), (continued,) = generate(loaded, asked, max_tokens=12, generator=generator)
    kinds = [kind for kind, _ in filled.pieces]
    assert kinds[0] == kinds[2] == "kept"
    assert kinds[1] in ("filled", "open")
    assert "".join(text for _, text in filled.pieces) == filled.text
    assert filled.text.startswith("the ")
    assert continued.text == "what was" + continued.output
    # The same by hand: the modes are those of the denoisers that fit.
    vocabulary, tokenizer = loaded.tokenizer.vocabulary, loaded.tokenizer
    modes = {name: ids[0] for name, ids in vocabulary.modes}
    assert [p.inputs[0] for p in _prompts(loaded, asked)] == [modes["R"], modes["S"]]
    (first, second) = generator.sample(_prompts(loaded, asked), max_tokens=12)
    assert tokenizer.decode(first.tokens) == filled.output
    assert (tokenizer.decode(second.tokens), second.log_prob) == (
        continued.output,
        continued.log_prob,
    )


def _prompts(loaded, texts):
    from jaxpt.filling import encode_prompt
    from jaxpt.objectives.prompt import prompt

    objective, vocabulary = loaded.program.phase.objective, loaded.tokenizer.vocabulary
    encoded = [encode_prompt(text, loaded.tokenizer) for text in texts]
    return [prompt(objective, vocabulary, ids, two_streams=True) for ids in encoded]


def test_several_answers_to_several_prompts(denoiser):
    loaded = load(denoiser[0])
    warm = {"sampling": Sampling(temperature=1.5), "max_tokens": 8, "seed": 3}
    generator = loaded.generator()
    answers = generate(loaded, ["what", "the text"], samples=2, generator=generator, **warm)
    assert [[w.prompt for w in a] for a in answers] == [["what"] * 2, ["the text"] * 2]
    assert len({w.output for a in answers for w in a}) == 4
    alone = generate(loaded, ["what"], samples=2, generator=generator, **warm)
    assert [w.output for w in alone[0]] == [w.output for w in answers[0]]
    best = generate(loaded, ["what"], beams=3, samples=2, max_tokens=8, generator=generator)[0]
    assert len({w.output for w in best}) == 2


def test_a_phase_says_how_its_model_is_asked(phases):
    folder, _ = phases
    (written,) = generate(load(folder, step=2), ["the model"], max_tokens=5)[0]
    assert written.text.startswith("the model")
    loaded = load(folder)
    (written,) = generate(loaded, ["the m<mask>del"])[0]
    assert written.pieces[0] == ("kept", "the m")
    assert (written.pieces[1][0], written.pieces[2]) == ("filled", ("kept", "del"))
    with pytest.raises(ConfigError, match="<mask>"):
        generate(loaded, ["the model"])
    with pytest.raises(ConfigError, match="without modes"):
        generate(loaded, ["the m<mask>del"], mode="R")


def test_the_command(denoiser, capsys):
    folder, _ = denoiser
    options = ["--temperature", "0", "--max-tokens", "12"]
    code = cli.main(["generate", str(folder), "--prompt", "what was", "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    (expected,) = generate(load(folder), ["what was"], max_tokens=12)[0]
    assert found["step"] == 6
    assert [o["text"] for o in found["outputs"]] == [expected.text]
    assert set(found["outputs"][0]) == {"prompt", "output", "text", "ended", "log_prob"}
    assert cli.main(["generate", str(folder), "--prompt", "what was", "--mode", "S", *options]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.text.rstrip("\n")
    assert cli.main(["generate", str(folder), "--prompt", "what", "--mode", "Q"]) == 2
    assert "known: R, S, X" in capsys.readouterr().err


# Samples.


def test_samples_of_denoisers(denoiser):
    folder, _result = denoiser
    loaded = load(folder)
    program, tokenizer = loaded.program, loaded.tokenizer
    validations = program.validations(tokenizer, 1)
    found = samples(program, loaded.params, tokenizer, validations, 3)
    assert [s["task"] for s in found] == ["R3", "S", "X3"]  # a mode each, though R2 comes second
    assert samples(program, loaded.params, tokenizer, validations, 3) == found
    assert len(samples(program, loaded.params, tokenizer, validations, 9)) == 4
    assert samples(program, loaded.params, tokenizer, validations, 0) == []
    texts = {p.read_text() for p in (folder.parent / "text").iterdir()}
    for sample in found:
        opening, given = sample["input"][:3], sample["input"][3:]
        assert opening == f"[{sample['task'][0]}]"
        if sample["task"] == "S":
            whole = given + sample["target"]
        else:
            whole = tokenizer.decode(
                fill(*map(_ids(tokenizer), (given, sample["target"])), tokenizer.vocabulary)
            )
        assert any(whole in text for text in texts), "input and target should rebuild the text"
        mode = sample["task"][0]
        most = len(_ids(tokenizer)(sample["target"])) + 1
        (own,) = generate(loaded, [given], mode=mode, max_tokens=most)[0]
        shorter, longer = sorted((own.output, sample["output"]), key=len)
        assert longer.startswith(shorter)
        assert shorter


def _ids(tokenizer):
    from jaxpt.filling import encode_prompt

    return lambda text: encode_prompt(text, tokenizer)


def test_samples_of_decoders(phases):
    folder, _ = phases
    causal = load(folder, step=2)
    (sample,) = samples(
        causal.program,
        causal.params,
        causal.tokenizer,
        causal.program.validations(causal.tokenizer, 1),
        2,
    )
    assert sample["task"] == "causal"
    (expected,) = generate(causal, [sample["input"]], max_tokens=len(sample["target"]) + 1)[0]
    assert sample["output"] == expected.output
    masked = load(folder)
    (sample,) = samples(
        masked.program,
        masked.params,
        masked.tokenizer,
        masked.program.validations(masked.tokenizer, 1),
        2,
    )
    assert "<mask>" in sample["input"]
    assert "<mask>" not in sample["target"]
    pattern = re.escape(sample["input"]).replace("<mask>", "(.+?)")
    assert re.fullmatch(pattern, sample["target"], re.DOTALL)
    assert re.fullmatch(pattern, sample["output"], re.DOTALL)


def test_decoder_only_denoisers_have_samples(tmp_path):
    run = tiny.tiny_run(tmp_path, objective=DENOISERS, length=64)
    result = train(
        dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, samples=3)),
        tmp_path / "run",
    )
    assert [s["task"] for s in result.samples] == ["R3", "S", "X3"]
    assert json.loads((tmp_path / "run" / "samples.json").read_text())["samples"] == result.samples


def test_a_component_without_batches_is_passed_over(denoiser):
    loaded = load(denoiser[0])
    nothing = [Validation("R3", [], 0.0, 0)]
    assert samples(loaded.program, loaded.params, loaded.tokenizer, nothing, 3) == []


def shown(*found):
    out = io.StringIO()
    show(found, Console(file=out, width=1000))
    return out.getvalue()


@pytest.mark.parametrize(
    ("table", "blank", "most"), [(None, None, 41), (64, None, 14), (51, None, 1), (64, 3, 41)]
)
def test_samples_keep_to_the_models_positions(table, blank, most):
    """Targets and prompts of different examples may be longer together than any one of them."""
    asked = []

    def sample(prompts, max_tokens):
        asked.append(max_tokens)
        return [types.SimpleNamespace(tokens=prompt.tokens[:1]) for prompt in prompts]

    model = types.SimpleNamespace(config=types.SimpleNamespace(max_length=table))
    generator = types.SimpleNamespace(sample=sample, model=model)
    long, short = np.ones(50, np.int32), np.ones(5, np.int32)
    prompts = [Prompt(long, prefix=True, blank=blank), Prompt(short, prefix=True, blank=blank)]
    assert len(_answers(generator, prompts, [short, long[:40]])) == 2
    assert asked == [most]


def test_samples_are_shown_around_their_first_spans():
    kept = "x" * 300
    text = shown(
        {
            "task": "R",
            "input": f"[R]{kept}<extra_id_0> b\n<extra_id_1>" + f"{kept}<extra_id_2>" * 4,
            "target": "<extra_id_0>one<extra_id_1>two\tlines\n<extra_id_2>three",
            "output": "<extra_id_0>one<extra_id_2>",
        }
    )
    assert "…xxx" in text
    assert "<0> b⏎<1>" in text
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  <")
    }
    assert rows["<0>"] == ["one", "one"]
    assert rows["<1>"] == ["two→lines⏎", "(left", "out)"]
    assert rows["<2>"] == ["three", "(empty)"]
    many = "".join(f"<extra_id_{i}>w{i}" for i in range(9))
    assert "and 5 more spans" in shown({"task": "X", "input": many, "target": many, "output": many})


def test_samples_without_spans_are_shown_in_full():
    text = shown(
        {"task": "S", "input": "a" * 500 + "end", "target": "truth " + "t" * 300, "output": "guess"}
    )
    assert "aend" in text
    assert "truth t" in text
    assert "guess" in text
    assert len(" ".join(text.split())) < 500
