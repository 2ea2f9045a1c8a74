"""The event stream as a client sees it: whole, in order, and never in anybody's way."""

import asyncio
import gc
import logging
import threading
import time

import pytest
from fold import Fold, stored

from understudy import Retention, ScriptedModel, errors, signals, tool
from understudy.actors import subscription as subscriptions
from understudy.actors.models.scripted import Call, Gate, Say, Think, Wait, steps_taken

TEXT = "The quick brown fox jumps over the lazy dog. " * 10


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@tool(permission="launch")
def launch() -> str:
    """Launch."""
    return "launched"


def busy(request):
    """Answers with reasoning, text, parallel calls, and text again."""
    if request.purpose == "summary":
        return Say("we talked")
    if steps_taken(request) == 0:
        return [
            Think("hm " * 20),
            Say(TEXT),
            Call("add", {"a": 1, "b": len(request.turns)}),
            Call("launch"),
        ]
    return [Say(TEXT, chunks=30)]


def fold_to(path, events, timeout_s=15):
    """Fold up to where the tables stand, and compare."""
    tables, cursor = stored(path)
    fold = Fold()
    deadline = time.monotonic() + timeout_s
    while fold.cursor < cursor:
        assert time.monotonic() < deadline
        event = events.next(timeout_s=1)
        if event is not None:
            fold.take(event)
            if event.type == "events.overflow":
                fold.overflows = event.data
    assert fold.cursor == cursor, "the tables moved on: compare when nothing runs"
    for table, rows in fold.tables().items():
        assert rows == tables[table], table
    return fold


def work(runtime, session):
    runtime_turn = session.prompt("go")
    return runtime_turn.result(timeout_s=15)


def test_signals_go_on_after_the_journal_could_not_be_read(opened, eventually, monkeypatch, caplog):
    runtime = opened()
    heard = []

    def hear(_, event):
        heard.append(event.session_id)

    broken = threading.Event()
    read = type(runtime.engine.store.read).events

    def events(self, *args, **options):
        if broken.is_set():
            raise errors.StoreError("the disk is away")
        return read(self, *args, **options)

    monkeypatch.setattr(type(runtime.engine.store.read), "events", events)
    pump = runtime.engine.publisher._pump
    with signals.session_created.connected_to(hear):
        first = runtime.create_session()
        eventually(lambda: heard == [first.id])
        broken.set()
        pump._subscription.fall_behind()
        second = runtime.create_session()
        eventually(lambda: "the disk is away" in caplog.text)
        broken.clear()
        third = runtime.create_session()
        eventually(lambda: heard == [first.id, second.id, third.id])


def test_folding_the_events_gives_the_tables_at_every_moment(opened, path):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session(title="one")
    events = runtime.events(after=0)
    fold = Fold()

    def check():
        tables, cursor = stored(path)
        while fold.cursor < cursor:
            event = events.next(timeout_s=10)
            assert event is not None
            fold.take(event)
        assert fold.tables() == tables

    child = runtime.create_session(parent_id=session.id)
    steps = [
        lambda: work(runtime, session),
        lambda: session.update(title="two", metadata={"a": [1]}),
        lambda: work(runtime, session),
        lambda: session.compact().result(timeout_s=10),
        session.fork,
        lambda: session.revert(session.messages()[2].id),
        session.unrevert,
        lambda: session.revert(session.messages()[2].id),
        lambda: work(runtime, session),
        lambda: work(runtime, child),
        session.archive,
        lambda: session.abort(queued=True),
        session.delete,
    ]
    check()
    for step in steps:
        step()
        for each in runtime.sessions(archived=None):
            each.wait_idle(timeout_s=10)
        check()
    events.close()


def test_many_clients_that_join_in_mid_stream_all_see_the_same(opened, path):
    """Joining at any delta: by offset, with no gap and no text said twice."""
    gates = [Gate() for _ in range(6)]

    def play(request):
        acts = []
        for gate in gates:
            acts += [Say(TEXT[:90], chunks=9), Wait(gate)]
        return acts

    runtime = opened(ScriptedModel(play))
    session = runtime.create_session()
    turn = session.prompt("go")
    clients = [runtime.events(after=0), session.events(after=0)]
    for gate in gates:
        gate.wait_reached()
        clients += [runtime.events(after=0), session.events(after=0), turn.events()]
        for client in clients[-3:-1]:
            client.poll()  # some read at once, some only later
        gate.open()
    assert turn.result(timeout_s=10).text == TEXT[:90] * 6
    session.wait_idle(timeout_s=10)
    for client in clients:
        fold = Fold()
        while fold.cursor < runtime.cursor:
            event = client.next(timeout_s=10)
            assert event is not None
            fold.take(event)
        assert [text for text in fold.live.values() if len(text) > 100] == [TEXT[:90] * 6]
        client.close()


def test_a_slow_client_is_told_resumes_and_misses_no_event(opened, path):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    slow = runtime.events(after=0, buffer=3)
    first = slow.next(timeout_s=10)
    for _ in range(4):
        work(runtime, session)
    session.wait_idle(timeout_s=10)
    fold = Fold()
    fold.take(first)
    told = 0
    while fold.cursor < runtime.cursor:
        event = slow.next(timeout_s=10)
        assert event is not None
        if event.type == "events.overflow":
            told += 1
            assert event.data.cursor == fold.cursor
            assert event.data.dropped > 0
        fold.take(event)
    assert told >= 1
    assert fold.tables() == stored(path)[0]
    work(runtime, session)
    session.wait_idle(timeout_s=10)
    while fold.cursor < runtime.cursor:
        fold.take(slow.next(timeout_s=10))
    assert fold.tables() == stored(path)[0]
    slow.close()


def test_a_client_that_reads_nothing_slows_no_session(opened):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    lazy = [runtime.events(after=0, buffer=2) for _ in range(50)]
    started = time.monotonic()
    for _ in range(5):
        work(runtime, session)
    assert time.monotonic() - started < 5
    assert all(len(each._buffer) <= 2 for each in lazy)
    for each in lazy:
        each.close()


def test_a_client_resumes_by_its_cursor_after_a_restart(opened, path):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    events = runtime.events(after=0)
    fold = Fold()
    work(runtime, session)
    for _ in range(7):
        fold.take(events.next(timeout_s=10))
    events.close()
    runtime.close()
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.session(session.id)
    work(runtime, session)
    session.wait_idle(timeout_s=10)
    with runtime.events(after=fold.cursor) as events:
        while fold.cursor < runtime.cursor:
            fold.take(events.next(timeout_s=10))
    assert fold.tables() == stored(path)[0]


def trim(runtime, events):
    runtime.engine.store.trim_journal(Retention(events=events))
    runtime.engine.store.run(lambda _: None)


def test_a_client_behind_the_journal_is_told_of_the_gap(opened):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    work(runtime, session)
    session.wait_idle(timeout_s=10)
    trim(runtime, 5)
    with runtime.events(after=1) as events:
        gap = events.next(timeout_s=10)
        assert gap.type == "events.gap"
        assert gap.data.after == 1
        with runtime.engine.store.read.connection() as c:
            [(last, size)] = c.execute("SELECT min(cursor), size FROM journal").fetchall()
        assert last - size + 1 == gap.data.oldest <= runtime.cursor - 4 <= last  # a row is whole
        assert events.next(timeout_s=10).cursor == gap.data.oldest
    with runtime.events(after=runtime.cursor - 3) as events:
        assert events.next(timeout_s=10).cursor == runtime.cursor - 2


def test_a_slow_client_whose_events_are_gone_is_told_of_the_gap(opened):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    with runtime.events(buffer=2) as events:
        work(runtime, session)
        session.wait_idle(timeout_s=10)
        trim(runtime, 3)
        types = []
        while events.cursor < runtime.cursor:
            types.append(events.next(timeout_s=10).type)
        assert types[:2] == ["events.overflow", "events.gap"]


def test_a_session_filter_shows_that_session_only(opened):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    one, two = runtime.create_session(), runtime.create_session()
    with one.events(after=0) as mine, runtime.events(types=["prompt.settled"]) as settled:
        work(runtime, two)
        work(runtime, one)
        one.wait_idle(timeout_s=10)
        seen = []
        while not seen or seen[-1].type != "session.idle":
            seen.append(mine.next(timeout_s=10))
        assert {event.session_id for event in seen} == {one.id}
        assert [settled.next(timeout_s=10).session_id for _ in range(2)] == [two.id, one.id]


def test_iteration_ends_when_the_runtime_closes(opened, crew):
    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    session = runtime.create_session()
    behind = runtime.events(after=0, buffer=1)
    calls = crew().call(lambda: [e.cursor for e in runtime.events(after=0)], times=3).start()
    work(runtime, session)
    runtime.close()
    for cursors in calls.outcomes():
        durable = [each for each in cursors if each is not None]
        assert durable == list(range(1, len(durable) + 1))
    assert list(behind) is not None  # it ends, wherever it stood


def test_ten_thousand_subscriptions_come_and_go(opened):
    runtime = opened()
    session = runtime.create_session()
    publisher = runtime.engine.publisher
    before = publisher.subscriptions()
    for _ in range(100):
        group = [
            runtime.events() if number % 2 else session.events(after=0) for number in range(100)
        ]
        for each in group:
            each.close()
        del group, each
    assert publisher.subscriptions() == before
    assert session.id not in publisher._by_session
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) is subscriptions.Subscription]
    assert len(left) < 100


def test_nothing_comes_after_a_session_was_deleted(opened):
    """Not an event, and not a delta of the answer that was being written."""

    async def play(request):
        return endless()

    async def endless():
        while True:
            yield Say("on and on ")
            await asyncio.sleep(0.0005)

    runtime = opened(ScriptedModel(play))
    everything = runtime.events(buffer=1_000_000)
    for _ in range(15):
        session = runtime.create_session()
        joined = session.events(after=0)
        session.prompt("go")
        while (event := joined.next(timeout_s=10)) is not None:
            if event.type == "message.part.delta":
                break
        session.delete()
        joined.close()
    barrier = runtime.create_session()
    fold = Fold()  # it raises on anything after session.deleted
    while barrier.id not in fold.sessions:
        fold.take(everything.next(timeout_s=10))
    assert len(fold.deleted) == 15
    assert fold.deltas
    everything.close()


def test_a_client_that_catches_up_sees_no_delta_after_the_deletion(opened, monkeypatch):
    """The session goes while a client reads the journal, with deltas in its buffer."""
    gate = Gate()
    runtime = opened(ScriptedModel([[Say(TEXT[:50]), Wait(gate), Say(TEXT, chunks=40)]]))
    session = runtime.create_session()
    session.prompt("go")
    with runtime.events(after=0) as ready:
        while (event := ready.next(timeout_s=10)).type != "message.part.updated" or getattr(
            event.data.part, "text", ""
        ) != TEXT[:50]:
            pass
        late = runtime.events(after=0)
        journal = runtime.engine.publisher.journal
        real = journal.events

        def events(**options):
            if threading.current_thread() is threading.main_thread():
                monkeypatch.setattr(journal, "events", real)
                gate.open()
                while ready.next(timeout_s=10).type != "message.part.delta":
                    pass
                session.delete()
            return real(**options)

        monkeypatch.setattr(journal, "events", events)
        fold = Fold()
        while session.id not in fold.deleted:
            fold.take(late.next(timeout_s=10))
        while (event := late.poll()) is not None:
            fold.take(event)
        late.close()


def test_a_client_that_catches_up_with_what_is_not_published_yet_sees_no_delta_after_it(
    opened, monkeypatch
):
    """The end of a session is in the journal, and the stream of its answer has not heard of it."""
    gate = Gate()
    runtime = opened(ScriptedModel([[Say(TEXT[:50]), Wait(gate), Say(TEXT)]]))
    session = runtime.create_session()
    with runtime.events() as ready:
        session.prompt("go")
        while (
            getattr(getattr(ready.next(timeout_s=10).data, "part", None), "text", "") != TEXT[:50]
        ):
            pass
    committed, told = threading.Event(), threading.Event()
    writer = runtime.engine.store._writer
    published = writer._published

    def publishing(events):
        committed.set()
        assert told.wait(15)
        published(events)

    monkeypatch.setattr(writer, "_published", publishing)
    deleting = threading.Thread(target=session.delete)
    deleting.start()
    assert committed.wait(15)
    with runtime.events(after=0) as late:
        fold = Fold()  # it raises on anything after session.deleted
        while (event := late.poll()) is not None:
            fold.take(event)
        told.set()
        while session.id not in fold.deleted:
            fold.take(late.next(timeout_s=10))
    deleting.join(15)


@pytest.mark.parametrize("live", [True, False], ids=["with news", "without"])
def test_whoever_gives_up_on_a_page_of_the_journal_loses_nothing_of_it(opened, monkeypatch, live):
    """A wait is cancelled while its page is read in a thread; the next one needs that page."""
    runtime = opened()
    reading, go = threading.Event(), threading.Event()
    journal = runtime.engine.publisher.journal
    real = journal.events

    def events(**options):
        page = real(**options)
        reading.set()
        assert go.wait(15)
        return page

    async def main():
        await runtime.create_session()
        monkeypatch.setattr(journal, "events", events)
        with runtime.events(after=0, deltas=False) as late:
            waiting = asyncio.ensure_future(late.next_async())
            assert await asyncio.to_thread(reading.wait, 15)
            waiting.cancel()
            if live:
                await runtime.create_session()
            expected = runtime.cursor
            waiting = asyncio.ensure_future(late.next_async())
            await asyncio.sleep(0)
            go.set()
            told = [(await asyncio.wait_for(waiting, 15)).cursor]
            while told[-1] < expected:
                told.append((await asyncio.wait_for(late.next_async(), 15)).cursor)
            assert told == list(range(1, expected + 1))

    asyncio.run(main())


def test_who_subscribes_as_the_runtime_closes_is_told_the_end(opened):
    runtime = opened()
    publisher = runtime.engine.publisher
    runtime.close()
    late = subscriptions.Subscription(publisher)
    following = threading.Thread(target=list, args=(late,), daemon=True)
    following.start()
    following.join(15)
    assert not following.is_alive()
    assert publisher.subscriptions() == 0


# --- signals -----------------------------------------------------------------------------------


@pytest.fixture
def receive():
    """Connect a receiver, and disconnect it whatever happens."""
    connected = []

    def connect(signal, receiver, **options):
        signal.connect(receiver, **options)
        connected.append((signal, receiver))
        return receiver

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


def test_signals_come_after_their_commit_in_cursor_order(opened, path, receive, eventually):
    seen = []

    def receiver(sender, event):
        assert event.cursor <= stored(path)[1]
        seen.append((sender, event))

    runtime = opened(ScriptedModel(busy), tools=[add, launch])
    for signal in signals.BY_TYPE.values():
        receive(signal, receiver)
    session = runtime.create_session()
    work(runtime, session)
    session.wait_idle(timeout_s=10)
    eventually(lambda: seen and seen[-1][1].type == "session.idle")
    cursors = [event.cursor for _, event in seen if event.cursor is not None]
    assert cursors == list(range(cursors[0], runtime.cursor + 1))
    assert {sender for sender, _ in seen} == {runtime}


def test_a_receiver_that_raises_is_reported_and_stops_nobody(opened, receive, caplog, eventually):
    good, failed = [], []

    def bad(sender, event):
        raise ZeroDivisionError("receiver")

    async def wrong(sender, event):
        pass

    runtime = opened()
    receive(signals.prompt_settled, bad)
    receive(signals.prompt_settled, wrong)
    receive(signals.prompt_settled, lambda s, event: good.append(event), weak=False)
    receive(
        signals.receiver_failed,
        lambda s, event, receiver, error: failed.append((receiver, type(error))),
        weak=False,
    )
    with caplog.at_level(logging.CRITICAL, "understudy"):
        session = runtime.create_session()
        for number in range(3):
            session.prompt(str(number)).result(timeout_s=10)
        eventually(lambda: len(good) == 3 and len(failed) == 6)
    assert set(failed) == {(bad, ZeroDivisionError), (wrong, TypeError)}


def test_a_slow_receiver_slows_no_session(opened, receive, eventually):
    hold, seen = threading.Event(), []

    def slow(sender, event):
        hold.wait(20)
        seen.append(event.cursor)

    runtime = opened()
    receive(signals.prompt_settled, slow)
    session = runtime.create_session()
    started = time.monotonic()
    for number in range(10):
        session.prompt(str(number)).result(timeout_s=10)
    assert time.monotonic() - started < 5
    assert seen == []
    hold.set()
    eventually(lambda: len(seen) == 10)
    assert seen == sorted(seen)


def test_receivers_are_held_weakly(opened, eventually):
    class Listener:
        def __init__(self, seen):
            self.seen = seen

        def hear(self, sender, event):
            self.seen.append(event)

    seen, kept = [], []
    runtime = opened()
    listener, other = Listener(seen), Listener(kept)
    signals.prompt_settled.connect(listener.hear)
    signals.prompt_settled.connect(other.hear)
    session = runtime.create_session()
    session.prompt("one").result(timeout_s=10)
    eventually(lambda: len(seen) == len(kept) == 1)
    del listener
    gc.collect()
    session.prompt("two").result(timeout_s=10)
    eventually(lambda: len(kept) == 2)
    assert len(seen) == 1
    signals.prompt_settled.disconnect(other.hear)


def test_what_happened_while_nobody_was_connected_is_not_told_later(opened, receive, eventually):
    runtime = opened()
    session = runtime.create_session()
    before = []
    receive(signals.prompt_settled, lambda s, event: before.append(event.cursor), weak=False)
    session.prompt("seen").result(timeout_s=10)
    eventually(lambda: len(before) == 1)
    signals.prompt_settled.disconnect(signals.prompt_settled.receivers_for(runtime).__next__())
    for number in range(5):
        session.prompt(f"unseen {number}").result(timeout_s=10)
    session.wait_idle(timeout_s=10)
    start = runtime.cursor
    after, hold = [], threading.Event()

    def receiver(sender, event):
        hold.wait(10)
        after.append(event.cursor)

    pump = runtime.engine.publisher._pump._subscription
    pump._limit = 4  # so that it overflows, and is brought up to date from the journal
    receive(signals.prompt_settled, receiver)
    for number in range(5):
        session.prompt(f"heard {number}").result(timeout_s=10)
    hold.set()
    eventually(lambda: len(after) >= 5)
    assert min(after) > start
    assert len(after) == 5


def test_who_is_behind_when_the_runtime_closes_is_told_where_to_go_on(opened):
    runtime = opened()
    session = runtime.create_session()
    with runtime.events(buffer=3) as slow, session.events(after=0) as late:
        last = runtime.cursor
        for number in range(3):
            session.prompt(f"say {number}").result(timeout_s=15)
        runtime.close()
        for behind, cursor in ((slow, last), (late, 0)):
            assert [event.type for event in behind] == ["events.overflow"]
            assert behind.cursor == cursor
            assert behind.next() is None
    with opened().events(after=slow.cursor) as rest:
        settled = [event for event in iter(rest.poll, None) if event.type == "prompt.settled"]
    assert len(settled) == 3
