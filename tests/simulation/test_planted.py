"""The simulator catches every planted bug within a thousand seeds."""

import pytest
from planted import PLANTED

from understudy.testing import Simulation

SEEDS = 1_000
# Where to begin with those that are caught late: what comes before is known to be in vain.
BEGIN: dict[str, int] = {
    "ask again what is allowed by now": 35,
    "go on after a refusal": 60,
    "run hooks of the bypassed": 195,
    "stay in retry": 10,
    "withdraw nothing that waits": 10,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED, ids=[bug.name for bug in PLANTED])
def test_a_planted_bug_is_caught(bug):
    with bug.plant():
        for seed in range(BEGIN.get(bug.name, 0), SEEDS):
            if Simulation(seed).run().findings:
                return
    pytest.fail(f"{bug.name}: not caught within {SEEDS} seeds")
