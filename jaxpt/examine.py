"""All that a model is evaluated by: the losses of its objective, and tasks of others."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from jaxpt.data.base import Split
from jaxpt.errors import ConfigError
from jaxpt.evaluation import Harness, Validation, evaluate
from jaxpt.loading import Loaded

Results = dict[str, dict[str, float]]


def losses(
    loaded: Loaded, validations: Sequence[Validation], split: Split = "validation"
) -> Results:
    """Component of the objective -> its loss, baseline, accuracy, number of targets, and what
    else the objective reports."""
    program = loaded.program
    more = program.phase.objective.validated
    return evaluate(program.eval_step, loaded.params, program.put, validations, more)


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
