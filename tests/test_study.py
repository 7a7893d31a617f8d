"""Studies: arms over seeds, tuned and resumed, and verdicts by a rule stated beforehand."""

import dataclasses
import functools
import json
import math
import types

import jax
import numpy as np
import pytest
from tiny import text_files, tiny_run

from experiments import low_rank_benchmark, reports, study
from experiments.study import Arm, Half, Size, Study
from experiments.verdicts import Interval, Relation, Relations, difference, interval
from jaxpt.errors import ConfigError
from jaxpt.folder import RunFolder
from jaxpt.guard import Guard
from jaxpt.optimizers import AdamW, Lion

# Numbers in the state that belong to no parameter: the steps, twice; what the guard knows.
COUNTERS = 2 + len(jax.tree.leaves(Guard().init()))


def runs_of(**losses):
    return [
        {"arm": arm, "seed": seed, "loss": loss, "losses": {"x": -loss}}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_intervals_are_students():
    """The mean of 1, 2, 4 and 4.3027 standard errors (Student's t, 2 degrees of freedom)."""
    found = interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.30265 * np.std([1, 2, 4], ddof=1) / math.sqrt(3), rel=1e-5)
    assert interval([3.0]) == Interval(3.0, math.inf)
    assert math.isnan(interval([]).mean)


def test_differences_are_paired_by_seed():
    runs = runs_of(a=[1.0, 2.0, 3.0], b=[1.5, 2.5])
    assert difference(runs, "a", "b") == Interval(0.5, 0.0)
    assert difference(runs, "a", "b", "x").mean == -0.5


@pytest.mark.parametrize(
    ("sign", "margin", "low", "high", "outcome"),
    [
        ("<", 0.0, 0.1, 0.3, "held"),
        ("<", 0.0, -0.1, 0.3, "not resolved"),
        ("<", 0.0, -0.3, -0.1, "not held"),
        ("<", 0.2, 0.1, 0.3, "not resolved"),
        ("<", 0.2, 0.1, 0.15, "not held"),
        ("<=", 0.0, -0.1, 0.1, "not resolved"),
        ("<=", 0.1, -0.05, 0.1, "held"),
        ("<=", 0.1, -0.4, -0.2, "not held"),
        ("~", 0.1, -0.05, 0.09, "held"),
        ("~", 0.1, -0.05, 0.2, "not resolved"),
        ("~", 0.1, 0.11, 0.2, "not held"),
        ("~", 0.1, -0.2, -0.11, "not held"),
        ("~", 0.1, -math.inf, math.inf, "not resolved"),
    ],
)
def test_relations(sign, margin, low, high, outcome):
    middle = 0.0 if math.isinf(low) else (low + high) / 2
    found = Interval(middle, (high - low) / 2)
    assert Relation("a", sign, "b", margin).outcome(found) == outcome


def test_a_claim_is_held_if_all_of_it_is():
    better, close = Relation("a", "<", "b"), Relation("b", "~", "c", 0.1)
    rule = Relations(better, close)
    held = runs_of(a=[1.0, 1.1], b=[2.0, 2.1], c=[2.01, 2.11])
    assert rule(held).outcome == "held"
    wide = runs_of(a=[1.0, 1.1], b=[2.0, 2.1], c=[2.0, 2.3])
    assert rule(wide).outcome == "not resolved"
    against = runs_of(a=[3.0, 3.1], b=[2.0, 2.1], c=[2.0, 2.3])
    assert rule(against).outcome == "not held"
    assert [line[2] for line in rule(against).lines] == ["not held", "not resolved"]
    assert [line[0] for line in rule(runs_of(a=[1.0], b=[2.0])).lines] == ["a < b"]
    aside = Relations(better, also=(Relation("c", "<", "b"),))(held)
    assert (aside.outcome, aside.also[0][2]) == ("held", "not held")
    diverged = runs_of(a=[1.0, math.nan], b=[2.0, 2.1], c=[2.01, 2.11])
    assert rule(diverged).outcome == "not resolved"


def lion(run):
    """Changes that depend on the base as it is at a size."""
    return {"optimizer": Lion(), "step.accumulate": run.phases[0].steps // 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A study of two arms on two seeds, the learning rate tuned."""
    folder = tmp_path_factory.mktemp("study")
    base = tiny_run(folder, **{"steps": 3, "evaluate.every": 2})
    base = base.replace(data=Half(text_files(folder / "text")))
    return Study(
        name="small",
        title="A small study",
        claim="Adam is better than Lion (nobody's claim, 2026)",
        scaled="Everything.",
        base=base,
        arms=(Arm("adam", values=(1e-2, 1e-3)), Arm("lion", lion, (1e-3,))),
        rule=Relations(Relation("adam", "<", "lion")),
        sizes={
            "quick": Size({"steps": 4}, (0, 1), {"data.half": "tuning", "steps": 2}),
            "smoke": Size({}, (0,), arms=("adam",)),
        },
        tuned="optimizer.lr",
    )


class Stopped(Exception):
    pass


@pytest.fixture
def trained(monkeypatch):
    """The runs that were trained, by a function that only takes their folders."""
    found = []

    def fake(run, folder, *, restart):
        assert restart
        if len(found) == 3 and run.seed == 1:  # once
            found.append("stopped")
            raise Stopped
        RunFolder(folder).claim(run)
        (folder / "checkpoints").mkdir()
        found.append(run)
        return types.SimpleNamespace(stopped=None, run=run)

    def outcome(result, folder):  # of a run with that seed and learning rate
        phase = result.run.phases[0]
        loss = 2 + abs(math.log10(phase.optimizer.lr) + 3) + 0.1 * result.run.seed
        costs = dict.fromkeys(("parameters", "training_bytes", "program_bytes"), 1000)
        stamp = {
            "commit": f"commit{result.run.seed}",
            "date": f"2026-11-0{1 + result.run.seed % 9}",
        }
        more = stamp | {"tokens": 384, "flops": 1e9, "seconds": 1.0, "curve": [], "validation": []}
        return {"loss": loss, "losses": {}, "steps": phase.steps, **costs, **more}

    monkeypatch.setattr(study, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(study, "train", fake)
    monkeypatch.setattr(study, "outcome_of", outcome)
    return found


def test_a_study_runs_resumes_and_reports(small, tmp_path, capsys, trained):
    go = functools.partial(study.main, small)
    argv = ["--quick", "--workdir", str(tmp_path)]
    with pytest.raises(Stopped):
        go([*argv, "--arms", "adam"])
    assert [run.phases[0].optimizer.lr for run in trained[:3]] == [1e-2, 1e-3, 1e-3]
    assert [run.phases[0].data.half for run in trained[:3]] == ["tuning", "tuning", "report"]
    assert [run.phases[0].steps for run in trained[:3]] == [2, 2, 4]
    assert [run.seed for run in trained[:3]] == [1000, 1000, 0]
    assert go([*argv, "--arms", "adam"]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert go(argv) == 0
    assert [run.seed for run in trained[4:]] == [1, 0, 1]  # what was finished is skipped
    assert [type(run.phases[0].optimizer) for run in trained[4:]] == [AdamW, Lion, Lion]
    assert [run.phases[0].step.accumulate for run in trained[4:]] == [1, 2, 2]
    assert list(tmp_path.rglob("checkpoints")) == []

    results = json.loads((tmp_path / "quick" / "results.json").read_text())
    assert dict(results["arms"][0]["tried"]).keys() == {1e-2, 1e-3}
    assert [(r["arm"], r["seed"], r["value"]) for r in results["runs"]] == [
        ("adam", 0, 1e-3), ("adam", 1, 1e-3), ("lion", 0, 1e-3), ("lion", 1, 1e-3),
    ]  # fmt: skip
    assert results["outcome"] == "not held"  # these arms' losses are equal
    assert results["relations"] == [
        {"asked": "adam < lion", "mean": 0.0, "half": 0.0, "outcome": "not held"}
    ]
    page = (tmp_path / "quick" / "report.md").read_text()
    for words in (
        small.claim,
        "**Outcome: not held.**",
        "| adam | 0.001 | 2.050 ± 0.635 |  | 1,000 |",
        "| lion | 0.001 | 2.050 ± 0.635 | +0.000 ± 0.000 |",
        "- `adam`: 0.001: 102.000, 0.01: 103.000; taken: 0.001 (at the edge of the grid)",
        "- `lion`: `optimizer` = `Lion()`, `step.accumulate` = `2`",
        "`python -m experiments.small --quick`, 2026-11-02, commit commit0 and commit1, ",
    ):
        assert words in page
    results["runs"][2]["value"] = None  # of an arm that has no values of its own
    assert [row["optimizer.lr"] for row in reports.costs(results)] == ["0.001", "the base's"]

    other = dataclasses.replace(small, base=small.base.replace(**{"model.width": 32}))
    with pytest.raises(ConfigError, match=r"with other choices \(model.width\)"):
        study.main(other, [*argv, "--report-only"])


def test_time_only_trains_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "use_compilation_cache", lambda: None)
    argv = ["--smoke", "--workdir", str(tmp_path), "--time-only"]
    assert study.main(small, [*argv, "--rounds", "1", "--round-seconds", "0.01"]) == 0
    results = json.loads((tmp_path / "smoke" / "results.json").read_text())
    assert results["runs"] == []
    rates = results["timing"]["rates"]
    assert set(rates) == {"adam"}
    assert 0 < rates["adam"]["low"] <= rates["adam"]["tokens_per_second"] <= rates["adam"]["high"]
    assert study.main(small, [*argv[:3], "--report-only"]) == 0  # which keeps the timing
    again = json.loads((tmp_path / "smoke" / "results.json").read_text())
    assert again["timing"] == results["timing"]


def test_halves_of_the_validation_text(tmp_path):
    whole = text_files(tmp_path)
    report, tuning = (Half(whole, half).open("validation") for half in ("report", "tuning"))
    assert sorted([*report, *tuning]) == sorted(whole.open("validation"))
    assert not set(report) & set(tuning)
    assert list(Half(whole).open("train")) == list(whole.open("train"))


def test_wrong_studies_are_refused(small):
    arms = (Arm("a"), Arm("a"))
    for change, field in (
        ({"arms": arms, "rule": Relations()}, "arms"),
        ({"rule": Relations(Relation("adam", "<", "sgd"))}, "rule"),
        ({"sizes": {"huge": Size({})}}, "sizes"),
        ({"sizes": {"quick": Size({}, arms=("sgd",))}}, "sizes.quick.arms"),
    ):
        with pytest.raises(ConfigError) as error:
            dataclasses.replace(small, **change)
        assert error.value.field == field


def test_the_ledger_is_that_of_the_results():
    page = reports.README.read_text(encoding="utf-8")
    assert reports.with_ledger(page) == page, (
        "run: python -c 'from experiments import reports; reports.write_ledger()'"
    )


def test_a_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reports, "HERE", tmp_path)
    found = {
        "study": "s",
        "claim": "c",
        "size": "full",
        "outcome": "not held",
        "date": "2026-11-21",
    }
    folder = tmp_path / "results" / "s" / "full"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    page = reports.with_ledger(
        f"before\n\n{reports.MARKS[0]}\n\nold\n\n{reports.MARKS[1]}\n\nafter\n"
    )
    assert "| [s](results/s/full/report.md) | c | full | not held | 2026-11-21 |" in page
    assert "old" not in page
    assert page.startswith("before")
    assert page.endswith("after\n")
    with pytest.raises(ValueError, match="no marks"):
        reports.with_ledger("nothing")


def test_low_rank_benchmark_smoke(tmp_path, monkeypatch):
    """The whole path; and that the run of every arm, size and value can be made."""
    made = low_rank_benchmark.STUDY
    for size in made.sizes.values():
        for arm in made.arms:
            for value in arm.values:
                run = made.run(size, arm, 0, value)
                assert run.phases[0].optimizer.lr == value
    monkeypatch.setattr(study, "use_compilation_cache", lambda: None)
    assert study.main(made, ["--smoke", "--workdir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "smoke" / "results.json").read_text())
    full, sltrain = results["runs"]
    assert (full["arm"], sltrain["arm"]) == ("full", "sltrain")
    for run in (full, sltrain):
        assert 5 < run["loss"] < 7
        assert run["losses"] == {"causal": run["loss"]}
        assert (run["steps"], run["tokens"]) == (2, 64)
        assert run["seconds"] > 0
        assert run["flops"] > 0
    assert [tokens for tokens, _ in full["curve"]] == [64]
    assert full["validation"] == [[64, full["loss"]]]
    # Parameters, gradients and two moments; of SLTrain also a byte for each value's place.
    assert full["training_bytes"] == 4 * 4 * full["parameters"] + 4 * COUNTERS
    places = sltrain["training_bytes"] - 4 * 4 * sltrain["parameters"] - 4 * COUNTERS
    assert 0 < places < 0.1 * sltrain["parameters"]
    assert results["outcome"] == "unfinished"
    assert results["relations"][0]["outcome"] == "not resolved"  # one seed


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments import plots

    run = {"parameters": 10, "training_bytes": 40}
    runs = [run | r for r in runs_of(a=[1.0, 1.1], b=[2.0, 2.2])]
    for one in runs:
        one["curve"] = [[i, (5.0 + one["seed"]) / i] for i in range(1, 41)]
    results = {"title": "t", "arms": [{"name": n} for n in "abc"], "runs": runs}
    figure = plots.curves(results)
    (axes,) = figure.axes
    first = axes.lines[0]
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert list(first.get_xdata()) == list(range(2, 41))
    assert first.get_ydata()[0] == pytest.approx((5.5 + 2.75) / 2)  # over seeds, and smooth
    assert plots.write(tmp_path, results) == ["curves.png", "costs.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "costs.png"))
