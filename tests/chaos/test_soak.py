"""What ``experiments.soak`` makes of what it has seen; the run itself takes minutes."""

import dataclasses
import json
import os

import numpy as np
import pytest

from experiments.lives import Folder
from experiments.soak import Sample, sample, slope, verdict


def watched(**changes):
    """Samples of a run that holds on to nothing; changes are functions of the step."""
    rng = np.random.default_rng(0)
    steady = Sample(1, 300.0, 500.0, 70, 40, 2)
    found = []
    for step in range(10, 2001, 10):
        noise = {"step": step, "memory": 300 + rng.normal()}
        grown = {name: change(step) for name, change in changes.items()}
        found.append(dataclasses.replace(steady, **noise | grown))
    return found


def test_a_run_that_holds_on_to_nothing():
    found = verdict(watched(files=lambda step: 210 if step % 50 == 0 else 70), left=0)
    assert found["wrong"] == []  # files of a save under way are no leak
    assert abs(found["MB per 100 steps"]) < 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": lambda step: 300 + step / 50}, "memory grows by 2.00 MB per 100 steps"),
        ({"workers_memory": lambda step: step / 90}, "workers_memory grows by 1.11 MB"),
        ({"files": lambda step: 70 + step // 400}, "files: at most"),
        ({"threads": lambda step: 40 + step // 1500}, "threads: at most"),
        ({"children": lambda step: 2 + step // 1500}, "children: at most"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_a_run_that_holds_on_to_something(changes, said):
    (wrong,) = verdict(watched(**changes), left=0)["wrong"]
    assert said in wrong


def test_processes_left_behind_are_told():
    assert verdict(watched(), left=3)["wrong"] == ["3 processes were left behind"]


def test_the_slope_is_that_of_most():
    steps = np.arange(0.0, 1000.0, 10.0)
    values = 0.02 * steps
    values[::7] += 50.0  # what is held for a moment
    assert slope(steps, values) == pytest.approx(2.0, rel=0.1)


def test_a_sample_is_of_the_process_that_is_asked_for():
    here = sample(os.getpid(), 5)
    assert here is not None
    with open(os.devnull), open(os.devnull):
        more = sample(os.getpid(), 6)
    assert more is not None
    assert more.files == here.files + 2
    assert here.memory > 10


def test_what_a_folder_shows(tmp_path):
    """Of the process 7, which went on from step 4 and evaluates at 5."""

    def moment(row=None, pid=7, save=False):
        for name, value in (
            ("status.json", {"pid": pid, "resumed_from": 4}),
            ("metrics.jsonl", row),
        ):
            (tmp_path / name).write_text(json.dumps(value) + "\n" if value else "")
        partial = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
        partial.mkdir(parents=True) if save else None
        try:
            return Folder(tmp_path, 5).moment(7)
        finally:
            partial.rmdir() if save else None

    assert moment(pid=6) == "start"
    assert moment({"step": 4}) == "compile"
    assert moment({"step": 5}) == moment({"step": 5}, save=True) == "evaluation"
    assert moment({"step": 5, "eval/a/loss": 1.0}) == moment({"step": 6}) == "step"
    assert moment({"step": 6}, save=True) == moment(pid=6, save=True) == "save"
