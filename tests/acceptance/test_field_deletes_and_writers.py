"""Field failures: deletes and ghosts, concurrent writers."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import LONG_AGO_MS, query, rows_of
from processes import Child

from understudy import Runtime, ScriptedModel, Session, ToolContext, signals, tool
from understudy.actors.clock import VirtualClock
from understudy.actors.models.scripted import Call, Gate, Say, Wait
from understudy.actors.tools.workspace import workspace
from understudy.errors import SessionClaimed, UnderstudyError

# --- 6: deletes --------------------------------------------------------------------------------


def test_f064_a_delete_right_after_a_prompt_200_times_without_an_error(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        for n in range(200):
            session = runtime.create_session()
            turn = session.prompt("say hello")
            if n % 2:
                turn.result(timeout_s=30)
            session.delete()
        assert runtime.sessions() == []
    assert not [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]
    assert query(path, "SELECT count(*) FROM part") == [(0,)]


def test_f065_a_storm_of_writes_against_a_delete_leaves_no_row(path: Path) -> None:
    with (
        Runtime(path, model=obedient(), durability="normal") as runtime,
        ThreadPoolExecutor(8) as pool,
    ):
        for _ in range(20):
            session = runtime.create_session()
            gone = threading.Event()

            def storm(n: int, session: Session = session, gone: threading.Event = gone) -> None:
                while not gone.is_set():
                    try:
                        session.update(title=str(n))
                        session.prompt(f"say {n}")
                    except UnderstudyError:
                        continue

            writers = [pool.submit(storm, n) for n in range(4)]
            session.prompt("say first").result(timeout_s=30)
            session.delete()
            gone.set()
            for writer in writers:
                writer.result(30)
            assert rows_of(path, session.id) == {}


def test_f067_all_is_deleted_with_nested_children(path: Path) -> None:
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        for _ in range(5):
            parent = runtime.create_session()
            for _ in range(3):
                child = runtime.create_session(parent_id=parent.id)
                runtime.create_session(parent_id=child.id).prompt("stall")
        for session in runtime.sessions(limit=None):
            session.delete(missing_ok=True)
        assert runtime.sessions() == []
    for name in ("session", "message", "part", "inbox", "claim"):
        assert query(path, f"SELECT count(*) FROM {name}") == [(0,)]


def test_f073_what_fires_after_the_delete_gets_a_quiet_gone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    @tool
    def notifier(context: ToolContext) -> str:
        """Report progress of a session that is gone."""
        started.set()
        release.wait(30)
        context.progress(title="still here", n=1)
        ended.set()
        return "late"

    notified: list[Any] = []

    def on_deleted(runtime: Runtime, event: Any) -> None:
        try:
            Session(runtime, event.session_id).update(title="ghost")
        except UnderstudyError as error:
            notified.append(type(error).__name__)

    with (
        signals.session_deleted.connected_to(on_deleted),
        Runtime(path, model=ScriptedModel([Call("notifier")]), tools=[notifier]) as runtime,
    ):
        session = runtime.create_session()
        session.prompt("go")
        assert started.wait(30)
        session.delete()
        release.set()
        assert ended.wait(30)
        runtime.create_session()
        assert rows_of(path, session.id) == {}
    assert notified == ["SessionNotFound"]
    assert not [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]


# --- 9: writers --------------------------------------------------------------------------------


def test_f094_and_f098_the_second_process_is_refused_before_its_model_is_called(
    path: Path,
) -> None:
    with Child() as child:
        child.do(
            f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
            "session = runtime.create_session()\n"
            "turn = session.prompt('stall')"
        )
        model = obedient()
        with Runtime(path, model=model) as second:
            session = second.session(child.do("session.id"))
            for _ in range(5):
                with pytest.raises(SessionClaimed):
                    session.prompt("say mine")
        assert model.calls == 0
        assert child.do("[p.outcome for p in session.prompts()]") == [None]
        child.do("session.abort()\nruntime.close()")
    with Runtime(path, model=obedient()) as second:
        session = second.session(session.id)
        assert session.prompt("say mine").result(timeout_s=30).text == "mine"
        assert [m.text for m in session.messages() if m.role == "user"] == ["stall", "say mine"]


def test_f095_many_writes_in_one_tick_of_the_clock(path: Path) -> None:
    with Runtime(path, model=obedient(), clock=VirtualClock()) as runtime:
        session = runtime.create_session()
        turns = [session.prompt(f"say {n}") for n in range(30)]
        assert [turn.result(timeout_s=30).text for turn in turns] == [str(n) for n in range(30)]
        texts = [m.text for m in session.messages() if m.role == "assistant"]
        assert texts == [str(n) for n in range(30)]


def test_f097_a_write_costs_the_same_after_20_000_messages(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        short, long = runtime.create_session().id, runtime.create_session().id
        runtime.session(long).prompt("say hello").result(timeout_s=30)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 20000) "
            "INSERT INTO message (session_id, id, turn, seq, role, open, data) "
            "SELECT ?1, 'msg_' || n, 1, n, 'user', 0, json_object('id', 'msg_' || n, "
            "'sessionID', ?1, 'role', 'user', 'turn', 1, 'time', json_object('created', ?2)) "
            "FROM n",
            (long, LONG_AGO_MS),
        )

    def seconds(session: Session) -> float:
        session.update(title="warm")
        best = 1e9
        for n in range(30):
            began = time.perf_counter()
            session.update(title=str(n))
            best = min(best, time.perf_counter() - began)
        return best

    with Runtime(path, model=obedient(), durability="normal") as runtime:
        assert len(runtime.session(long).messages()) >= 20_000
        assert seconds(runtime.session(long)) < 5 * seconds(runtime.session(short))


def test_f100_two_writers_of_one_file_leave_one_of_their_texts_whole(
    path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    texts = ["a" * 200_000, "b" * 200_000]
    with ThreadPoolExecutor(2) as pool:
        writers = [next(t for t in workspace(folder) if t.name == "write") for _ in texts]
        for _ in range(20):
            (folder / "shared").unlink(missing_ok=True)
            list(
                pool.map(lambda pair: pair[0]("shared", pair[1]), zip(writers, texts, strict=True))
            )
            assert (folder / "shared").read_text() in texts
    assert [each.name for each in folder.iterdir()] == ["shared"]


def test_f104_no_lock_is_held_over_model_and_tool_calls(path: Path, tools: Tools) -> None:
    gate = Gate()
    model = ScriptedModel(
        lambda request: (
            [Wait(gate), Say("done")]
            if request.purpose == "summary" or "wait" in str(request.turns[-1])
            else [Call("block")]
        )
    )
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        parent = runtime.create_session()
        child = runtime.create_session(parent_id=parent.id)
        parent.prompt("go")
        child.prompt("wait")
        assert tools.started.wait(30)
        gate.wait_reached()
        with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        gate.open()
        child.wait_idle(timeout_s=30)
