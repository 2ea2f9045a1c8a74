"""Rows, figures and targets; and medians over interleaved rounds."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec


class Figure(msgspec.Struct, kw_only=True):
    """One line of the table.

    Attributes:
        row: the benchmark it belongs to.
        what: what was measured.
        value: the figure, in ``unit``.
        against: the floor or peer measured in the same run, or "".
        base: its figure, in ``unit``.
        ratio: how many times better than the base; above 1 is better. Or, for flatness and
            overhead, how many times the base it is, and the target is an upper bound.
        target: the words of the target, or "".
        met: whether it is met; None when there is no target or nothing to compare with.
        note: why a figure is what it is, or why there is none.
    """

    row: str = ""
    what: str
    value: float | None = None
    unit: str = ""
    against: str = ""
    base: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


Sense = Literal["at least", "at most"]


def cores() -> Iterator[str]:
    """Every core, then one with all threads of this process on it; says which for a line's name.

    Hand-offs between cores can cost more than what is handed over: neither tells all.
    """
    before = sorted(os.sched_getaffinity(0))
    yield f"on {len(before)} cores"
    if len(before) > 1:
        _pin(before[:1])
        try:
            yield "on one core"
        finally:
            _pin(before)


def _pin(cores: Sequence[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def figure(
    what: str, value: float, unit: str, sense: Sense, limit: float, note: str = ""
) -> Figure:
    """A figure with a target of its own."""
    met = value >= limit if sense == "at least" else value <= limit
    sign = "≥" if sense == "at least" else "≤"
    return Figure(
        what=what, value=value, unit=unit, target=f"{sign} {limit:,g} {unit}", met=met, note=note
    )


def versus(
    what: str, value: float, unit: str, against: str, base: float, limit: float, note: str = ""
) -> Figure:
    """A rate that should be at least ``limit`` times a peer's."""
    ratio = value / base
    return Figure(
        what=what,
        value=value,
        unit=unit,
        against=against,
        base=base,
        ratio=ratio,
        target=f"≥ {limit:g} ×",
        met=ratio >= limit,
        note=note,
    )


def flat(
    what: str, value: float, unit: str, against: str, base: float, limit: float, note: str = ""
) -> Figure:
    """A cost that should be at most ``limit`` times what it was."""
    ratio = value / base
    return Figure(
        what=what,
        value=value,
        unit=unit,
        against=against,
        base=base,
        ratio=ratio,
        target=f"≤ {limit:g} ×",
        met=ratio <= limit,
        note=note,
    )


def over_floor(
    what: str, value: float, unit: str, against: str, base: float, note: str = ""
) -> Figure:
    """A rate beside what is possible at all: it has no target."""
    return Figure(
        what=f"… over the floor: {what}",
        value=value,
        unit=unit,
        against=against,
        base=base,
        ratio=value / base,
        note=note,
    )


def skipped(what: str, why: str) -> Figure:
    return Figure(what=what, note=f"skipped: {why}")


class Run(msgspec.Struct):
    """What a row is given: where to work, and how long it may take."""

    directory: Path
    quick: bool
    paths: int = 0

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    def path(self) -> Path:
        """A place for one more database."""
        self.paths += 1
        return self.directory / f"{self.paths}.db"


Row = Callable[[Run], Iterator[Figure]]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """Enter a benchmark under its name."""

    def enter(function: Row) -> Row:
        ROWS[name] = function
        return function

    return enter


def interleaved(rounds: int, contenders: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each contender's figure, over rounds in which each has its turn.

    A noisy neighbour then slows all of them, and the ratio stays.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            gc.collect()
            figures[name].append(contender())
    return {name: statistics.median(values) for name, values in figures.items()}


def rate(count: int, work: Callable[[], Any]) -> float:
    """How many of ``count`` were done in a second."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def rss_bytes() -> int:
    """This process's resident memory."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
