"""A run that starts from parameters that are there; imported models as runs; other vocabularies."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from interop_cases import BERT, LLAMA, T5, TOKENIZER, params_of, with_tokenizer
from tiny import tiny_run

from jaxpt import cli
from jaxpt.checkpoint import Checkpoints
from jaxpt.data.pretrained import Pretrained
from jaxpt.data.tokenizers import Bytes
from jaxpt.errors import ConfigError
from jaxpt.folder import RunFolder
from jaxpt.growth import Convert, ResizeVocabulary
from jaxpt.interop import hf
from jaxpt.loading import load
from jaxpt.mesh import single
from jaxpt.models.stacking import unstacked
from jaxpt.start import open_start
from jaxpt.state import flatten
from jaxpt.train import check, train
from jaxpt.weights import LowRank

MODEL = dataclasses.replace(LLAMA, vocab_multiple=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model as Hugging Face has it, and the same imported."""
    folder = tmp_path_factory.mktemp("start")
    _, params = with_tokenizer(folder / "hf")
    assert cli.main(["import", "hf", str(folder / "hf"), str(folder / "imported")]) == 0
    return folder, params


def run_from(folder, source, **changes):
    own = {"model": MODEL, "tokenizer": Pretrained(path=str(source)), "start_from": str(source)}
    return tiny_run(folder, **own | changes)


def equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_an_imported_model_is_a_run(home, capsys):
    folder, params = home
    loaded = load(folder / "imported", layout=single())
    assert loaded.step == 0
    assert loaded.run.tokenizer == Pretrained(path=str(folder / "imported"))
    config = dataclasses.replace(loaded.program.model.config, vocab_multiple=8)
    equal(hf.read(folder / "hf").params(config), params)
    found = flatten(loaded.params)
    for path, array in flatten(params).items():
        cut = tuple(slice(n) for n in array.shape)
        np.testing.assert_array_equal(np.asarray(found[path])[cut], array)
    own, was = loaded.tokenizer.vocabulary, TOKENIZER.build().vocabulary
    assert dataclasses.replace(own, modes=was.modes, pieces=was.pieces) == was
    named = Pretrained(path=str(folder / "imported"), modes=("R", "S", "X")).build()
    assert named.vocabulary.modes == was.modes
    assert cli.main(["checkpoint", "verify", str(folder / "imported")]) == 0
    assert "whole" in capsys.readouterr().out


def test_kinds_of_models_have_an_objective(home, tmp_path):
    for name, config in {"t5": T5, "bert": BERT}.items():
        with_tokenizer(tmp_path / name, config)
        assert cli.main(["import", "hf", str(tmp_path / name), str(tmp_path / f"{name}_run")]) == 0
        run = RunFolder(tmp_path / f"{name}_run").load()
        program = load(tmp_path / f"{name}_run", layout=single()).program
        program.check()
        assert (
            type(run.phases[0].objective).__name__
            == {"t5": "SpanCorruption", "bert": "MaskedLM"}[name]
        )


def test_import_that_cannot_be_writes_nothing(home, tmp_path, capsys):
    folder, _ = home
    assert cli.main(["import", "hf", str(folder / "hf"), str(folder / "imported")]) == 2
    assert "OUT: " in capsys.readouterr().err
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in (folder / "hf").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"mystery": 1}))
    assert cli.main(["import", "hf", str(copy), str(tmp_path / "out")]) == 2
    assert "mystery: 1 in config.json is not understood" in capsys.readouterr().err
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "tokenizer.json").unlink()
    assert cli.main(["import", "hf", str(copy), str(tmp_path / "out")]) == 3
    assert "holds no tokenizer that is known" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_training_goes_on_from_them_and_out_again(home, tmp_path, capsys):
    """Imported, trained for a step, and exported; and another run starts from that."""
    folder, params = home
    run = run_from(tmp_path, folder / "imported", steps=1, **{"model.vocab_multiple": 128})
    result = train(run, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        first = checkpoints.restore(0, result.program.abstract).params
    found = flatten(first)
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(found[path][tuple(slice(n) for n in array.shape)], array)
    argv = ["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "out"), "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path / "out"), "family": "llama", "step": 1,
    }  # fmt: skip
    last = hf.read(tmp_path / "out").params(run.model)
    equal(last, jax.tree.map(np.asarray, jax.device_get(result.state.params)) | {})
    other = run_from(
        tmp_path, tmp_path / "run", **{"model.vocab_multiple": 128, "model.scan": False}
    )
    start = open_start(other, RunFolder(tmp_path / "nowhere"))
    assert start is not None
    equal(start.read(single()), unstacked(result.state.params))
    # Going on with a run, nothing of what it began with is needed.
    gone = run.replace(start_from=str(tmp_path / "gone"))
    assert open_start(gone, RunFolder(tmp_path / "run")) is None


def test_a_folder_of_hugging_face_as_the_run_has_its_layers(home, tmp_path):
    folder, params = home
    run = run_from(tmp_path, folder / "hf", **{"model.scan": False, "model.dtype": "bfloat16"})
    start = open_start(run, RunFolder(tmp_path / "run"))
    assert start is not None
    layout, tokenizer = run.mesh.build(), run.tokenizer.build()
    check(run, tokenizer, layout, start)
    found = flatten(start.read(layout))
    for path, array in flatten(unstacked(params)).items():
        np.testing.assert_array_equal(found[path], array.astype(found[path].dtype))
        assert found[path].dtype == "bfloat16"


def test_what_does_not_fit_is_said_before_anything_is_made(home, tmp_path):
    folder, _ = home
    other = Bytes(sentinels=80)
    for changes, said in [
        ({"model.width": 32}, r"start_from: at .* has shape \(16,\), and the model shape \(32,\)"),
        ({"model.layers": 3}, r"begin \(jaxpt\.growth\.Convert\)"),
        ({"tokenizer": other}, r"embedding/w it has shape .* begin \(jaxpt\.growth\.ResizeVoc"),
        ({"start_from": str(tmp_path)}, "start_from: .* holds neither"),
        ({"model.weights": (("*", LowRank(rank=2)),)}, r"/a it has nothing, and the model shape"),
        ({"start_from": str(tmp_path / "odd")}, "start_from: .*model_type: 'odd' is not supported"),
    ]:
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "config.json").write_text('{"model_type": "odd"}')
        run = run_from(tmp_path, folder / "imported", **changes)
        with pytest.raises(ConfigError, match=said):
            train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_transitions_lead_from_them_to_the_model(home, tmp_path):
    folder, _ = home
    changes = {"model.weights": (("*/mlp/*", LowRank(rank=16)), *MODEL.weights)}
    run = run_from(tmp_path, folder / "hf", begin=(Convert(),), **changes)
    start = open_start(run, RunFolder(tmp_path / "run"))
    assert start is not None
    assert start.model.config.weights == LLAMA.weights
    check(run, run.tokenizer.build(), run.mesh.build(), start)


# --- another vocabulary -----------------------------------------------------------------------


def resized(transition, old_size, new_size, config=LLAMA, new_config=None):
    old = dataclasses.replace(config, vocab_multiple=8).build(old_size)
    new = dataclasses.replace(new_config or config, vocab_multiple=16).build(new_size)
    transition.validate(old, new)
    params = params_of(old)
    made = transition(params, old, new, jax.random.key(0))
    assert {p: x.shape for p, x in flatten(made).items()} == {
        p: t.shape for p, t in new.tensors.items()
    }
    return params, jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("config", [LLAMA, BERT])
def test_rows_go_by_id_and_the_rest_is_the_mean(config):
    params, made = resized(ResizeVocabulary(), 31, 40, config)
    old, new = params["embedding"]["w"], made["embedding"]["w"]
    np.testing.assert_array_equal(new[:31], old[:31])
    np.testing.assert_allclose(new[31:40], np.tile(old[:31].mean(0), (9, 1)), rtol=1e-5)
    assert not new[40:].any()
    if config is LLAMA:
        head, was = made["lm_head"]["w"], params["lm_head"]["w"]
        np.testing.assert_array_equal(head[:, :31], was[:, :31])
        np.testing.assert_allclose(head[:, 35], was[:, :31].mean(1), rtol=1e-5, atol=1e-7)
    else:
        bias, was = made["lm_head_bias"], params["lm_head_bias"]
        np.testing.assert_allclose(bias[33], was[:31].mean(), rtol=1e-5)
    rest = {p: x for p, x in flatten(made).items() if "embedding/w" not in p and "lm_head" not in p}
    for path, array in rest.items():
        np.testing.assert_array_equal(array, flatten(params)[path])


def test_rows_may_be_fewer_or_drawn():
    params, made = resized(ResizeVocabulary(), 31, 20)
    np.testing.assert_array_equal(made["embedding"]["w"][:20], params["embedding"]["w"][:20])
    assert not made["embedding"]["w"][20:].any()
    params, made = resized(ResizeVocabulary(new="draw"), 31, 33)
    new = made["embedding"]["w"]
    np.testing.assert_array_equal(new[:31], params["embedding"]["w"][:31])
    assert np.ptp(new[31]) > 0.1
    assert np.abs(new[31] - new[32]).max() > 0.1


def test_rows_go_by_text_where_both_tokenizers_are_known(tmp_path):
    """A file of bytes' characters against bytes: the same letters and special ids at other ids."""
    import tokenizers
    from tokenizers import models

    letters = {letter: i for i, letter in enumerate("zyxabc")}
    file = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    file.add_special_tokens(["</s>", "<pad>", "<extra_id_0>", "<extra_id_1>"])
    file.save(str(tmp_path / "tokenizer.json"))
    before, after = Bytes(sentinels=3), Pretrained(path=str(tmp_path), modes=("R",))
    a, b = before.build().vocabulary, after.build().vocabulary
    transition = ResizeVocabulary(before=before, after=after)
    params, made = resized(transition, a.size, b.size)
    old, new = params["embedding"]["w"], made["embedding"]["w"]
    for letter, i in letters.items():
        np.testing.assert_array_equal(new[i], old[ord(letter) + 3])
    for mine, its in [(b.pad, a.pad), (b.eos, a.eos), *zip(b.sentinels, a.sentinels, strict=False)]:
        np.testing.assert_array_equal(new[mine], old[its])
    np.testing.assert_array_equal(new[dict(b.modes)["R"][0]], old[dict(a.modes)["R"][0]])
    back = ResizeVocabulary(before=after, after=before).rows(b.size, a.size)
    assert back[ord("q") + 3] == -1
    assert back[ord("x") + 3] == letters["x"]


def test_resizing_that_cannot_be():
    with pytest.raises(ConfigError, match="after: missing; give both"):
        ResizeVocabulary(before=Bytes())
    with pytest.raises(ConfigError, match="new: 'zero'"):
        ResizeVocabulary(new="zero")
    with pytest.raises(ConfigError, match="only the vocabulary may change"):
        resized(ResizeVocabulary(), 31, 40, LLAMA, dataclasses.replace(LLAMA, tied=True))
    with pytest.raises(ConfigError, match="in this phase and"):
        resized(ResizeVocabulary(), 31, 40, LLAMA, dataclasses.replace(LLAMA, width=32))
    with pytest.raises(ConfigError, match="before: of 364 ids; the model has 31"):
        resized(ResizeVocabulary(before=Bytes(), after=Bytes()), 31, 40)
