"""The worker of ``chaos kill``: an app that works hard, and dies. Orders, news: see ``pipes``."""

from __future__ import annotations

import logging
import os
import queue
import runpy
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Final

from understudy import RestartPolicy, Runtime
from understudy.actors.core.state import CompactionRules
from understudy.actors.hooks import HookCall
from understudy.errors import UnderstudyError
from understudy.gateway import lines
from understudy.gateway.chaos.cast import model, tools
from understudy.gateway.chaos.points import Points
from understudy.gateway.chaos.words import News, Order, Promise
from understudy.gateway.chaos.work import RETENTION, Work
from understudy.gateway.pipes import read_orders, tell

TOLD_EVERY: Final = 3


class Worker:
    def __init__(self, setup: Order) -> None:
        self.points = Points()
        self.points.install()
        self._ledger = os.open(setup.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if setup.point:
            self.points.arm(setup.point, setup.nth)
        if setup.planted:
            runpy.run_path(setup.planted)
        self.runtime = Runtime(
            setup.database,
            model=model(self.points),
            tools=tools(self.points, self.write, lambda: self.runtime),
            permissions={"guarded": "ask"},
            compaction=CompactionRules(tail=300),
            restart=RestartPolicy(intensity=1_000, quarantine_after=1_000),
            hooks={"before_prompt": recall},
            retention=RETENTION,
            lease_s=setup.lease_s,
            on_restart=setup.on_restart,
            fault=self.points.fault,
        )
        self.work = Work(self.runtime, self.write)

    def write(self, promise: Promise) -> None:
        lines.append(self._ledger, (promise,))

    def serve(self, orders: queue.SimpleQueue[Order]) -> None:
        self.runtime.start()
        self.points.phase = "working"
        recovered = len(self.runtime.recovered)
        tell(News("ready", id=self.runtime.id, recovered=recovered))
        threading.Thread(target=self._follow, name="follow", daemon=True).start()
        while True:
            self._obey(orders.get())

    def _follow(self) -> None:
        """Hear what is published, whoever committed it, and write some of it down."""
        last = 0
        with suppress(UnderstudyError), self.runtime.events(deltas=False) as events:
            for event in events:
                if event.cursor is None:
                    continue
                if last and event.cursor != last + 1:
                    said = f"event {event.cursor} was published after {last}"
                    self.write(Promise("broken", said=said))
                last = event.cursor
                if last % TOLD_EVERY == 0:
                    session_id, kind = event.session_id, event.type
                    self.write(Promise("published", session=session_id, key=str(last), said=kind))

    def _obey(self, order: Order) -> None:
        match order.kind:
            case "work":
                self.work.start(order.seed, order.again)
            case "rest":
                what = self.work.rest(order.within_s)
                tell(News("stuck", what=what) if what else News("settled"))
            case "arm":
                self.points.arm(order.point, order.nth)
                self.work.hurry(order.point)
            case "limit":
                self._limit(order.pages)
            case "close":
                self.points.phase = "closing"
                self.runtime.close(timeout_s=20.0)
                tell(News("closed"))
                os._exit(0)  # callers may still be about to hear of it
            case "start":
                raise AssertionError("a worker starts once")

    def _limit(self, pages: int) -> None:
        """Let the database grow by so many pages and no more: SQLite says that the disk is full."""

        def limit(tx: object) -> None:
            connection = tx.connection  # type: ignore[attr-defined]
            (count,) = connection.execute("PRAGMA page_count").fetchone()
            most = count + pages if pages else 1 << 30
            connection.execute(f"PRAGMA max_page_count = {most}").fetchall()

        self.runtime.engine.store.run(limit)


def recall(call: HookCall) -> str:
    """A hook on the way of every turn."""
    return f"This is session {call.session.id}."


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends us
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    read_orders(Order, orders.put)
    try:
        Worker(orders.get()).serve(orders)
    except UnderstudyError as error:
        traceback.print_exc()
        tell(News("failed", what=f"{type(error).__name__}: {error}"))
        sys.stderr.flush()
        os._exit(3)


if __name__ == "__main__":
    main()
