"""What callers were promised, and whether the database keeps it: plain SQL against the ledger."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from understudy.gateway.audit import Audit, audit
from understudy.gateway.chaos.words import Promise
from understudy.gateway.lines import whole
from understudy.testing.watch import Finding

Named: TypeAlias = tuple[str, str]


class Book:
    """The ledger of one database, as far as it has been read; ``new`` are this round's promises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new: list[Promise] = []
        self._all: list[Promise] = []
        self._read = 0
        self._parents: dict[str, str] = {}
        self._doomed: set[str] = set()  # sessions somebody asked to delete
        self._deleted: set[str] = set()
        self._reverted: set[str] = set()
        self._releasing: set[str] = set()
        self._effects: Counter[Named] = Counter()

    def turn_page(self) -> None:
        self.new = []

    def read(self) -> list[Promise]:
        """What was written since the last look."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            promises, size = whole(file.read(), Promise)
        self._read += size
        for promise in promises:
            self._enter(promise)
        self.new += promises
        self._all += promises
        return promises

    def _enter(self, promise: Promise) -> None:
        match promise.kind:
            case "born":
                self._parents[promise.session] = promise.parent
            case "deleting":
                self._doomed.add(promise.session)
            case "deleted":
                self._deleted.add(promise.session)
            case "reverting":
                self._reverted.add(promise.session)
            case "releasing":
                self._releasing.add(promise.key)
            case "effect":
                self._effects[promise.session, promise.key] += 1

    def _line(self, session_id: str) -> Iterator[str]:
        """The session and all above it."""
        while session_id:
            yield session_id
            session_id = self._parents.get(session_id, "")

    def gone(self, session_id: str) -> bool:
        return any(each in self._deleted for each in self._line(session_id))

    def stands(self, session_id: str) -> bool:
        """Nobody has asked for its end."""
        return not any(each in self._doomed for each in self._line(session_id))

    # --- the checks ----------------------------------------------------------------------------

    def check(self, database: Path) -> tuple[Audit, list[Finding]]:
        """The audit, with what was accepted, and what else was promised and is not so."""
        accepted = [
            (p.session, p.key) for p in self._all if p.kind == "accepted" and self.stands(p.session)
        ]
        found = audit(database, accepted=accepted)
        findings: list[Finding] = [
            (each.kind, f"{each.session_id}: {each.what}") for each in found.violations
        ]
        findings += [("broken", p.said) for p in self.new if p.kind == "broken"]
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            rows = _Rows(connection)
            for promise in self._all:
                if what := self._kept(promise, rows, found):
                    findings.append((promise.kind, f"{promise.session} {promise.key}: {what}"))
            findings += self._check_effects(rows)
            findings += self._check_published(rows)
        return found, findings

    def _kept(self, promise: Promise, rows: _Rows, found: Audit) -> str:
        """What is wrong with a promise, or nothing."""
        there = promise.session in rows.sessions
        name = (promise.session, promise.key)
        what: object = promise.said
        match promise.kind:
            case "born" | "deleted" if self.gone(promise.session):
                left = rows.left(promise.session)
                return f"deleted, and it has rows in {', '.join(left)}" if left else ""
            case "born" if self.stands(promise.session):
                return "" if there else "it is not there"
            case "outcome" if there:
                return self._outcome(promise, rows, found)
            case "replied" if there:
                what = rows.asks.get(name, promise.said)
            case "compacted" if there and self._whole(promise.session):
                what = rows.markers.get(name)
            case "claimed" if promise.key not in self._releasing:
                what = rows.claims.get(promise.key)
            case "released":
                what = rows.claims.get(promise.key, "")
        return "" if what == promise.said else f"it was {promise.said or 'free'}, and is {what}"

    def _whole(self, session_id: str) -> bool:
        """Nothing was ever taken out of its transcript."""
        return session_id not in self._reverted

    def _outcome(self, promise: Promise, rows: _Rows, found: Audit) -> str:
        name = (promise.session, promise.key)
        outcome = rows.outcomes.get(name)
        if outcome != promise.said:
            return f"its caller heard {promise.said} ({promise.text}), it is {outcome}"
        if outcome == "answered" and self._whole(promise.session):
            text = found.answers.get(name)
            return "" if text == promise.text else f"answered {promise.text!r}, it is {text!r}"
        return ""

    def _check_effects(self, rows: _Rows) -> Iterator[Finding]:
        for (session_id, call_id), times in self._effects.items():
            if times > 1:
                yield "duplicated", f"{session_id}: call {call_id} took effect {times} times"
            recorded = (session_id, call_id) in rows.calls
            known = session_id in rows.sessions and self._whole(session_id)
            if known and not recorded:
                yield "lost", f"{session_id}: call {call_id} took effect and is not recorded"
        for session_id, call_id in rows.noted:
            if not self._effects[session_id, call_id]:
                yield "lost", f"{session_id}: call {call_id} completed without effect"

    def _check_published(self, rows: _Rows) -> Iterator[Finding]:
        """What subscribers were told this round was committed, and is still what it was."""
        for promise in self.new:
            if promise.kind == "published":
                there = rows.event(int(promise.key))
                if there not in (None, (promise.session, promise.said)):
                    told = f"{promise.said} of {promise.session}"
                    yield "published", f"event {promise.key} was {told}, and is {there}"


class _Rows:
    """What the checks ask of the database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.sessions = {row[0] for row in connection.execute("SELECT id FROM session")}
        self.outcomes = {
            (session_id, key): msgspec.json.decode(data).get("outcome")
            for session_id, key, data in self._all("inbox", "message_id")
        }
        self.asks = {
            (session_id, key): msgspec.json.decode(data).get("replied")
            for session_id, key, data in self._all("ask", "id")
        }
        self.claims = {
            key: msgspec.json.decode(data)["owner"]
            for key, data in connection.execute("SELECT key, data FROM tracker_claim")
        }
        self.markers: dict[Named, str] = {}
        self.calls: set[Named] = set()
        self.noted: set[Named] = set()
        for session_id, _, data in self._all("part", "id", "kind IN ('tool', 'compaction')"):
            self._part(session_id, msgspec.json.decode(data))

    def _all(self, table: str, key: str, where: str = "1") -> Iterator[tuple[str, str, bytes]]:
        sql = f"SELECT session_id, {key}, data FROM {table} WHERE {where}"  # noqa: S608 - constants
        yield from self._connection.execute(sql)

    def _part(self, session_id: str, part: dict[str, Any]) -> None:
        if part["type"] == "compaction":
            self.markers[session_id, part["messageID"]] = part["state"]
            return
        self.calls.add((session_id, part["callID"]))
        if part["tool"] == "note" and part["state"]["status"] == "completed":
            # A fork has its call from elsewhere: the output says whose effect it was.
            _, where, call_id = part["state"]["output"].split()
            self.noted.add((where, call_id))

    def event(self, cursor: int) -> Named | str | None:
        """Session and type of an event; None if it was trimmed."""
        sql = "SELECT cursor, session_id, type FROM journal WHERE cursor >= ? ORDER BY cursor"
        found = self._connection.execute(f"{sql} LIMIT 1", (cursor,)).fetchone()
        if found is None:
            return "missing"
        last, session_id, types = found
        before = types.split(" ")[: -(last - cursor) or None]
        if before:
            return session_id, before[-1]
        (oldest,) = self._connection.execute("SELECT min(cursor) FROM journal").fetchone()
        return None if last == oldest else "missing"

    def left(self, session_id: str) -> list[str]:
        """The tables with anything of a session that is gone."""
        owners = {"session": "id"}
        return [
            table
            for table in ("session", "message", "part", "inbox", "ask", "claim")
            if self._connection.execute(
                f"SELECT 1 FROM {table} WHERE {owners.get(table, 'session_id')} = ?",  # noqa: S608
                (session_id,),
            ).fetchone()
        ]
