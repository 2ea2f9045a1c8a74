"""B: what was deleted is gone, all of it, for everybody, for good (anomalyco/opencode#5517)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import events, query, rows_of, snapshot, write

from understudy import RestartPolicy, Runtime, ScriptedModel, Session
from understudy.actors.models.scripted import Gate, Say, Wait
from understudy.errors import (
    SessionError,
    SessionNotFound,
    StoreFull,
    TurnAborted,
    UnderstudyError,
)

REPETITIONS = 200


@pytest.fixture
def runtime(path: Path, tools: Tools) -> Iterator[Runtime]:
    """One that does not wait for the disk: these tests are about many deletes."""
    with Runtime(path, model=obedient(), tools=tools.all(), durability="normal") as runtime:
        yield runtime


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


def ids_of(runtime: Runtime) -> set[str]:
    return {session.id for session in runtime.sessions(limit=None)}


def outcome(call: Any) -> Any:
    """What a call gives, or the type of what it raises."""
    try:
        return call()
    except UnderstudyError as error:
        return type(error)


# --- the report --------------------------------------------------------------------------------


def test_b01_a_list_that_starts_after_a_delete_does_not_contain_it(runtime: Runtime) -> None:
    kept = runtime.create_session().id
    for _ in range(REPETITIONS):
        session = runtime.create_session()
        session.delete()
        assert ids_of(runtime) == {kept}


def test_b02_five_deleted_at_once_are_five_gone_200_times_over_from_threads(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    ghosts = 0
    for _ in range(REPETITIONS):
        made = [runtime.create_session() for _ in range(5)]
        start = threading.Barrier(5)

        def delete(session: Session, start: threading.Barrier = start) -> None:
            start.wait(30)
            session.delete()

        for done in [pool.submit(delete, session) for session in made]:
            done.result(30)
        ghosts += len(runtime.sessions(limit=None))
    assert ghosts == 0


def test_b02_five_deleted_at_once_are_five_gone_200_times_over_in_asyncio(path: Path) -> None:
    async def main() -> int:
        ghosts = 0
        async with Runtime(path, model=obedient(), durability="normal") as runtime:
            for _ in range(REPETITIONS):
                made = await asyncio.gather(*(runtime.create_session() for _ in range(5)))
                await asyncio.gather(*(session.delete() for session in made))
                ghosts += len(await runtime.sessions(limit=None))
        return ghosts

    assert asyncio.run(main()) == 0


def test_b02_fifty_at_once(runtime: Runtime, pool: ThreadPoolExecutor) -> None:
    for _ in range(5):
        made = [runtime.create_session() for _ in range(50)]
        for session in made[::2]:
            session.prompt("stall")  # half of them are busy
        list(pool.map(lambda session: session.delete(), made))
        assert ids_of(runtime) == set()


def test_b03_a_deleted_session_is_not_found(runtime: Runtime) -> None:
    session = runtime.create_session()
    turn = session.prompt("say hello")
    turn.result(timeout_s=30)
    session.delete()
    for call in (
        lambda: runtime.session(session.id),
        session.refresh,
        session.messages,
        session.status,
        session.abort,
        session.compact,
        session.fork,
        session.prompts,
        lambda: session.update(title="ghost"),
        lambda: session.prompt("ghost"),
        lambda: session.turn(turn.message_id),
        lambda: runtime.create_session(parent_id=session.id),
        session.delete,
    ):
        assert outcome(call) is SessionNotFound, call
    assert not session.children()
    assert not session.asks()


def test_b05_a_delete_that_cannot_be_stored_fails_and_leaves_the_session_whole(
    path: Path, runtime: Runtime, tools: Tools
) -> None:
    session = runtime.create_session()
    child = runtime.create_session(parent_id=session.id)
    turn = session.prompt("call block {}")
    assert tools.started.wait(30)
    before = snapshot(path)
    write(
        path,
        "CREATE TRIGGER refuse BEFORE DELETE ON part "
        "BEGIN SELECT raise(ABORT, 'disk is full'); END",
    )
    with pytest.raises(StoreFull):
        session.delete()
    write(path, "DROP TRIGGER refuse")
    assert snapshot(path) == before
    assert ids_of(runtime) == {session.id, child.id}
    tools.release.set()
    assert turn.result(timeout_s=30).text == "done", "the turn was not disturbed"
    assert session.prompt("say hello").result(timeout_s=30).text == "hello"
    session.delete()
    assert ids_of(runtime) == set()


def test_b05_a_refused_delete_does_not_cut_the_live_text_of_the_turn(path: Path) -> None:
    first, second = Gate(), Gate()
    model = ScriptedModel([[Say("one "), Wait(first), Say("two "), Wait(second), Say("three")]])
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        turn = session.prompt("go")
        first.wait_reached()
        write(
            path,
            "CREATE TRIGGER refuse BEFORE DELETE ON session "
            "BEGIN SELECT raise(ABORT, 'disk is full'); END",
        )
        with pytest.raises(StoreFull):
            session.delete()
        write(path, "DROP TRIGGER refuse")
        events = session.events()
        first.open()
        second.wait_reached()
        live = next(event for event in events if event.type == "message.part.delta")
        assert live.data.delta in "one two "
        second.open()
        assert turn.result(timeout_s=30).text == "one two three"


def test_b06_many_deletes_of_one_session_have_one_event_and_no_other_error(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    for _ in range(20):
        session = runtime.create_session()
        session.prompt("say hello").result(timeout_s=30)
        cursor = runtime.cursor
        start = threading.Barrier(20)

        def delete(_: int, session: Session = session, start: threading.Barrier = start) -> Any:
            start.wait(30)
            return outcome(lambda: session.delete().value)

        outcomes = list(pool.map(delete, range(20)))
        assert sorted(outcomes, key=str) == sorted([1] + [SessionNotFound] * 19, key=str)
        told = events(runtime.engine.store.path)
        assert [kind for at, _, kind in told if at > cursor].count("session.deleted") == 1


def test_b07_deleting_again_later_is_safe(runtime: Runtime) -> None:
    session = runtime.create_session()
    assert session.delete()
    assert outcome(session.delete) is SessionNotFound
    assert not session.delete(missing_ok=True)
    assert outcome(runtime.session("ses_never").delete if False else session.delete) is (
        SessionNotFound
    )


# --- what is left behind: nothing --------------------------------------------------------------


def test_b08_nothing_goes_on_consuming_resources(path: Path, tools: Tools) -> None:
    with Runtime(path, model=obedient(), tools=tools.all(), durability="normal") as runtime:
        engine = runtime.engine

        def busy_round() -> None:
            made = [runtime.create_session() for _ in range(10)]
            waiters = []
            for session in made:
                session.prompt("call wait {}")
                session.prompt("say queued")
                turn = session.prompt("say queued too")
                runtime.tracker.bypass(session.id, allow_unknown=True)
                waiter = threading.Thread(target=lambda turn=turn: list(turn))
                waiter.start()
                waiters.append(waiter)
            for session in made:
                session.delete()
            for waiter in waiters:
                waiter.join(30)
                assert not waiter.is_alive(), "its turn ended with its session"

        busy_round()
        _settle_threads(runtime)
        threads = _threads()
        for _ in range(5):
            busy_round()
        _settle_threads(runtime)
        assert runtime.live_sessions() == 0
        assert not engine.executor._executions
        assert len(engine.outcomes) == 0
        assert not engine.outcomes._waiting
        assert not engine.publisher._streams
        assert not engine.publisher._by_session
        assert not engine.executor._asks
        assert not runtime.tracker.bypasses()
        assert not runtime.tracker.claims()
        assert _threads() == threads
        for name in ("session", "message", "part", "inbox", "ask", "claim", "restart"):
            assert query(path, f"SELECT count(*) FROM {name}") == [(0,)], name


def _threads() -> set[str]:
    """The threads but those of bounded pools, which grow and shrink with the work."""
    pools = ("understudy-tool", "understudy-calls", "understudy-context")
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if not name.startswith(pools)}


def _settle_threads(runtime: Runtime) -> None:
    """Wait until the loop has ended what was cancelled."""
    cancelled = threading.Event()
    runtime.engine.executor.call_later(0.0, cancelled.set)
    assert cancelled.wait(30)


def test_b08_a_deleted_session_leaves_no_trace_with_the_supervisor(path: Path) -> None:
    policy = RestartPolicy(backoff_s=0.001)
    with Runtime(path, model=obedient(), restart=policy) as runtime:
        for _ in range(3):
            session = runtime.create_session()
            with pytest.raises(SessionError):
                session._crash()
            session.prompt("say hello").result(timeout_s=30)
            session.delete()
        assert not runtime.engine.supervisor._recent
        assert not runtime.quarantined()


def test_b09_all_dependent_rows_go_at_all_depths(path: Path, tools: Tools) -> None:
    with Runtime(
        path, model=obedient(), tools=tools.all(), permissions={"guarded": "ask"}
    ) as runtime:
        root = runtime.create_session()
        tree = [root]
        for _ in range(4):
            tree.append(runtime.create_session(parent_id=tree[-1].id))
        for session in tree:
            session.prompt("say hello").result(timeout_s=30)
            session.prompt("call guarded {}")
            session.prompt("say queued")
            session.compact()
        assert root.delete().value == 5
        assert ids_of(runtime) == set()
        for session in tree:
            assert rows_of(path, session.id) == {}
        assert not runtime.asks()
    for name in ("message", "part", "inbox", "ask", "claim", "restart", "session"):
        assert query(path, f"SELECT count(*) FROM {name}") == [(0,)]


def test_b10_a_client_that_folds_the_events_has_the_sessions_of_the_list(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    live: set[str] = set()

    def fold(known: set[str], event: Any) -> None:
        if event.type == "session.created":
            known.add(event.session_id)
        elif event.type == "session.deleted":
            known.discard(event.session_id)

    events = runtime.events(deltas=False)
    made = list(pool.map(lambda n: runtime.create_session(title=str(n)), range(60)))
    list(pool.map(lambda session: session.delete(), made[::3]))
    runtime.create_session()
    end = runtime.create_session().id
    for event in events:
        fold(live, event)
        if (event.type, event.session_id) == ("session.created", end):
            break
    assert live == ids_of(runtime)
    replayed: set[str] = set()
    with runtime.events(after=0) as journal:
        for event in journal:
            fold(replayed, event)
            if (event.type, event.session_id) == ("session.created", end):
                break
    assert replayed == live


# --- the others --------------------------------------------------------------------------------


def test_b11_the_other_five_remain_as_they_were(
    path: Path, runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    made = [runtime.create_session(title=f"session {n}") for n in range(10)]
    for session in made:
        session.prompt(f"say I am {session.title}").result(timeout_s=30)
    kept = made[1::2]
    before = {session.id: session.messages() for session in kept}
    rows = {session.id: rows_of(path, session.id) for session in kept}
    list(pool.map(lambda session: session.delete(), made[::2]))
    assert ids_of(runtime) == before.keys()
    for session in kept:
        assert session.refresh().title == session.title
        assert session.messages() == before[session.id]
        assert rows_of(path, session.id) == rows[session.id]


def test_b12_what_is_created_during_a_burst_of_deletes_is_all_there(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    for _ in range(10):
        doomed = [runtime.create_session() for _ in range(20)]
        deletes = [pool.submit(session.delete) for session in doomed]
        creates = [pool.submit(runtime.create_session) for _ in range(20)]
        created = {done.result(30).id for done in creates}
        for done in deletes:
            done.result(30)
        now = ids_of(runtime)
        assert created <= now
        assert not now & {session.id for session in doomed}


def test_b16_every_list_during_deletes_is_a_valid_snapshot(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    """Families of three are created whole and deleted whole; no list shows a part of one."""
    stop = threading.Event()
    torn: list[Any] = []

    def watch() -> int:
        looks = 0
        while not stop.is_set():
            families: dict[str, int] = {}
            for session in runtime.sessions(limit=None):
                root = session.parent_id or session.id
                families[root] = families.get(root, 0) + 1
            torn.extend(root for root, size in families.items() if size != 3 and root in whole)
            looks += 1
        return looks

    whole: set[str] = set()
    roots = []
    for _ in range(100):
        root = runtime.create_session()
        for _ in range(2):
            runtime.create_session(parent_id=root.id)
        roots.append(root)
        whole.add(root.id)
    watchers = [pool.submit(watch) for _ in range(2)]
    list(pool.map(lambda root: root.delete(), roots))
    stop.set()
    assert all(watcher.result(30) for watcher in watchers)
    assert not torn
    assert ids_of(runtime) == set()


def test_b18_parent_and_child_deleted_in_any_order_are_both_gone(
    path: Path, runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    for n in range(50):
        parent = runtime.create_session()
        child = runtime.create_session(parent_id=parent.id)
        grandchild = runtime.create_session(parent_id=child.id)
        order = [parent, child, grandchild]
        order = order[n % 3 :] + order[: n % 3]
        if n % 2:
            child.prompt("stall")
        outcomes = list(pool.map(lambda each: outcome(each.delete), order))
        assert all(each is SessionNotFound or each for each in outcomes)
        assert ids_of(runtime) == set()
    assert query(path, "SELECT count(*) FROM claim") == [(0,)]


def test_b20_after_create_the_session_is_listed_with_its_title_and_ids_are_unique(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    def make(n: int) -> tuple[str, bool]:
        session = runtime.create_session(title=f"number {n}")
        titles = {each.id: each.title for each in runtime.sessions(limit=None)}
        return session.id, titles.get(session.id) == f"number {n}"

    made = list(pool.map(make, range(300)))
    assert all(listed for _, listed in made)
    assert len({session_id for session_id, _ in made}) == 300


def test_b22_sessions_at_work_at_once_do_not_interfere(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    def converse(n: int) -> list[str]:
        session = runtime.create_session(title=str(n))
        for k in range(5):
            session.prompt(f"say {n}.{k}").result(timeout_s=30)
        return [m.text for m in session.messages() if m.role == "assistant"]

    for n, texts in enumerate(pool.map(converse, range(50))):
        assert texts == [f"{n}.{k}" for k in range(5)]


def test_b26_deleting_one_session_changes_nothing_about_the_current_one(runtime: Runtime) -> None:
    sessions = [runtime.create_session(title=str(n)) for n in range(5)]
    current = sessions[2]
    turn = current.prompt("stall")
    order = [each.id for each in runtime.sessions()]
    sessions[0].delete()
    sessions[4].delete()
    gone = {sessions[0].id, sessions[4].id}
    assert [each.id for each in runtime.sessions()] == [i for i in order if i not in gone]
    assert current.status().type == "busy"
    assert runtime.statuses() == {current.id: "busy"}
    current.abort()
    assert outcome(lambda: turn.result(timeout_s=30)) is TurnAborted


def test_b16_a_transcript_read_during_its_delete_is_whole_or_not_there(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    whole = [("say hello", 1), ("hello", 3)]  # texts and numbers of parts

    def read(session: Session) -> list[Any]:
        seen = []
        while (found := outcome(session.messages)) is not SessionNotFound:
            seen.append([(message.text, len(message.parts)) for message in found])
        return seen

    for _ in range(30):
        session = runtime.create_session()
        session.prompt("say hello").result(timeout_s=30)
        readers = [pool.submit(read, session) for _ in range(3)]
        session.delete()
        for reader in readers:
            assert all(seen == whole for seen in reader.result(30))
