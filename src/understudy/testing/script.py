"""Scripts: what a simulation does to its runtimes, decided by the seed before anything runs.

An act says how many steps pass before it, what is done, and two numbers that the doing interprets.
So any act can be left out and the rest still makes sense: that is how failures are shrunk.
"""

from __future__ import annotations

import random
from typing import Final

import msgspec


class Act(msgspec.Struct, frozen=True):
    """``verb``, after ``gap`` steps; ``a`` and ``b`` choose among what is there then."""

    gap: int
    verb: str
    a: int
    b: int

    def __str__(self) -> str:
        return f"{self.gap:>3} {self.verb} {self.a} {self.b}"


WORK: Final = {
    "create": 6,
    "prompt": 40,
    "again": 4,
    "abort": 8,
    "compact": 6,
    "update": 4,
    "revert": 4,
    "unrevert": 2,
    "fork": 2,
    "edit": 3,
    "reply": 12,
    "delete": 4,
    "look": 4,
    "reset": 2,
    "listen": 4,
    "track": 8,
    "rest": 8,
}
FAULTS: Final = {
    "crash": 6,
    "kill": 3,
    "kill_at": 6,
    "close": 2,
    "second": 3,
    "freeze": 3,
    "fail": 7,
    "hang": 3,
    "deliver": 8,
    "jump": 3,
}


def write(seed: int | str, *, steps: int, faults: bool = True) -> tuple[Act, ...]:
    """The script of a seed, about ``steps`` steps long."""
    chance = random.Random(f"{seed}/script")
    verbs = {**WORK, **FAULTS} if faults else WORK
    names, weights = list(verbs), list(verbs.values())
    pace = chance.choice((2, 5, 5, 12))
    acts = [Act(0, "create", number, 0) for number in range(chance.choice((1, 2, 3)))]
    left = steps
    while left > 0:
        gap = min(left, chance.randrange(2 * pace))
        (verb,) = chance.choices(names, weights)
        acts.append(Act(gap, verb, chance.randrange(1 << 16), chance.randrange(1 << 16)))
        left -= gap
    return tuple(acts)
