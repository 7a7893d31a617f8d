"""What the tests against transformers share. They need the extra ``parity``; without it each of
them is skipped, by name."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.interop import hf
from jaxpt.mesh import single
from jaxpt.models import Model
from jaxpt.models.stack import watched
from jaxpt.state import flatten

HAVE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_transformers = pytest.mark.skipif(not HAVE, reason="needs pip install 'jaxpt[parity]'")
LENGTHS = (7, 4)  # tokens of the two examples
STACKS = ("encoder", "decoder")
TOLERANCE = 1e-4  # of the largest difference, relative to the root mean square


def torch_model(cls: str, config, seed: int = 0):
    """A model of transformers in which no bias is zero and no scale is one."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(
                    ("norm" in name.lower() and "bias" not in name) + 0.3 * torch.randn(p.shape)
                )
            else:
                p.copy_(torch.randn(p.shape) * (1.5 / p.shape[-1] ** 0.5))
    return model


def examples(vocab: int, lengths=LENGTHS, seed: int = 0, low: int = 3) -> list[np.ndarray]:
    """Token ids of each example, none of them a special one."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, vocab, n) for n in lengths]


def padded(rows: list[np.ndarray], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [B, T]: each example in a row of its own."""
    width = max(map(len, rows))
    tokens = np.stack([np.pad(r, (0, width - len(r)), constant_values=pad) for r in rows])
    return tokens, np.stack([np.arange(width) < len(r) for r in rows]).astype(np.int64)


def packed(rows: list[np.ndarray], name: str = "") -> dict[str, jax.Array]:
    """All examples in one row, with a token of padding at its end."""
    tokens = np.concatenate([*rows, [0]])
    segments = np.concatenate([np.full(len(r), i + 1) for i, r in enumerate(rows)] + [[0]])
    positions = np.concatenate([np.arange(len(r)) for r in rows] + [[0]])
    start = f"{name}_" if name else ""
    found = {"inputs" if name else "tokens": tokens, f"{start}segments": segments}
    return as_batch(found | {f"{start}positions": positions})


def padded_batch(rows: list[np.ndarray], inputs: list[np.ndarray] | None, pad: int):
    """Each example in a row of its own."""
    tokens, mask = padded(rows, pad)
    batch = as_batch({"tokens": tokens, "segments": mask})
    if inputs is not None:
        tokens, mask = padded(inputs, pad)
        batch |= as_batch({"inputs": tokens, "input_segments": mask})
    return batch


def as_batch(arrays: dict) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v, jnp.int32).reshape(-1, np.shape(v)[-1]) for k, v in arrays.items()}


def logits(model, params, batch) -> np.ndarray:
    """Ours, float32 [B, T, V]."""

    @jax.jit
    def forward(params, batch):
        network = model.bind(params)
        return network.logits(network(batch))

    with single().active(), jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, batch))


def run_theirs(model, rows: list[np.ndarray], inputs, pad: int, **options):
    """What transformers returns for padded examples."""
    import torch

    tokens, mask = padded(rows, pad)
    given = {"input_ids": tokens, "attention_mask": mask}
    if inputs is not None:
        given = {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        given |= dict(zip(("input_ids", "attention_mask"), padded(inputs, pad), strict=True))
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in given.items()}, **options)


def theirs(model, rows: list[np.ndarray], inputs: list[np.ndarray] | None = None, pad: int = 0):
    """Logits of transformers, padded: one array [T, V] an example."""
    found = run_theirs(model, rows, inputs, pad).logits.numpy()
    return [x[: len(row)] for x, row in zip(found, rows, strict=True)]


def layers_apart(theirs_model, read: hf.Pretrained, rows, inputs, pad: int) -> str:
    """How far hidden states are apart after each layer (or period of windows) of each stack,
    relative to their root mean square; but after the last, where transformers has the final
    norm's output."""
    found = run_theirs(theirs_model, rows, inputs, pad, output_hidden_states=True)
    config = dataclasses.replace(read.config, scan=False)
    model = Model(config, read.vocab_size)

    @jax.jit
    def forward(params, batch):
        with watched() as outputs:
            model.bind(params)(batch)
        return outputs

    with single().active():
        outputs = forward(read.params(config), padded_batch(rows, inputs, pad))
    names = ("hidden_states",) if inputs is None else (f"{n}_hidden_states" for n in STACKS)
    said = []
    for name, ours in zip(names, outputs, strict=True):
        real = padded(inputs if name.startswith("encoder") else rows)[1] == 1
        each = max(len(config.attention.window), 1)  # of these layers one is shown
        pairs = zip(ours[:-1], found[name][each:-1:each], strict=True)
        near = [(np.asarray(a)[real], b.numpy()[real]) for a, b in pairs]
        apart = [f"{np.abs(a - b).max() / np.sqrt(np.mean(b**2)):.0e}" for a, b in near]
        said.append(f"{name}, apart after each layer but the last: {', '.join(apart)}")
    return "\n".join(said)


def assert_near(ours, wanted) -> None:
    rms = np.sqrt(np.mean(np.square(wanted)))
    assert rms > 1e-3, "nothing to compare"
    assert np.abs(ours - wanted).max() <= TOLERANCE * rms


def prove(folder, theirs_model, *, family: str | None = None, lengths=LENGTHS, pad: int = 0):
    """Their model read here gives their logits, padded and packed; written again it loads in
    transformers without a missing or unexpected name and gives the same logits; and read again it
    is the same, bit for bit. Returns (what was read, config.json as written)."""
    theirs_model.save_pretrained(folder / "theirs")
    read = hf.read(folder / "theirs")
    model, params = read.model(), read.params()
    both = read.config.kind == "encoder_decoder"
    rows = examples(read.vocab_size, lengths)
    inputs = examples(read.vocab_size, lengths[::-1], seed=1) if both else None
    wanted = theirs(theirs_model, rows, inputs, pad)
    try:
        _check_padded(model, params, rows, inputs, wanted, pad)
    except AssertionError as error:
        where = layers_apart(theirs_model, read, rows, inputs, pad)
        raise AssertionError(f"{error}\n{where}") from error
    _check_packed(model, params, rows, inputs, wanted)
    out = folder / "ours"
    hf.write(out, model, params, family=family)
    again, info = type(theirs_model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    for ours, there in zip(theirs(again.eval(), rows, inputs, pad), wanted, strict=True):
        assert_near(ours, there)
    back = hf.read(out)
    assert back.config == read.config
    for path, array in flatten(back.params()).items():
        was = flatten(params)[path]
        assert array.dtype == was.dtype
        assert array.tobytes() == was.tobytes(), path
    return read, json.loads((out / "config.json").read_text())


def _check_padded(model, params, rows, inputs, wanted, pad) -> None:
    batch = padded_batch(rows, inputs, pad)
    for ours, there in zip(logits(model, params, batch), wanted, strict=True):
        assert_near(ours[: len(there)], there)


def _check_packed(model, params, rows, inputs, wanted) -> None:
    batch = packed(rows)
    if inputs is not None:
        batch |= packed(inputs, "input")
    (ours,) = logits(model, params, batch)
    at = 0
    for there in wanted:
        assert_near(ours[at : at + len(there)], there)
        at += len(there)
