"""The experiment on attention's memory: what it calls plain computes the same, and its runs are
runs."""

import argparse

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_memory
from kernels.attention import RelativeBias, attention


def test_plain_is_the_same_op():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 8)), jnp.float32) for _ in range(3))
    bias = RelativeBias(jnp.asarray(rng.normal(size=(2, 8)), jnp.float32), 6)
    rule = {
        "causal": True,
        "segments": jnp.asarray(np.sort(rng.integers(1, 3, (2, 9)))),
        "prefix": jnp.asarray(rng.integers(0, 2, (2, 9))),
    }
    want = attention(q, k, v, bias=bias, scale=0.5, **rule, implementation="reference")
    rule["kv_segments"] = rule["segments"]
    got = attention_memory.plain(q, k, v, bias=bias, scale=0.5, softcap=None, dropout=None, **rule)
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(NotImplementedError):
        attention_memory.plain(q, k, v, bias=None, scale=0.5, softcap=2.0, dropout=None)


@pytest.mark.parametrize("implementation", attention_memory.IMPLEMENTATIONS)
def test_runs_differ_in_attention_alone(implementation):
    args = argparse.Namespace(
        model="t5_small", batch=4, length=2048, target_length=512, remat="none"
    )
    run = attention_memory.run_of(implementation, args)
    run.validate(1)
    assert run.model.attention.implementation == implementation
    assert run.phases[0].length == 2048
