"""What is kept of a finished run, and how fast a run's train step is."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.verdicts import Record
from jaxpt import environment
from jaxpt.evaluation import mean_loss
from jaxpt.files import number, read_metrics
from jaxpt.folder import RunFolder
from jaxpt.program import Program
from jaxpt.run import Run
from jaxpt.train import Result


def stepper(run: Run) -> tuple[Callable[[], Any], int]:
    """(a function that does one train step of a run's first phase on the next of a few batches and
    returns its metrics, positions of a batch)."""
    tokenizer = run.tokenizer.build()
    program = Program(run, 0, tokenizer.vocabulary, run.mesh.build())
    key, state = jax.random.key(run.seed), program.init(jax.random.key(0))
    with program.batches(tokenizer, learn=False) as batches:
        ready = itertools.cycle(list(itertools.islice(batches, 4)))

    def call():
        nonlocal state
        state, metrics = program.train_step(state, next(ready), key)
        return metrics

    return call, program.phase.tokens_per_step


def outcome_of(result: Result, folder: Path) -> Record:
    """What is kept of a finished run.

    loss: mean over ``losses`` (task -> nats a target, validation). training_bytes: parameters,
    optimizer state and gradients. program_bytes: what the compiled step holds at once. flops: of
    the model, by formula, over all steps. seconds: those of training. tokens_per_second: median
    over lines of the log, on a machine that may have been busy. curve, validation: [tokens, loss].
    """
    program, rows = result.program, read_metrics(RunFolder(folder).metrics)
    run, abstract = program.run, program.abstract
    programs = [Program(run, i, program.vocabulary, program.layout) for i in range(len(run.phases))]
    trained = {path: t for path, t in program.model.tensors.items() if t.trained}
    gradients = sum(np.prod(t.shape) * np.dtype(t.dtype).itemsize for t in trained.values())
    memory = program.train_step.program.memory_analysis()
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    losses = {task: found["loss"] for task, found in (result.results or {}).items()}
    evals = [
        [row["tokens"], float(np.mean([number(v) for k, v in row.items() if _is_loss(k)]))]
        for row in rows
        if any(map(_is_loss, row))
    ]
    return {
        "loss": mean_loss(result.results or {}),
        "losses": losses,
        "baseline": float(np.mean([r["baseline"] for r in (result.results or {}).values()])),
        "steps": result.progress.phase_step,
        "tokens": sum(p.phase.tokens_per_step * (p.phase.total_steps or 0) for p in programs),
        "parameters": program.model.parameters,
        "training_bytes": int(_bytes(abstract) + gradients),
        "program_bytes": None
        if memory is None
        else memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "flops": sum(p.flops_per_step * (p.phase.total_steps or 0) for p in programs),
        "seconds": rows[-1]["seconds"] if rows else None,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "curve": [[row["tokens"], number(row["loss"])] for row in rows if "loss" in row],
        "validation": evals,
        **stamp(),
    }


def stamp() -> dict[str, Any]:
    """What makes figures a record: commit, versions, device, date (UTC)."""
    return {
        "commit": environment.commit(),
        "versions": {k: v for k, v in environment.versions().items() if k in ("python", "jax")},
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _is_loss(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("/loss")


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
