"""The simulator: the same seed tells the same story, and no seed tells of a broken guarantee."""

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from understudy.testing import Act, Simulation

SEEDS = int(os.environ.get("UNDERSTUDY_SEEDS", "1000"))
FIRST = int(os.environ.get("UNDERSTUDY_FIRST_SEED", "0"))


def digests(seeds: str, hash_seed: str) -> str:
    code = (
        "import sys\n"
        "from understudy.testing import Simulation\n"
        "for seed in sys.argv[1].split():\n"
        "    result = Simulation(int(seed), keep_trace=True).run()\n"
        "    print(seed, result.digest, *result.trace, sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, seeds],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return done.stdout


def test_the_same_seed_gives_the_same_trace_in_another_process():
    seeds = f"{' '.join(map(str, range(30)))} 151"  # a process of 151's takes its time to close
    first, second = digests(seeds, "1"), digests(seeds, "2")
    assert first.count("\n") > 3_000
    assert first == second


def test_another_seed_gives_another_trace():
    assert Simulation(1).run().digest != Simulation(2).run().digest


def test_a_script_can_be_played_by_hand():
    script = [Act(0, "create", 0, 0), Act(20, "prompt", 1, 0), Act(20, "kill", 0, 0)]
    result = Simulation("by hand", script=script).run()
    assert not result.findings
    assert result.events > 5


# What a run of many seeds must have come by, or it has not looked.
SEEN = {
    "actor.restarted",
    "hook after_turn",
    "hook before_compaction",
    "hook before_prompt",
    "message.part.removed",
    "message.removed",
    "permission.replied",
    "question.replied",
    "request: summary",
    "session.compacted",
    "session.quarantined",
    "session.reset",
    "told events.overflow",
    "told message.part.delta",
    "told session.deleted",
    "tracker claim",
    "tracker unbypass",
}


def one(seed: int) -> tuple[int, tuple[tuple[str, str], ...], dict[str, int]]:
    result = Simulation(seed).run()
    return seed, result.findings, result.seen


@pytest.mark.timeout(600)
def test_no_seed_breaks_a_guarantee(capsys):
    began = time.monotonic()
    found, seen = {}, set()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for seed, broken, what in pool.map(one, range(FIRST, FIRST + SEEDS), chunksize=20):
            seen |= what.keys()
            if broken:
                found[seed] = broken
    with capsys.disabled():
        rate = SEEDS / (time.monotonic() - began)
        print(f"\n  seeds {FIRST} to {FIRST + SEEDS - 1}: {rate:.1f} a second")  # noqa: T201 - the report of a long run
    assert not found
    assert seen >= SEEN
