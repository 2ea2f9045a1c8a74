"""The watch: follows a database from commit to commit, by plain SQL.

Knows the wire shapes and the promises, and none of the code that is to keep them. What it reads it
tells to the sessions' stories, and asks the rules what is broken.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from understudy.gateway.fold import KEYS, PUTS, Row, is_open
from understudy.gateway.rows import events_of
from understudy.testing import rules
from understudy.testing.claims import Claims
from understudy.testing.requests import conversation
from understudy.testing.resting import at_rest
from understudy.testing.rules import Finding
from understudy.testing.story import Story
from understudy.testing.timing import Times

__all__ = ["Finding", "Told", "Watch"]

_COPIED: Final = {"session.created", "message.updated", "message.part.updated"}
_MARKED: Final = (
    "SELECT (SELECT count(*) FROM message WHERE session_id = :id AND open = 1)"
    " + (SELECT count(*) FROM part WHERE session_id = :id AND open = 1)"
    " + (SELECT count(*) FROM inbox WHERE session_id = :id AND open = 1)"
    " + (SELECT count(*) FROM ask WHERE session_id = :id AND open = 1)"
)
_decode: Final = msgspec.json.Decoder().decode


class Told(NamedTuple):
    """One event of the journal; its cursor is its place in the log, from 1."""

    session_id: str
    seq: int
    kind: str


class Watch:
    """What was committed so far, and ``findings``: what was broken.

    Args:
        path: the database, which is there.
        now_s: the virtual clock; without one, what takes time is not judged.
        claims: judges who may write.
        keep: how many events the journal's retention keeps; None keeps all.
        quarantine_after, backoff_s: the supervisor's policy.
        limited: whether the runtimes have the limits that ``rules`` names.
        turn_s: the limit of turns, if they have those.
        calm_s: how long nobody had anything to do, in all.
    """

    def __init__(
        self,
        path: Path,
        *,
        now_s: Callable[[], float] | None = None,
        claims: Claims | None = None,
        keep: int | None = None,
        quarantine_after: int = 4,
        backoff_s: float = 0.05,
        limited: bool = False,
        turn_s: float | None = None,
        calm_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.findings: list[Finding] = []
        self.log: list[Told] = []
        self.stories: dict[str, Story] = {}
        self.types: Counter[str] = Counter()
        self.accepted: set[tuple[str, str]] = set()
        self.outcomes: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        # Prompts that were settled, by session and life, in order: hooks are told of them.
        self.ended: list[tuple[str, int, str]] = []
        # Sessions whose revert may be taken back, if that is known.
        self.unreverting: Counter[str] | None = None
        self._claims = claims or Claims()
        self.reopen(path)
        self._now_s = now_s
        self._keep = keep
        self._quarantine_after = quarantine_after
        self._backoff_s = backoff_s
        self._limited = limited
        self._turn_s = turn_s
        self._calm_s = calm_s
        self._times: dict[str, Times] = {}
        self._seqs: dict[str, int] = {}
        self._owners: dict[str, tuple[str, int]] = {}

    @property
    def cursor(self) -> int:
        return len(self.log)

    def reopen(self, path: Path) -> None:
        """Go on with the same database in another place."""
        self._connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)

    def close(self) -> None:
        self._connection.close()

    def found(self, guarantee: str, what: str) -> None:
        self.findings.append((guarantee, what))

    def _broken(self, session_id: str, findings: Iterable[Finding]) -> None:
        for guarantee, what in findings:
            self.found(guarantee, f"{session_id}: {what}")

    def closed(self, stories: Iterable[Story]) -> None:
        """Whoever worked on these has closed: what is under way waits for people, or for others."""
        for story in stories:
            let_go = self.owner(story.id) is None and not story.quarantined
            if let_go and story.running() and not story.asks_people():
                left = ", ".join(table for table, _ in story.open_rows())
                self.found("a close leaves nothing at work", f"{story.id}: {left}")

    # --- after every commit --------------------------------------------------------------------

    def committed(self, runtime_id: str | None = None) -> list[str]:
        """Look at what was committed since; by one runtime, if it is named. Gives it as lines."""
        self._connection.execute("BEGIN")  # the rows of the same moment as the events
        try:
            return self._look(runtime_id)
        finally:
            self._connection.rollback()

    def _look(self, runtime_id: str | None) -> list[str]:
        rows = self._connection.execute(
            "SELECT session_id, seq, cursor, type, data, size FROM journal WHERE cursor > ? "
            "ORDER BY cursor",
            (self.cursor,),
        ).fetchall()
        events = [(row[0], *event) for row in rows for event in events_of(*row[1:])]
        kinds: defaultdict[str, set[str]] = defaultdict(set)
        for session_id, seq, cursor, kind, fact in events:
            if cursor != self.cursor + 1:
                self.found("cursor", f"event {cursor} follows event {self.cursor}")
            self.log.append(Told(session_id, seq, kind))
            last = self._seqs.get(session_id, 0)
            if seq != last + 1:
                self.found("seq", f"event {seq} of {session_id} follows {last}")
            self._seqs[session_id] = seq
            kinds[session_id].add(kind)
            self.types[kind] += 1
            assert fact is not None, f"event {cursor} cannot be read"
            self._event(session_id, kind, fact)
        for session_id in kinds:
            story = self.stories[session_id]
            self._born(story)
            if not story.deleted:
                self._broken(session_id, at_rest(story))
                self._check_marks(story)
                self._check_crashes(story, kinds[session_id])
        if any("session.deleted" in told for told in kinds.values()):
            self._check_children()
        self.findings += self._claims.committed(self._connection, runtime_id, kinds)
        self._check_retention()
        return [f"  {cursor} {session_id} {kind}" for session_id, _, cursor, kind, _ in events]

    def _event(self, session_id: str, kind: str, fact: Row) -> None:
        story = self._story(session_id, kind)
        if kind not in _COPIED:
            self._born(story)
        self._broken(session_id, self._rules(story, kind, fact))
        self._check_times(story, kind, fact)
        if kind in PUTS:
            table, field = PUTS[kind]
            record = fact[field]
            if table in ("message", "part"):
                self._check_owner(story, table, record)
            self._count(story, table, record)
            story.put(table, record, self.cursor)
        if kind.startswith("prompt."):
            self._prompt(story, kind, fact["info"])
        elif kind == "message.removed":
            removed = story.tables["message"].get(fact["messageID"])
            if removed is not None and is_open("message", removed):
                story.cut_short.append(conversation(story, removed))
            story.remove_message(fact["messageID"])
        elif kind == "message.part.removed":
            story.edited.add(fact["messageID"])
            story.remove_part(fact["partID"])
        else:
            self._life(story, kind, fact)

    def _rules(self, story: Story, kind: str, fact: Row) -> Iterator[Finding]:
        """What the story so far says against this event."""
        if kind in PUTS:
            table, field = PUTS[kind]
            yield from rules.put(story, table, fact[field])
            taking_back = self.unreverting is None or self.unreverting[story.id]
            if table == "session" and not taking_back:
                yield from rules.unreverted(story, fact[field])
        if kind.startswith("prompt."):
            yield from rules.prompt(story, kind, fact["info"])
        elif kind == "message.updated":
            message = fact["info"]
            new = message["id"] not in story.tables["message"] and not story.newborn
            if new and is_open("message", message):
                yield from rules.opened(story, message, self.epoch(story.id))
        elif kind == "session.idle":
            if story.busy():
                yield "idle says done", "something is open"
            if story.idle_told:
                yield "idle is told once", "nothing was done in between"
        elif kind == "actor.crashed":
            yield from rules.crashed(story, fact["consecutive"])
        elif kind == "actor.restarted" and self._now_s is not None:
            yield from rules.restarted(story, self._now_s(), self._backoff_s)

    def _story(self, session_id: str, kind: str) -> Story:
        """Whose event this is; its creation begins a new one."""
        story = self.stories.get(session_id)
        if kind == "session.created":
            if story is not None and not story.deleted:
                self.found("created once", session_id)
            before = story
            number = before.number + 1 if before is not None else 1
            story = self.stories[session_id] = Story(session_id, number, limited=self._limited)
            if before is not None:  # a step of that life may ask its model yet
                story.cut_short = before.cut_short
        if story is None:
            self.found("created first", f"{kind} of {session_id}")
            story = self.stories[session_id] = Story(session_id, limited=self._limited)
        if story.deleted:
            self.found("no write after delete", f"{kind} of {session_id}")
        return story

    def _born(self, story: Story) -> None:
        """What a session is created with, a fork's history, has been told."""
        if story.newborn and story.tables["session"]:
            story.newborn, story.copied = False, story.said()

    # --- what an event changes -----------------------------------------------------------------

    def _life(self, story: Story, kind: str, fact: Row) -> None:
        if kind == "session.deleted":
            story.cut_short.extend(conversation(story, each) for each in story.open_messages())
            story.end()
        elif kind == "session.status":
            story.status = fact["status"]["type"]
            story.idle_told = story.status == "idle" and story.idle_told
        elif kind == "session.idle":
            story.idle_told = True
        elif kind == "session.error":
            story.failed = fact["error"]["name"] == "CompactionError"
        elif kind == "session.compacted":
            marker = next(
                (p for p in story.parts_of(fact["markerID"]) if p["type"] == "compaction"), {}
            )
            story.follow_up = bool(marker.get("resume"))
        elif kind == "session.quarantined":
            story.quarantined, story.condemned = True, False
            story.quarantined_s = self._time_s()
        elif kind == "session.reset":
            story.crashes = 0
            story.quarantined, story.forgivable = False, True
            story.reset_at = self.cursor
        elif kind == "actor.crashed":
            story.crashes, story.forgivable = fact["consecutive"], False
            story.condemned = story.crashes >= self._quarantine_after
            story.crashed_s = self._time_s()

    def _time_s(self) -> float:
        return 0.0 if self._now_s is None else self._now_s()

    def _prompt(self, story: Story, kind: str, info: Row) -> None:
        message_id = info["messageID"]
        if kind == "prompt.accepted":
            story.accepted.append(message_id)
            self.accepted.add((story.id, message_id))
        elif kind == "prompt.started":
            story.started.add(message_id)
            story.turns.setdefault(info["turn"], message_id)
        else:
            story.settled.add(message_id)
            story.forgivable |= info.get("outcome") == "answered"
            self.outcomes[story.id, message_id].add(str(info.get("outcome")))
            if not (info.get("quiet") or story.record.get("internal")):
                self.ended.append((story.id, story.number, message_id))

    def _count(self, story: Story, table: str, record: Row) -> None:
        """Keep what later events are held against."""
        if table == "message" and record.get("synthetic"):
            story.follow_up = False
        if table == "session":
            story.failed &= record.get("compaction_failures", 0) == 0
            if not story.titles or story.titles[-1] != record["title"]:
                story.titles.append(record["title"])
            if story.newborn and not story.tables["session"]:
                story.used = record.get("tokens", {}).get("total", 0)
                story.cost = record.get("cost", 0.0)
            if (hidden := record.get("revert", {}).get("messageID")) is not None:
                order = [message["id"] for message in story.transcript()]
                story.hidden = set(order[order.index(hidden) :]) if hidden in order else set()
                if story.record.get("revert") != record["revert"]:
                    story.reverted_at = self.cursor
        elif table == "message" and record["role"] == "assistant":
            old = story.tables["message"].get(record["id"])
            if old is None:
                story.lives[record["id"]] = self.epoch(story.id)
            was_open = old is None or is_open("message", old)
            if old is not None and "error" in record and not record.get("summary"):
                story.cut_short.append(conversation(story, old))
            if was_open and not is_open("message", record) and not story.newborn:
                story.used += record["tokens"]["total"]
                story.cost += record.get("cost", 0.0)

    def _check_owner(self, story: Story, table: str, record: Row) -> None:
        """Ids that the runtime makes are made once: a fork has its own."""
        key, mine = record["id"], (story.id, story.number)
        if self._owners.setdefault(key, mine) != mine and key.startswith(("msg_", "prt_")):
            self.found("ids are made once", f"{table} {key} of {story.id} and {self._owners[key]}")

    # --- between commits -----------------------------------------------------------------------

    def _check_marks(self, story: Story) -> None:
        """Recovery looks for what is marked as open."""
        (marked,) = self._connection.execute(_MARKED, {"id": story.id}).fetchone()
        opened = sum(1 for _ in story.open_rows())
        if marked != opened:
            self.found("what is open is found", f"{story.id}: {marked} of {opened}")

    def _check_crashes(self, story: Story, kinds: set[str]) -> None:
        if story.condemned:
            self.found("crashes end in quarantine", f"{story.id}: {story.crashes}")
        if "actor.restarted" in kinds and self._now_s is not None:
            row = self._connection.execute(
                "SELECT culprit, culprit_count FROM restart WHERE session_id = ?", (story.id,)
            ).fetchone()
            culprit, count = row or (None, 0)
            if count >= 2 and culprit in story.started - story.settled:
                self.found("a prompt that kills is set aside", f"{culprit} of {story.id}")

        if "session.reset" in kinds and "actor.crashed" not in kinds:
            row = self._connection.execute(
                "SELECT consecutive, culprit_count FROM restart WHERE session_id = ?", (story.id,)
            ).fetchone()
            if row != (0, 0):
                self.found("a reset starts anew", f"{story.id}: {row} crashes")

    def _check_times(self, story: Story, kind: str, fact: Row) -> None:
        if kind == "session.created":
            self._times[story.id] = Times(
                tool_s=rules.TOOL_S, turn_s=self._turn_s, calm_s=self._calm_s
            )
        if self._now_s is not None and self._limited and not story.newborn:
            for problem in self._times[story.id].take(kind, fact, self._now_s()):
                self.found("people take their time", f"{story.id}: {problem}")

    def _check_children(self) -> None:
        for story in self.stories.values():
            parent_id = story.record.get("parentID")
            if not story.deleted and parent_id is not None and self.stories[parent_id].deleted:
                self.found("children go with their parent", story.id)

    def _check_retention(self) -> None:
        """The journal keeps what was promised, of whoever has not read it yet."""
        if self._keep is None:
            return
        row = self._connection.execute(
            "SELECT cursor - size + 1 FROM journal ORDER BY cursor LIMIT 1"
        ).fetchone()
        oldest = row[0] if row is not None else 1
        if oldest > max(1, self.cursor - self._keep + 1):
            self.found("the journal is kept", f"from {oldest} on, the last is {self.cursor}")

    # --- what others ask -----------------------------------------------------------------------

    def next_of(self, cursor: int, wanted: Callable[[Told], bool]) -> int | None:
        """The first cursor after this one of an event that is wanted."""
        for place in range(cursor, len(self.log)):
            if wanted(self.log[place]):
                return place + 1
        return None

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
        """Which life of this id it is; 0 if there is none now."""
        story = self.stories.get(session_id)
        return story.number if story is not None and not story.deleted else 0

    def tool_states(self, session_id: str, message_id: str) -> dict[str, str]:
        """The calls of a message as its rows have them, by call id."""
        rows = self._connection.execute(
            "SELECT data FROM part WHERE session_id = ? AND message_id = ?",
            (session_id, message_id),
        )
        parts = [_decode(data) for (data,) in rows]
        return {p["callID"]: p["state"]["status"] for p in parts if p["type"] == "tool"}

    def text_of_part(self, session_id: str, part_id: str) -> str | None:
        """A part's text as its row has it, or None if there is no such row."""
        part = self.stories[session_id].tables["part"].get(part_id)
        return str(part.get("text", "")) if part is not None else None

    def owner(self, session_id: str) -> str | None:
        row = self._connection.execute(
            "SELECT owner FROM claim WHERE session_id = ?", (session_id,)
        ).fetchone()
        return row[0] if row is not None else None

    def epoch(self, session_id: str) -> int:
        row = self._connection.execute(
            "SELECT epoch FROM claim WHERE session_id = ?", (session_id,)
        ).fetchone()
        return row[0] if row is not None else 0

    def leases(self) -> dict[str, int]:
        """When each runtime's lease lapses, in milliseconds of the wall clock."""
        return dict(self._connection.execute("SELECT id, until_ms FROM runtime"))

    def check_rows(self) -> None:
        """The tables are what the events say, now."""
        for session_id, story in self.stories.items():
            for table, told in story.tables.items():
                column = "id" if table == "session" else "session_id"
                rows: dict[str, Row] = {}
                for (data,) in self._connection.execute(
                    f"SELECT data FROM {table} WHERE {column} = ?",  # noqa: S608 - constants
                    (session_id,),
                ):
                    record = _decode(data)
                    rows[record[KEYS[table]]] = record
                for key in sorted(rows.keys() | told.keys()):
                    if rows.get(key) != told.get(key):
                        self.found("events = store", f"{table} {key} of {session_id}")
