"""Files of arrays: there and back, and nothing that a header claims is believed."""

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest

from jaxpt.errors import DataError
from jaxpt.interop.safetensors import DTYPES, SafeTensors, write
from jaxpt.interop.shards import INDEX, SINGLE, Shards, write_shards

RNG = np.random.default_rng(0)
ARRAYS = {
    name: RNG.integers(0, 2 if name == "BOOL" else 100, (3, n + 1)).astype(dtype)
    for n, (name, dtype) in enumerate(DTYPES.items())
} | {"scalar": np.array(3.5, np.float32), "empty": np.zeros((2, 0, 3), np.int64)}


def same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def test_there_and_back(tmp_path):
    path = tmp_path / "a.safetensors"
    turned = ARRAYS | {"turned": ARRAYS["F32"].T}
    write(path, turned, {"format": "pt"})
    found = SafeTensors(path)
    assert found.metadata == {"format": "pt"}
    assert set(found) == set(turned)
    for name, array in turned.items():
        same(found[name], array)
        assert found.shape(name) == array.shape
        assert found.dtype(name) == array.dtype
    assert not found["F32"].flags.writeable
    with pytest.raises(TypeError, match="a: safetensors has no complex64"):
        write(path, {"a": np.zeros(1, np.complex64)})


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs pip install 'jaxpt[parity]'"
)
def test_the_library_reads_ours_and_we_read_its(tmp_path):
    from safetensors import numpy as library

    known = {k: v for k, v in ARRAYS.items() if v.dtype != ml_dtypes.bfloat16}
    write(tmp_path / "ours", known, {"format": "pt"})
    for name, array in library.load_file(tmp_path / "ours").items():
        same(array, known[name])
    library.save_file({k: np.array(v, order="C") for k, v in known.items()}, tmp_path / "its")
    found = SafeTensors(tmp_path / "its")
    assert set(found) == set(known)
    for name in found:
        same(found[name], known[name])


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def forged(header, data=8, length=None, raw=None):
    raw = json.dumps(header).encode() if raw is None else raw
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


def row(**changes):
    return {"a": GOOD["a"] | changes}


TWO = {"a": GOOD["a"], "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
FORGED = {
    "nothing": b"",
    "a short file": b"\0" * 7,
    "a header beyond the file": forged(GOOD, length=10_000),
    "a header of 2^63 bytes": forged(GOOD, length=2**63),
    "no JSON": forged(None, raw=b"{"),
    "no UTF-8": forged(None, raw=b'{"\xff": 1}'),
    "no object": forged([1]),
    "deep JSON": forged(None, raw=b"[" * 100_000),
    "a name twice": forged(None, raw=b'{"a": {}, "a": {}}'),
    "no row": forged({"a": 3}),
    "a field too many": forged(row(more=1)),
    "a field too few": forged({"a": {"dtype": "F32", "shape": [2]}}),
    "a strange type": forged(row(dtype="F7")),
    "a type that is no text": forged(row(dtype=[])),
    "a negative shape": forged(row(shape=[-2])),
    "a shape that is no number": forged(row(shape=[2.0])),
    "a shape of booleans": forged(row(shape=[True, 2])),
    "a huge shape": forged(row(shape=[2**62, 2**62])),
    "offsets beyond the file": forged(row(data_offsets=[8, 16])),
    "negative offsets": forged(row(data_offsets=[-8, 0])),
    "offsets the wrong way round": forged(row(data_offsets=[8, 0])),
    "three offsets": forged(row(data_offsets=[0, 4, 8])),
    "another length": forged(row(shape=[3])),
    "arrays that overlap": forged(TWO, data=12),
    "a hole": forged({"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
    "more data": forged(GOOD, data=9),
    "less data": forged(GOOD, data=7),
    "metadata that is no text": forged(GOOD | {"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers_are_refused(name, tmp_path):
    (tmp_path / "x").write_bytes(FORGED[name])
    with pytest.raises(DataError, match="x: not a sound safetensors file"):
        SafeTensors(tmp_path / "x")


def test_the_good_header_is_not(tmp_path):
    (tmp_path / "x").write_bytes(forged(GOOD))
    same(SafeTensors(tmp_path / "x")["a"], np.zeros(2, np.float32))
    with pytest.raises(DataError, match="nowhere: No such file"):
        SafeTensors(tmp_path / "nowhere")


def test_shards_and_their_index(tmp_path):
    arrays = {f"a{i}": np.full((4,), i, np.float32) for i in range(5)}
    write_shards(tmp_path, arrays.items(), shard_bytes=40)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 80}
    found = Shards(tmp_path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        same(found[name], array)
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", arrays.items())
    assert [p.name for p in (tmp_path / "one").iterdir()] == [SINGLE]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].update(a0="../model"), "no file of this folder"),
        (lambda index: index["weight_map"].update(a0="gone"), "gone: No such file"),
        (lambda index: index["weight_map"].update(b="model-00001-of-00002.safetensors"), "lacks b"),
        (lambda index: index["weight_map"].pop("a0"), "has beside what the index says a0"),
    ],
)
def test_an_index_that_lies_is_refused(change, said, tmp_path):
    arrays = {f"a{i}": np.zeros(4, np.float32) for i in range(4)}
    write_shards(tmp_path, arrays.items(), shard_bytes=32)
    index = json.loads((tmp_path / INDEX).read_text())
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match=said):
        Shards(tmp_path)


def test_a_folder_without_arrays(tmp_path):
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        Shards(tmp_path)
