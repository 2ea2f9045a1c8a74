"""Shrinking: the least script that still breaks the same guarantee."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from understudy.testing.script import Act
from understudy.testing.simulation import Result, Simulation


def shrink(result: Result, *, runs: int = 300) -> Result:
    """Leave out acts, many at a time and then one by one, for as long as the finding stays.

    ``runs`` bounds the attempts. Gives ``result`` itself if nothing can be left out.
    """
    smallest = result
    guarantee = result.findings[0][0]

    def fails(script: Sequence[Act]) -> bool:
        nonlocal smallest, runs
        runs -= 1
        tried = Simulation(result.seed, script=script).run()
        same = any(finding[0] == guarantee for finding in tried.findings)
        if same:
            smallest = tried
        return same

    size = max(1, len(result.script) // 2)
    while runs > 0:
        left = _without(smallest.script, size, fails, lambda: runs > 0)
        if size == 1 and not left:
            break
        size = max(1, size // 2)
    return smallest


def _without(
    script: tuple[Act, ...],
    size: int,
    fails: Callable[[Sequence[Act]], bool],
    go_on: Callable[[], bool],
) -> bool:
    """Try to leave out ``size`` acts at each place. Whether any could go."""
    place, left = 0, False
    while place < len(script) and go_on():
        shorter = script[:place] + script[place + size :]
        if fails(shorter):
            script, left = shorter, True
        else:
            place += size
    return left
