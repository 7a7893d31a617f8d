"""All that a model is evaluated by: the losses of its objective, and tasks of others."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence

from jaxpt.answers import Answers
from jaxpt.data.base import Split
from jaxpt.errors import ConfigError
from jaxpt.evaluation import Harness, Validation, evaluate
from jaxpt.loading import Loaded

Results = dict[str, dict[str, float]]


def losses(
    loaded: Loaded,
    validations: Sequence[Validation],
    split: Split = "validation",
    between: Callable[[], None] = lambda: None,
) -> Results:
    """Component of the objective -> its loss, baseline, accuracy, number of targets, and what
    else the objective reports.

    Where there are labels, also the figures of the whole split: beside the loss, or where the data
    has several domains under the name of each.

    Args:
      between: called before every batch; what it raises ends the evaluation.
    """
    program = loaded.program
    objective, data = program.phase.objective, program.phase.data
    results = evaluate(
        program.eval_step, loaded.params, program.put, validations, objective.validated, between
    )
    if not objective.labelled:
        return results
    answers = Answers(loaded)
    parts, domains = data.parts_of(split), data.domains()
    for (cases, _), domain in zip(parts, domains, strict=True):
        name = objective.tasks[0] if len(parts) == 1 else domain.name
        results[name] = results.get(name, {}) | objective.figures(answers, cases)
    return results


def ask(loaded: Loaded, harness: Harness) -> Results:
    """Task of lm_eval -> its figures, by lm_eval's own names.

    Raises:
      ConfigError: lm_eval is not installed or lacks a task, or the model cannot answer.
    """
    check(harness)
    return importlib.import_module("jaxpt.interop.lm_eval").run(loaded, harness)


def check(harness: Harness | None) -> None:
    """Raises ConfigError where tasks are wanted and lm_eval is not installed."""
    if harness is not None and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.harness", "needs lm_eval: pip install 'jaxpt[eval]', or leave it None"
        )
