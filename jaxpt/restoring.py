"""The whole state of a run at a checkpoint, also of one that a guard watched otherwise, or none."""

from __future__ import annotations

import dataclasses

import jax

from jaxpt.checkpoint import Checkpoints
from jaxpt.guard import NAME
from jaxpt.program import Program
from jaxpt.state import TrainState


def restored(checkpoints: Checkpoints, step: int, program: Program) -> TrainState:
    """The state saved at a step. Where the guard is another now, what it knew begins anew."""
    prefix, abstract = f"extra/{NAME}/", program.abstract
    rows = {
        path.removeprefix(prefix): row
        for path, row in checkpoints.manifest(step)["arrays"].items()
        if path.startswith(prefix)
    }
    own = abstract.extra.get(NAME, {})
    if {n: tuple(row["shape"]) for n, row in rows.items()} == {n: x.shape for n, x in own.items()}:
        return checkpoints.restore(step, abstract)
    place = abstract.step.sharding
    there = {
        n: jax.ShapeDtypeStruct(tuple(row["shape"]), row["dtype"], sharding=place)
        for n, row in rows.items()
    }
    others = {name: x for name, x in abstract.extra.items() if name != NAME}
    extra = others | ({NAME: there} if there else {})
    old = checkpoints.restore(step, dataclasses.replace(abstract, extra=extra))
    fresh = jax.jit(program.run.guard.init, out_shardings=place)()
    extra = {name: x for name, x in old.extra.items() if name != NAME} | fresh
    return dataclasses.replace(old, extra=extra)
