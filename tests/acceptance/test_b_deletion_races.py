"""B: deletes against everything else that goes on at the same time."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import events, query, rows_of, write
from processes import Child, ChildError

from understudy import RestartPolicy, Runtime, ScriptedModel, Session, signals
from understudy.actors.models.scripted import Call, Say
from understudy.actors.tools.workspace import workspace
from understudy.errors import (
    ActorCrashed,
    RuntimeClosed,
    SessionClaimed,
    SessionExists,
    SessionNotFound,
    TurnAborted,
    UnderstudyError,
)
from understudy.store.changes import Change
from understudy.store.events import SessionUpdated
from understudy.store.records import ToolCompleted, ToolFailed


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def outcome(call: Any) -> Any:
    try:
        return call()
    except UnderstudyError as error:
        return type(error)


# --- against a running turn --------------------------------------------------------------------


def test_b13_and_f071_nothing_a_running_turn_does_late_brings_the_session_back(
    path: Path, tools: Tools
) -> None:
    """The tool is deaf to cancellation, and returns when its session is long gone."""
    with Runtime(path, model=obedient(), tools=tools.all()) as runtime:
        session = runtime.create_session()
        turn = session.prompt("say text \ncall block {}")
        queued = session.prompt("say queued")
        assert tools.started.wait(30)
        session.delete()
        for each in (turn, queued):
            with pytest.raises((TurnAborted, SessionNotFound)):
                each.result(timeout_s=30)
        journal = query(path, "SELECT count(*) FROM journal")
        tools.release.set()
        assert tools.ended.wait(30)
        runtime.create_session().prompt("say after").result(timeout_s=30)
        for _ in range(20):
            runtime.engine.orphans.wake()
            runtime.engine.upkeep._lost_executions()
        assert rows_of(path, session.id) == {}
        assert session.id not in {each.id for each in runtime.sessions()}
        assert query(path, "SELECT count(*) FROM journal") != journal
        assert query(
            path,
            "SELECT type FROM journal WHERE session_id = ? ORDER BY cursor DESC LIMIT 1",
            session.id,
        ) == [("session.deleted",)]
    with Runtime(path, model=obedient()) as runtime:
        assert not runtime.recovered
        assert rows_of(path, session.id) == {}


def test_b13_a_write_with_the_old_epoch_is_refused(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        engine = runtime.engine
        epoch, seq = query(path, "SELECT epoch, seq FROM claim")[0]
        session.delete()
        told: list[Any] = []
        arrived = threading.Event()

        def done(result: Any, events: Any, error: BaseException | None) -> None:
            told.append(error)
            arrived.set()

        engine.store.commit(
            Change(
                session_id=session.id,
                owner=engine.id,
                epoch=epoch,
                seq=seq,
                time_ms=0,
                facts=(SessionUpdated(session_id=session.id, info=session.record),),
            ),
            done,
        )
        assert arrived.wait(30)
        assert type(told[0]).__name__ == "SessionFenced"
        assert rows_of(path, session.id) == {}


def test_b13_the_supervisor_does_not_bring_back_what_crashed_and_was_deleted(path: Path) -> None:
    policy = RestartPolicy(backoff_s=0.2, max_backoff_s=0.2)
    with Runtime(path, model=obedient(), restart=policy) as runtime:
        session = runtime.create_session()
        with pytest.raises(ActorCrashed):
            session._crash()
        session.delete()
        probe = runtime.create_session()
        with pytest.raises(ActorCrashed):
            probe._crash()
        # Restarted later than the deleted one would have been.
        assert probe.prompt("say hello").result(timeout_s=30).text == "hello"
        assert rows_of(path, session.id) == {}
        assert outcome(lambda: session.prompt("ghost")) is SessionNotFound


def test_b13_a_session_whose_stored_record_is_damaged_can_be_deleted(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        sessions = [runtime.create_session(title=str(n)) for n in range(3)]
        sessions[1].prompt("say hello").result(timeout_s=30)
    write(path, "UPDATE session SET data = x'00' WHERE id = ?", sessions[1].id)
    with Runtime(path, model=obedient()) as runtime:
        damaged = Session(runtime, sessions[1].id)
        assert damaged.delete()
        assert rows_of(path, damaged.id) == {}
        assert {each.title for each in runtime.sessions()} == {"0", "2"}


def test_b14_nothing_is_heard_of_a_session_after_its_deletion(
    path: Path, pool: ThreadPoolExecutor
) -> None:
    """Streams of many sessions run while they are deleted; live text counts too."""

    async def chatter(request: Any) -> Any:
        for n in itertools.count():
            yield Say(f"word {n} ", chunks=1)
            if n % 20 == 0:
                await asyncio.sleep(0.001)

    heard_by_signal: list[tuple[str, str]] = []

    def hear(runtime: Runtime, event: Any) -> None:
        heard_by_signal.append((event.type, event.session_id))

    heard: list[tuple[str, str]] = []
    with (
        signals.message_part_updated.connected_to(hear),
        signals.message_updated.connected_to(hear),
        signals.session_status.connected_to(hear),
        signals.session_deleted.connected_to(hear),
        Runtime(path, model=ScriptedModel(chatter), durability="normal") as runtime,
    ):
        events = runtime.events(buffer=1_000_000)
        follower = threading.Thread(
            target=lambda: heard.extend((event.type, event.session_id) for event in events)
        )
        follower.start()
        for _ in range(5):
            made = [runtime.create_session() for _ in range(8)]
            flowing = [session.events() for session in made]
            for session in made:
                session.prompt("go")
            for each in flowing:
                next(event for event in each if event.type == "message.part.delta")
                each.close()
            list(pool.map(lambda session: session.delete(), made))
    follower.join(30)
    for stream in (heard, heard_by_signal):
        assert not _late(stream)
        assert sum(event_type == "session.deleted" for event_type, _ in stream) == 40


def _late(stream: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What was heard of sessions after their deletion."""
    gone: set[str] = set()
    late = []
    for event_type, session_id in stream:
        if session_id in gone:
            late.append((event_type, session_id))
        if event_type == "session.deleted":
            gone.add(session_id)
    return late


# --- against prompts ---------------------------------------------------------------------------


def test_b15_a_prompt_is_answered_before_the_delete_or_refused_never_swallowed(
    path: Path, pool: ThreadPoolExecutor
) -> None:
    seen: set[Any] = set()
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        for _ in range(60):
            session = runtime.create_session()
            start = threading.Barrier(5)

            def ask(n: int, session: Session = session, start: threading.Barrier = start) -> Any:
                start.wait(30)
                return outcome(
                    lambda: session.prompt(f"say {n}").result(timeout_s=30).text == str(n)
                )

            asking = [pool.submit(ask, n) for n in range(4)]
            start.wait(30)
            session.delete()
            seen.update(done.result(60) for done in asking)
            assert rows_of(path, session.id) == {}
    assert seen <= {True, SessionNotFound, TurnAborted}, seen


def test_b15_in_asyncio_as_well(path: Path) -> None:
    async def main() -> set[Any]:
        seen: set[Any] = set()
        async with Runtime(path, model=obedient(), durability="normal") as runtime:
            for _ in range(40):
                session = await runtime.create_session()

                async def ask(n: int, session: Session = session) -> Any:
                    try:
                        turn = await session.prompt(f"say {n}")
                        return (await turn.result(timeout_s=30)).text == str(n)
                    except UnderstudyError as error:
                        return type(error)

                *answers, _ = await asyncio.gather(*map(ask, range(4)), session.delete())
                seen.update(answers)
        return seen

    seen = asyncio.run(main())
    assert seen <= {True, SessionNotFound, TurnAborted}, seen


# --- against the death of the process ----------------------------------------------------------


def test_b04_a_deleted_session_is_gone_for_a_new_process(path: Path) -> None:
    with Child() as child:
        child.do(
            f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
            "kept, gone = (runtime.create_session(title=t) for t in ('kept', 'gone'))\n"
            "gone.prompt('say hello').result()\n"
            "gone.delete()"
        )
        gone = child.do("gone.id")
        child.kill()
    with Child() as child:
        child.do(f"runtime = Runtime({str(path)!r}, model=obedient()).start()")
        assert child.do("[session.title for session in runtime.sessions()]") == ["kept"]
        with pytest.raises(ChildError, match="SessionNotFound"):
            child.do(f"runtime.session({gone!r})")
        child.do("runtime.close()")
    assert rows_of(path, gone) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 3, 8, 13])
def test_b17_killed_in_a_burst_of_deletes_each_session_is_whole_or_gone(
    path: Path, kill_at: int
) -> None:
    """The process dies at its n-th commit of the burst; what it had acknowledged is gone."""
    with Child() as child:
        child.do(
            "armed, count = False, 0\n"
            "def fault(point):\n"
            "    global count\n"
            "    count += armed\n"
            f"    if count >= {kill_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"runtime = Runtime({str(path)!r}, model=obedient(), fault=fault).start()\n"
            "made = [runtime.create_session(title=str(n)) for n in range(40)]\n"
            "children = [runtime.create_session(parent_id=s.id) for s in made[:10]]\n"
            "for s in made: s.prompt('say hello').result()\n"
        )
        ids = child.do("[s.id for s in made]")
        parents = dict(zip(child.do("[s.id for s in children]"), ids, strict=False))
        child.send(
            "armed = True\n"
            "def delete(part):\n"
            "    for s in part:\n"
            "        s.delete()\n"
            "        note('gone ' + s.id)\n"
            "for n in range(4): spawn(lambda n=n: delete(made[n::4]))\n"
        )
        child.wait_dead()
        acknowledged = {note[5:] for note in child.notes() if note.startswith("gone ")}
    with Runtime(path, model=obedient()) as runtime:
        left = {session.id for session in runtime.sessions(limit=None)}
        assert not left & acknowledged
        assert len(acknowledged) < len(ids)
        for session_id in ids:
            if session_id in left:
                session = runtime.session(session_id)
                assert [m.text for m in session.messages()] == ["say hello", "hello"]
                assert [prompt.outcome for prompt in session.prompts()] == ["answered"]
            else:
                assert rows_of(path, session_id) == {}
        for each, parent in parents.items():
            assert (each in left) == (parent in left), "a tree goes as one"


# --- the same name again -----------------------------------------------------------------------


def test_b19_and_f068_a_session_made_again_is_empty_and_has_a_higher_epoch(
    path: Path, tools: Tools
) -> None:
    with Runtime(
        path, model=obedient(), tools=tools.all(), permissions={"guarded": "ask"}
    ) as runtime:
        first = runtime.create_session(session_id="ses_mine", title="first")
        assert outcome(lambda: runtime.create_session(session_id="ses_mine")) is SessionExists
        first.prompt("say hello").result(timeout_s=30)
        waits = first.prompt("call guarded {}\ncall block {}")
        first.prompt("say queued")
        assert tools.started.wait(30)
        runtime.tracker.claim("ses_mine", "somebody")
        runtime.tracker.bypass("ses_mine")
        epoch = query(path, "SELECT epoch FROM claim")[0][0]
        (ask,) = first.asks()
        first.delete()
        assert rows_of(path, "ses_mine") == {}
        second = runtime.create_session(session_id="ses_mine", title="second")
        assert query(path, "SELECT epoch FROM claim")[0][0] > epoch
        assert (second.title, second.messages(), second.prompts(), second.asks()) == (
            "second",
            [],
            [],
            [],
        )
        assert second.status().type == "idle"
        tools.release.set()  # the old incarnation's tool comes back now
        assert tools.ended.wait(30)
        with pytest.raises((TurnAborted, SessionNotFound)):
            waits.result(timeout_s=30)
        assert second.prompt("say anew").result(timeout_s=30).text == "anew"
        assert [m.text for m in second.messages()] == ["say anew", "anew"]
        assert outcome(lambda: runtime.reply(ask.id)) is not None
        assert not isinstance(outcome(lambda: runtime.reply(ask.id)), bool)
        assert not runtime.tracker.is_bypassed("ses_mine")
        assert "ses_mine" not in runtime.tracker.claims()


def test_b19_a_late_write_of_the_old_incarnation_is_refused_by_the_new_one(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        engine = runtime.engine
        first = runtime.create_session(session_id="ses_mine", title="old")
        epoch, seq = query(path, "SELECT epoch, seq FROM claim")[0]
        first.delete()
        second = runtime.create_session(session_id="ses_mine", title="new")
        errors: list[Any] = []
        arrived = threading.Event()
        for late_seq in (seq, seq + 1, seq + 2):
            engine.store.commit(
                Change(
                    session_id="ses_mine",
                    owner=engine.id,
                    epoch=epoch,
                    seq=late_seq,
                    time_ms=0,
                    facts=(SessionUpdated(session_id="ses_mine", info=first.record),),
                ),
                lambda _r, _e, error: (errors.append(type(error).__name__), arrived.set()),
            )
        engine.store.run(lambda tx: None)
        assert errors == ["SessionFenced"] * 3
        assert second.refresh().title == "new"


def test_b19_and_f070_a_tight_loop_of_create_prompt_and_delete(path: Path) -> None:
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        for n in range(100):
            session = runtime.create_session(session_id="ses_again", title=str(n))
            assert session.messages() == []
            turn = session.prompt(f"say {n}")
            if n % 2:
                assert turn.result(timeout_s=30).text == str(n)
            session.delete()
        assert runtime.sessions() == []
        seqs = [seq for _, seq, _ in events(path)]
        assert seqs == list(range(1, len(seqs) + 1)), "one numbering over all incarnations"


def test_b19_only_an_explicit_create_brings_a_name_back(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session(session_id="ses_mine")
        session.delete()
        for call in (
            lambda: session.prompt("x"),
            lambda: session.update(title="x"),
            session.compact,
            session.fork,
            session.reset,
        ):
            outcome(call)
        assert runtime.sessions() == []
        assert rows_of(path, "ses_mine") == {}


# --- starting, closing, and two runtimes -------------------------------------------------------


def test_b21_start_returns_when_list_works_and_close_is_bounded_while_deletes_run(
    path: Path, tools: Tools, pool: ThreadPoolExecutor
) -> None:
    runtime = Runtime(path, model=obedient(), tools=tools.all()).start()
    assert runtime.sessions() == []
    made = [runtime.create_session() for _ in range(60)]
    for session in made[:10]:
        session.prompt("call block {}")
    assert tools.started.wait(30)
    start = threading.Barrier(len(made[:30]) + 1)

    def delete(session: Session) -> Any:
        start.wait(30)
        return outcome(lambda: session.delete().value)

    deletes = [pool.submit(delete, session) for session in made[:30]]
    start.wait(30)
    runtime.close(timeout_s=5)
    outcomes = [done.result(10) for done in deletes]
    assert set(outcomes) <= {1, RuntimeClosed}
    with Runtime(path, model=obedient()) as runtime:
        left = {session.id for session in runtime.sessions(limit=None)}
    for session, result in zip(made[:30], outcomes, strict=True):
        if result == 1:
            assert session.id not in left
    assert {session.id for session in made[30:]} <= left


def test_b25_closing_a_second_runtime_takes_nothing_from_the_first(
    path: Path, tools: Tools
) -> None:
    with Runtime(path, model=obedient(), tools=tools.all()) as first:
        session = first.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        for _ in range(3):
            with Runtime(path, model=obedient()) as second:
                assert [each.id for each in second.sessions()] == [session.id]
                assert outcome(second.session(session.id).delete) is SessionClaimed
        assert len(list(path.parent.glob("*.lock"))) == 1
        tools.release.set()
        assert turn.result(timeout_s=30).text == "done"
        assert session.prompt("say on").result(timeout_s=30).text == "on"


# --- related reports ---------------------------------------------------------------------------


def test_b23_parallel_edits_of_one_file_are_serialised_or_refused(
    path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    lines = [f"line {n}" for n in range(20)]
    (folder / "notes.txt").write_text("\n".join(lines))
    calls = [
        Call("edit", {"path": "notes.txt", "old": f"line {n}\n", "new": f"edited {n}\n"})
        for n in range(19)
    ]
    model = ScriptedModel([[Call("read", {"path": "notes.txt"})], calls, "done"])
    with Runtime(path, model=model, tools=workspace(folder)) as runtime:
        session = runtime.create_session()
        session.prompt("go").result(timeout_s=30)
        edits = [p for m in session.messages() for p in m.tools if p.tool == "edit"]
    text = (folder / "notes.txt").read_text().splitlines()
    done = {n for n, part in enumerate(edits) if isinstance(part.state, ToolCompleted)}
    assert done, edits[0].state
    for n in range(19):
        assert text[n] == (f"edited {n}" if n in done else f"line {n}")
        if n not in done:
            assert isinstance(edits[n].state, ToolFailed)


def test_b24_results_are_recorded_in_call_order_though_some_wait_for_permission(
    path: Path, tools: Tools
) -> None:
    model = obedient()
    with Runtime(path, model=model, tools=tools.all(), permissions={"guarded": "ask"}) as runtime:
        session = runtime.create_session()
        turn = session.prompt(
            'call guarded {"n": 1}\ncall quick {"n": 2}\ncall guarded {"n": 3}\ncall quick {"n": 4}'
        )
        with session.events(after=0) as events:
            asked = [e.data.info for e in _take(events, "permission.asked", 2)]
        for ask in reversed(asked):
            runtime.reply(ask.id, "once")
        turn.result(timeout_s=30)
    (calls,) = [t.calls for t in model.requests[-1].turns if hasattr(t, "calls")]
    assert [each.output for each in calls] == ["guarded 1", "quick 2", "guarded 3", "quick 4"]


def _take(events: Any, event_type: str, count: int) -> list[Any]:
    taken = []
    for event in events:
        if event.type == event_type:
            taken.append(event)
            if len(taken) == count:
                break
    return taken
