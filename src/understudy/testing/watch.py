"""The watch: what must hold after every commit, read from the journal by plain SQL.

Knows the wire shapes and the promises, and none of the code that is to keep them.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from understudy.gateway.fold import KEYS, Row, Tables, is_open, no_tables

Finding: TypeAlias = tuple[str, str]
"""(the guarantee that was broken, what was found)."""

_PUTS: Final = {
    "session.created": ("session", "info"),
    "session.updated": ("session", "info"),
    "message.updated": ("message", "info"),
    "message.part.updated": ("part", "part"),
    "prompt.accepted": ("inbox", "info"),
    "prompt.started": ("inbox", "info"),
    "prompt.settled": ("inbox", "info"),
    "permission.asked": ("ask", "info"),
    "permission.replied": ("ask", "info"),
    "question.asked": ("ask", "info"),
    "question.replied": ("ask", "info"),
}
_OUTCOMES: Final = {"answered", "interrupted", "rejected", "failed"}


def _outcome(table: str, record: Row) -> str | None:
    """How something ended that may end once only."""
    if is_open(table, record):
        return None
    if table == "part" and record["type"] == "tool":
        return f"{record['state']['status']}: {record['state'].get('output')}"
    if table == "part" and record["type"] == "compaction":
        return str(record["state"])
    return str(record.get("outcome" if table == "inbox" else "replied"))


class Story:
    """One session from its creation on, as the journal tells it."""

    def __init__(self) -> None:
        self.tables: Tables = no_tables()
        self.deleted = False
        self.status = "idle"
        self.accepted: list[str] = []
        self.started: set[str] = set()
        self.settled: set[str] = set()
        self.number = 1  # which life of this session id

    def running(self) -> bool:
        """Something is under way. A runtime that closes leaves prompts queued, and is idle."""
        return any(
            is_open(table, record) and (table != "inbox" or "turn" in record)
            for table, rows in self.tables.items()
            for record in rows.values()
        )

    def busy(self) -> bool:
        return any(
            is_open(table, record)
            for table, rows in self.tables.items()
            for record in rows.values()
        )


class Watch:
    """Follows a database from commit to commit. ``findings`` is what was broken."""

    def __init__(self, path: Path) -> None:
        self.findings: list[Finding] = []
        self.cursor = 0
        self.stories: dict[str, Story] = {}
        self.types: Counter[str] = Counter()
        self.accepted: set[tuple[str, str]] = set()
        self.outcomes: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.reopen(path)
        self._seqs: dict[str, int] = {}
        self._epochs: dict[str, int] = {}

    def reopen(self, path: Path) -> None:
        """Go on with the same database in another place."""
        self._connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)

    def close(self) -> None:
        self._connection.close()

    def found(self, guarantee: str, what: str) -> None:
        self.findings.append((guarantee, what))

    # --- after every commit --------------------------------------------------------------------

    def committed(self) -> list[str]:
        """Look at what is new. Gives it as lines for the trace."""
        rows = self._connection.execute(
            "SELECT cursor, session_id, seq, type, data FROM journal WHERE cursor > ? "
            "ORDER BY cursor",
            (self.cursor,),
        ).fetchall()
        for cursor, session_id, seq, kind, data in rows:
            if cursor != self.cursor + 1:
                self.found("cursor", f"event {cursor} follows event {self.cursor}")
            self.cursor = cursor
            last = self._seqs.get(session_id, 0)
            if seq != last + 1:
                self.found("seq", f"event {seq} of {session_id} follows {last}")
            self._seqs[session_id] = seq
            self._event(session_id, kind, msgspec.json.decode(data))
            self.types[kind] += 1
        for session_id in dict.fromkeys(row[1] for row in rows):
            self._at_rest(session_id, self.stories[session_id])
        self._check_epochs()
        return [f"  {cursor} {session_id} {kind}" for cursor, session_id, _, kind, _ in rows]

    def _check_epochs(self) -> None:
        held = self._connection.execute(
            "SELECT session_id, epoch FROM claim UNION ALL SELECT session_id, epoch FROM tombstone"
        ).fetchall()
        now = dict(held)
        if len(now) != len(held):
            self.found("epoch", "a session is both claimed and deleted")
        for session_id, epoch in self._epochs.items():
            if now.get(session_id, 0) < epoch:
                self.found("epoch", f"{session_id} went from {epoch} to {now.get(session_id)}")
        self._epochs = now

    def _event(self, session_id: str, kind: str, fact: Row) -> None:
        story = self._story(session_id, kind)
        if kind == "session.deleted":
            story.deleted = True
            story.tables = no_tables()
            story.status = "idle"
        elif kind == "session.status":
            story.status = fact["status"]["type"]
        elif kind == "session.idle" and story.busy():
            self.found("idle says done", f"{session_id} has something open")
        elif kind.startswith("prompt."):
            self._prompt(session_id, story, kind, fact["info"])
        elif kind == "message.removed":
            self._remove_message(story, fact["messageID"])
        elif kind == "message.part.removed":
            story.tables["part"].pop(fact["partID"], None)
        if kind in _PUTS:
            table, field = _PUTS[kind]
            self._put(session_id, story, table, fact[field])

    def _story(self, session_id: str, kind: str) -> Story:
        """Whose event this is; its creation begins a new one."""
        story = self.stories.get(session_id)
        if kind == "session.created":
            if story is not None and not story.deleted:
                self.found("created once", session_id)
            number = story.number + 1 if story is not None else 1
            story = self.stories[session_id] = Story()
            story.number = number
        if story is None:
            self.found("created first", f"{kind} of {session_id}")
            story = self.stories[session_id] = Story()
        if story.deleted:
            self.found("no write after delete", f"{kind} of {session_id}")
        return story

    def _put(self, session_id: str, story: Story, table: str, record: Row) -> None:
        key = record[KEYS[table]]
        old = story.tables[table].get(key)
        if old is not None and is_open(table, record) and not is_open(table, old):
            self.found("one terminal state", f"{table} {key} of {session_id} is open again")
        if old is not None and _outcome(table, old) not in (None, _outcome(table, record)):
            self.found("one terminal state", f"{table} {key} of {session_id} ended twice")
        if table == "part" and record["messageID"] not in story.tables["message"]:
            self.found("parts have messages", f"{key} of {session_id}")
        story.tables[table][key] = record

    def _remove_message(self, story: Story, message_id: str) -> None:
        story.tables["message"].pop(message_id, None)
        parts = story.tables["part"]
        for key in [k for k, part in parts.items() if part["messageID"] == message_id]:
            del parts[key]

    def _prompt(self, session_id: str, story: Story, kind: str, prompt: Row) -> None:
        message_id = prompt["messageID"]
        name = f"{message_id} of {session_id}"
        if kind == "prompt.accepted":
            if message_id in story.accepted:
                self.found("accepted once", name)
            story.accepted.append(message_id)
            self.accepted.add((session_id, message_id))
            return
        if message_id not in story.accepted:
            self.found("accepted first", f"{kind} {name}")
        if message_id in story.settled:
            self.found("one outcome per prompt", f"{kind} after the outcome of {name}")
        if kind == "prompt.settled":
            story.settled.add(message_id)
            self.outcomes[session_id, message_id].add(str(prompt.get("outcome")))
            if prompt.get("outcome") not in _OUTCOMES:
                self.found("one outcome per prompt", f"{name}: {prompt.get('outcome')}")
        elif message_id not in story.started:
            story.started.add(message_id)
            self._check_fifo(session_id, story, prompt)

    def _check_fifo(self, session_id: str, story: Story, prompt: Row) -> None:
        """Whoever was accepted before, of the same kind, has started or is settled."""
        for earlier in story.accepted:
            if earlier == prompt["messageID"]:
                return
            same = story.tables["inbox"][earlier].get("when_busy") == prompt.get("when_busy")
            if same and earlier not in story.started and earlier not in story.settled:
                self.found("FIFO", f"{prompt['messageID']} of {session_id} passed {earlier}")

    def _at_rest(self, session_id: str, story: Story) -> None:
        """What holds between commits."""
        if story.deleted:
            return
        parts = story.tables["part"].values()
        markers = [p for p in parts if p["type"] == "compaction" and is_open("part", p)]
        if len(markers) > 1:
            self.found("one active marker", f"{len(markers)} in {session_id}")
        opened = [m["id"] for m in story.tables["message"].values() if is_open("message", m)]
        if len(opened) > 1:
            self.found("one open message", f"{opened} in {session_id}")
        for part in parts:
            message = story.tables["message"].get(part["messageID"])
            answer = message is not None and message["role"] == "assistant"
            if answer and is_open("part", part) and part["messageID"] not in opened:
                self.found("closed means closed", f"{part['id']} of {session_id} is open")
        if story.running() if story.status == "idle" else not story.busy():
            self.found("status agrees with transcript", f"{session_id} is {story.status}")

    # --- what others ask -----------------------------------------------------------------------

    def open_asks(self) -> list[tuple[str, Row]]:
        return [
            (session_id, ask)
            for session_id, story in self.stories.items()
            for ask in story.tables["ask"].values()
            if is_open("ask", ask)
        ]

    def unfinished(self) -> list[str]:
        return [s for s, story in self.stories.items() if not story.deleted and story.busy()]

    def living(self) -> list[str]:
        return [s for s, story in self.stories.items() if not story.deleted]

    def life(self, session_id: str) -> int:
        story = self.stories.get(session_id)
        return story.number if story is not None else 0

    def tool_states(self, session_id: str, message_id: str) -> dict[str, str]:
        """The calls of a message as its rows have them, by call id."""
        rows = self._connection.execute(
            "SELECT data FROM part WHERE session_id = ? AND message_id = ?",
            (session_id, message_id),
        )
        parts = [msgspec.json.decode(data) for (data,) in rows]
        return {p["callID"]: p["state"]["status"] for p in parts if p["type"] == "tool"}

    def owner(self, session_id: str) -> str | None:
        row = self._connection.execute(
            "SELECT owner FROM claim WHERE session_id = ?", (session_id,)
        ).fetchone()
        return row[0] if row is not None else None

    def check_rows(self) -> None:
        """The tables are what the events say, now."""
        for session_id, story in self.stories.items():
            self._compare(session_id, story)

    def _compare(self, session_id: str, story: Story) -> None:
        owners = {"session": "id"}
        for table, told in story.tables.items():
            column = owners.get(table, "session_id")
            rows: defaultdict[str, Row] = defaultdict(dict)
            for (data,) in self._connection.execute(
                f"SELECT data FROM {table} WHERE {column} = ?",  # noqa: S608 - constants
                (session_id,),
            ):
                record = msgspec.json.decode(data)
                rows[record[KEYS[table]]] = record
            for key in sorted(rows.keys() | told.keys()):
                if rows.get(key) != told.get(key):
                    self.found("events = store", f"{table} {key} of {session_id}")
