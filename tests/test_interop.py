"""Folders of Hugging Face without torch: there and back, what is refused, nothing half there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_cases import BERT, LLAMA, T5, params_of, with_tokenizer, written
from model_cases import VOCAB

from jaxpt.data.pretrained import Pretrained
from jaxpt.errors import ConfigError, DataError
from jaxpt.interop import hf, shards
from jaxpt.interop.families import FAMILIES
from jaxpt.interop.family import essence
from jaxpt.interop.safetensors import SafeTensors, write
from jaxpt.models import Electra, RelativeBias
from jaxpt.models.presets import PUBLISHED
from jaxpt.models.stacking import unstacked
from jaxpt.state import flatten
from jaxpt.weights import LoRA, LowRank, SparsePlusLowRank

MODELS = {
    "t5": T5,
    "bert": BERT,
    "llama": LLAMA,
    "umt5": dataclasses.replace(
        T5,
        positions=RelativeBias(8, 12, per_layer=True),
        tied=True,
        logit_scale=16**-0.5,
        vocab_multiple=8,
    ),
}


def equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape), path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, dtype, tmp_path):
    config = dataclasses.replace(MODELS[name], dtype=dtype)
    _, params = written(tmp_path / "out", config, shard_bytes=3_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = hf.read(tmp_path / "out")
    assert (found.family.model_type, found.vocab_size) == (name, VOCAB)
    assert essence(found.config) == essence(config)
    assert found.config.dtype == dtype
    equal(found.params(config), params)
    unrolled = dataclasses.replace(config, scan=False)
    equal(found.params(unrolled), jax.tree.map(np.asarray, unstacked(params)))
    again = unrolled.build(VOCAB)
    hf.write(tmp_path / "again", again, found.params(unrolled), shard_bytes=3_000)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    padding = found.params()["embedding"]["w"][VOCAB:]
    assert padding.shape[0] == 128 - VOCAB
    assert not padding.any()


def test_types_of_files(tmp_path):
    _, params = written(tmp_path / "half", LLAMA, dtype="bfloat16")
    half = hf.read(tmp_path / "half")
    assert half.config.dtype == "bfloat16"
    full = flatten(half.params(dataclasses.replace(LLAMA, dtype="float32")))
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(full[path], array.astype(jnp.bfloat16).astype(np.float32))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    file = tmp_path / "half" / "model.safetensors"
    write(file, {k: v.astype(np.float16) for k, v in SafeTensors(file).items()})
    assert hf.read(tmp_path / "half").config.dtype == "float32"
    write(file, {k: v.astype(np.int32) for k, v in SafeTensors(file).items()})
    with pytest.raises(DataError, match="is of type int32"):
        hf.read(tmp_path / "half")


def test_low_rank_is_written_dense(tmp_path):
    weights = (("*/mlp/*", LowRank(rank=2)), *LLAMA.weights)
    for scan in (True, False):
        config = dataclasses.replace(LLAMA, weights=weights, scan=scan)
        model = config.build(VOCAB)
        params = params_of(model)
        hf.write(tmp_path / str(scan), model, params)
        found = hf.read(tmp_path / str(scan)).params(dataclasses.replace(LLAMA, scan=scan))
        layers = found["decoder"]["layers"] if scan else found["decoder"]["layers_1"]
        own = params["decoder"]["layers"] if scan else params["decoder"]["layers_1"]
        up, held = layers["mlp"]["up"]["w"], own["mlp"]["up"]
        product = model.products[f"decoder/layers{'' if scan else '_1'}/mlp/up"]
        held = jax.tree.map(lambda x, s=scan: x[1] if s else x, held)
        np.testing.assert_array_equal(up[1] if scan else up, product.module(held).dense())
        query = own["attention"]["query"]["w"]
        np.testing.assert_array_equal(layers["attention"]["query"]["w"], query)


@pytest.mark.parametrize("scan", [True, False])
def test_factors_are_kept_on_request(scan, tmp_path):
    weights = (
        ("*/mlp/*", LowRank(rank=2)),
        ("*/query", LoRA(rank=3)),
        ("*/key", SparsePlusLowRank(rank=2)),
        ("lm_head", LowRank(rank=2)),
        *LLAMA.weights,
    )
    model = dataclasses.replace(LLAMA, weights=weights, scan=scan).build(VOCAB)
    params = params_of(model)
    params["lm_head"]["b"][:, VOCAB:] = 0
    hf.write(tmp_path / "out", model, params, keep_factors=True)
    found = hf.read(tmp_path / "out")
    assert found.config.weights == weights
    equal(found.params(model.config), params)
    names = SafeTensors(tmp_path / "out" / "factors.safetensors").keys()
    assert {"decoder/layers_1/mlp/up/a", "lm_head/b"} <= names
    if scan:
        (tmp_path / "out" / "factors.safetensors").unlink()
        dense = hf.read(tmp_path / "out")
        assert dense.config.weights == LLAMA.weights
        assert "w" in dense.params()["lm_head"]
    else:
        file = tmp_path / "out" / "factors.safetensors"
        held = SafeTensors(file)
        changed = {n: np.array(x[:1] if n.endswith("up/a") else x) for n, x in held.items()}
        write(file, changed, held.metadata)
        with pytest.raises(DataError, match=r"up/a \(1, 2\), which is \(16, 2\) in the model"):
            hf.read(tmp_path / "out")
        write(file, changed, {"weights": "nonsense"})
        with pytest.raises(DataError, match=r"factors\.safetensors: config\.json: is no JSON"):
            hf.read(tmp_path / "out")


def test_published_models_have_a_family():
    for preset, (size, _) in PUBLISHED.items():
        family, config = hf.choose(preset(), size)
        name = preset.__name__.split("_")[0].replace("ul2", "t5")
        assert family.model_type == name
        assert config["vocab_size"] == size
        assert hf.choose(preset(), size, name)[1] == config


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (T5, {"logit_softcap": 3.0}, r"model: .*t5 cannot have 3\.0"),
        (T5, {"placement": "sandwich"}, "placement"),
        (BERT, {"parallel": True}, "parallel"),
        (LLAMA, {"inner_positions": 4}, "inner_positions"),
        (LLAMA, {"attention": dataclasses.replace(LLAMA.attention, softcap=2.0)}, "softcap"),
    ],
)
def test_what_transformers_has_not_is_named(base, changes, said, tmp_path):
    model = dataclasses.replace(base, **changes).build(VOCAB)
    with pytest.raises(ConfigError, match=said):
        hf.write(tmp_path / "out", model, {})
    assert not list(tmp_path.iterdir())


def test_other_choices_that_cannot_be(tmp_path):
    model = LLAMA.build(VOCAB)
    params = params_of(model)
    for options, said in [
        ({"family": "gtp2"}, "family: 'gtp2' is unknown"),
        ({"family": "t5"}, "model.kind: t5 cannot have 'decoder', only 'encoder_decoder'"),
        ({"dtype": "int8"}, "dtype"),
    ]:
        with pytest.raises(ConfigError, match=said):
            hf.write(tmp_path / "out", model, params, **options)
    several = Electra(generator=BERT, discriminator=BERT).build(VOCAB)
    with pytest.raises(ConfigError, match="Electra is of several networks"):
        hf.write(tmp_path / "out", several, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        hf.write(tmp_path / "out", model, params)


TABLES = "shared.weight", "encoder.embed_tokens.weight"


def config_with(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_mystery": 3}, "rope_mystery"),
        ({"model_type": "gpt_neox"}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"architectures": ["T5EncoderModel"]}, "architectures"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"d_model": True}, "d_model"),
        ({"d_model": 16.5}, "d_model"),
        ({"d_model": 0}, "d_model"),
        ({"feed_forward_proj": "gated-mystery"}, "feed_forward_proj"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder"),
    ],
)
def test_fields_are_understood_or_refused_by_name(changes, field, tmp_path):
    written(tmp_path / "a")
    config_with(tmp_path / "a", **changes)
    with pytest.raises(ConfigError) as error:
        hf.read(tmp_path / "a")
    assert error.value.field == field


def test_harmless_fields_are_read_over(tmp_path):
    written(tmp_path / "a")
    config_with(tmp_path / "a", task_specific_params={}, n_positions=512, use_cache=False)
    assert essence(hf.read(tmp_path / "a").config) == essence(T5)
    assert all(reason for family in FAMILIES.values() for reason in family.harmless.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("lm_head.weight"), "no tensor lm_head.weight"),
        (lambda a: a.update(more=a["lm_head.weight"]), "more has no place in a model of type t5"),
        (
            lambda a: a.update({"lm_head.weight": a["lm_head.weight"].T}),
            r"lm_head.weight \(16, 31\)",
        ),
        (
            lambda a: a.update(dict.fromkeys([*TABLES], a["shared.weight"][:-1])),
            r"shared.weight \(30, 16",
        ),
        (
            lambda a: a.update({"encoder.embed_tokens.weight": a["shared.weight"] + 1}),
            "encoder.embed_tokens.weight differs from shared.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, said, tmp_path):
    written(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    arrays = {name: np.array(array) for name, array in SafeTensors(file).items()}
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    write(file, arrays)
    hf.read(tmp_path / "a")
    change(arrays)
    write(file, arrays)
    with pytest.raises(DataError, match=said):
        hf.read(tmp_path / "a")


def test_a_half_written_export_does_not_look_complete(tmp_path, monkeypatch):
    out = tmp_path / "out"
    wrote = shards.write

    def full(path, arrays, metadata=None):
        wrote(path, arrays, metadata)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(OSError, match="No space"):
        written(out)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    order = []
    monkeypatch.setattr(hf, "write_json", lambda p, v: order.append((p.name, out.exists())))
    written(out)
    assert order == [("generation_config.json", False), ("config.json", False)]


def test_special_ids(tmp_path):
    _, params = with_tokenizer(tmp_path / "a")
    tokenizer = Pretrained(path=str(tmp_path / "a")).build()
    config, generation = (
        json.loads((tmp_path / "a" / name).read_text())
        for name in ("config.json", "generation_config.json")
    )
    ids = {
        f"{role}_token_id": getattr(tokenizer.vocabulary, role) for role in ("pad", "eos", "bos")
    }
    assert generation == ids
    assert config.items() >= ids.items()
    assert len(params["embedding"]["w"]) >= config["vocab_size"] == tokenizer.vocabulary.size
    two = dataclasses.replace(BERT, positions=dataclasses.replace(BERT.positions, offset=3))
    with pytest.raises(ConfigError, match="pad_token_id is 0, and the model can only have 2"):
        with_tokenizer(tmp_path / "b", two)
    assert not (tmp_path / "b").exists()
