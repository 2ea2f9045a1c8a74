"""Actors: what an idle one costs, how fast they start, how fast they answer."""

from __future__ import annotations

import asyncio
import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import stage
from benchmarks.measure import Figure, Run, cores, figure, interleaved, rate, row, rss_bytes, versus
from benchmarks.peers import StockActor
from understudy import Runtime
from understudy.actors.core.state import State
from understudy.actors.messages import Wake
from understudy.store.records import Session, SessionTime


@row("idle")
def idle(run: Run) -> Iterator[Figure]:
    """The slope of memory over sessions that are live and idle, and over passivated ones."""
    count, warm = run.size(100_000, 10_000), run.size(20_000, 4_000)
    with stage.runtime(run.path(), model=stage.InstantModel()) as runtime:
        _create(runtime, warm)
        gc.collect()
        rss, blocks = rss_bytes(), sys.getallocatedblocks()
        _create(runtime, count)
        gc.collect()
        each = (rss_bytes() - rss) / count
        yield figure(
            f"idle live session actor, over {count:,}",
            each / 1000,
            "kB",
            "at most",
            4.0,
            "session record, state, actor, mailbox: the growth of RSS",
        )
        runtime.engine.registry.passivate(0.0)
        gc.collect()
        left = max(0, sys.getallocatedblocks() - blocks) / count
        yield figure(
            f"blocks of memory that each of {count:,} passivated sessions keeps",
            left,
            "blocks",
            "at most",
            0.1,
            "counted by the interpreter; 0.1 is noise",
        )


def _create(runtime: Runtime, count: int) -> None:
    async def create() -> None:
        await stage.in_flight(512, (runtime.create_session for _ in range(count)))  # type: ignore[arg-type, return-value]

    asyncio.run(create())


@row("start")
def start(run: Run) -> Iterator[Figure]:
    """Actors brought to life, each answering once, against a thread each."""
    mine, theirs = run.size(20_000, 5_000), run.size(2_000, 500)
    with stage.runtime(run.path(), model=stage.InstantModel()) as runtime:
        numbers = iter(range(100_000_000))

        def ours() -> float:
            ids = [f"ses_{next(numbers)}" for _ in range(mine)]
            figure = rate(mine, lambda: _born(runtime, ids))
            for session_id in ids:
                runtime.engine.registry.ended(
                    session_id, runtime.engine.registry._live[session_id], None
                )
            return figure

        def stock() -> float:
            refs: list[Any] = []
            figure = rate(theirs, lambda: refs.extend(StockActor.start() for _ in range(theirs)))
            for ref in refs:
                ref.stop(block=False)
            return figure

        medians = interleaved(run.rounds, {"ours": ours, "stock": stock})
    yield versus(
        "start of session actors",
        medians["ours"],
        "/s",
        "pykka ThreadingActor",
        medians["stock"],
        10.0,
    )


def handed_over(count: int) -> float:
    """The floor of any ask that another thread answers: a queue, a lock, and two wake-ups."""
    asked: queue.SimpleQueue[threading.Lock | None] = queue.SimpleQueue()

    def answer() -> None:
        while (waiting := asked.get()) is not None:
            waiting.release()

    def ask() -> None:
        for _ in range(count):
            waiting = threading.Lock()
            waiting.acquire()
            asked.put(waiting)
            waiting.acquire()

    threading.Thread(target=answer, daemon=True).start()
    figure = rate(count, ask)
    asked.put(None)
    return figure


def _born(runtime: Runtime, ids: Sequence[str]) -> None:
    for session_id in ids:
        info = Session(id=session_id, title="", time=SessionTime(created=0, updated=0))
        runtime.engine.registry.born(session_id, State(info=info, seq=0), 1)


@row("ask")
def ask(run: Run) -> Iterator[Figure]:
    """A question to an actor and its answer: to one of 10,000 each, and to one alone."""
    many = run.size(10_000, 2_000)
    with stage.runtime(run.path(), model=stage.InstantModel()) as runtime:
        ids = [f"ses_{n}" for n in range(many)]
        _born(runtime, ids)
        refs = [StockActor.start() for _ in range(many)]
        wake = Wake()

        def ours() -> float:
            ask = runtime.engine.ask
            return rate(many, lambda: [ask(each, wake).get(timeout=10) for each in ids])

        def stock() -> float:
            return rate(many, lambda: [ref.ask(wake, timeout=10) for ref in refs])

        contenders = {"ours": ours, "stock": stock, "bare": lambda: handed_over(many)}
        medians = interleaved(
            run.rounds, {"main": ours, **{k: _in_thread(v) for k, v in contenders.items()}}
        )
        yield versus(
            f"ask over {many:,} actors",
            medians["ours"],
            "/s",
            "pykka ThreadingActor",
            medians["stock"],
            5.0,
            f"one thread asks and another answers, nothing else: {medians['bare']:,.0f}/s",
        )
        yield Figure(
            what="… asked by the main thread, whose work signals may break off",
            value=medians["main"],
            unit="/s",
        )
        for where in cores():
            yield from _ask_one(run, runtime, ids[0], where)


def _ask_one(run: Run, runtime: Runtime, session_id: str, where: str) -> Iterator[Figure]:
    count = run.size(20_000, 5_000)
    ref, wake = StockActor.start(), Wake()

    def ours() -> float:
        ask = runtime.engine.ask
        return rate(count, lambda: [ask(session_id, wake).get(timeout=10) for _ in range(count)])

    def stock() -> float:
        return rate(count, lambda: [ref.ask(wake, timeout=10) for _ in range(count)])

    medians = interleaved(run.rounds, {"ours": _in_thread(ours), "stock": _in_thread(stock)})
    yield versus(
        f"ask to one actor, {where}",
        medians["ours"],
        "/s",
        "pykka ThreadingActor",
        medians["stock"],
        0.8,
    )


def _in_thread(contender: Callable[[], float]) -> Callable[[], float]:
    """In a thread, as a server's callers are."""

    def run() -> float:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(contender).result()

    return run
