"""What masks cost: updates of masks, and steps of masked matrices beside dense ones.

    python -m experiments.mask_overhead [--rounds 5] [--peer-python PYTHON]

PYTHON is an interpreter that can import jaxpruner (its source calls ``jax.tree_map``, which JAX has
dropped: it is given that name). Both choose masks for one tree of matrices, from the same numbers:
the largest quarter by magnitude; SET's and RigL's exchange of 30% of a quarter. What is compared is
the new masks (of SET the growth scores are the same numbers, too) and the time of an update; then,
at an update every ``--every`` steps, what masks add to a step: ours unpacks bits where a matrix is
used, jaxpruner multiplies all parameters by masks of a byte after each step, and RigL's gradients
of all entries are a pass of their own at ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from rich.table import Table

from experiments.outcomes import stepper
from experiments.sparse_benchmark import BASE, held
from jaxpt.sparsity import Seen
from jaxpt.sparsity.exchange import exchanged
from jaxpt.weights import Dense, Masked
from kernels.timing import interleaved

SHAPES = {"query": (512, 512), "out": (512, 512), "up": (512, 1376), "down": (1376, 512)}
DENSITY, DROP = 0.25, 0.3
METHODS = ("magnitude", "set", "rigl")
PEER = """
import json, sys, time
import numpy as np, jax, jax.numpy as jnp
jax.tree_map = jax.tree.map
import jaxpruner
from jaxpruner.algorithms import pruners, sparse_trainers
data, rounds = np.load(sys.argv[1]), int(sys.argv[2])
names = sorted({n.split("/")[1] for n in data.files})
tree = lambda kind: {n: jnp.asarray(data[f"{kind}/{n}"]) for n in names}
params, grads, masks, words = (tree(k) for k in ("w", "g", "mask", "words"))
masks = {n: m.astype(jnp.uint8) for n, m in masks.items()}
sparsities = {n: 0.75 for n in names}
magnitude = pruners.MagnitudePruning()
trainer = sparse_trainers.RigL(drop_fraction_fn=lambda _: 0.3)
def by_magnitude(params, grads, masks, words):
    return magnitude.create_masks(magnitude.calculate_scores(params), sparsities)
def exchange(grow, params, masks):
    return {n: trainer._update_masks(masks[n], jnp.abs(params[n]), grow[n], 0.3) for n in names}
def by_set(params, grads, masks, words):
    return exchange(words, params, masks)
def by_rigl(params, grads, masks, words):
    return exchange({n: jnp.abs(g) for n, g in grads.items()}, params, masks)
def applied(params, grads, masks, words):
    return magnitude.apply_masks(params, masks)
found, out = {}, {}
all_of = {"magnitude": by_magnitude, "set": by_set, "rigl": by_rigl, "apply": applied}
for name, f in all_of.items():
    f = jax.jit(f)
    result = jax.block_until_ready(f(params, grads, masks, words))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(f(params, grads, masks, words))
        seconds.append(time.perf_counter() - began)
    found[name] = seconds
    if name != "apply":
        out |= {f"{name}/{n}": np.asarray(m) for n, m in result.items()}
np.savez(sys.argv[3], **out)
print(json.dumps({"seconds": found, "version": jax.__version__}))
"""


def numbers() -> dict[str, dict[str, np.ndarray]]:
    """Matrices, gradients, masks of a quarter and random growth scores, by kind and name."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, np.ndarray]] = {"w": {}, "g": {}, "mask": {}, "words": {}}
    for name, shape in SHAPES.items():
        for kind in ("w", "g"):
            found[kind][name] = rng.normal(size=shape).astype(np.float32)
        order = rng.permutation(np.prod(shape))
        found["mask"][name] = (order < DENSITY * order.size).reshape(shape)
        found["words"][name] = rng.random(shape, np.float32)
    return found


def ours() -> dict[str, Callable[..., dict[str, jax.Array]]]:
    """Method -> (matrices, gradients, masks, growth scores) -> new masks, by name."""

    def see(w, mask):
        keys = jax.random.split(jax.random.key(0), 1)
        held = jnp.where(mask, w, 0)[None]
        return Seen(Masked(DENSITY), w.shape, mask[None], held, {}, keys)

    def magnitude(w, g, mask, words):
        pattern = Masked().pattern
        return {n: pattern.top(jnp.abs(x), pattern.count(DENSITY, *x.shape)) for n, x in w.items()}

    def exchange(w, mask, growth):
        seen = {n: see(w[n], mask[n]) for n in w}
        drop = jnp.float32(DROP)
        return {n: exchanged(s, s.support, drop, growth[n][None])[0] for n, s in seen.items()}

    return {
        "magnitude": magnitude,
        "set": lambda w, g, mask, words: exchange(w, mask, words),
        "rigl": lambda w, g, mask, words: exchange(w, mask, {n: jnp.abs(x) for n, x in g.items()}),
    }


def timed(function: Callable, arguments: tuple, rounds: int) -> tuple[Any, list[float]]:
    """(what a jitted function gives, seconds of each call)."""
    function = jax.jit(function)
    result, seconds = jax.block_until_ready(function(*arguments)), []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return result, seconds


def peer(python: str, data: dict[str, dict[str, np.ndarray]], rounds: int):
    """(seconds of each, new masks by method and name) of jaxpruner."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npz"
        flat = {f"{kind}/{n}": x for kind, each in data.items() for n, x in each.items()}
        np.savez(given, **flat)  # pyright: ignore[reportArgumentType]
        command = [python, "-c", PEER, str(given), str(rounds), str(made)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with np.load(made) as masks:
            return json.loads(output.splitlines()[-1])["seconds"], dict(masks)


def steps(rounds: int, seconds: float) -> dict[str, float]:
    """Seconds of a train step with dense and with masked matrices, in turns."""
    calls = {}
    for name, weight in (("dense", Dense()), ("masked", Masked(DENSITY))):
        run = dataclasses.replace(BASE, model=held(BASE, weight))
        calls[name] = stepper(run)[0]
    found = interleaved(calls, rounds=rounds, round_seconds=seconds)
    return {name: timing.seconds for name, timing in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer-python", help="an interpreter that can import jaxpruner")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-seconds", type=float, default=3.0, help="of steps, each kind")
    parser.add_argument("--every", type=int, default=100, help="steps between updates of masks")
    options = parser.parse_args()
    data = numbers()
    arguments = tuple(data[kind] for kind in ("w", "g", "mask", "words"))
    theirs, masks = (
        peer(options.peer_python, data, options.rounds) if options.peer_python else ({}, {})
    )
    table = Table(title=f"milliseconds; {sum(a * b for a, b in SHAPES.values()):,} entries")
    for column in ("update of masks", "jaxpt", "jaxpruner", "masks that differ"):
        table.add_column(column, justify="left" if column.startswith("update") else "right")
    for name, function in ours().items():
        result, seconds = timed(function, arguments, options.rounds)
        differ = (
            sum(int(np.sum(np.asarray(m) != (masks[f"{name}/{n}"] > 0))) for n, m in result.items())
            if masks
            else ""
        )
        table.add_row(name, _ms(seconds), _ms(theirs.get(name, [])), str(differ))
    table.add_row("masks applied to parameters, each step", "", _ms(theirs.get("apply", [])), "")
    console = rich.console.Console()
    console.print(table)
    found = steps(options.rounds, options.round_seconds)
    more = found["masked"] - found["dense"]
    console.print(
        f"a train step: dense {1e3 * found['dense']:.1f} ms, masked {1e3 * found['masked']:.1f} "
        f"({more / found['dense']:+.1%}); a pass for RigL's gradients every {options.every} steps "
        f"adds {1 / options.every:.1%} at most"
    )


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}" if seconds else ""


if __name__ == "__main__":
    sys.exit(main())
