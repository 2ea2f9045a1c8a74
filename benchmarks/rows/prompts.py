"""Prompts accepted: durable at FULL, with everything that belongs to one in place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from benchmarks import stage
from benchmarks.floors import Tape, one_row_ms, over_sqlite, raw_group_commit
from benchmarks.measure import Figure, Run, cores, figure, interleaved, over_floor, row, versus
from benchmarks.peers import agents_items, missing, stock_prompts
from understudy import Runtime, Session


@row("prompts")
def prompts(run: Run) -> Iterator[Figure]:
    """Message, part, inbox row and events of each prompt, with 512 callers waiting for theirs."""
    count, sessions = run.size(16_384, 4_096), 512
    stock_count = run.size(3_000, 600)
    with stage.runtime(run.path(), model=stage.HeldModel()) as runtime:
        tape = Tape(runtime)
        contenders = {
            "ours": lambda: tape.record(lambda: _accept(runtime, sessions, count, tape.start)),
            "alone": lambda: count / tape.replayed_s(run.path()),
            "commit": lambda: one_row_ms(run.path()),
            "stock": lambda: stock_prompts(run.path(), actors=64, prompts=stock_count, window=512),
            "raw": lambda: raw_group_commit(run.path(), prompts=count * 4),
        }
        for where in cores():
            yield from _accepted(interleaved(run.rounds // 2 + 1, contenders), where)
    why = missing("agents")
    if why is None:
        items = agents_items(run.path(), run.size(4_000, 1_000))
        yield Figure(
            what="items kept by the OpenAI Agents SDK session",
            value=items,
            unit="/s",
            note="for scale: a prompt and an answer in one call, one caller",
        )
    else:
        yield Figure(what="OpenAI Agents SDK session", note=f"skipped: {why}")


def _accepted(medians: Mapping[str, float], where: str) -> Iterator[Figure]:
    ours, what = medians["ours"], f"prompts accepted, 512 in flight, {where}"
    yield figure(what, ours, "/s", "at least", 8_000)
    against = "stock pykka + peewee autocommit, one row"
    yield versus(what, ours, "/s", against, medians["stock"], 10.0)
    yield over_sqlite(medians)
    yield over_floor(
        "sqlite3, one row each, groups of 512",
        ours,
        "/s",
        "sqlite3 executemany",
        medians["raw"],
        "a prompt is 4 rows here",
    )


def _accept(runtime: Runtime, sessions: int, count: int, started: Callable[[], None]) -> float:
    """Prompts per second to sessions that are busy already: they are accepted, and wait."""

    async def accept() -> float:
        handles = [await runtime.create_session() for _ in range(sessions)]
        await stage.in_flight(sessions, (partial(_prompt, handle) for handle in handles))
        jobs = (partial(_prompt, handles[number % sessions]) for number in range(count))
        started()
        start = time.perf_counter()
        await stage.in_flight(512, jobs)
        return count / (time.perf_counter() - start)

    return asyncio.run(accept())


async def _prompt(session: Session) -> None:
    await session.prompt("What is 1 + 2?")
