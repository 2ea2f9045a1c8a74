"""A client's view of sessions, folded from events alone: written against the documentation.

It shares no code with the store's projection, so that agreement means something.
"""

import json
import sqlite3

import msgspec


def plain(record):
    return json.loads(msgspec.json.encode(record))


class Gap(AssertionError):
    """The stream left something out, or said it twice."""


class Fold:
    """Sessions, messages, parts, prompts and asks as JSON, by id."""

    def __init__(self):
        self.sessions = {}
        self.messages = {}
        self.parts = {}
        self.prompts = {}
        self.asks = {}
        self.statuses = {}
        self.deleted = set()
        self.cursor = 0
        self.seqs = {}
        self.deltas = 0
        self.live = {}  # (session, part) -> text as a screen would show it

    def take(self, event):
        fact, session_id = event.data, event.session_id
        if event.type == "message.part.delta":
            self._delta(fact)
            return
        if event.cursor is None:
            return
        if event.cursor <= self.cursor:
            raise Gap(f"cursor {event.cursor} came after {self.cursor}")
        self.cursor = event.cursor
        known = self.seqs.get(session_id)
        if known is not None and event.seq != known + 1:
            raise Gap(f"{session_id}: seq {event.seq} came after {known}")
        self.seqs[session_id] = event.seq
        if event.type == "session.created":
            self.deleted.discard(session_id)
        elif session_id in self.deleted:
            raise Gap(f"{event.type} after session.deleted")
        handler = getattr(self, "_on_" + event.type.replace(".", "_"), None)
        if handler is not None:
            handler(fact, session_id)

    def _delta(self, fact):
        """Live text joins by its offset."""
        if fact.session_id in self.deleted:
            raise Gap("a delta after session.deleted")
        key = (fact.session_id, fact.part_id)
        self.deltas += 1
        if key not in self.live:
            return
        text = self.live[key]
        if fact.offset > len(text):
            raise Gap(f"a delta at {fact.offset}, the text ends at {len(text)}")
        overlap = text[fact.offset : fact.offset + len(fact.delta)]
        if not fact.delta.startswith(overlap):
            raise Gap(f"{fact.delta!r} at {fact.offset} contradicts {overlap!r}")
        self.live[key] = text + fact.delta[len(overlap) :]

    def _on_session_created(self, fact, session_id):
        self.sessions[session_id] = plain(fact.info)

    _on_session_updated = _on_session_created

    def _on_session_deleted(self, fact, session_id):
        self.deleted.add(session_id)
        self.sessions.pop(session_id, None)
        for table in (self.messages, self.parts, self.prompts, self.asks, self.live):
            for key in [key for key in table if key[0] == session_id]:
                del table[key]

    def _on_session_status(self, fact, session_id):
        self.statuses[session_id] = fact.status.type

    def _on_message_updated(self, fact, session_id):
        self.messages[session_id, fact.info.id] = plain(fact.info)

    def _on_message_removed(self, fact, session_id):
        self.messages.pop((session_id, fact.message_id), None)
        for key, part in list(self.parts.items()):
            if key[0] == session_id and part["messageID"] == fact.message_id:
                del self.parts[key]
                self.live.pop(key, None)

    def _on_message_part_updated(self, fact, session_id):
        key = (session_id, fact.part.id)
        self.parts[key] = part = plain(fact.part)
        if "text" in part:
            shown = self.live.get(key, "")
            if not (part["text"].startswith(shown) or shown.startswith(part["text"])):
                raise Gap(f"{part['text']!r} contradicts what was shown: {shown!r}")
            ended = part.get("time", {}).get("end") is not None
            longer = part["text"] if len(part["text"]) > len(shown) else shown
            self.live[key] = part["text"] if ended else longer

    def _on_message_part_removed(self, fact, session_id):
        self.parts.pop((session_id, fact.part_id), None)
        self.live.pop((session_id, fact.part_id), None)

    def _on_prompt_accepted(self, fact, session_id):
        self.prompts[session_id, fact.info.message_id] = plain(fact.info)

    _on_prompt_started = _on_prompt_accepted
    _on_prompt_settled = _on_prompt_accepted

    def _on_permission_asked(self, fact, session_id):
        self.asks[session_id, fact.info.id] = plain(fact.info)

    _on_permission_replied = _on_permission_asked
    _on_question_asked = _on_permission_asked
    _on_question_replied = _on_permission_asked

    def tables(self):
        return {
            "session": self.sessions,
            "message": self.messages,
            "part": self.parts,
            "inbox": self.prompts,
            "ask": self.asks,
        }


def stored(path):
    """The same from the file's tables, and the cursor they stand at: one read transaction."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("BEGIN")
        (cursor,) = connection.execute("SELECT coalesce(max(cursor), 0) FROM journal").fetchone()
        tables = {}
        for table, keys in (
            ("session", "id"),
            ("message", "session_id, id"),
            ("part", "session_id, id"),
            ("inbox", "session_id, message_id"),
            ("ask", "session_id, id"),
        ):
            rows = connection.execute(f"SELECT {keys}, data FROM {table}").fetchall()
            tables[table] = {
                (row[0] if len(row) == 2 else row[:-1]): json.loads(row[-1]) for row in rows
            }
        return tables, cursor
    finally:
        connection.close()
