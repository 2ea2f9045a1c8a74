"""Sessions by the thousand: created, deleted, and recovered at start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial

from benchmarks import stage
from benchmarks.measure import Figure, Run, figure, interleaved, row
from understudy import Runtime, Session


@row("sessions")
def sessions(run: Run) -> Iterator[Figure]:
    """Created and deleted, durable, with 512 callers at a time."""
    count = run.size(10_000, 3_000)
    with stage.runtime(run.path(), model=stage.InstantModel()) as runtime:
        made: list[Session] = []
        medians = interleaved(
            run.rounds,
            {
                "created": lambda: _create(runtime, count, made),
                "deleted": lambda: _delete(made),
            },
        )
    yield figure("sessions created", medians["created"], "/s", "at least", 8_000)
    yield figure("sessions deleted", medians["deleted"], "/s", "at least", 5_000)


def _create(runtime: Runtime, count: int, made: list[Session]) -> float:
    async def create() -> float:
        async def one() -> None:
            made.append(await runtime.create_session())

        start = time.perf_counter()
        await stage.in_flight(512, (one for _ in range(count)))
        return count / (time.perf_counter() - start)

    return asyncio.run(create())


def _delete(made: list[Session]) -> float:
    count = len(made)

    async def delete() -> float:
        start = time.perf_counter()
        await stage.in_flight(512, (partial(session.delete) for session in made))  # type: ignore[arg-type]
        return count / (time.perf_counter() - start)

    figure = asyncio.run(delete())
    made.clear()
    return figure


@row("recovery")
def recovery(run: Run) -> Iterator[Figure]:
    """Start after a kill, and start beside a great many sessions that need nothing."""
    count = run.size(100_000, 5_000)
    path = run.path()
    stage.interrupted(path, count)
    limit_s = 12.0 * count / 100_000
    start_s, cpu_s, recovered = _start(path)
    yield figure(
        f"start with {count:,} interrupted sessions",
        start_s,
        "s",
        "at most",
        limit_s,
        f"{recovered:,} closed and settled, {recovered / start_s:,.0f}/s",
    )
    yield Figure(what="… its CPU, all threads, a session", value=cpu_s / count * 1e6, unit="µs")
    clean = run.size(1_000_000, 50_000)
    path = run.path()
    stage.filled(path, clean)
    start_s, *_ = _start(path)
    yield figure(f"start with {clean:,} clean sessions", start_s, "s", "at most", 1.0)


def _start(path: object) -> tuple[float, float, int]:
    runtime = Runtime(path, model=stage.InstantModel(), command_timeout_s=600.0)  # type: ignore[arg-type]
    before, cpu_before = time.perf_counter(), time.process_time()
    runtime.start()
    took_s, cpu_s = time.perf_counter() - before, time.process_time() - cpu_before
    unfinished = len(runtime.engine.store.read.unfinished_sessions())
    assert unfinished == 0, f"{unfinished} sessions are not whole"
    recovered = runtime.cursor
    runtime.close(timeout_s=60.0)
    return took_s, cpu_s, recovered
