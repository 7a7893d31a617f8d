"""Models whose attention is cut over a mesh: as on one device, and by the kernels."""

import types

import jax
import numpy as np
import pytest
from model_cases import POSITIONS, VOCAB, derive, drawn, make_batch

from jaxpt.mesh import Mesh, single
from jaxpt.models import Attention
from kernels.attention import api
from kernels.platform import compiling_for

CASES = {  # name -> (config, mesh)
    "t5": (
        {"kind": "encoder_decoder", "positions": POSITIONS["relative"]},
        Mesh(data=2, tensor=2, context=2),
    ),
    "grouped heads": (
        {"positions": POSITIONS["alibi"], "attention": Attention(heads=4, kv_heads=2)},
        Mesh(data=2, fsdp=2, tensor=2),
    ),
}


def gradients(model, params, batch, layout):
    with layout.active():
        total = lambda p: (model.bind(p)(batch) ** 2).sum()  # noqa: E731
        return jax.device_get(jax.jit(jax.value_and_grad(total))(params))


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_device(case, monkeypatch):
    changes, mesh = CASES[case]
    model = derive(layers=1, **changes).build(VOCAB)
    params, batch = drawn(model), make_batch(16, 8 if "kind" in changes else None, rows=4)
    cut = []
    inner = api.attention
    monkeypatch.setattr(
        api, "attention", lambda q, *args, **kw: cut.append(q.shape) or inner(q, *args, **kw)
    )
    params, batch = jax.device_get((params, batch))
    got, d_got = gradients(model, params, batch, mesh.build())
    rows, length, heads = (mesh.build().ways(axis) for axis in ("batch", "length", "heads"))
    assert (4 // rows, 16 // length, 4 // heads, 4) in cut, "each device has its own part"
    want, d_want = gradients(model, params, batch, single())
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), d_got, d_want)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels_are_used_over_a_mesh(backend, monkeypatch):
    device = types.SimpleNamespace(
        platform=backend, device_kind="TPU v5 lite", compute_capability="9.0"
    )
    chosen = []
    for name in api.IMPLEMENTATIONS:
        monkeypatch.setitem(
            api.IMPLEMENTATIONS, name, lambda q, *_, name=name, **kw: chosen.append((name, kw)) or q
        )
    model = derive(
        kind="encoder_decoder",
        positions=POSITIONS["relative"],
        attention=Attention(heads=4, head_dim=16),
        dtype="bfloat16",
    ).build(VOCAB)
    batch = make_batch(256, 256, rows=4)
    with Mesh(data=4, tensor=2).build().active(), compiling_for(device, 8):
        params = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(lambda p: model.bind(p)(batch), params)
    assert {name for name, _ in chosen} == {f"pallas_{backend}"}
    # The bias of self-attention is computed inside, from its table.
    assert any(isinstance(kw["bias"], api.RelativeBias) for _, kw in chosen)
    assert not any(isinstance(kw["bias"], jax.Array) for _, kw in chosen)
