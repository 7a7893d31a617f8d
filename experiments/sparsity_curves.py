"""One-shot sparsity curves of a trained run: how much of it can be left out at once.

    python -m experiments.sparsity_curves RUN [--step N] [--densities 0.9 0.8 ...] [--json FILE]

Entries of the matrices of the layers (embeddings, norms and the output projection stay) of the
smallest magnitude are set to 0, and the validation loss is measured:

    global     of all matrices together
    layer      of each matrix as many
    N:M        of each N:M group (2:4 and 4:8, at density 1/2)

Essential sparsity is where the curve turns down (Jaiswal et al. 2023, "The Emergence of Essential
Sparsity in Large Pre-trained Models: The Weights that Matter"): it is printed as the greatest
sparsity at which the loss is within ``--tolerance`` nats of the whole model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
from rich.table import Table

from jaxpt.errors import ConfigError
from jaxpt.evaluate import Measure
from jaxpt.evaluation import mean_loss
from jaxpt.files import write_json
from jaxpt.growth import periodic
from jaxpt.growth.periodic import Place
from jaxpt.loading import Loaded, load
from jaxpt.state import Params, flatten, unflatten
from jaxpt.weights import Dense, Entries, Groups
from jaxpt.weights.selection import top_of_all

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SCHEMES = ("global", "layer", "2:4", "4:8")


def matrices_of(model: Any) -> list[Place]:
    """The layers' dense matrices. Raises ConfigError where there are none."""

    def wanted(product):
        return isinstance(product.weight, Dense)

    found = [p for p in periodic.weights(model, wanted) if "lm_head" not in p.path]
    if not found:
        raise ConfigError("RUN", "the model has no matrix that is held as Dense")
    return found


def pruned(model: Any, params: Params, scheme: str, density: float) -> Params:
    """The parameters with the smallest entries of the layers' matrices set to 0.

    Args:
      scheme: of ``SCHEMES``; with N:M the density is N / M.
    """
    flat = flatten(params)
    places = {f"{place.path}/w": place for place in matrices_of(model)}
    sizes: dict[str, jax.Array] = {p: jnp.abs(flat[p].astype(jnp.float32)) for p in places}
    if scheme == "global":
        units = sum(x.size for x in sizes.values())
        kept: Mapping[str, jax.Array] = top_of_all(sizes, int(density * units + 0.5))
    else:
        pattern = Entries() if scheme == "layer" else Groups(int(scheme.partition(":")[2]))
        kept = {}
        for path, x in sizes.items():
            d_in, d_out = x.shape[-2:]
            support = pattern.top(pattern.mean(x), pattern.count(density, d_in, d_out))
            kept[path] = pattern.spread(support, d_in, d_out)
    return unflatten(flat | {path: jnp.where(mask, flat[path], 0) for path, mask in kept.items()})


def curves(loaded: Loaded, densities: Sequence[float] = DENSITIES) -> list[dict[str, Any]]:
    """A row for each point: scheme, density and validation loss; the first is the whole model."""
    measure, model = Measure(), loaded.program.model
    rows = [{"scheme": "whole", "density": 1.0, "loss": mean_loss(measure(loaded))}]
    for scheme in SCHEMES:
        n, _, m = scheme.partition(":")
        points = (int(n) / int(m),) if m else densities
        for density in points:
            prune = jax.jit(functools.partial(pruned, model, scheme=scheme, density=density))
            with loaded.program.layout.active():
                params = prune(loaded.params)
            loss = mean_loss(measure(dataclasses.replace(loaded, params=params)))
            rows.append({"scheme": scheme, "density": density, "loss": loss})
    return rows


def essential(rows: Sequence[Mapping[str, Any]], scheme: str, tolerance: float) -> float:
    """The greatest sparsity up to which the loss stays within ``tolerance`` of the whole model's;
    0 where there is none."""
    whole, found = rows[0]["loss"], 0.0
    points = sorted((1 - r["density"], r["loss"]) for r in rows if r["scheme"] == scheme)
    for sparsity, loss in points:
        if loss > whole + tolerance:
            break
        found = sparsity
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sparsity_curves",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--step", type=int, help="of the checkpoint; the latest by default")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--tolerance", type=float, default=0.05, help="nats")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(argv)
    if not all(0 < d <= 1 for d in options.densities):
        parser.error("--densities: give numbers in (0, 1]")
    rows = curves(load(options.run, options.step), options.densities)
    table = Table(title=f"{options.run}: validation loss, nats")
    for column in ("scheme", "sparsity", "loss", "more than whole"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for row in rows:
        more = row["loss"] - rows[0]["loss"]
        table.add_row(
            row["scheme"], f"{1 - row['density']:.0%}", f"{row['loss']:.4f}", f"{more:+.4f}"
        )
    console = rich.console.Console()
    console.print(table)
    for scheme in ("global", "layer"):
        share = essential(rows, scheme, options.tolerance)
        console.print(f"{scheme}: {share:.0%} can be left out for {options.tolerance:g} nats")
    if options.json:
        write_json(options.json, {"run": str(options.run), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
