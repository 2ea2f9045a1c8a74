"""Events: how many are delivered, and what a subscriber that does not read costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from benchmarks import stage
from benchmarks.measure import Figure, Run, figure, flat, interleaved, row, rss_bytes
from benchmarks.rows.turns import _turns
from understudy import Event, Runtime, Subscription
from understudy.store.events import PartUpdated
from understudy.store.records import TextPart

_GROUP = 200  # events of one commit under load


@row("fanout")
def fanout(run: Run) -> Iterator[Figure]:
    """Events handed to ten subscribers, each read to its end by a thread of its own."""
    count = run.size(40_000, 10_000)
    with stage.runtime(run.path(), model=stage.InstantModel()) as runtime:
        medians = interleaved(
            run.rounds,
            {
                "one": lambda: _deliver(runtime, 1, count),
                "ten": lambda: _deliver(runtime, 10, count),
                "hundred": lambda: _deliver(runtime, 100, count // 10),
            },
        )
    for name, subscribers in (("one", 1), ("ten", 10), ("hundred", 100)):
        yield figure(
            f"deliveries to {subscribers} subscriber{'s' if subscribers > 1 else ''}",
            medians[name],
            "/s",
            "at least",
            100_000,
        )


def _deliver(runtime: Runtime, subscribers: int, count: int) -> float:
    """Publish ``count`` committed events in groups; deliveries per second."""
    publisher = runtime.engine.publisher
    subscriptions = [runtime.events(buffer=count + 1) for _ in range(subscribers)]
    threads = [
        threading.Thread(target=_read, args=(each, count), daemon=True) for each in subscriptions
    ]
    part = TextPart(id="prt_x", session_id="ses_x", message_id="msg_x", text="x" * 100)
    fact = PartUpdated(session_id="ses_x", part=part, time=0)
    first = publisher.cursor + 1
    groups = [
        [
            Event(fact.type, "ses_x", cursor, 1, 0, fact)
            for cursor in range(first + start, first + min(start + _GROUP, count))
        ]
        for start in range(0, count, _GROUP)
    ]
    for thread in threads:
        thread.start()
    start_s = time.perf_counter()
    for group in groups:
        publisher.committed(group)
    for thread in threads:
        thread.join()
    figure = subscribers * count / (time.perf_counter() - start_s)
    for subscription in subscriptions:
        subscription.close()
    return figure


def _read(subscription: Subscription, count: int) -> None:
    for _ in range(count):
        subscription.next()


@row("stalled")
def stalled(run: Run) -> Iterator[Figure]:
    """Turns with ten subscribers that read, and with one of the ten stalled."""
    count = run.size(1_000, 256)
    with stage.runtime(run.path(), model=stage.InstantModel(calls_tool=True)) as runtime:
        _turns(runtime, 64)
        before = rss_bytes()
        medians = interleaved(
            run.rounds + 4,
            {
                "ten": lambda: 1 / _with_subscribers(runtime, 10, 0, count),
                "nine": lambda: 1 / _with_subscribers(runtime, 9, 1, count),
            },
        )
        grown = rss_bytes() - before
    yield flat(
        "turn time with one stalled subscriber of ten",
        medians["nine"] * 1000,
        "ms",
        "ten that read",
        medians["ten"] * 1000,
        1.02,
        f"RSS grew by {grown / 1e6:.0f} MB over all rounds; a stalled one keeps 1,000 events",
    )


def _with_subscribers(runtime: Runtime, reading: int, stalled: int, count: int) -> float:
    subscriptions = [runtime.events(buffer=1_000) for _ in range(reading + stalled)]
    threads = [
        threading.Thread(target=_drain, args=(each,), daemon=True)
        for each in subscriptions[:reading]
    ]
    for thread in threads:
        thread.start()
    figure = _turns(runtime, count)
    for subscription in subscriptions:
        subscription.close()
    for thread in threads:
        thread.join(10)
    return figure


def _drain(subscription: Subscription) -> None:
    for _ in subscription:
        pass
