"""GLUE, SuperGLUE, SQuAD and CoNLL-2003: what each is called, reads, answers and is judged by.

GLUE: Wang et al. 2019a. SuperGLUE: Wang et al. 2019b. As text: Raffel et al. 2020 (T5), section 2.4
and appendix D, whose prefixes, order of features and label words these are.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from typing import Literal

from jaxpt.data.base import Split
from jaxpt.data.labelled import (
    Case,
    Cases,
    FromTfds,
    LabelledSource,
    Names,
    Origin,
    Record,
    opened,
)
from jaxpt.errors import ConfigError

Form = Literal["text", "classes", "tags", "span"]
Kind = Literal["plain", "score", "multirc", "record", "wic", "wsc", "squad", "tags"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    prefix: what the text begins with. features: what it goes on with, in T5's order, each after its
      own name. labels: words of the classes. pair: features that a head reads, one or two; () where
      a head has no form of it.
    """

    names: Names
    prefix: str
    features: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    pair: tuple[str, ...] = ()
    kind: Kind = "plain"


ENTAILMENT = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
TRUTH = ("False", "True")
TAGS = ("O", *(f"{side}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for side in "BI"))
SENTENCES, PREMISE = ("sentence1", "sentence2"), ("premise", "hypothesis")


def _glue(name: str, features, labels, metrics=("accuracy",), *, pair=None, **more) -> Entry:
    validation = more.pop("validation", "validation")
    names = Names(f"glue/{name}", ("nyu-mll/glue", name), validation)
    return Entry(names, more.pop("prefix", name), features, labels, metrics, pair or features)


def _super(
    name: str, features, labels, metrics=("accuracy",), *, pair=(), kind: Kind = "plain"
) -> Entry:
    names = Names(f"super_glue/{name}", ("aps/super_glue", name))
    return Entry(names, name.partition(".")[0], features, labels, metrics, pair, kind)


def _mnli(kind: str) -> Entry:
    validation = f"validation_{kind}"
    names = Names("glue/mnli", ("nyu-mll/glue", "mnli"), validation)
    features = ("hypothesis", "premise")
    return Entry(names, "mnli", features, ENTAILMENT, ("accuracy",), PREMISE)


TASKS: dict[str, Entry] = {
    "glue/cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "glue/sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
    "glue/mrpc": _glue("mrpc", SENTENCES, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "glue/stsb": dataclasses.replace(
        _glue("stsb", SENTENCES, (), ("pearson", "spearman")), kind="score"
    ),
    "glue/qqp": _glue(
        "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")
    ),
    "glue/mnli": _mnli("matched"),
    "glue/mnli_mismatched": _mnli("mismatched"),
    "glue/qnli": _glue("qnli", ("question", "sentence"), TWO_WAY),
    "glue/rte": _glue("rte", SENTENCES, TWO_WAY),
    "glue/wnli": _glue("wnli", SENTENCES, ("not_entailment", "entailment")),
    "super_glue/boolq": _super(
        "boolq", ("passage", "question"), TRUTH, pair=("question", "passage")
    ),
    "super_glue/cb": _super(
        "cb",
        ("hypothesis", "premise"),
        ("entailment", "contradiction", "neutral"),
        ("macro_f1", "accuracy"),
        pair=PREMISE,
    ),
    "super_glue/copa": _super(
        "copa", ("choice1", "choice2", "premise", "question"), ("choice1", "choice2")
    ),
    "super_glue/multirc": _super(
        "multirc",
        ("question", "answer", "paragraph"),
        TRUTH,
        ("f1", "group_exact_match"),
        pair=("paragraph", "question"),
        kind="multirc",
    ),
    "super_glue/record": _super(
        "record", ("query", "entities", "passage"), (), ("token_f1", "exact_match"), kind="record"
    ),
    "super_glue/rte": _super("rte", ("hypothesis", "premise"), TWO_WAY, pair=PREMISE),
    "super_glue/wic": _super(
        "wic", ("sentence1", "sentence2", "word"), TRUTH, pair=SENTENCES, kind="wic"
    ),
    "super_glue/wsc": _super("wsc.fixed", ("text",), TRUTH, pair=("text",), kind="wsc"),
    "squad": Entry(
        Names("squad/v1.1", ("rajpurkar/squad",)),
        "",
        ("question", "context"),
        (),
        ("exact_match", "token_f1"),
        ("question", "context"),
        "squad",
    ),
    "conll2003": Entry(
        Names("conll2003", ("eriktks/conll2003",), "dev"),
        "",
        ("tokens",),
        TAGS,
        ("entity_f1", "accuracy"),
        ("tokens",),
        "tags",
    ),
}
HEADS: dict[str, Form] = {"squad": "span", "tags": "tags"}  # of these kinds; "classes" of others


@dataclasses.dataclass(frozen=True)
class Task(LabelledSource):
    """A task of the table, as text to write or as labels for a head.

    text     T5's: "mrpc sentence1: ... sentence2: ..." and "equivalent". STS-B's scores are
             rounded to 0.2 and written out. Of ReCoRD's answers the first is learnt, and any
             counts; WSC marks the noun * so * and the pronoun # so #.
    classes  one or two texts and the class's number, or STS-B's score
    span     SQuAD's question and context, and where the first answer stands
    tags     CoNLL-2003's words, and the class of each
    """

    name: str  # of the table: glue/mrpc, super_glue/boolq, squad, ...
    form: Form = "text"  # text, or what a head learns: classes, span (squad) or tags (conll2003)
    origin: Origin = FromTfds()  # where the records come from

    def __post_init__(self):
        if self.name not in TASKS:
            raise ConfigError("name", f"no task {self.name!r}; known: {', '.join(TASKS)}")
        entry = TASKS[self.name]
        head = HEADS.get(entry.kind, "classes")
        known = [*(["text"] if entry.kind != "tags" else []), *([head] if entry.pair else [])]
        if self.form not in known:
            raise ConfigError(
                "form", f"{self.name} has no form {self.form!r}; it has {', '.join(known)}"
            )

    def open(self, split: Split) -> Cases:
        entry = TASKS[self.name]
        reader = _text if self.form == "text" else _HEAD_READERS.get(entry.kind, _classes)
        read = functools.partial(reader, entry)
        return opened(self.origin, entry.names, split, read, entry.metrics, entry.labels)


def _text(entry: Entry, record: Record) -> Case:
    """T5's text-to-text form."""
    if entry.kind == "squad":
        return _squad_text(entry, record)
    if entry.kind == "record":
        return _record_text(entry, record)
    record = dict(record)
    if entry.kind == "wsc":
        record["text"] = _marked(record)
    joined = " ".join([entry.prefix, *(f"{name}: {record[name]}" for name in entry.features)])
    label, group = record["label"], None
    if entry.kind == "multirc":
        joined, group = _without_markup(joined), _question_of(record)
    if entry.kind == "score":
        return Case((joined,), float(label), target=f"{round(label * 5) / 5:.1f}")
    target = entry.labels[label] if label >= 0 else "<unk>"
    return Case((joined,), int(label), target=target, group=group)


def _classes(entry: Entry, record: Record) -> Case:
    """One or two texts and a class or score, for a head."""
    texts = [record[name] for name in entry.pair]
    label = float(record["label"]) if entry.kind == "score" else int(record["label"])
    if entry.kind == "multirc":
        texts = [_without_markup(texts[0]), f"{record['question']} {record['answer']}"]
        return Case(tuple(texts), label, group=_question_of(record))
    if entry.kind == "wic":
        texts[0] = f"{record['word']}: {texts[0]}"
    if entry.kind == "wsc":
        texts = [_marked(record), record["span1_text"]]
    return Case(tuple(texts), label)


def _tags(entry: Entry, record: Record) -> Case:
    classes = record["ner_tags"] if "ner_tags" in record else record["ner"]
    return Case(tuple(record["tokens"]), tuple(int(tag) for tag in classes))


def _span(entry: Entry, record: Record) -> Case:
    texts, starts = record["answers"]["text"], record["answers"]["answer_start"]
    span = (starts[0], starts[0] + len(texts[0])) if texts else (0, 0)
    return Case((record["question"], record["context"]), span, answers=tuple(texts))


_HEAD_READERS = {"squad": _span, "tags": _tags}


def _question_of(record: Record) -> tuple[int, int]:
    return record["idx"]["paragraph"], record["idx"]["question"]


def _without_markup(text: str) -> str:
    """MultiRC's paragraphs have some HTML."""
    return re.sub("</?b>", "", text.replace("<br>", " "))


def _record_text(entry: Entry, record: Record) -> Case:
    """The highlights of ReCoRD's passages become sentences."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", record["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    entities, answers = ", ".join(record["entities"]), tuple(record["answers"])
    query = record["query"]
    joined = f"{entry.prefix} query: {query} entities: {entities} passage: {passage}"
    return Case((joined,), target=answers[0] if answers else "<unk>", answers=answers)


def _squad_text(entry: Entry, record: Record) -> Case:
    question, context = _spaced(record["question"]), _spaced(record["context"])
    answers = tuple(map(_spaced, record["answers"]["text"]))
    joined = re.sub(r"\s+", " ", f"question: {question} context: {context}")
    return Case((joined,), target=answers[0] if answers else "", answers=answers)


def _spaced(text: str) -> str:
    """Spaces around all that is no letter, mark, number, underscore or space; single spaces."""
    parts = (
        c if c == "_" or c.isspace() or unicodedata.category(c)[0] in "LMN" else f" {c} "
        for c in text
    )
    return re.sub(r"\s+", " ", "".join(parts))


def _marked(record: Record) -> str:
    """WSC's text with the noun between stars and the pronoun between hashes, by word number."""
    text, first, second = record["text"], int(record["span1_index"]), int(record["span2_index"])
    if not 0 <= min(first, second) <= max(first, second) <= len(text):
        raise ValueError(f"no words {first} and {second} in {text!r}")
    text = _mark(text, record["span1_text"], first, "*")
    second += 2 * (first < second)  # the stars are words too
    return _mark(text, record["span2_text"], second, "#")


def _mark(text: str, span: str, index: int, mark: str) -> str:
    pattern = rf"^((?:\S+\s){{{index}}})({re.escape(span)})"
    return re.sub(pattern, lambda m: f"{m[1]}{mark} {m[2]} {mark}", text)
