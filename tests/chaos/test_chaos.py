"""A run that is killed again and again ends, bit for bit, as the one that was left alone.

The long version, with every family of objectives: ``python -m experiments.chaos``.
"""

import signal

import pytest

from experiments.chaos import Kill, ordeal
from experiments.chaos_cases import CASES
from experiments.lives import Lives
from jaxpt.errors import Exit

KILLS = {
    # Phases, masks that change, workers.
    "everything": [
        Kill("worker"),
        Kill("evaluation", after=0.01),
        Kill("save", nth=2, after=0.02),
    ],
    # Weights of domains that follow the losses. The second signal comes while XLA compiles.
    "mixing": [Kill("step", nth=3, after=0.004), Kill("compile", number=signal.SIGTERM)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_is_the_run_that_was_left_alone(tmp_path, name):
    kills = KILLS[name]
    said: list[str] = []
    lives = Lives(tmp_path)
    run = CASES[name](10)
    blows, wrong = ordeal(lives, name, run, iter(kills), len(kills), said.append)
    assert not wrong, "\n".join(said)
    assert [blow.meant for blow in blows] == [kill.moment for kill in kills]
    stopped = [blow for blow in blows if blow.number == signal.SIGTERM]
    assert all(blow.codes == [Exit.TERMINATED] for blow in stopped), said


@pytest.mark.slow
def test_two_processes_where_one_is_killed_or_stopped(tmp_path):
    """The other says so, or stops with it; and the run goes on."""
    kills = [Kill("step", victim=1), Kill("step", victim=1, number=signal.SIGTERM)]
    lives, name, said = Lives(tmp_path, 2), "prefix", []
    blows, wrong = ordeal(lives, name, CASES[name](10), iter(kills), len(kills), said.append)
    assert not wrong, "\n".join(said)
    assert [blow.codes for blow in blows] == [
        [Exit.LOST_PROCESS, -signal.SIGKILL],
        [Exit.TERMINATED] * 2,
    ]
    first = (tmp_path / "prefix.0.log").read_text()
    assert "error: process 1 (" in first
    assert "is gone without a word; start all processes again" in first
    assert "stopped by SIGTERM at step" in first
