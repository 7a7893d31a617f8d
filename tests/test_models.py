"""The Transformer's values: against a float64 numpy forward pass, and who sees whom."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import POSITIONS, VOCAB, derive, drawn, make_batch, perturbed, states

from jaxpt.mesh import single
from jaxpt.models import MLP, ALiBi, Attention, LayerNorm, Learned, RMSNorm, Rotary
from jaxpt.state import flatten


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


# --- an independent forward pass --------------------------------------------------------------


class Numpy:
    """A decoder in float64, row by row and head by head, from unrolled parameters."""

    def __init__(self, config, params):
        self.config = config
        self.p = {k: np.asarray(v, np.float64) for k, v in flatten(params).items()}

    def norm(self, at, x):
        scale, kind = self.p[f"{at}/scale"], self.config.norm
        if isinstance(kind, RMSNorm):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + kind.epsilon) * scale
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + kind.epsilon) * scale + self.p.get(f"{at}/bias", 0)

    def project(self, at, x):
        return x @ self.p[f"{at}/w"] + self.p.get(f"{at}_bias", 0)

    def mlp(self, at, x):
        c = self.config.mlp
        erf = np.vectorize(math.erf)
        act = {
            "relu": lambda x: np.maximum(x, 0),
            "relu2": lambda x: np.maximum(x, 0) ** 2,
            "silu": lambda x: x / (1 + np.exp(-x)),
            "gelu": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
            "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
        }[c.activation]  # fmt: skip
        up = self.project(f"{at}/up", x)
        hidden = act(self.project(f"{at}/gate", x)) * up if c.gated else act(up)
        return self.project(f"{at}/down", hidden)

    def rotate(self, x, positions, window):
        rotary = self.config.positions
        base = rotary.local_base if window and rotary.local_base else rotary.base
        half = int(x.shape[-1] * rotary.fraction) // 2
        angle = positions[:, None] * base ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)

    def attention(self, at, x, source, see, positions, window=None):
        """x [T, D], source [S, D], see [T, S]."""
        c, rotary = self.config.attention, isinstance(self.config.positions, Rotary)
        width, heads, kv = self.config.head_dim, c.heads, c.kv_heads or c.heads
        q, k, v = (
            self.project(f"{at}/{name}", y)
            for name, y in (("query", x), ("key", source), ("value", source))
        )
        if c.qk_norm_whole:
            q, k = self.norm(f"{at}/query_norm", q), self.norm(f"{at}/key_norm", k)
        q, k, v = (y.reshape(len(y), -1, width) for y in (q, k, v))
        out = np.zeros((len(x), heads, width))
        distance = np.arange(len(source))[None] - np.arange(len(x))[:, None]
        for n in range(heads):
            g = n // (heads // kv)
            qn, kn, vn = q[:, n], k[:, g], v[:, g]
            if c.qk_norm and not c.qk_norm_whole:
                qn, kn = self.norm(f"{at}/query_norm", qn), self.norm(f"{at}/key_norm", kn)
            if rotary and positions is not None:
                qn, kn = (self.rotate(y, positions, window) for y in (qn, kn))
            s = qn @ kn.T * (width**-0.5 if c.scale is None else c.scale)
            if c.softcap:
                s = c.softcap * np.tanh(s / c.softcap)
            if isinstance(self.config.positions, ALiBi) and positions is not None:
                s = s - 2.0 ** (-8 * (n + 1) / heads) * abs(distance)
            ok = see & (abs(distance) < window) if window else see
            s = np.where(ok, s, -np.inf)
            p = np.exp(s - np.where(ok.any(1), s.max(1), 0)[:, None])
            p = p / np.where(ok.any(1), p.sum(1), 1)[:, None]
            out[:, n] = p @ vn
        return self.project(f"{at}/out", out.reshape(len(x), -1))

    def residual(self, at, x, f):
        placement = self.config.placement
        if placement == "post":
            return self.norm(f"{at}_norm", x + f(x))
        if placement == "sandwich":
            return x + self.norm(f"{at}_norm_after", f(self.norm(f"{at}_norm_before", x)))
        if placement == "after":
            return x + self.norm(f"{at}_norm", f(x))
        if not self.config.first_norm and at == "decoder/layers_0/attention":
            return x + f(x)
        return x + f(self.norm(f"{at}_norm", x))

    def row(self, tokens, segments, positions, prefix):
        """Hidden states [T, D] of one row of a decoder."""
        c = self.config
        x = self.p["embedding/w"][tokens] * (math.sqrt(c.width) if c.scale_embeddings else 1)
        if c.token_types:
            x = x + self.p["token_types/w"][0]
        both_ways = c.embedding_projection == "in_and_out"
        if both_ways:
            x = x @ self.p["decoder/embedding_projection/w"]
        if isinstance(c.positions, Learned):
            x = x + self.p["decoder/positions/w"][positions + c.positions.offset]
        if c.embedding_norm:
            x = self.norm("decoder/embedding_norm", x)
        order = np.arange(len(tokens))
        see = (order[None] <= order[:, None]) | (prefix[None] == 1)
        see &= (segments[:, None] == segments[None]) & (segments[None] != 0)
        for i in range(c.layers):
            at = f"decoder/layers_{i}"
            window = c.attention.window[i % len(c.attention.window)] if c.attention.window else None

            def attend(x, at=at, window=window):
                return self.attention(f"{at}/attention", x, x, see, positions, window)

            def mlp(x, at=at):
                return self.mlp(f"{at}/mlp", x)

            if c.parallel_norms:
                x = self.residual(f"{at}/attention", x, attend) + (
                    self.residual(f"{at}/mlp", x, mlp) - x
                )
            elif c.parallel:
                x = self.residual(f"{at}/branches", x, lambda x, f=attend, g=mlp: f(x) + g(x))
            else:
                x = self.residual(f"{at}/attention", x, attend)
                x = self.residual(f"{at}/mlp", x, mlp)
        x = self.norm("decoder/final_norm", x) if c.has_final_norm else x
        if both_ways:
            return x @ self.p["output_projection/w"]
        if c.head_transform:
            y = self.project("transform", x)
            erf = np.vectorize(math.erf)
            x = self.norm("transform_norm", y / 2 * (1 + erf(y / math.sqrt(2))))
        return x

    def logits(self, x):
        w = self.p["embedding/w"].T if self.config.tied else self.p["lm_head/w"]
        y = x @ w * self.config.logit_scale + self.p.get("lm_head_bias", 0)
        cap = self.config.logit_softcap
        return cap * np.tanh(y / cap) if cap else y


VARIANTS = {
    "plain": {},
    "post": {"placement": "post", "norm": LayerNorm(), "embedding_norm": True},
    "sandwich": {"placement": "sandwich", "norm": LayerNorm(bias=False)},
    "parallel": {"parallel": True, "placement": "sandwich"},
    "grouped": {"attention": Attention(heads=4, kv_heads=2, qk_norm=True, head_dim=6, softcap=1.0)},
    "OLMo 2's": {"placement": "after",
                 "attention": Attention(heads=4, kv_heads=2, qk_norm=True, qk_norm_whole=True)},
    "Falcon's": {"parallel": True, "parallel_norms": True, "norm": LayerNorm(),
                 "attention": Attention(heads=4, kv_heads=1)},
    "OPT's": {"embedding_width": 10, "embedding_projection": "in_and_out", "tied": True,
              "positions": Learned(16, offset=2), "placement": "post", "norm": LayerNorm()},
    "Qwen 2's": {"attention": Attention(heads=4, bias=True, out_bias=False)},
    "partial rotary": {"attention": Attention(heads=2), "positions": Rotary(100.0, fraction=0.75)},
    "window": {"attention": Attention(heads=4, window=(2, None), bias=True, scale=0.7)},
    "relu2 with biases": {"mlp": MLP(width=24, activation="relu2", bias=True)},
    "gated silu": {"mlp": MLP(activation="silu", gated=True)},
    "gated relu": {"mlp": MLP(width=24, activation="relu", gated=True, bias=True)},
    "alibi": {"positions": ALiBi(), "logit_softcap": 3.0, "final_norm": False},
    "learned": {"positions": Learned(16, offset=2), "scale_embeddings": True, "logit_scale": 0.3},
    "BERT's head": {"tied": True, "output_bias": True, "head_transform": True, "token_types": 2,
                    "mlp": MLP(width=24, activation="gelu")},
    "ModernBERT's": {"positions": Rotary(100.0, local_base=7.0), "norm": LayerNorm(bias=False),
                     "attention": Attention(heads=4, window=(None, 4)), "first_norm": False,
                     "tied": True, "head_transform": True, "head_transform_bias": False,
                     "mlp": MLP(width=24, activation="gelu")},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_values_against_numpy(name):
    config = derive(scan=False, **VARIANTS[name])
    model = config.build(VOCAB)
    params = perturbed(model)
    batch = make_batch()
    batch["prefix"] = batch["prefix"].at[:, 2:5].set(1)

    def run(params, batch):
        network = model.bind(params)
        x = network(batch)
        return x, network.logits(x)

    x, logits = jax.jit(run)(params, batch)
    assert logits.dtype == jnp.float32
    numpy = Numpy(config, params)
    for b in range(2):
        row = [np.asarray(batch[k][b]) for k in ("tokens", "segments", "positions", "prefix")]
        want = numpy.row(*row)
        real = row[1] != 0
        np.testing.assert_allclose(x[b][real], want[real], atol=2e-4)
        np.testing.assert_allclose(logits[b][real], numpy.logits(want)[real], atol=5e-4)


# --- who sees whom ----------------------------------------------------------------------------


def influence(config, batch, stream="tokens"):
    """[B, T, S]: whether output t changes where token s of ``stream`` does."""
    model = config.build(VOCAB)
    params = drawn(model)
    base = states(model, params, batch)
    tokens = batch[stream]
    changed = jnp.stack([tokens.at[:, s].add(1) % VOCAB for s in range(tokens.shape[1])])
    run = jax.jit(jax.vmap(lambda tokens: model.bind(params)(batch | {stream: tokens})))
    return np.moveaxis(np.abs(run(changed) - base).max(-1) > 1e-6, 0, -1)


@pytest.mark.parametrize("positions", POSITIONS)
def test_decoder_sees_its_past_its_prefix_and_its_segment(positions):
    batch = make_batch(8)
    batch["prefix"] = batch["prefix"].at[:, 2:4].set(1)
    got = influence(derive(positions=POSITIONS[positions]), batch)
    segments, prefix = np.asarray(batch["segments"]), np.asarray(batch["prefix"])
    t, s = np.arange(8)[:, None], np.arange(8)[None]
    same = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
    # Two layers: through a prefix token, which sees other prefix tokens.
    one = same & ((s <= t) | (prefix[:, None] == 1))
    want = np.einsum("bts,bsr->btr", one, one) > 0
    real = segments != 0
    np.testing.assert_array_equal(got[real], want[real])


def test_encoder_sees_all_of_its_segment():
    batch = make_batch(8)
    got = influence(derive(kind="encoder"), batch)
    segments = np.asarray(batch["segments"])
    same = segments[:, :, None] == segments[:, None]
    np.testing.assert_array_equal(got[segments != 0], same[segments != 0])


@pytest.mark.smoke
@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_encoder_decoder_sees_the_inputs_of_its_segment(positions):
    config = derive(kind="encoder_decoder", encoder_layers=1, positions=POSITIONS[positions])
    batch = make_batch(6, inputs=9)
    segments, inputs = np.asarray(batch["segments"]), np.asarray(batch["input_segments"])
    got = influence(config, batch, "inputs")
    same = (segments[:, :, None] == inputs[:, None]) & (inputs != 0)[:, None]
    np.testing.assert_array_equal(got[segments != 0], same[segments != 0])
    causal = influence(config, batch, "tokens")
    want = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(causal[segments != 0], want[segments != 0])


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_packed_example_is_as_if_alone(positions):
    config = derive(positions=POSITIONS[positions])
    model = config.build(VOCAB)
    params = perturbed(model)
    batch = make_batch(10)
    row, segments = np.asarray(batch["tokens"][1]), np.asarray(batch["segments"][1])
    packed = states(model, params, batch)[1]
    alone = states(model, params, {"tokens": jnp.asarray(row[segments == 2][None])})[0]
    np.testing.assert_allclose(packed[segments == 2], alone, atol=1e-5)
