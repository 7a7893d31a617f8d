"""Parameters that are gathered for their use, once, and whose gradients are scattered."""

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import derive

from jaxpt.gather import gathering, in_use
from jaxpt.hlo import Collective, traffic
from jaxpt.mesh import Mesh, single


def test_a_matrix_is_gathered_once():
    """For its product and both of the backward pass's, the first of them made again; its gradient
    is that of one device. Outside of what is made again nothing is gathered."""
    w, x = (jax.random.normal(jax.random.key(i), (16, 16)) for i in (0, 1))

    @jax.checkpoint
    def layer(w, x):
        with gathering():
            return jnp.tanh(x @ in_use(w, ("embed", "mlp"), x.dtype))

    def value(w, x):
        return jnp.sum(layer(w, jnp.sin(x)))

    layout = Mesh(data=2, fsdp=4).build()
    lies, rows = layout.sharding(("embed", "mlp")), layout.sharding(("batch", None))
    with layout.active():
        jitted = jax.jit(jax.grad(value), in_shardings=(lies, rows), out_shardings=lies)
        compiled = jitted.lower(w, x).compile()
        assert in_use(w, ("embed", "mlp"), jnp.float32) is w
    found = traffic(compiled.as_text(), dict(layout.mesh.shape)).collectives
    gathers = [each for each in found if each.kind == "all-gather"]
    assert gathers == [Collective("all-gather", ("fsdp",), 4, 1, 4 * 16 * 16)]
    with single().active():
        expected = jax.grad(value)(w, x)
        with gathering():
            assert in_use(w, ("embed", "mlp"), jnp.float32) is w
    np.testing.assert_allclose(compiled(w, x), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_layers_are_in_the_type_of_the_products():
    """Stacked, and so the copies of the parameters that layers are given, where these are cut."""
    config = derive(remat="full", compute="bfloat16")
    model = config.build(64)
    params, batch = model.abstract(), {"tokens": jax.ShapeDtypeStruct((8, 8), jnp.int32)}

    def value(params, batch):
        return jnp.sum(model.bind(params)(batch).astype(jnp.float32))

    def stacked(layout):
        with layout.active():
            text = str(jax.make_jaxpr(jax.grad(value))(params, batch))
        shape = ",".join(map(str, model.tensors["decoder/layers/mlp/up/w"].shape))
        return f"bf16[{shape}]" in text

    assert stacked(Mesh(data=2, fsdp=4).build())
    assert not stacked(single())


def test_a_forward_pass_keeps_no_copy_of_parameters():
    """Of layers that are computed again: their inputs alone, [L, B, T, D]."""
    model = derive(remat="full", layers=6).build(64)
    batch = {"tokens": jax.ShapeDtypeStruct((8, 8), jnp.int32)}
    with single().active():
        value = jax.grad(lambda params, batch: jnp.sum(model.bind(params)(batch)))
        traced = jax.make_jaxpr(value)(model.abstract(), batch)
    forward = next(e for e in traced.eqns if e.primitive.name == "scan")
    assert [v.aval.shape for v in forward.outvars if v.aval.shape[:1] == (6,)] == [(6, 8, 8, 16)]
