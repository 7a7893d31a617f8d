"""Examples as text, as the model will get them: what ``jaxpt data show`` prints."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from json import dumps
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpt.data.balance import balance, balanced_target_length
from jaxpt.data.base import Source, Split
from jaxpt.data.blocks import Counts
from jaxpt.data.loader import Loading, build_loader
from jaxpt.data.packing import unpack
from jaxpt.errors import ConfigError
from jaxpt.objectives.lengths import table as table_of_lengths

if TYPE_CHECKING:
    from jaxpt.run import Run

MOST_BATCHES = 64  # read in search of an example of every task


def collect(
    source: Source,
    features: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch: int,
    length: int,
    target_length: int | None = None,
    split: Split = "train",
    seed: int = 0,
    loading: Loading | None = None,
    count: int = 1,
    at_batch: int | None = None,
) -> dict[str, Any]:
    """Reads the first batches, until each task has shown ``count`` examples (64 batches at most);
    or the batch of this number alone, which counts from 1.

    Returns:
      JSON: "examples", a list of {"task", "inputs" (encoder-decoder), "tokens", "targets" (text
      where the loss weight is not 0), and the tokens in each}; "tasks", per task its examples and
      tokens; "batches", "rows" and, for each stream, "real" and "padding" positions.
    """
    shown: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    totals = {name: {"examples": 0, "inputs": 0, "tokens": 0, "predicted": 0} for name in tasks}
    epochs = 1 if split == "validation" else None
    with build_loader(
        source,
        features,
        tokenizer,
        batch=batch,
        length=length,
        target_length=target_length,
        split=split,
        seed=seed,
        epochs=epochs,
        shuffle=split == "train",
        loading=loading,
    ) as loader:
        first, last = (0, MOST_BATCHES) if at_batch is None else (at_batch - 1, at_batch)
        for _ in itertools.islice(loader, first):
            pass
        loader.counts = Counts()
        for host in itertools.islice(loader, last - first):
            for example in unpack(host):
                task: int = example["task"]
                total = totals[tasks[task]]
                total["examples"] += 1
                total["inputs"] += len(example.get("inputs", ()))
                total["tokens"] += len(example["tokens"])
                total["predicted"] += int(np.count_nonzero(example["weights"]))
                if len(shown[task]) < count:
                    shown[task].append(_text(example, tasks[task], tokenizer))
            if all(len(shown[task]) >= count for task in range(len(tasks))):
                break
        counts = loader.counts
    streams = {"tokens": (counts.tokens, counts.positions)}
    if target_length is not None:
        streams["inputs"] = (counts.inputs, counts.input_positions)
    return {
        "examples": [example for task in sorted(shown) for example in shown[task]],
        "tasks": totals,
        "batches": counts.batches,
        "rows": counts.batches * batch,
        "positions": {
            name: {"real": real, "padding": all_ - real, "share": round(real / max(1, all_), 4)}
            for name, (real, all_) in streams.items()
        },
    }


def _text(example: dict[str, Any], task: str, tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"task": task}
    if "inputs" in example:
        found["inputs"] = tokenizer.decode(example["inputs"])
        found["input_tokens"] = len(example["inputs"])
    predicted = example["targets"][example["weights"] != 0]
    found["tokens"] = tokenizer.decode(example["tokens"])
    found["token_count"] = len(example["tokens"])
    if len(prefix := example["tokens"][example["prefix"] != 0]):
        found["prefix"] = tokenizer.decode(prefix)
        found["prefix_tokens"] = len(prefix)
    found["targets"] = tokenizer.decode(predicted)
    found["target_tokens"] = len(predicted)
    return found


def show(found: dict[str, Any], console: Any = None) -> None:
    """Prints what ``collect`` gave, on a ``rich`` console (default: the terminal)."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    sizes = {"inputs": "input_tokens", "prefix": "prefix_tokens", "tokens": "token_count"}
    for example in found["examples"]:
        body = Text()
        # An encoder-decoder's decoder reads its targets shifted: they are not shown twice.
        fields = ("inputs", "targets") if "inputs" in example else ("prefix", "tokens", "targets")
        for name in fields:
            if name in example:
                size = example[sizes.get(name, "target_tokens")]
                body.append(f"{name} ({size} tokens)\n", style="bold")
                body.append(_marked(example[name]))
                body.append("\n")
        console.print(Panel(body, title=example["task"], title_align="left"))
    table = Table("task", "examples", "inputs", "tokens", "predicted", title="Tokens by task")
    for name, total in found["tasks"].items():
        table.add_row(name, *(f"{total[key]:,}" for key in total))
    console.print(table)
    if "lengths" in found:
        table = Table("task", "raw", "inputs", "targets", "sentinels", title="Longest examples")
        for row in found["lengths"]:
            table.add_row(row["task"], *(f"{row[key]:,}" for key in list(row)[1:]))
        console.print(table)
    for name, stream in found["positions"].items():
        console.print(
            f"{name}: {stream['real']:,} real and {stream['padding']:,} padding positions "
            f"({stream['share']:.1%} real) in {found['rows']} rows of {found['batches']} batches"
        )
    if "balance" in found:
        console.print(
            "The mean of the longest examples has {inputs:.1f} inputs and {targets:.1f} targets: "
            "at most {bound:.1%} of these rows' positions can be real. Rows of {target_length} "
            "targets would be in balance.".format(**found["balance"])
        )


def main(
    run: Run,
    *,
    count: int = 1,
    split: Split = "train",
    phase: str | None = None,
    at_batch: int | None = None,
    json: bool = False,
    tokenizer: Any = None,
) -> int:
    """``jaxpt data show``: examples of a phase's batches, and how well they fill their rows.

    Args:
      run: whose data to show.
      count: examples of each task.
      split: which documents.
      phase: name of the phase; default: the first.
      at_batch: the number of the only batch to show, as the phase trains on it, from 1.
      json: prints the JSON of ``collect``, and "lengths": for each task the raw tokens of its
        longest example, its inputs, targets and sentinels; with two streams also "balance": the
        mean positions of the longest examples, the "bound" on the rows' fill and the
        "target_length" in balance.
      tokenizer: the run's, built; default: what ``run.tokenizer`` builds.

    Raises:
      ConfigError: there is no such phase, or its objective cannot be built; or a batch by its
        number, of data whose mixture is learnt in training.
    """
    names = [p.name for p in run.phases]
    if phase is not None and phase not in names:
        raise ConfigError("--phase", f"{phase!r} is not valid; phases: {', '.join(names)}")
    index = 0 if phase is None else names.index(phase)
    shown, tokenizer = run.phases[index], tokenizer or run.tokenizer.build()
    if at_batch is not None and at_batch < 1:
        raise ConfigError("--at-batch", f"{at_batch} is not valid; give 1 or more")
    if at_batch is not None and shown.data.mixing().online:
        name = type(shown.data.mixing()).__name__
        raise ConfigError("--at-batch", f"{name} draws batches by what the run has learnt")
    sizes = {"length": shown.length, "target_length": shown.target_length}
    features = shown.objective.on_host.build(tokenizer.vocabulary, **sizes)
    found = collect(
        shown.data,
        features,
        tokenizer,
        shown.objective.tasks,
        batch=shown.batch,
        **sizes,
        split=split,
        seed=(run.seed if run.data_seed is None else run.data_seed) + index,
        loading=run.loader,
        count=count,
        at_batch=at_batch,
    )
    found["lengths"] = table_of_lengths(features, shown.objective.tasks)
    if shown.target_length is not None:
        build = functools.partial(shown.objective.on_host.build, tokenizer.vocabulary)
        found["balance"] = _balance(build, shown.length, shown.target_length)
    if json:
        print(dumps(found, indent=2))
    else:
        show(found)
    return 0


def _balance(build: Any, length: int, target_length: int) -> dict[str, Any]:
    """How full the rows can be, and the ``target_length`` at which both streams could."""
    found = balance(build(length=length, target_length=target_length))
    return dataclasses.asdict(found) | {
        "bound": found.bound(length, target_length),
        "target_length": balanced_target_length(build, length),
    }


def _marked(text: str) -> Any:
    """Special ids stand out."""
    from rich.text import Text

    marked = Text(text)
    marked.highlight_regex(r"<extra_id_\d+>|<pad>|</s>|<s>|<mask>", "bold magenta")
    marked.highlight_regex(r"^\[[A-Z]\w*\]", "bold green")
    return marked
