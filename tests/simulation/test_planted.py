"""The simulator catches every planted bug within a thousand seeds."""

import pytest
from planted import PLANTED

from understudy.testing import Simulation

SEEDS = 1_000
# Where to begin with those that are caught late: what comes before is known to be in vain.
BEGIN: dict[str, int] = {
    "bear silence for twice its time": 18,
    "believe late reports": 52,
    "charge a call for people": 67,
    "charge a turn for people": 215,
    "do not watch calls": 132,
    "do not watch executions": 23,
    "forget quarantine at a restart": 37,
    "forget the time of turns": 108,
    "forget to forget executions": 23,
    "give up executions at first sight": 75,
    "go on after a refusal": 238,
    "leave alone what was reset": 47,
    "leave asks open": 212,
    "let grandchildren live": 38,
    "lose the mail of a lost session": 51,
    "miss a reset by others": 37,
    "queue without end": 81,
    "run hooks of the bypassed": 62,
    "run tools again": 35,
    "take a revert back in memory only": 308,
    "tell nobody of a quarantine": 110,
    "trust a claim after a freeze": 192,
    "withdraw nothing that waits": 48,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED, ids=[bug.name for bug in PLANTED])
def test_a_planted_bug_is_caught(bug):
    with bug.plant():
        for seed in range(BEGIN.get(bug.name, 0), SEEDS):
            if Simulation(seed).run().findings:
                return
    pytest.fail(f"{bug.name}: not caught within {SEEDS} seeds")
