"""A: after kill -9 and a restart, nothing is left unfinished (anomalyco/opencode#19023).

One child process is killed in the middle of everything; each test restarts on a copy of its store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import (
    LONG_AGO_MS,
    assistant,
    call,
    copy_store,
    open_counts,
    part,
    query,
    records,
    snapshot,
    table,
    write,
)
from processes import Child

from understudy import Runtime, Session, TextPart, signals
from understudy.actors.clock import VirtualClock
from understudy.actors.models.protocol import AssistantTurn
from understudy.errors import StoreFull
from understudy.store.records import Span, ToolCompleted, ToolFailed

BUSY_TURN = "say Let me look. \ncall quick {}\ncall fails {}\ncall block {}"
NOW_MS = 2_000_000_000_000


class Wreck:
    """What a killed process left: the store, and its rows as they were."""

    def __init__(self, path: Path, ids: dict[str, str], ledger: Path) -> None:
        self.path = path
        self.ids = ids
        self.ledger = ledger
        self.messages = records(path, "message")
        self.parts = records(path, "part")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Wreck:
    """``tool`` runs a tool, ``text`` is in mid-sentence, ``queue`` waits, ``clean`` rests."""
    folder = tmp_path_factory.mktemp("killed")
    path, ledger = folder / "a.db", folder / "ledger"
    with Child() as child:
        child.do(
            f"tools = Tools(note=note, ledger=Path({str(ledger)!r}))\n"
            f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all()).start()\n"
            "made = {name: runtime.create_session(title=name)\n"
            "        for name in ('tool', 'text', 'queue', 'clean')}\n"
            "for session in made.values():\n"
            "    session.prompt('say hello').result(timeout_s=30)\n"
        )
        child.do(f"made['tool'].prompt({BUSY_TURN!r})")
        child.wait_note("block started")
        child.do("made['queue'].prompt('call block {\"n\": 2}')")
        child.wait_note("block started")
        child.do("for text in ('say first', 'say second'): made['queue'].prompt(text)")
        child.do(
            "turn = made['text'].prompt('say Half a sen\\nstall')\n"
            "next(event for event in turn if event.type == 'message.part.updated'"
            " and getattr(event.data.part, 'text', '').startswith('Half'))"
        )
        # Both quick calls of the busy turn have their result in the store by then.
        child.do(
            "def ends(): return {p.tool for m in made['tool'].messages() for p in m.tools"
            " if p.state.__class__.__name__ in ('ToolCompleted', 'ToolFailed')}\n"
            "events = runtime.events(after=0, session_id=made['tool'].id)\n"
            "while ends() != {'quick', 'fails'}: next(events)\n"
        )
        ids = child.do("{name: session.id for name, session in made.items()}")
        child.kill()
    return Wreck(path, ids, ledger)


@pytest.fixture
def wreck(killed: Wreck, tmp_path: Path) -> Wreck:
    return Wreck(copy_store(killed.path, tmp_path / "a.db"), killed.ids, killed.ledger)


def restart(path: Path, **options: Any) -> Runtime:
    return Runtime(path, **{"model": obedient(), **options})


def settle(runtime: Runtime) -> None:
    for session in runtime.sessions():
        session.wait_idle(timeout_s=30)


def unfinished(path: Path) -> dict[str, int]:
    return {name: count for name, count in open_counts(path).items() if count}


def error_parts(session: Session) -> list[Any]:
    return [each for message in session.messages() for each in message.tools]


# --- what is found, and what becomes of it -----------------------------------------------------


def test_a01_after_kill_9_in_a_tool_and_a_restart_no_message_is_left_thinking(wreck: Wreck) -> None:
    thinking = [m for m in wreck.messages.values() if not _completed(m)]
    assert len(thinking) == 3, "the wreck has three open answers"
    with restart(wreck.path) as runtime:
        settle(runtime)
        for session in runtime.sessions():
            for message in session.messages():
                if message.role == "assistant":
                    assert message.info.time.completed is not None
    assert not unfinished(wreck.path)


def _completed(message: dict[str, Any]) -> bool:
    return message["role"] == "user" or message["time"].get("completed") is not None


def test_a02_every_session_is_recovered_at_the_start_not_when_it_is_opened(wreck: Wreck) -> None:
    with restart(wreck.path):
        # Looked at from outside: no session of this runtime was opened or prompted.
        before = [m for m in wreck.messages.values() if not _completed(m)]
        after = records(wreck.path, "message")
        assert before
        assert all(_completed(after[message["id"]]) for message in before)


def test_a03_a_recovered_message_is_completed_at_the_time_of_recovery(wreck: Wreck) -> None:
    orphans = [m["id"] for m in wreck.messages.values() if not _completed(m)]
    with restart(wreck.path, clock=VirtualClock(wall_ms=NOW_MS)):
        after = records(wreck.path, "message")
    assert [after[key]["time"]["completed"] for key in orphans] == [NOW_MS] * len(orphans)


def test_a04_a_running_call_becomes_an_error_that_says_it_was_interrupted(wreck: Wreck) -> None:
    running = [key for key, p in wreck.parts.items() if _status(p) == "running"]
    assert len(running) == 2
    with restart(wreck.path):
        after = records(wreck.path, "part")
    for key in running:
        assert after[key]["state"]["status"] == "error"
        assert after[key]["state"]["error"] == "Tool execution was interrupted (server restart)"


def _status(part_record: dict[str, Any]) -> str | None:
    return part_record["state"]["status"] if part_record["type"] == "tool" else None


def test_a05_a_call_that_never_started_becomes_an_error_the_same_way(wreck: Wreck) -> None:
    session_id = wreck.ids["clean"]
    assistant(wreck.path, session_id, "msg_planted", turn=900)
    call(wreck.path, session_id, "msg_planted", "prt_pending", running=False)
    with restart(wreck.path) as runtime:
        (planted,) = [p for p in error_parts(runtime.session(session_id)) if p.id == "prt_pending"]
        assert isinstance(planted.state, ToolFailed)
        assert planted.state.error == "Tool execution was interrupted (server restart)"
        assert planted.state.interrupted


def test_a06_calls_that_had_ended_keep_output_error_and_times(wreck: Wreck) -> None:
    ended = {k: p for k, p in wreck.parts.items() if _status(p) in ("completed", "error")}
    assert {p["tool"] for p in ended.values()} == {"quick", "fails"}
    with restart(wreck.path):
        after = records(wreck.path, "part")
    assert {key: after[key] for key in ended} == ended


def test_a07_user_messages_and_finished_answers_are_not_touched_and_text_is_kept(
    wreck: Wreck,
) -> None:
    queued = {wreck.messages[row[0]]["id"] for row in _waiting(wreck.path)}
    whole = {
        key: message
        for key, message in wreck.messages.items()
        if _completed(message) and key not in queued  # queued prompts get their turn's number
    }
    with restart(wreck.path) as runtime:
        settle(runtime)
        after, parts = records(wreck.path, "message"), records(wreck.path, "part")
        texts = [m.text for m in runtime.session(wreck.ids["text"]).messages()]
    assert {key: after[key] for key in whole} == whole
    assert wreck.messages.keys() <= after.keys()
    assert wreck.parts.keys() <= parts.keys()
    assert texts[-1] == "Half a sen"


def _waiting(path: Path) -> list[tuple[Any, ...]]:
    return query(
        path, "SELECT message_id FROM inbox WHERE open = 1 AND json_extract(data, '$.turn') IS NULL"
    )


# --- what is published -------------------------------------------------------------------------


def test_a08_each_message_and_part_that_recovery_changes_is_published(wreck: Wreck) -> None:
    live: list[str] = []

    def on_message(runtime: Runtime, event: Any) -> None:
        live.append(event.data.info.id)

    def on_part(runtime: Runtime, event: Any) -> None:
        live.append(event.data.part.id)

    with (
        signals.message_updated.connected_to(on_message),
        signals.message_part_updated.connected_to(on_part),
        restart(wreck.path) as runtime,
    ):
        after = {**records(wreck.path, "message"), **records(wreck.path, "part")}
        runtime.close()
    before = {**wreck.messages, **wreck.parts}
    changed = {key for key in before if after[key] != before[key]}
    orphans = [key for key, m in wreck.messages.items() if not _completed(m)]
    assert changed.issuperset(orphans)
    assert changed <= set(live)


def test_a08_the_changes_are_in_the_journal_for_those_who_connect_later(wreck: Wreck) -> None:
    (last,) = query(wreck.path, "SELECT max(cursor) FROM journal")[0]
    with restart(wreck.path) as runtime:
        settle(runtime)
        end = runtime.cursor
        seen: set[str] = set()
        with runtime.events(after=last, deltas=False) as events:
            for event in events:
                seen.add(getattr(getattr(event.data, "info", None), "id", ""))
                seen.add(getattr(getattr(event.data, "part", None), "id", ""))
                if event.cursor == end:
                    break
        after = {**records(wreck.path, "message"), **records(wreck.path, "part")}
    before = {**wreck.messages, **wreck.parts}
    assert {key for key in before if after[key] != before[key]} <= seen


def test_a09_what_an_event_says_a_read_at_that_moment_shows(wreck: Wreck) -> None:
    wrong: list[str] = []
    looked: list[str] = []

    def look(runtime: Runtime, event: Any) -> None:
        told = event.data.info
        if told.role != "assistant" or told.time.completed is None:
            return
        looked.append(told.id)
        found = {m.id: m.info for m in runtime.session(event.session_id).messages()}
        if found[told.id].time.completed != told.time.completed:
            wrong.append(told.id)

    with signals.message_updated.connected_to(look), restart(wreck.path) as runtime:
        settle(runtime)
    assert looked
    assert not wrong


REFUSE = """
    CREATE TRIGGER refuse BEFORE UPDATE ON message WHEN NEW.open = 0
    BEGIN SELECT raise(ABORT, 'disk is full'); END
"""


def test_a09_nothing_is_published_for_a_recovery_that_was_not_stored(wreck: Wreck) -> None:
    heard: list[Any] = []

    def hear(runtime: Runtime, event: Any) -> None:
        heard.append(event)

    write(wreck.path, REFUSE)
    before = snapshot(wreck.path)
    with signals.message_updated.connected_to(hear), restart(wreck.path) as runtime:
        assert snapshot(wreck.path) == before
        runtime.close()
    assert not heard


def test_a23_a_prompt_is_not_handled_before_a_recovery_that_could_not_be_stored(
    wreck: Wreck,
) -> None:
    write(wreck.path, REFUSE)
    with restart(wreck.path) as runtime:
        session = runtime.session(wreck.ids["tool"])
        with pytest.raises(StoreFull):
            session.prompt("say too early")
        write(wreck.path, "DROP TRIGGER refuse")
        assert session.prompt("say now").result(timeout_s=30).text == "now"
        assert [m.text for m in session.messages() if m.role == "user"][-1] == "say now"
        settle(runtime)
    assert query(wreck.path, "SELECT count(*) FROM message WHERE open = 1") == [(0,)]


def test_a10_status_and_transcript_agree_after_the_restart(wreck: Wreck) -> None:
    disagreed: list[str] = []

    def look(runtime: Runtime, event: Any) -> None:
        for message in runtime.session(event.session_id).messages():
            open_call = any(p.state.__class__.__name__.endswith("ing") for p in message.tools)
            thinking = message.role == "assistant" and message.info.time.completed is None
            if thinking or open_call:
                disagreed.append(message.id)

    with signals.session_idle.connected_to(look), restart(wreck.path) as runtime:
        settle(runtime)
        for session in runtime.sessions():
            assert session.status().type == "idle"
        assert not runtime.statuses()
    assert not disagreed
    assert not unfinished(wreck.path)


# --- going on ----------------------------------------------------------------------------------


def test_a11_a_prompt_after_recovery_is_answered_and_no_older_orphan_remains(wreck: Wreck) -> None:
    with restart(wreck.path) as runtime:
        for name in ("tool", "text", "queue", "clean"):
            session = runtime.session(wreck.ids[name])
            assert session.prompt("say again").result(timeout_s=30).text == "again"
        assert not unfinished(wreck.path)


def test_a12_the_next_request_shows_an_interrupted_call_as_interrupted(wreck: Wreck) -> None:
    model = obedient()
    with restart(wreck.path, model=model) as runtime:
        runtime.session(wreck.ids["tool"]).prompt("say again").result(timeout_s=30)
    request = next(r for r in reversed(model.requests) if r.session_id == wreck.ids["tool"])
    calls = [c for t in request.turns if isinstance(t, AssistantTurn) for c in t.calls]
    results = {each.tool: (each.output, each.is_error) for each in calls}
    assert len({each.call_id for each in calls}) == len(calls) == 3
    assert results["quick"] == ("quick 0", False)
    assert results["fails"] == ("it is broken", True)
    text, is_error = results["block"]
    assert is_error
    assert "interrupted" in text


def test_a18_a_second_restart_changes_no_row_and_publishes_nothing(wreck: Wreck) -> None:
    with restart(wreck.path) as runtime:
        settle(runtime)
    before = snapshot(wreck.path)
    heard: list[Any] = []

    def hear(runtime: Runtime, event: Any) -> None:
        heard.append(event)

    with (
        signals.message_updated.connected_to(hear),
        signals.session_status.connected_to(hear),
        restart(wreck.path) as runtime,
    ):
        assert not runtime.recovered
    assert snapshot(wreck.path) == before
    assert not heard


def test_a26_a_recovered_message_is_no_normal_finish_and_its_calls_end_after_their_start(
    wreck: Wreck,
) -> None:
    orphans = [key for key, m in wreck.messages.items() if not _completed(m)]
    running = [key for key, p in wreck.parts.items() if _status(p) == "running"]
    with restart(wreck.path):
        messages, parts = records(wreck.path, "message"), records(wreck.path, "part")
    for key in orphans:
        assert messages[key]["error"]["name"] == "InterruptedError"
        assert messages[key]["error"]["data"]["reason"] == "restart"
        assert messages[key].get("finish") != "stop"
    for key in running:
        span = parts[key]["state"]["time"]
        assert span["end"] >= span["start"] == wreck.parts[key]["state"]["time"]["start"]


def test_a26_a_call_from_the_future_still_ends_after_its_start(wreck: Wreck) -> None:
    with restart(wreck.path, clock=VirtualClock(wall_ms=LONG_AGO_MS)):
        parts = records(wreck.path, "part")
    spans = [p["state"]["time"] for p in parts.values() if _status(p) == "error"]
    assert spans
    assert all(span["end"] >= span["start"] for span in spans)


def test_a27_an_open_call_under_a_finished_message_is_finalised_too(wreck: Wreck) -> None:
    session_id = wreck.ids["clean"]
    assistant(wreck.path, session_id, "msg_done", turn=900, completed=True)
    call(wreck.path, session_id, "msg_done", "prt_running", running=True)
    call(wreck.path, session_id, "msg_done", "prt_pending", running=False)
    part(
        wreck.path,
        TextPart(
            id="prt_text",
            session_id=session_id,
            message_id="msg_done",
            text="unended",
            time=Span(start=LONG_AGO_MS),
        ),
    )
    done = records(wreck.path, "message")["msg_done"]
    with restart(wreck.path):
        assert records(wreck.path, "message")["msg_done"] == done
        parts = records(wreck.path, "part")
    for key in ("prt_running", "prt_pending"):
        assert parts[key]["state"]["error"] == "Tool execution was interrupted (server restart)"
    assert parts["prt_text"]["text"] == "unended"
    assert parts["prt_text"]["time"]["end"] >= LONG_AGO_MS


def test_a28_everything_recovery_needs_is_in_the_store(wreck: Wreck) -> None:
    """Nothing of the killed process's memory is there; every accepted prompt has its outcome."""
    with restart(wreck.path) as runtime:
        settle(runtime)
        outcomes = {
            name: [(p.outcome, p.reason) for p in runtime.session(wreck.ids[name]).prompts()]
            for name in wreck.ids
        }
    interrupted = ("interrupted", "restart")
    answered = ("answered", None)
    assert outcomes == {
        "tool": [answered, interrupted],
        "text": [answered, interrupted],
        "queue": [answered, interrupted, answered, answered],
        "clean": [answered],
    }


def test_a29_recovery_never_runs_the_interrupted_tool_again(wreck: Wreck, tools: Tools) -> None:
    assert sorted(wreck.ledger.read_text().split()) == ["block", "block", "fails", "quick"]
    with restart(wreck.path, tools=tools.all()) as runtime:
        settle(runtime)
        assert tools.runs == []


def test_a29_even_a_resumed_turn_does_not_repeat_a_call(wreck: Wreck, tools: Tools) -> None:
    model = obedient()
    with restart(wreck.path, model=model, tools=tools.all(), on_restart="resume") as runtime:
        session = runtime.session(wreck.ids["tool"])
        session.wait_idle(timeout_s=30)
        assert tools.runs == []
        assert session.prompts()[-1].outcome == "answered"
    assert any(request.session_id == wreck.ids["tool"] for request in model.requests)


def test_a29_without_a_policy_saying_so_nothing_is_resumed(wreck: Wreck) -> None:
    model = obedient()
    with restart(wreck.path, model=model) as runtime:
        settle(runtime)
    assert {request.session_id for request in model.requests} == {wreck.ids["queue"]}
    assert model.calls == 2, "the two prompts that had not started, and nothing else"


def test_a30_a_session_with_nothing_orphaned_costs_no_write_and_no_event(wreck: Wreck) -> None:
    clean = wreck.ids["clean"]

    def rows() -> list[Any]:
        return [
            query(wreck.path, f"SELECT * FROM {name} WHERE session_id = ? ORDER BY rowid", clean)
            for name in ("message", "part", "inbox", "ask", "journal", "restart")
        ] + [
            query(wreck.path, "SELECT epoch, seq FROM claim WHERE session_id = ?", clean),
            query(wreck.path, "SELECT * FROM session WHERE id = ?", clean),
        ]

    before = rows()
    with restart(wreck.path) as runtime:
        settle(runtime)
        assert rows() == before
        assert clean not in {report.session_id for report in runtime.recovered}


def test_a30_a_start_with_nothing_to_recover_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with restart(path) as runtime:
        for _ in range(20):
            runtime.create_session().prompt("say hello").result(timeout_s=30)
    before = snapshot(path), table(path, "claim")
    with restart(path) as runtime:
        assert runtime.live_sessions() == 0
    assert (snapshot(path), table(path, "claim")) == before


# --- recovery is one routine, and never in anybody's way ----------------------------------------


def test_a24_one_corrupt_session_blocks_neither_the_others_nor_the_start(wreck: Wreck) -> None:
    corrupt = wreck.ids["text"]
    write(wreck.path, "UPDATE session SET data = x'00' WHERE id = ?", corrupt)
    with restart(wreck.path) as runtime:
        assert corrupt in runtime.quarantined(), "it is reported"
        for name in ("tool", "queue", "clean"):
            session = runtime.session(wreck.ids[name])
            assert session.prompt("say again").result(timeout_s=30).text == "again"


def test_a24_a_raising_recovery_hook_is_reported_and_stops_nobody(
    wreck: Wreck, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []

    def hook(runtime: Runtime, session: Session, report: Any) -> None:
        called.append(session.id)
        raise RuntimeError("the hook is broken")

    with restart(wreck.path, recovery_hook=hook) as runtime:
        settle(runtime)
        for name in wreck.ids:
            session = runtime.session(wreck.ids[name])
            assert session.prompt("say again").result(timeout_s=30).text == "again"
    assert set(called) == {wreck.ids[name] for name in ("tool", "text", "queue")}
    assert len(called) == 3
    assert "the hook is broken" in caplog.text


def test_a06_and_a17_a_part_recovered_twice_would_show_it(wreck: Wreck) -> None:
    """The parts of a recovered turn: each call one state, one output, in the model's order."""
    with restart(wreck.path) as runtime:
        made = error_parts(runtime.session(wreck.ids["tool"]))
    assert [p.tool for p in made] == ["quick", "fails", "block"]
    assert isinstance(made[0].state, ToolCompleted)
    assert [p.state.interrupted for p in made[1:]] == [False, True]
