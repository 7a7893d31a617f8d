"""A few validation examples with what the model makes of them, for the end of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxpt.data.encoding import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.evaluation import HostBatch, Validation
from jaxpt.generator import Generator
from jaxpt.objectives.prompt import Prompt
from jaxpt.program import Program
from jaxpt.state import Params

LEAST_TARGETS = 4  # an example with fewer is passed over where there is another
SENTINEL = re.compile(r"<extra_id_(\d+)>")
SPANS_SHOWN = 4
FIELDS = ("tokens", "targets", "weights", "prefix")
PLACES = ("positions", "inner_positions")  # of blank infilling
CONTEXT = 60  # characters shown around the first spans
SHOWN = 200  # characters shown of a target without spans

Example = dict[str, np.ndarray]


def samples(
    program: Program,
    params: Params,
    tokenizer: Tokenizer,
    validations: Sequence[Validation],
    count: int,
) -> list[dict[str, str]]:
    """Validation examples, decoded greedily: what was asked, what was right, what came out.

    They are of components with different modes first (R, S, X), then of the others in turn. Of a
    causal model's example the first half is given.

    Args:
      params: of the program's model.
      validations: host batches of each component.
      count: how many at most; fewer where there are fewer components.

    Returns:
      Dicts of texts: "task", "input", "target", "output"; for masked LM target and output are
      the whole text. None of a model that gives no tokens.
    """
    if "tokens" not in program.model.config.outputs:
        return []
    vocabulary = tokenizer.vocabulary
    found = [(v.name, e) for v in validations if (e := _first(v.batches)) is not None]
    picked = _varied(found, vocabulary)[:count]
    asked = [(name, *_question(example, vocabulary)) for name, example in picked]
    generator = Generator(program.model, params, vocabulary, program.layout)
    outputs = _answers(generator, [prompt for _, prompt, _, _ in asked], [t for *_, t in asked])
    return [
        {
            "task": name,
            "input": tokenizer.decode(given),
            "target": tokenizer.decode(target),
            "output": tokenizer.decode(output),
        }
        for (name, _, given, target), output in zip(asked, outputs, strict=True)
    ]


def _answers(
    generator: Generator, prompts: list[Prompt], targets: list[np.ndarray]
) -> list[np.ndarray]:
    answers: dict[int, np.ndarray] = {}
    holes = [i for i, p in enumerate(prompts) if p.holes is not None]
    if holes:
        answers |= zip(holes, generator.predict([prompts[i] for i in holes]), strict=True)
    others = [i for i in range(len(prompts)) if i not in answers]
    if others:
        # As long as the targets, and a token for the eos.
        most = max(len(targets[i]) for i in others) + 1
        table = generator.model.config.max_length
        longest = max(
            (len(prompts[i].tokens) for i in others if prompts[i].blank is None), default=0
        )
        if table is not None and longest:  # what the positions leave the longest prompt
            most = max(1, min(most, table - longest))
        written = generator.sample([prompts[i] for i in others], max_tokens=most)
        answers |= zip(others, (w.tokens for w in written), strict=True)
    return [answers[i] for i in range(len(prompts))]


def _examples(batches: Sequence[HostBatch]) -> Iterator[Example]:
    """The packed examples of host batches, each as 1-D arrays."""
    for batch in batches:
        for row, segments in enumerate(batch["segments"]):
            for segment in range(1, int(segments.max(initial=0)) + 1):
                at = segments == segment
                example = {
                    name: batch[name][row][at]
                    for name in (*FIELDS, *(PLACES if "inner_positions" in batch else ()))
                }
                if "inputs" in batch:
                    at = batch["input_segments"][row] == segment
                    example["inputs"] = batch["inputs"][row][at]
                yield example


def _first(batches: Sequence[HostBatch]) -> Example | None:
    """The first example with some targets; with any, where none has so many."""
    fallback = None
    for example in _examples(batches):
        targets = int((example["weights"] > 0).sum())
        if targets >= LEAST_TARGETS:
            return example
        if targets and fallback is None:
            fallback = example
    return fallback


def _varied(found: list[tuple[str, Example]], vocabulary: Vocabulary) -> list[tuple[str, Example]]:
    """The same, those with a mode not seen so far first."""
    modes = {ids[0]: name for name, ids in vocabulary.modes}
    seen: dict[Any, int] = {}
    turns = []
    for _, example in found:
        first = int(example["inputs" if "inputs" in example else "tokens"][0])
        mode = modes.get(first)
        turns.append(seen.get(mode, 0))
        seen[mode] = turns[-1] + 1
    order = sorted(range(len(found)), key=lambda i: turns[i])
    return [found[i] for i in order]


def _question(example: Example, vocabulary: Vocabulary) -> tuple[Prompt, np.ndarray, np.ndarray]:
    """The prompt of an example, the ids to show for it, and the ids that are right."""
    tokens, targets, prefix = example["tokens"], example["targets"], example["prefix"]
    predicted = example["weights"] > 0
    if "inputs" in example:
        inputs = example["inputs"]
        given = inputs[:-1] if inputs[-1] == vocabulary.eos else inputs
        return Prompt(tokens[:1], inputs), given, _without_end(targets[predicted], vocabulary)
    if prefix.all():  # predicted where they stand
        holes = np.flatnonzero(predicted)
        return (
            Prompt(tokens, prefix=True, holes=holes),
            tokens,
            np.where(predicted, targets, tokens),
        )
    if "inner_positions" in example and example["inner_positions"].any():
        return _first_blank(example)
    if prefix.any():
        read = tokens[: int(prefix.sum())]
        return Prompt(read, prefix=True), read, _without_end(targets[predicted], vocabulary)
    # A text with an answer of its own is given up to that; of others the first half.
    first = int(np.argmax(predicted))
    half = first + 1 if first else max(1, len(tokens) // 2)
    read = tokens[:half]
    given = read[1:] if read[0] in (vocabulary.bos, vocabulary.pad) else read
    return Prompt(read), given, _without_end(targets[half - 1 :], vocabulary)


def _first_blank(example: Example) -> tuple[Prompt, np.ndarray, np.ndarray]:
    """Of blank infilling: the blank that is filled first."""
    tokens, n = example["tokens"], int(example["prefix"].sum())
    begins = np.flatnonzero(example["inner_positions"] == 1)
    end = begins[1] if len(begins) > 1 else len(tokens)
    blank = int(example["positions"][n])
    asked = Prompt(tokens[: n + 1], prefix=True, text=tokens[:n], middle=blank, blank=blank)
    return asked, tokens[:n], tokens[n + 1 : end]


def _without_end(targets: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    ends = np.flatnonzero(targets == vocabulary.eos)
    return targets[: ends[0]] if len(ends) else targets


def show(samples: Sequence[dict[str, str]], console: Console | None = None) -> None:
    """Prints samples: the text around its first spans, and what stood and what was put there."""
    console = console or Console(highlight=False)
    for sample in samples:
        console.print(Text(f"\n{sample['task']}", style="bold"))
        given, target, output = sample["input"], sample["target"], sample["output"]
        true, written = _spans(target), _spans(output)
        if not true:
            lines = [("given", _end_of(given)), ("truth", Text(_short(target, SHOWN)))]
            lines.append(("model", _answer(target, output, SHOWN)))
            console.print(_table("", "", rows=lines))
            continue
        console.print(Padding(_around_spans(given), (0, 2)))
        numbers = list(true)[:SPANS_SHOWN]
        rows = [
            (f"<{n}>", Text(_short(true[n], CONTEXT)), _answer(true[n], written.get(n), CONTEXT))
            for n in numbers
        ]
        console.print(_table("", "truth", "model", rows=rows))
        if len(true) > len(numbers):
            console.print(Text(f"  and {len(true) - len(numbers)} more spans", style="dim"))


def _table(*names: str, rows: Sequence[tuple]) -> Table:
    table = Table(box=None, show_header=any(names), header_style="dim", padding=(0, 2, 0, 2))
    for i, name in enumerate(names):
        table.add_column(name, style="" if i else "cyan", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _spans(text: str) -> dict[int, str]:
    """Number of a sentinel -> the text that follows it."""
    parts = SENTINEL.split(text)[1:]
    spans: dict[int, str] = {}
    for number, span in zip(parts[::2], parts[1::2], strict=True):
        spans.setdefault(int(number), span)
    return spans


def _around_spans(text: str) -> Text:
    """The text around its first spans, sentinels short and in colour."""
    line, places = Text(), []
    for i, part in enumerate(SENTINEL.split(text)):
        start = len(line)
        line.append(f"<{part}>" if i % 2 else _flat(part), "cyan" if i % 2 else "")
        if i % 2:
            places.append((start, len(line)))
    begin, end = (places[0][0], places[:SPANS_SHOWN][-1][1]) if places else (0, 0)
    first, last = max(0, begin - 2 * CONTEXT), end + CONTEXT
    last = max([last, *(e for s, e in places if s < last)])  # no sentinel is cut
    return Text.assemble("…" if first else "", line[first:last], "…" if last < len(line) else "")


def _end_of(text: str) -> Text:
    return Text(_flat(text if len(text) <= SHOWN else "…" + text[1 - SHOWN :]))


def _answer(right: str, got: str | None, most: int) -> Text:
    """What the model wrote, in green where it is right."""
    if not got:
        return Text("(left out)" if got is None else "(empty)", style="red")
    return Text(_short(got, most), style="green" if right.strip() == got.strip() else "yellow")


def _short(text: str, most: int) -> str:
    return _flat(text if len(text) <= most else text[: most - 1] + "…")


def _flat(text: str) -> str:
    """On one line: ends of lines and tabs are shown as signs."""
    return text.replace("\n", "⏎").replace("\t", "→")
