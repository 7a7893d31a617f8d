"""A run that is killed again and again ends, bit for bit, as the one that was left alone.

The long version, with every family of objectives: ``python -m experiments.chaos``.
"""

import signal

import pytest

from experiments.chaos import Kill, differences, ordeal, strike
from experiments.chaos_cases import CASES, of_processes
from experiments.lives import Lives
from jaxpt.errors import Exit
from jaxpt.files import read_json

KILLS = [
    Kill("evaluation", after=0.01),
    Kill("save", after=0.02),
    Kill("compile", number=signal.SIGTERM),  # hears of it there
]


@pytest.mark.slow
def test_a_killed_run_is_the_run_that_was_left_alone(tmp_path):
    """Of two phases, with masks that change and domains whose weights follow the losses."""
    said: list[str] = []
    run = CASES["everything"](12)
    blows, wrong = ordeal(Lives(tmp_path), "run", run, KILLS, len(KILLS), said.append)
    assert not wrong, "\n".join(said)
    assert [blow.meant for blow in blows] == [kill.moment for kill in KILLS]
    assert blows[-1].codes == [Exit.TERMINATED], said


@pytest.mark.slow
def test_two_processes_where_one_is_killed_or_stopped(tmp_path):
    """The other says so, or stops with it; and the run goes on."""
    lives = Lives(tmp_path, 2)
    run, folder = of_processes(CASES["prefix"](10), 2), tmp_path / "run"
    lives.finish(run, tmp_path / "straight")
    killed = strike(lives, run, folder, Kill("step", victim=1))
    assert killed is not None
    assert killed.codes == [Exit.LOST_PROCESS, -signal.SIGKILL]
    last = (tmp_path / "run.0.log").read_text().splitlines()[-1]
    assert last.startswith("error: process 1 (")
    assert last.endswith("is gone without a word; start all processes again to go on from the last "
                         "checkpoint")  # fmt: skip
    status = read_json(folder / "status.json")
    assert status["state"] == "failed"
    assert "process 1" in status["cause"]
    stopped = strike(lives, run, folder, Kill("step", victim=1, number=signal.SIGTERM))
    assert stopped is not None
    assert stopped.codes == [Exit.TERMINATED] * 2
    assert read_json(folder / "status.json")["state"] == "stopped"
    assert "stopped by SIGTERM at step" in (tmp_path / "run.0.log").read_text()
    lives.finish(run, folder)
    assert differences(tmp_path / "straight", folder) == []
