"""The audit catches what it is there to catch: each kind of violation, planted by hand."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from understudy import Runtime, ScriptedModel, tool
from understudy.actors.models.scripted import Call
from understudy.actors.tools.context import ToolContext
from understudy.gateway.audit import Audit, audit
from understudy.gateway.rows import events_of

COLUMNS = "cursor, session_id, seq, time_ms, type, data, size"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory):
    """A database with two sessions of two answered prompts, and the books kept of it."""
    effects = []

    @tool
    def note(ctx: ToolContext) -> str:
        """Note."""
        effects.append((ctx.session_id, ctx.call_id))
        return "noted"

    path = tmp_path_factory.mktemp("audit") / "a.db"
    script = ScriptedModel([Call("note"), "Done."], repeat=True)
    with Runtime(path, model=script, tools=[note]) as runtime:
        for name in ("one", "two"):
            session = runtime.create_session(session_id=name)
            for number in (1, 2):
                session.prompt("Note it.", message_id=f"{name}_{number}").result(timeout_s=30)
    accepted = [(name, f"{name}_{number}") for name in ("one", "two") for number in (1, 2)]
    return path, accepted, effects


class Case:
    """A copy of the database to break things in, and the books to break."""

    def __init__(self, path: Path, accepted, effects) -> None:
        self.path = path
        self.accepted = list(accepted)
        self.effects = list(effects)

    def sql(self, sql: str, *values):
        with closing(sqlite3.connect(self.path)) as c:
            rows = c.execute(sql, values).fetchall()
            c.commit()
        return rows

    def change(self, table: str, where: str, change) -> None:
        """Let ``change`` alter the record of one row, in place."""
        rowid, data = self.sql(f"SELECT rowid, data FROM {table} WHERE {where} LIMIT 1")[0]
        record = msgspec.json.decode(data)
        change(record)
        self.sql(f"UPDATE {table} SET data = ? WHERE rowid = ?", msgspec.json.encode(record), rowid)

    def part_events(self) -> None:
        """Give each event a row of its own, as databases of before have them."""
        rows = self.sql("SELECT seq, cursor, type, data, size, session_id, time_ms FROM journal")
        self.sql("DELETE FROM journal")
        for *row, session_id, time_ms in rows:
            for seq, cursor, kind, fact in events_of(*row):
                values = (cursor, session_id, seq, time_ms, kind, msgspec.json.encode(fact), 1)
                self.sql(f"INSERT INTO journal ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", *values)

    def audit(self, **options) -> Audit:
        return audit(
            self.path,
            accepted=self.accepted,
            effects=self.effects,
            effect_tool="note",
            **options,
        )


@pytest.fixture
def case(sound, tmp_path: Path) -> Case:
    path, accepted, effects = sound
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    return Case(copy, accepted, effects)


def test_a_sound_database_has_no_violation(case: Case):
    found = case.audit()
    assert found.violations == []
    assert (found.sessions, found.prompts, found.outcomes["answered"]) == (2, 4, 4)
    assert found.answers["one", "one_1"] == "Done."


def lose_a_prompt(case: Case):
    case.sql("DELETE FROM inbox WHERE message_id = 'one_1'")


def lose_an_outcome(case: Case):
    case.change("inbox", "message_id = 'one_1'", lambda prompt: prompt.pop("outcome"))


def promise_what_never_arrived(case: Case):
    case.accepted.append(("one", "one_3"))


def repeat_an_effect(case: Case):
    case.effects.append(case.effects[0])


def forget_an_effect(case: Case):
    case.effects.pop()


def have_an_effect_nobody_recorded(case: Case):
    case.effects.append(("one", "call_unheard_of"))


def answer_twice(case: Case):
    where = "session_id = 'one' AND role = 'assistant' ORDER BY turn, seq"
    case.change("message", where, lambda message: message.update(finish="stop"))


def share_a_turn(case: Case):
    turn = msgspec.json.decode(case.sql("SELECT data FROM inbox WHERE message_id = 'one_1'")[0][0])
    case.change("inbox", "message_id = 'one_2'", lambda p: p.update(turn=turn["turn"]))


def settle_twice(case: Case):
    case.part_events()
    case.sql(
        f"INSERT INTO journal ({COLUMNS}) SELECT "
        "(SELECT max(cursor) + 1 FROM journal), session_id, "
        "(SELECT max(seq) + 1 FROM journal WHERE session_id = 'one'), time_ms, type, data, 1 "
        "FROM journal WHERE session_id = 'one' AND type = 'prompt.settled' LIMIT 1"
    )
    case.sql("UPDATE claim SET seq = seq + 1 WHERE session_id = 'one'")


def record_a_call_twice(case: Case):
    case.sql(
        "INSERT INTO part (session_id, id, message_id, seq, kind, open, data) "
        "SELECT session_id, 'again', message_id, seq, kind, open, replace(data, id, 'again') "
        "FROM part WHERE kind = 'tool' LIMIT 1"
    )


def leave_a_call_running(case: Case):
    def run(part):
        part["state"] = {"status": "running", "input": {}, "time": {"start": 1}}

    case.change("part", "kind = 'tool'", run)


def leave_a_message_open(case: Case):
    case.change("message", "role = 'assistant'", lambda m: m["time"].pop("completed"))


def orphan_parts(case: Case):
    case.sql("DELETE FROM message WHERE session_id = 'one' AND role = 'assistant'")


def orphan_everything(case: Case):
    case.sql("DELETE FROM session WHERE id = 'one'")


def lose_an_event(case: Case):
    case.part_events()
    case.sql("DELETE FROM journal WHERE session_id = 'one' AND seq = 5")


def lose_a_change(case: Case):
    case.sql("DELETE FROM journal WHERE rowid IN (SELECT rowid FROM journal LIMIT 1 OFFSET 2)")


def lose_the_end_of_a_change(case: Case):
    case.sql("UPDATE journal SET size = size + 1 WHERE session_id = 'one'")


def lose_the_last_event(case: Case):
    case.sql("DELETE FROM journal WHERE cursor = (SELECT max(cursor) FROM journal)")


def reorder_events(case: Case):
    case.part_events()
    case.sql("UPDATE journal SET seq = -seq WHERE session_id = 'one' AND seq IN (5, 6)")
    case.sql("UPDATE journal SET seq = 11 + seq WHERE session_id = 'one' AND seq < 0")


def change_history(case: Case):
    case.change("part", "kind = 'text'", lambda part: part.update(text="Never said."))


def unmark_a_column(case: Case):
    case.sql("UPDATE inbox SET open = 1 WHERE message_id = 'one_1'")


def garble_a_record(case: Case):
    case.sql("UPDATE part SET data = ? WHERE kind = 'text'", b"{not json")


def garble_an_event(case: Case):
    case.part_events()
    case.sql("UPDATE journal SET data = ? WHERE cursor = 3", b"\xff")


def garble_a_change(case: Case):
    case.sql("UPDATE journal SET data = ? WHERE size > 1", b"\xff")


def garble_a_page(case: Case):
    [(page,)] = case.sql("SELECT rootpage FROM sqlite_master WHERE name = 'ask_id'")
    [(size,)] = case.sql("PRAGMA page_size")
    with case.path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))


def answer_with_nothing(case: Case):
    case.change("inbox", "message_id = 'one_1'", lambda p: p.update(reply_id="one_1"))


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (lose_a_prompt, "lost"),
        (lose_an_outcome, "lost"),
        (lose_an_outcome, "stuck"),
        (promise_what_never_arrived, "lost"),
        (forget_an_effect, "lost"),
        (have_an_effect_nobody_recorded, "lost"),
        (repeat_an_effect, "duplicated"),
        (answer_twice, "duplicated"),
        (share_a_turn, "duplicated"),
        (settle_twice, "duplicated"),
        (record_a_call_twice, "duplicated"),
        (leave_a_call_running, "stuck"),
        (leave_a_message_open, "stuck"),
        (orphan_parts, "orphan"),
        (orphan_everything, "orphan"),
        (lose_an_event, "journal"),
        (lose_a_change, "journal"),
        (lose_the_end_of_a_change, "damaged"),
        (lose_the_last_event, "journal"),
        (reorder_events, "journal"),
        (change_history, "mismatch"),
        (unmark_a_column, "mismatch"),
        (garble_a_record, "damaged"),
        (garble_an_event, "damaged"),
        (garble_a_change, "damaged"),
        (garble_a_page, "damaged"),
        (answer_with_nothing, "outcome"),
    ],
)
def test_a_planted_violation_is_found(case: Case, plant, kind: str):
    plant(case)
    assert case.audit().of(kind), case.audit().violations


def test_what_runs_is_not_stuck(case: Case):
    leave_a_message_open(case)
    assert case.audit(resting=False).of("stuck") == []


def test_a_deleted_session_leaves_nothing_and_whatever_is_left_is_found(case: Case):
    with Runtime(case.path) as runtime:
        runtime.session("two").delete()
    case.accepted = [each for each in case.accepted if each[0] == "one"]
    case.effects = [each for each in case.effects if each[0] == "one"]
    assert case.audit().violations == []
    case.sql(
        f"INSERT INTO journal ({COLUMNS}) "
        "SELECT max(cursor) + 1, 'two', max(seq) + 1, 1, 'session.idle', "
        "CAST('{\"sessionID\":\"two\"}' AS BLOB), 1 FROM journal WHERE session_id = 'two'"
    )
    assert [each.session_id for each in case.audit().of("journal")] == ["two", "two"]
