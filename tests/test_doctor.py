"""jaxpt doctor: what it knows of bad versions, and that it answers on this machine."""

import json

import pytest

from jaxpt import doctor
from kernels.attention import api as attention
from kernels.block_sparse import api as block_sparse
from kernels.cross_entropy import api as cross_entropy

GOOD = {"jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.12", "grain": "0.2.19"}


@pytest.mark.parametrize(
    ("versions", "platform", "level", "words"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "gpu", "warning", "scatter-add"),
        ({"jax": "0.11.0", "jaxlib": "0.11.0"}, "gpu", "warning", "scatter-add"),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "cpu", "note", "scatter-add"),
        ({"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.12.8"}, "cpu", "error", "flax 0.12.8"),
        ({"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.11.2"}, "gpu", "warning", "cuDNN"),
        ({"jax": "0.6.0", "jaxlib": "0.6.0"}, "cpu", "error", "older"),
        ({"jax": "0.12.0", "jaxlib": "0.11.1"}, "cpu", "error", "belong together"),
        ({"jax": "0.11.1", "jaxlib": "0.11.1"}, "tpu", "note", "SparseCore"),
        ({"libtpu": "0.0.42"}, "tpu", "warning", "libtpu"),
        ({"grain": "0.2.18"}, "cpu", "note", "grain"),
        ({"sentencepiece": "0.2.1"}, "cpu", "error", "sentencepiece"),
    ],
)
def test_known_trouble(versions, platform, level, words):
    found = doctor.known_trouble(GOOD | versions, platform)
    (finding,) = [f for f in found if words in f.what]
    assert finding.level == level
    assert finding.advice


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_good_versions_have_no_findings(platform):
    assert doctor.known_trouble(GOOD | {"libtpu": "0.0.50.1"}, platform) == []
    fixed = {"jax": "0.11.2", "jaxlib": "0.11.2", "sentencepiece": "0.2.3"}
    assert doctor.known_trouble(GOOD | fixed, platform) == []


def test_releases():
    assert doctor.release("0.10.2.dev20") == (0, 10, 2)
    assert doctor.release("0.12.0.1") == (0, 12, 0, 1)
    assert doctor.release(None) == ()


def test_json_tells_the_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a").write_bytes(b"12345")
    status = doctor.main(json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["devices"][0]["kind"] == "cpu"
    assert found["versions"]["jax"]
    assert found["folders"]["jaxpt cache"]["path"] == str(tmp_path / "cache")
    assert found["folders"]["jaxpt cache"]["bytes"] == 5
    assert found["extras"]["test"]
    assert status == any(f["level"] == "error" for f in found["findings"])
    assert set(found["variables"]) <= set(doctor.environment.VARIABLES)


def test_kernels_that_would_be_picked():
    for choice in (attention._chosen, cross_entropy._chosen, block_sparse._logged):
        choice.cache_clear()  # each says a choice once in a process
    assert doctor.kernels() == {
        "attention": "xla: the backend is cpu",
        "cross-entropy": "xla on cpu",
        "block-sparse products": "xla: there is no kernel for cpu",
    }


def test_text_is_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor.environment, "version", lambda package: None)
    monkeypatch.setattr(doctor.environment, "versions", lambda: GOOD | {"sentencepiece": "0.2.1"})
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "error: sentencepiece 0.2.1 crashes" in out
    assert "not installed: tfds, hf, parquet, wandb" in out
    assert "x cpu" in out


def test_a_backend_that_does_not_start_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver\nmore")

    monkeypatch.setattr(doctor.jax, "devices", broken)
    found = doctor.examine()
    assert found["devices"] == []
    assert "no driver" in found["findings"][0]["what"]
    assert found["findings"][0]["level"] == "error"
