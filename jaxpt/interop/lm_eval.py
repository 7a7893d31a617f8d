"""Models of jaxpt for EleutherAI's lm-evaluation-harness. Needs the extra ``eval``.

``HarnessLM`` is what the public package drives, from Python or through ``run``::

    lm_eval.simple_evaluate(model=HarnessLM(loaded), tasks=["lambada_openai"])
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from jaxpt.errors import ConfigError
from jaxpt.evaluation import Harness
from jaxpt.loading import Loaded
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.prompt import Prompt, components, opening
from jaxpt.sampling import GREEDY, Sampling
from jaxpt.scoring import Question, windows, write

Request = tuple[tuple[str, str], list[int], list[int]]


class HarnessLM(TemplateLM):
    """A run's model as ``lm_eval`` sees one.

    What stands before a continuation is what the model was trained to go on from
    (``jaxpt.objectives.prompt.opening``): the start of a causal model, the mode of a denoiser, the
    encoder's inputs. A context that is too long loses its beginning, not these.

    Args:
      loaded: the run.
      mode: name of the UL2 mode to announce (R, S, X); None: that of the first denoiser that goes
        on from a text.
      batch: questions at a time.
      max_length: positions of the only stack, or of the encoder; None: the model's own, or those
        that its phase was trained with.
      max_tokens: the most tokens of a text, where a task does not say.

    Raises:
      ConfigError: a model that writes no text, or an unknown mode.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        mode: str | None = None,
        batch: int = 16,
        max_length: int | None = None,
        max_tokens: int = 256,
    ):
        super().__init__()
        self.loaded, self.mode, self.batch, self.max_tokens = loaded, mode, batch, max_tokens
        program = loaded.program
        self.two_streams = program.model.config.kind == "encoder_decoder"
        self.backend = "seq2seq" if self.two_streams else "causal"
        table = program.model.config.max_length
        self.max_length = max_length or table or program.phase.length
        self._targets = (table or program.phase.target_length) if self.two_streams else None
        self._scorer, self._generator = loaded.scorer(batch), loaded.generator()
        self._empty = self._opening([])

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.vocabulary.eos

    @property
    def tokenizer_name(self) -> str:
        return f"jaxpt-{self.loaded.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        """Ids of a text, without any special one: ``opening`` adds those."""
        return self.loaded.tokenizer.encode(string).tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is greedy."""
        pairs = []
        for context, answer in (request.args for request in requests):
            # After no context comes the text itself, and not, as after others, a word in a text.
            ids = self._encode_pair(context, answer) if context else ([], self.tok_encode(answer))
            pairs.append(((context, answer), *ids))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs):
        asked = [self._question(context, answer) for _, context, answer in requests]
        found = [(score.log_prob, score.greedy) for score in self._scorer(asked)]
        for (texts, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows where it is longer than a row."""
        asked, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            ids = np.array(self.tok_encode(text), np.int32)
            most = self._targets or self.max_length - len(self._empty.tokens) + 1
            for context, answer in windows(ids, most) if len(ids) else []:
                asked.append(self._window(context, answer))
                owners.append(i)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score.log_prob for score in self._scorer(asked)])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string of its request."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        for chosen in groups.values():
            options = dict(requests[chosen[0]].args[1])
            until = options.get("until") or ()
            most = int(options.get("max_gen_toks", self.max_tokens))
            found = write(
                self._generator,
                [self._prompt(self.tok_encode(requests[i].args[0]), most) for i in chosen],
                lambda ids: self.loaded.tokenizer.decode(ids, special=False),
                until=[until] if isinstance(until, str) else until,
                max_tokens=most,
                sampling=_sampling(options),
                batch=self.batch,
            )
            texts |= zip(chosen, found, strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _opening(self, ids) -> Prompt:
        program = self.loaded.program
        return opening(
            program.phase.objective,
            program.vocabulary,
            np.asarray(ids, np.int32),
            mode=self.mode,
            two_streams=self.two_streams,
        )

    def _prompt(self, ids, more: int) -> Prompt:
        """The prompt of a context, whose beginning is cut off where ``more`` positions would not
        fit after it."""
        asked = self._opening(ids)
        taken = len(asked.tokens) + more if asked.inputs is None else len(asked.inputs)
        if (over := taken - self.max_length) <= 0:
            return asked
        if over > len(ids):
            raise ConfigError(
                "max_length", f"{self.max_length} positions have no room for {more} more tokens"
            )
        return self._opening(ids[over:])

    def _question(self, context, answer) -> Question:
        # The last token of the answer is predicted, and not read.
        return Question(self._prompt(context, len(answer) - 1), np.asarray(answer, np.int32))

    def _window(self, context: np.ndarray, answer: np.ndarray) -> Question:
        """As ``_question``; in a causal model's text nothing stands between two windows."""
        objective = self.loaded.program.phase.objective
        plain = all(isinstance(part, CausalLM) for part in components(objective))
        if plain and len(context) and not self.two_streams:
            return Question(Prompt(context), answer)
        return self._question(context, answer)


def _sampling(options: dict[str, Any]) -> Sampling:
    """How a request wants tokens drawn; greedy unless it says otherwise."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return GREEDY
    return Sampling(temperature or 1.0, options.get("top_k") or None, options.get("top_p"))


def run(loaded: Loaded, harness: Harness) -> dict[str, dict[str, float]]:
    """Task -> its figures by the harness's own names: "acc", "acc_stderr", ...

    A figure of a filter other than "none" has its name behind: "exact_match_strict-match".

    Raises:
      ConfigError: an unknown task, or a model that the harness has no use for.
    """
    model = HarnessLM(loaded, mode=harness.mode, batch=harness.batch, max_length=harness.max_length)
    manager = _manager(harness.tasks, harness.include_path)
    results = simple_evaluate(
        model=model,
        tasks=list(harness.tasks),
        num_fewshot=harness.fewshot,
        limit=harness.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None
    return {task: _figures(found) for task, found in results["results"].items()}


@functools.lru_cache(maxsize=4)
def _manager(tasks: tuple[str, ...], include_path: str | None) -> TaskManager:
    """Knows where the tasks are; the thousands that come with lm_eval are looked through only if
    some task is not in ``include_path``."""
    if include_path and not Path(include_path).is_dir():
        raise ConfigError("include_path", f"{include_path} is no folder; give one of task files")
    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    near = [n for name in unknown for n in difflib.get_close_matches(name, manager.all_tasks)]
    where = f", nor is it in {include_path}" if include_path else "; give include_path for your own"
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    raise ConfigError("tasks", f"lm_eval knows no {', '.join(unknown)}{where}{nearest}")


def _figures(found: dict[str, Any]) -> dict[str, float]:
    figures = {}
    for name, value in found.items():
        metric, _, kept = name.partition(",")
        if kept and isinstance(value, (int, float)):
            figures[metric if kept == "none" else f"{metric}_{kept}"] = float(value)
    return figures
