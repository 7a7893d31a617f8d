"""SynFlow (Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
synaptic flow", algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.sparsity.at_start import Score

# Where a matrix's output goes to, within its branch of the residual stream: the matrices that stand
# behind it; "turned" where it meets another's output in a score, as queries and keys do.
NEXT = {
    "up": ("down", False),
    "gate": ("down", False),
    "value": ("out", False),
    "query": ("key", True),
    "key": ("query", True),
}


@dataclasses.dataclass(frozen=True)
class SynFlow(Score):
    """|w dR/d|w||, with R the sum over a network's outputs for inputs of ones and weights |w|.

    Norms and softmax, which are not positively homogeneous, have no synaptic flow that is
    conserved. So R is that of each branch of the residual stream by itself, whose input is ones as
    all positions' are alike, without activations:

        feed-forward  1 |up| |down| 1 (and 1 |gate| |down| 1)
        attention     1 |value| |out| 1, and 1 |query| |key|^T 1 of its scores

    keys and values that heads share counted as often as they are used; what else there is (a
    projection to the vocabulary) stands alone, 1 |w| 1. No data is looked at. The density falls in
    ``rounds``, without which whole layers would be lost. (The paper's selection is global.)
    """

    rounds: int = 100  # rounds in which the density falls
    head_dim: int | None = None  # features of a head; needed where heads share keys and values

    def __post_init__(self):
        if self.rounds < 1:
            raise ConfigError("rounds", f"{self.rounds} is not valid; give 1 or more")

    def __call__(self, seen, matrices, slopes):
        sizes = {path: jnp.abs(w.astype(jnp.float32)) for path, w in matrices.items()}
        flows = jax.grad(total)(sizes, self.head_dim)
        return {path: seen[path].pattern.mean(w * flows[path]) for path, w in sizes.items()}


def total(sizes: dict[str, jax.Array], head_dim: int | None = None) -> jax.Array:
    """R, given |w| [L, d_in, d_out] by path."""
    flow, behind = jnp.float32(0), set()
    for path, w in sizes.items():
        parent, _, name = path.rpartition("/")
        following, turned = NEXT.get(name, ("", False))
        other = f"{parent}/{following}"
        if other not in sizes:
            continue
        behind |= {path, other}
        if turned and name == "key":
            continue  # counted with the queries
        into, out = jnp.sum(w, 1), jnp.sum(sizes[other], 1 if turned else 2)
        into, out = _alike(into, out, head_dim)
        flow += jnp.sum(into * out)
    return flow + sum((jnp.sum(w) for path, w in sizes.items() if path not in behind), 0.0)


def _alike(a: jax.Array, b: jax.Array, head_dim: int | None) -> tuple[jax.Array, jax.Array]:
    """[L, n] and [L, m], features of heads: each of the fewer heads as often as it is shared."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return a, b
    if head_dim is None:
        raise ConfigError(
            "score.head_dim", f"heads share keys and values ({n} and {m} features): give it"
        )

    def repeated(x):
        heads = x.reshape(len(x), -1, head_dim)
        return jnp.repeat(heads, max(n, m) // x.shape[1], axis=1).reshape(len(x), -1)

    return (repeated(a), b) if n < m else (a, repeated(b))
