"""Validation: the loss of each component of an objective, beside what counting alone would give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxpt.duration import Duration, as_duration
from jaxpt.errors import ConfigError
from jaxpt.steps import Metrics

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Harness:
    """Tasks of EleutherAI's lm-evaluation-harness (extra: eval) to ask the model; ``jaxpt eval``
    asks others."""

    tasks: tuple[str, ...]  # names of tasks or groups, as lm_eval knows them
    # how often: steps, or any duration that steps follow from; None: at the end alone
    every: int | float | Duration | None = None
    include_path: str | None = None  # folder of further tasks (YAML files)
    limit: int | None = None  # documents of each task; None: all
    fewshot: int | None = None  # examples in front of each question; None: the task's own number
    mode: str | None = None  # UL2 mode to announce (R, S, X); None: of the denoiser that goes on
    batch: int = 16  # questions at a time
    # positions of a context; None: the model's own, or those that the phase trains with
    max_length: int | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError("tasks", "none given; name a task of lm_eval")
        for name in ("limit", "batch", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"{value} is not valid; give 1 or more")
        if self.fewshot is not None and self.fewshot < 0:
            raise ConfigError("fewshot", f"{self.fewshot} is not valid; give 0 or more")
        if self.every is not None and as_duration(self.every).unit in ("seconds", "epochs"):
            raise ConfigError(
                "every", f"{self.every} is not valid; give steps, tokens, examples or a share"
            )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When to measure the validation loss, and on how much."""

    every: int | float | Duration | None = None  # how often; None: at the end alone
    batches: int = 8  # batches of each component (denoiser) of the objective
    samples: int = 3  # examples whose targets are generated and shown at the end
    harness: Harness | None = None  # tasks of lm_eval that are asked on the way; None: none

    def __post_init__(self):
        if self.batches < 1:
            raise ConfigError("batches", f"{self.batches} is not valid; give 1 or more")
        if self.samples < 0:
            raise ConfigError("samples", f"{self.samples} is not valid; give 0 or more")


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation batches of one component, and the unigram entropy of their targets."""

    name: str
    batches: list[HostBatch]
    baseline: float  # nats per target
    targets: int

    @staticmethod
    def of(
        name: str,
        batches: Iterable[HostBatch],
        baseline: Callable[[np.ndarray], float | None] = lambda targets: None,
    ) -> Validation:
        """``baseline``: an objective's own; None of it: the targets' unigram entropy."""
        batches = list(batches)
        targets = np.concatenate(
            [b["targets"][b["weights"] > 0] for b in batches] or [np.zeros(0, np.int32)]
        )
        own = baseline(targets)
        own = unigram_entropy(targets) if own is None else own
        return Validation(name, batches, own, targets.size)


def unigram_entropy(targets: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of ``targets`` (int, any shape).

    No model that ignores context has a lower loss on them, even one fitted to them; a model
    that reads its context must come out below.
    """
    counts = np.bincount(targets.reshape(-1))
    shares = counts[counts > 0] / max(targets.size, 1)
    return float(-(shares * np.log(shares)).sum())


def evaluate(
    step: Callable[[Any, Any], Metrics],
    params: Any,
    put: Callable[[HostBatch], Any],
    validations: Iterable[Validation],
    more: Sequence[str] = (),
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Losses of the given parameters.

    Args:
      step: compiled eval step.
      put: lays a host batch on the devices.
      more: further metrics of the step to report, each a (sum, count) pair.
      between: called before every batch; what it raises ends the evaluation.

    Returns:
      Component -> {"loss": nats per target, without z-loss and smoothing, "baseline": unigram
      entropy of the same targets, "accuracy", "targets": their number, and those of ``more``};
      NaN where there are none.
    """
    results = {}
    for validation in validations:
        pending = []
        for batch in validation.batches:
            between()
            pending.append(step(params, put(batch)))
        sums = [
            np.sum([np.asarray(m.get(name, m["loss"]), np.float64) for m in pending], axis=0)
            for name in ("cross_entropy", "accuracy")
        ]
        (loss, count), (right, _) = (s if len(pending) else (0.0, 0.0) for s in sums)
        results[validation.name] = {
            "loss": float(loss / count) if count else math.nan,
            "baseline": validation.baseline,
            "accuracy": float(right / count) if count else math.nan,
            "targets": validation.targets,
        }
        for name in more:
            total, count = np.sum([m[name] for m in pending], axis=0) if pending else (0.0, 0.0)
            results[validation.name][name] = float(total / count) if count else math.nan
    return results


def logged(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """ "NAME/FIGURE" -> figure, of what an evaluation found: what stands in the metrics.

    Without what is the same at every step, and without errors of estimates.
    """
    fixed = ("baseline", "targets")
    return {
        f"{task}/{name}": value
        for task, found in results.items()
        for name, value in found.items()
        if name not in fixed and "_stderr" not in name
    }


def mean_loss(results: dict[str, dict[str, float]]) -> float:
    """The plain mean over components: what "best" means for checkpoints."""
    losses = [r["loss"] for r in results.values() if "loss" in r]
    return float(np.mean(losses)) if losses else math.nan
