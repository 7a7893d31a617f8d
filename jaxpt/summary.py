"""What a person sees of a run on the terminal: before it starts, and when it has ended."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import rich.console
from rich.table import Table

from jaxpt.mesh import Activation, recorded
from jaxpt.program import Program
from jaxpt.run import Run


def show(run: Run) -> None:
    """``jaxpt train --dry-run``: every tensor and activation of every model of the run, and the
    phases' sizes."""
    console = rich.console.Console()
    tokenizer = run.tokenizer.build()
    layout = run.mesh.build()
    shown = None
    for index, phase in enumerate(run.phases):
        program = Program(run, index, tokenizer.vocabulary, layout)
        if run.model_of(index) != shown:
            shown = run.model_of(index)
            console.print(tensor_table(program))
            console.print(activation_table(program))
        console.print(
            f"phase {phase.name}: {phase.duration.value:,g} {phase.duration.unit}"
            + (f" = {phase.total_steps:,} steps" if phase.total_steps and not phase.steps else "")
            + f"; {phase.tokens_per_step:,} positions and "
            f"{program.flops_per_step:.3g} model FLOPs a step"
        )
        state = program.abstract
        console.print(
            f"  {program.model.parameters:,} parameters; "
            f"{_bytes(state.params):.1f} MB of parameters, "
            f"{_bytes(state.opt_state):.1f} MB of optimizer state, "
            f"over {layout.mesh.size} device{'s' if layout.mesh.size > 1 else ''} "
            f"({', '.join(f'{name} {size}' for name, size in layout.mesh.shape.items())})"
        )
        for line in costs(program):
            console.print(f"  {line}")


def costs(program: Program) -> list[str]:
    """A line for each kind of sparse weight: what it costs beside a dense one."""
    found: dict[str, list[str]] = {}
    for path, product in program.model.products.items():
        if product.weight.cost is not None:
            kind = type(product.weight).__name__
            found.setdefault(f"{kind} is {product.weight.cost}", []).append(path)
    return [f"{line} ({len(paths)} matrices or stacks)" for line, paths in found.items()]


def tensor_table(program: Program) -> Table:
    """A row for each tensor: shape, std at initialisation, logical axes, placement, weight type."""
    model = program.model
    table = Table(title=f"{model.config.kind}, {model.parameters:,} parameters")
    for column in ("tensor", "shape", "std", "axes", "placement", "weight"):
        table.add_column(column, justify="right" if column in ("shape", "std") else "left")
    for path, tensor in model.tensors.items():
        spec = program.layout.spec(tensor.axes, tensor.shape, path)
        table.add_row(
            path,
            " x ".join(map(str, tensor.shape)),
            f"{tensor.std:.4g}",
            " ".join(a or "-" for a in tensor.axes),
            _placement(spec),
            tensor.weight,
        )
    return table


def activation_table(program: Program) -> Table:
    """A row for each array of the batch and each activation that the model lays out (within stacked
    layers, of one of them): shape, type, logical axes and placement."""
    table = Table(title=f"a step's activations, {program.phase.batch} rows")
    for column in ("activation", "shape", "type", "axes", "placement"):
        table.add_column(column, justify="right" if column == "shape" else "left")
    batch = program.abstract_batch
    found = [
        Activation(name, ("batch", "length"), x.shape, str(x.dtype), place.spec)
        for (name, x), place in zip(batch.items(), program.batch_shardings.values(), strict=True)
    ]
    step = program.step_function
    with program.layout.active(), recorded() as activations:
        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(lambda *args: step(*args), program.abstract, batch, key)
    for each in [*found, *activations]:
        shape, axes = " x ".join(map(str, each.shape)), " ".join(a or "-" for a in each.axes)
        table.add_row(each.name, shape, each.dtype, axes, _placement(each.spec))
    return table


def _placement(spec: jax.sharding.PartitionSpec) -> str:
    """The mesh axes of each dimension, ``-`` where it is whole."""
    each = ("-" if s is None else s if isinstance(s, str) else "+".join(s) for s in spec)
    return " ".join(each) or "-"


def results_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Validation loss of each component beside the unigram entropy of the same targets."""
    table = Table(title="validation loss, nats per target")
    for column in ("denoiser", "loss", "unigram entropy", "below it by", "accuracy", "targets"):
        table.add_column(column, justify="left" if column == "denoiser" else "right")
    for name, r in results.items():
        if "loss" not in r:
            continue
        table.add_row(
            name,
            f"{r['loss']:.3f}",
            f"{r['baseline']:.3f}",
            f"{r['baseline'] - r['loss']:.3f}",
            f"{r['accuracy']:.1%}",
            f"{r['targets']:,}",
        )
    return table


def figures_table(results: Mapping[str, Mapping[str, float]]) -> Table | None:
    """What each task was found to be beside the columns of ``results_table``, and its standard
    error where that is known; None where there is nothing."""
    own = ("loss", "baseline", "accuracy", "targets")
    rows = [
        (task, name, value, found.get(f"{name}_stderr"))
        for task, found in results.items()
        for name, value in found.items()
        if "_stderr" not in name and not (name in own and "loss" in found)
    ]
    table = Table()
    for column in ("task", "figure", "value", "standard error"):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right")
    for task, name, value, error in rows:
        table.add_row(task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return table if rows else None


def show_results(results: Mapping[str, Mapping[str, float]], console: rich.console.Console) -> None:
    """Prints both tables."""
    console.print(results_table(results))
    if table := figures_table(results):
        console.print(table)


def _bytes(tree) -> float:
    """Megabytes (10^6 bytes) of a pytree of arrays or shapes."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) / 1e6
