"""``understudy chaos soak``: steady load with crashes, and whether anything grows.

Sessions are made, prompted, aborted, crashed and deleted at a steady rate in one runtime with a
scripted model, while memory, descriptors, threads, the log and the journal are measured. What is
still growing at the end is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy import Retention, Runtime, ScriptedModel, Session, tool
from understudy.actors.models.scripted import Call, Say, Wait
from understudy.errors import UnderstudyError

WORKERS: Final = 24
KEPT: Final = 200  # sessions, beyond those at work
SAMPLES: Final = 240
LEAST: Final = 3  # to have a middle and an end
CRASHED: Final = 0.02  # of turns
ABORTED: Final = 0.04
RETENTION: Final = Retention(events=50_000)


class Sample(msgspec.Struct, frozen=True):
    """What was measured at one moment. Sizes in bytes, time in seconds from the start."""

    time_s: float
    rss: int
    descriptors: int
    threads: int
    wal: int
    database: int
    journal: int
    live: int
    turns: int
    crashes: int


# What may be larger at the end than it was in the middle: by a factor, and by so much beyond it.
# The journal is trimmed once a minute, and the log truncated every so many commits: they go up and
# down, so their highest points are compared.
SLACK: Final[dict[str, tuple[float, float]]] = {
    "rss": (1.10, 8e6),
    "descriptors": (1.0, 8),
    "threads": (1.0, 12),
    "wal": (1.25, 16e6),
    "database": (1.15, 16e6),
    "journal": (1.25, 20_000),
    "live": (1.25, 64),
}


@tool(idempotent=True)
async def look(number: int) -> str:
    """Look something up."""
    await asyncio.sleep(0.005)
    return f"It is {number}. " * 20


def script() -> ScriptedModel:
    words = [Say("one moment "), Wait(0.002), Say("please "), Call("look", {"number": 3})]
    return ScriptedModel([words, "It is 3."], repeat=True, record=10)


class Soak:
    """The load: ``WORKERS`` coroutines, each with one session at a time."""

    def __init__(self, runtime: Runtime, *, until_s: float, seed: int) -> None:
        self.turns = 0
        self.crashes = 0
        self._runtime = runtime
        self._until_s = until_s
        self._chance = random.Random(seed)
        self._kept: deque[Session] = deque()

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until_s

    async def run(self) -> None:
        await asyncio.gather(*(self._work() for _ in range(WORKERS)))

    async def _work(self) -> None:
        while not self.over:
            session = await self._runtime.create_session(title="soak")
            for _ in range(4):
                await self._turn(session)
            self._kept.append(session)
            if len(self._kept) > KEPT:
                await self._kept.popleft().delete(missing_ok=True)

    async def _turn(self, session: Session) -> None:
        """One turn, and what befalls it: usually nothing."""
        fate = self._chance.random()
        try:
            turn = await session.prompt("What is it?")
            if fate < CRASHED:
                self.crashes += 1
                await session._crash("soak")  # noqa: SLF001 - it is there for chaos
            elif fate < CRASHED + ABORTED:
                await turn.abort()
            await turn.result(timeout_s=30)
        except UnderstudyError:
            if fate >= CRASHED + ABORTED:
                raise
        self.turns += 1


def sample(runtime: Runtime, soak: Soak, since_s: float) -> Sample:
    path = Path(runtime.engine.store.path)
    oldest, newest = runtime.engine.store.read.cursors()
    return Sample(
        time_s=round(time.monotonic() - since_s, 2),
        rss=_rss(),
        descriptors=len(list(Path("/dev/fd").iterdir())),
        threads=threading.active_count(),
        wal=_size(path.with_name(f"{path.name}-wal")),
        database=_size(path),
        journal=newest - oldest + 1,
        live=len(runtime.engine.registry),
        turns=soak.turns,
        crashes=soak.crashes,
    )


def _rss() -> int:
    """Resident memory now; where that is not to be had, the highest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def growth(samples: list[Sample]) -> dict[str, tuple[float, float, bool]]:
    """For each measure its level in the middle, at the end, and whether that is flat.

    The level is the highest tenth: what goes up and down is compared where it is up.
    """
    half = samples[len(samples) // 3 :]
    middle, end = half[: len(half) // 2], half[len(half) // 2 :]
    found = {}
    for name, (factor, beyond) in SLACK.items():
        before, after = (_level([getattr(each, name) for each in part]) for part in (middle, end))
        found[name] = (before, after, after <= before * factor + beyond)
    return found


def _level(values: list[float]) -> float:
    highest = sorted(values)[-max(1, len(values) // 10) :]
    return statistics.median(highest)


async def _soak(runtime: Runtime, seconds: float, seed: int, *, quiet: bool) -> list[Sample]:
    since_s = time.monotonic()
    soak = Soak(runtime, until_s=since_s + seconds, seed=seed)
    load = asyncio.create_task(soak.run())
    samples: list[Sample] = []
    while not load.done() or len(samples) < LEAST:
        await asyncio.wait((load,), timeout=max(0.05, seconds / SAMPLES))
        samples.append(await asyncio.to_thread(sample, runtime, soak, since_s))
        if not quiet:
            _progress(samples[-1], seconds)
    await load
    return samples


def _progress(now: Sample, seconds: float) -> None:
    if sys.stderr.isatty():
        done = min(30, int(30 * now.time_s / seconds))
        words = f"{now.turns:,} turns, {now.crashes:,} crashes, {now.rss / 1e6:.0f} MB"
        print(f"\r[{'█' * done}{'·' * (30 - done)}] {words}", end="", file=sys.stderr, flush=True)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Crashes are the point: their reports are no news."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def soak(args: argparse.Namespace) -> int:
    """Exit code 0 when everything was flat at the end, else 1."""
    with (
        _quiet(logging.getLogger("understudy")),
        tempfile.TemporaryDirectory(prefix="understudy-soak-") as directory,
    ):
        path = Path(directory) / "soak.db"
        with Runtime(
            path, model=script(), tools=[look], retention=RETENTION, passivate_after_s=2.0
        ) as runtime:
            samples = asyncio.run(_soak(runtime, 60.0 * args.minutes, args.seed, quiet=args.json))
    verdict = growth(samples)
    if args.plot:
        Path(args.plot).write_text(plot(samples))
    flat = all(each[2] for each in verdict.values())
    last = samples[-1]
    if args.json:
        report: dict[str, Any] = {"flat": flat, "growth": verdict, "samples": samples}
        print(msgspec.json.encode(report).decode())
    else:
        print(f"\n{last.turns:,} turns and {last.crashes:,} crashes in {last.time_s:,.0f} s")
        for name, (before, after, ok) in verdict.items():
            line = f"{name:<12} {_shown(name, before):>12} → {_shown(name, after):>12}"
            print(f"{line}   {'flat' if ok else 'GROWS'}")
        if args.plot:
            print(f"Plotted: {args.plot}")
    return 0 if flat else 1


def _shown(name: str, value: float) -> str:
    in_bytes = name in ("rss", "wal", "database")
    return f"{value / 1e6:,.1f} MB" if in_bytes else f"{value:,.0f}"


_WIDE, _HIGH, _GAP = 640, 90, 34


def plot(samples: list[Sample]) -> str:
    """Every measure over time, one below the other, as SVG."""
    height = (_HIGH + _GAP) * len(SLACK) + _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDE + 40}" height="{height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDE + 40}" height="{height}" fill="#ffffff"/>',
    ]
    span_s = max(samples[-1].time_s, 0.001)
    for row, name in enumerate(SLACK):
        values = [getattr(each, name) for each in samples]
        top, bottom = _GAP + row * (_HIGH + _GAP), _GAP + row * (_HIGH + _GAP) + _HIGH
        highest = max(*values, 1)
        points = " ".join(
            f"{20 + _WIDE * each.time_s / span_s:.1f},{bottom - _HIGH * value / highest:.1f}"
            for each, value in zip(samples, values, strict=True)
        )
        lines += [
            f'<text x="20" y="{top - 6}">{name}: at most {_shown(name, highest)}</text>',
            f'<line x1="20" y1="{bottom}" x2="{_WIDE + 20}" y2="{bottom}" stroke="#bbb"/>',
            f'<polyline points="{points}" fill="none" stroke="#3a6ea5" stroke-width="1.5"/>',
        ]
    words = f"{samples[-1].turns:,} turns, {samples[-1].crashes:,} crashes, {span_s:,.0f} s"
    lines += [f'<text x="20" y="{height - 10}">{words}</text>', "</svg>"]
    return "\n".join(lines) + "\n"
