"""Tasks with labels: what is read of records, and what answers are worth. On the host alone."""

import dataclasses
import json
import types

import numpy as np
import pytest

from jaxpt.config import codec
from jaxpt.data.base import EmptySplit, Source
from jaxpt.data.corpus import Corpus
from jaxpt.data.labelled import Case, FromFiles, FromHub, FromTfds, plain
from jaxpt.data.packages import Packages
from jaxpt.data.sentence_order import SentenceOrder
from jaxpt.data.tasks import TAGS, TASKS, Task
from jaxpt.data.text import Text
from jaxpt.errors import ConfigError, DataError
from jaxpt.objectives.figures import METRICS, entities, figures, normal

# A record of each task as TensorFlow Datasets and Hugging Face have it, and T5's text and target.
PASSAGE = "One way.\n@highlight\nAnother\n@highlight\nlast"
RECORDS = {
    "glue/cola": (
        {"sentence": "They drank.", "label": 1, "idx": 0},
        "cola sentence: They drank.",
        "acceptable",
    ),
    "glue/sst2": (
        {"sentence": "so dull", "label": 0, "idx": 1},
        "sst2 sentence: so dull",
        "negative",
    ),
    "glue/mrpc": (
        {"sentence1": "A b.", "sentence2": "A c.", "label": 1, "idx": 2},
        "mrpc sentence1: A b. sentence2: A c.",
        "equivalent",
    ),
    "glue/stsb": (
        {"sentence1": "A b.", "sentence2": "A c.", "label": np.float32(3.333), "idx": 2},
        "stsb sentence1: A b. sentence2: A c.",
        "3.4",
    ),
    "glue/qqp": (
        {"question1": "Why?", "question2": "How?", "label": 0, "idx": 3},
        "qqp question1: Why? question2: How?",
        "not_duplicate",
    ),
    "glue/mnli": (
        {"premise": "P.", "hypothesis": "H.", "label": 2, "idx": 4},
        "mnli hypothesis: H. premise: P.",
        "contradiction",
    ),
    "glue/qnli": (
        {"question": "Q?", "sentence": "S.", "label": 0, "idx": 5},
        "qnli question: Q? sentence: S.",
        "entailment",
    ),
    "glue/wnli": (
        {"sentence1": "A.", "sentence2": "B.", "label": 0, "idx": 5},
        "wnli sentence1: A. sentence2: B.",
        "not_entailment",
    ),
    "super_glue/boolq": (
        {"passage": "P.", "question": "is it", "label": 1, "idx": 6},
        "boolq passage: P. question: is it",
        "True",
    ),
    "super_glue/cb": (
        {"premise": "P.", "hypothesis": "H.", "label": 1, "idx": 7},
        "cb hypothesis: H. premise: P.",
        "contradiction",
    ),
    "super_glue/copa": (
        {
            "premise": "It fell.",
            "choice1": "One.",
            "choice2": "Two.",
            "question": "cause",
            "label": 1,
            "idx": 8,
        },
        "copa choice1: One. choice2: Two. premise: It fell. question: cause",
        "choice2",
    ),
    "super_glue/multirc": (
        {
            "paragraph": "<b>Sent 1: </b>A.<br>B.",
            "question": "Q?",
            "answer": "A",
            "idx": {"paragraph": 3, "question": 5, "answer": 7},
            "label": 0,
        },
        "multirc question: Q? answer: A paragraph: Sent 1: A. B.",
        "False",
    ),
    "super_glue/record": (
        {
            "passage": PASSAGE,
            "query": "A @placeholder is.",
            "entities": ["pen", "bird"],
            "answers": ["bird", "Bird"],
            "idx": {"passage": 0, "query": 1},
        },
        "record query: A @placeholder is. entities: pen, bird passage: One way. Another. last",
        "bird",
    ),
    "super_glue/rte": (
        {"premise": "P.", "hypothesis": "H.", "label": 1, "idx": 9},
        "rte hypothesis: H. premise: P.",
        "not_entailment",
    ),
    "super_glue/wic": (
        {"word": "place", "sentence1": "A place.", "sentence2": "They place it.", "label": 0},
        "wic sentence1: A place. sentence2: They place it. word: place",
        "False",
    ),
    "super_glue/wsc": (
        {
            "text": "This is a test sentence .",
            "span1_text": "test",
            "span1_index": 3,
            "span2_text": "This",
            "span2_index": 0,
            "label": 0,
        },
        "wsc text: # This # is a * test * sentence .",
        "False",
    ),
    "squad": (
        {
            "id": "x",
            "title": "t",
            "context": "In 1990, the (old) tower fell.",
            "question": "When?",
            "answers": {"text": ["1990", "In 1990"], "answer_start": [3, 0]},
        },
        "question: When ? context: In 1990 , the ( old ) tower fell . ",
        "1990",
    ),
}


def as_tfds(record):
    """As tfds gives it: bytes, numpy's numbers, lists as arrays."""
    if isinstance(record, dict):
        return {name: as_tfds(value) for name, value in record.items()}
    if isinstance(record, str):
        return record.encode()
    if isinstance(record, list):
        return np.array(
            [as_tfds(x) for x in record], object if record and isinstance(record[0], str) else None
        )
    return np.int64(record) if isinstance(record, int) else record


def files(folder, records):
    (folder / "cases.jsonl").write_text("".join(json.dumps(plain(r)) + "\n\n" for r in records))
    return FromFiles(str(folder / "cases.jsonl"), str(folder / "cases.jsonl"))


@pytest.mark.parametrize("name", RECORDS)
def test_text_is_that_of_t5(name, tmp_path):
    record, text, target = RECORDS[name]
    cases = Task(name, origin=files(tmp_path, [record])).open("validation")
    assert len(cases) == 1
    assert cases[0].texts == (text,)
    assert cases[0].target == target
    assert set(cases.metrics) <= METRICS.keys()
    if cases.labels and name != "conll2003":
        assert cases.labels[cases[0].label] == target


def test_every_task_of_the_table_is_tested_or_like_one():
    assert TASKS.keys() - RECORDS.keys() == {"glue/mnli_mismatched", "glue/rte", "conll2003"}


def fake_tfds(monkeypatch, splits):
    asked = []

    def builder(name, *, data_dir, file_format):
        asked.append((name, data_dir, file_format))
        return types.SimpleNamespace(
            info=types.SimpleNamespace(splits=splits),
            as_data_source=lambda split: splits[split],
        )

    module = types.SimpleNamespace(builder=builder)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", module)
    return asked


def test_tfds_and_files_give_the_same(monkeypatch, tmp_path):
    for name, split in (("glue/mnli", "validation_matched"), ("super_glue/multirc", "validation")):
        record = RECORDS[name][0]
        wanted = Task(name, origin=files(tmp_path, [record])).open("train")[0]
        asked = fake_tfds(monkeypatch, {"train": [as_tfds(record)], split: [as_tfds(record)] * 3})
        task = Task(name, origin=FromTfds("/data"))
        assert task.open("train")[0] == wanted
        assert len(task.open("validation")) == 3
        assert asked[0] == (name, "/data", "array_record")
    fake_tfds(monkeypatch, {"test": []})
    with pytest.raises(EmptySplit, match="no split"):
        Task("glue/mrpc").open("train")


def test_the_library_of_hugging_face_gives_the_same(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    record = RECORDS["super_glue/multirc"][0]
    wanted = Task("super_glue/multirc", origin=files(tmp_path, [record])).open("train")[0]
    rows = datasets.Dataset.from_list([record])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
    task = Task("super_glue/multirc", origin=FromHub(str(tmp_path / "saved")))
    assert [task.open(split)[0] for split in ("train", "validation")] == [wanted, wanted]


def test_heads_read_pairs_classes_and_scores(tmp_path):
    def one(name, form="classes"):
        return Task(name, form, files(tmp_path, [RECORDS[name][0]])).open("train")[0]

    assert one("glue/mnli") == Case(("P.", "H."), 2)
    assert one("glue/cola") == Case(("They drank.",), 1)
    assert one("glue/stsb").label == pytest.approx(3.333)
    assert one("super_glue/multirc") == Case(("Sent 1: A. B.", "Q? A"), 0, group=(3, 5))
    assert one("super_glue/wic").texts == ("place: A place.", "They place it.")
    assert one("super_glue/wsc").texts[1] == "test"
    span = one("squad", "span")
    assert span.texts[1][slice(*span.label)] == "1990"
    assert span.answers == ("1990", "In 1990")
    words = {"tokens": ["Ada", "went"], "pos_tags": [1, 2]}
    for field in ("ner", "ner_tags"):
        origin = files(tmp_path, [words | {field: [1, 0]}])
        cases = Task("conll2003", "tags", origin).open("train")
        assert cases[0] == Case(("Ada", "went"), (1, 0))
        assert cases.labels[1] == "B-PER"


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no task 'glue/nli'"):
        Task("glue/nli")
    for name, form in (("super_glue/copa", "classes"), ("squad", "classes"), ("conll2003", "text")):
        with pytest.raises(ConfigError, match="has no form") as error:
            Task(name, form)
        assert error.value.field == "form"
    cases = Task("glue/mrpc", origin=files(tmp_path, [{"sentence1": "A."}])).open("train")
    with pytest.raises(DataError, match=r"glue/mrpc\[train\], record 0: KeyError: 'sentence2'"):
        cases[0]
    with pytest.raises(EmptySplit):
        Task("glue/mrpc", origin=FromFiles("x.jsonl")).open("validation")
    with pytest.raises(DataError, match="nowhere"):
        Task("glue/mrpc", origin=FromFiles("/nowhere.jsonl")).open("train")
    task = Task("glue/mrpc", "classes", FromFiles("a", "b"))
    assert codec.from_json(codec.to_json(task), Source) == task


# ---------------------------------------------------------------------------------------- figures


def of_classes(metric, said, right, labels=()):
    return figures([metric], said, [Case(("",), label) for label in right], labels)[metric]


def test_figures_of_classes():
    rng = np.random.default_rng(0)
    said, right = rng.integers(0, 2, 50).tolist(), rng.integers(0, 2, 50).tolist()
    pairs = list(zip(said, right, strict=True))
    tp, fp, fn, tn = (pairs.count(p) for p in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert of_classes("accuracy", said, right) == pytest.approx((tp + tn) / 50)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * precision * recall / (precision + recall)
    assert of_classes("f1", said, right) == pytest.approx(f1)
    other = 2 * tn / (2 * tn + fp + fn)
    assert of_classes("macro_f1", said, right, ("a", "b")) == pytest.approx((f1 + other) / 2)
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert of_classes("matthews", said, right) == pytest.approx((tp * tn - fp * fn) / root)
    assert of_classes("matthews", [1, 1, 1], [0, 1, 1]) == 0
    assert of_classes("matthews", [0, 1, 2, 2], [0, 1, 2, 2]) == pytest.approx(1)
    # What is no class counts as the wrong one.
    assert of_classes("f1", [-1, 1, -1], [1, 1, 0]) == pytest.approx(2 / 4)
    assert of_classes("accuracy", [-1, 1], [1, 1]) == 0.5
    assert of_classes("f1", [0], [0]) == 0
    assert of_classes("accuracy", [(1, 2), (0,)], [(1, 1), (0,)]) == pytest.approx(2 / 3)


def test_figures_of_scores():
    rng = np.random.default_rng(1)
    said, right = rng.normal(size=40), np.round(rng.normal(size=40), 1)
    wanted = np.corrcoef(said, right)[0, 1]
    assert of_classes("pearson", said.tolist(), right.tolist()) == pytest.approx(wanted)

    def rank(x):  # by counting: how many are below, and half of the equal ones
        return [np.sum(x < a) + (np.sum(x == a) - 1) / 2 for a in x]

    assert len(set(right.tolist())) < 40
    wanted = np.corrcoef(rank(said), rank(right))[0, 1]
    assert of_classes("spearman", said.tolist(), right.tolist()) == pytest.approx(wanted)
    assert of_classes("pearson", [1.0, 1.0], [1.0, 2.0]) == 0


def test_figures_of_texts():
    assert normal("The  Tower, of a Bird!") == "tower of bird"
    cases = [Case(("",), answers=a) for a in (("The Tower", "x"), ("one two three",), ("a b",), ())]
    said = ["tower.", "two three four", "c", ""]
    found = figures(["exact_match", "token_f1"], said, cases)
    assert found["exact_match"] == 1 / 4
    assert found["token_f1"] == pytest.approx((1 + 2 * 2 / 6 + 0 + 0) / 4)


def test_figures_of_groups_and_entities():
    cases = [Case(("",), 1, group=g) for g in (1, 1, 2, 3)]
    assert figures(["group_exact_match"], [0, 1, 1, 1], cases) == {"group_exact_match": 2 / 3}
    tags = [TAGS.index(t) for t in ("B-PER", "I-PER", "O", "I-ORG", "B-ORG", "I-LOC")]
    assert entities(tags, TAGS) == {("PER", 0, 2), ("ORG", 3, 4), ("ORG", 4, 5), ("LOC", 5, 6)}
    other = [*tags[:1], 0, *tags[2:]]
    found = figures(["entity_f1"], [other], [Case(("",) * 6, tuple(tags))], TAGS)
    assert found["entity_f1"] == pytest.approx(3 / 4)
    with pytest.raises(ConfigError, match="no figure bleu"):
        figures(["bleu"], [], [])


def test_sentence_order(tmp_path):
    sentences = [f"This is sentence number {i} of the text." for i in range(40)]
    (tmp_path / "a.txt").write_text(" ".join(sentences) + " Short. End.")
    source = SentenceOrder(Text(str(tmp_path / "a.txt"), str(tmp_path / "a.txt")))
    cases = source.open("train")
    assert len(cases) == 20
    places = [tuple(sentences.index(text) for text in case.texts) for case in cases]
    for (first, second), case in zip(places, cases, strict=True):
        assert abs(first - second) == 1
        assert case.label == int(first < second)
    assert 5 < sum(case.label for case in cases) < 15
    assert dataclasses.replace(source) == codec.from_json(codec.to_json(source), Source)


def test_packages():
    files = {
        "xml/a.py": "import xml\n" + "   XML in a line\n" * 5,
        "xml/b.py": "x\n",
        "json/c.py": "json and xml\n" * 4,
        "xml.py": "not of the folder\n" * 9,
    }

    class Given(Corpus):
        def open(self, split):
            class Files(list):
                names = tuple(files)

            return Files(files.values() if split == "train" else ["x\n"] * len(files))

    source = Packages(packages=("json", "xml"), characters=20, corpus=Given())
    cases = source.open("train")
    assert [(case.texts[0], case.label) for case in cases] == [
        ("import _\n_ in a line\n", 1),
        ("_ in a line\n_ in a line\n", 1),
        ("_ in a line\n_ in a line\n", 1),
        ("_ and _\n_ and _\n_ and _\n", 0),
    ]
    assert cases.labels == ("json", "xml")
    with pytest.raises(EmptySplit, match="split 'validation' has no text of"):
        source.open("validation")
    with pytest.raises(ConfigError, match="two or more"):
        Packages(packages=("xml",))
    with pytest.raises(ConfigError, match="characters"):
        Packages(characters=0)
    real = Packages()
    assert codec.from_json(codec.to_json(real), Source) == real
    assert {case.label for case in real.open("validation")} == set(range(6))
