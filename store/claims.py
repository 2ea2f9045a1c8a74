"""Claims: who may write a session now, and the number that fences everyone else out.

Each function is the work of a writer's job: it runs inside the write transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

import msgspec

from understudy.errors import SessionClaimed, SessionExists, SessionNotFound
from understudy.store.changes import Transaction
from understudy.store.events import ActorCrashed, AnyFact, Event, SessionDeleted, SessionQuarantined
from understudy.store.records import Session, SessionTime

Alive: TypeAlias = Callable[[str], bool]
"""Whether the runtime with this id is alive, as far as anyone can tell."""

_TREE: Final = """
    WITH RECURSIVE tree (id, depth) AS (
        SELECT ?, 0
        UNION ALL
        SELECT s.id, tree.depth + 1 FROM session s JOIN tree ON s.parent_id = tree.id
        WHERE tree.depth < 1000
    )
    SELECT id, max(depth) FROM tree GROUP BY id ORDER BY max(depth) DESC, id
"""
_SETTLE: Final = (
    "UPDATE claim SET owner = NULL, epoch = epoch + 1, seq = ? "
    "WHERE session_id = ? AND epoch = ? AND seq = ? AND owner IS ?"
)
_SESSION_TABLES: Final = ("part", "message", "inbox", "ask", "restart", "claim")


class Claimed(msgspec.Struct, frozen=True):
    """A claim taken: write with this epoch. ``previous`` is who held it before."""

    epoch: int
    seq: int
    previous: str | None


def create(
    tx: Transaction, *, owner: str, info: Session, facts: tuple[AnyFact, ...], time_ms: int
) -> tuple[Claimed, list[Event]]:
    """A new session, claimed by its creator. An id used before starts empty, at a higher epoch."""
    execute = tx.connection.execute
    if execute("SELECT 1 FROM claim WHERE session_id = ?", (info.id,)).fetchone():
        raise SessionExists(f"Session {info.id} exists", session_id=info.id)
    if info.parent_id is not None:
        parent = execute("SELECT 1 FROM claim WHERE session_id = ?", (info.parent_id,)).fetchone()
        if not parent:
            raise SessionNotFound(f"No parent session {info.parent_id}", session_id=info.parent_id)
    buried = execute(
        "DELETE FROM tombstone WHERE session_id = ? RETURNING epoch, seq", (info.id,)
    ).fetchone()
    epoch, seq = buried or (0, 0)
    execute(
        "INSERT INTO claim (session_id, owner, epoch, seq) VALUES (?, ?, ?, ?)",
        (info.id, owner, epoch + 1, seq + len(facts)),
    )
    events = tx.append(info.id, seq, time_ms, facts)
    return Claimed(epoch + 1, seq + len(facts), None), events


class Orphan(msgspec.Struct, frozen=True, gc=False):
    """A session that nobody may be at work on: its record, and the claim as it was read."""

    info: Session
    owner: str | None
    epoch: int
    seq: int


def settle_orphans(
    tx: Transaction,
    *,
    settled: Sequence[tuple[Orphan, tuple[AnyFact, ...]]],
    time_ms: int,
    alive: Alive,
) -> tuple[list[str], list[Event]]:
    """Write the facts that make orphans whole, and leave them to nobody, at a higher epoch.

    Returns the ids of those that moved since they were read; nothing was written of them.
    """
    owners = {orphan.owner for orphan, _ in settled}
    free = {owner for owner in owners if owner is None or not alive(owner)}
    moved: list[str] = []
    events: list[Event] = []
    for orphan, facts in settled:
        session_id, seq = orphan.info.id, orphan.seq
        values = (seq + len(facts), session_id, orphan.epoch, seq, orphan.owner)
        if orphan.owner in free and tx.connection.execute(_SETTLE, values).rowcount == 1:
            events += tx.append(session_id, seq, time_ms, facts)
        else:
            moved.append(session_id)
    return moved, events


def acquire(tx: Transaction, *, session_id: str, owner: str, alive: Alive) -> Claimed:
    """Take a session over. Whoever wrote it before is fenced out by the new epoch."""
    row = tx.connection.execute(
        "SELECT owner, epoch, seq FROM claim WHERE session_id = ?", (session_id,)
    ).fetchone()
    if row is None:
        raise SessionNotFound(f"No session {session_id}", session_id=session_id)
    holder, epoch, seq = row
    if holder not in (None, owner) and alive(holder):
        raise SessionClaimed(
            f"Session {session_id} belongs to runtime {holder}",
            session_id=session_id,
            owner=holder,
        )
    tx.connection.execute(
        "UPDATE claim SET owner = ?, epoch = ? WHERE session_id = ?",
        (owner, epoch + 1, session_id),
    )
    return Claimed(epoch + 1, seq, holder)


def release(tx: Transaction, *, owner: str, held: Iterable[tuple[str, int]]) -> None:
    """Let sessions go, each unless somebody took it over."""
    tx.connection.executemany(
        "UPDATE claim SET owner = NULL WHERE session_id = ? AND epoch = ? AND owner = ?",
        [(session_id, epoch, owner) for session_id, epoch in held],
    )


def release_all(tx: Transaction, *, owner: str) -> None:
    """Let go of everything a runtime holds, and of the runtime itself."""
    tx.connection.execute("UPDATE claim SET owner = NULL WHERE owner = ?", (owner,))
    tx.connection.execute("DELETE FROM runtime WHERE id = ?", (owner,))


# --- deletion ----------------------------------------------------------------------------------


def delete_tree(
    tx: Transaction, *, session_id: str, owner: str, epoch: int | None, alive: Alive, now_ms: int
) -> tuple[list[str], list[Event]]:
    """Delete a session and its descendants, all or nothing; children's events come first.

    ``epoch`` is the caller's claim on the session, or None when it holds none. Raises
    ``SessionNotFound``, or ``SessionClaimed`` if another live runtime holds any of them.
    """
    ids = [row[0] for row in tx.connection.execute(_TREE, (session_id,))]
    events: list[Event] = []
    buried = []
    for member in ids:
        row = tx.connection.execute(
            "SELECT c.owner, c.epoch, c.seq, s.data FROM claim c "
            "LEFT JOIN session s ON s.id = c.session_id WHERE c.session_id = ?",
            (member,),
        ).fetchone()
        if row is None:
            raise SessionNotFound(f"No session {member}", session_id=member)
        holder, held, seq, data = row
        if member == session_id and epoch is not None and (holder, held) != (owner, epoch):
            raise SessionClaimed(
                f"Session {member} was taken over", session_id=member, owner=holder
            )
        if holder not in (None, owner) and alive(holder):
            raise SessionClaimed(
                f"Session {member} belongs to runtime {holder}", session_id=member, owner=holder
            )
        fact = SessionDeleted(session_id=member, info=_readable(member, data))
        events += tx.append(member, seq, now_ms, (fact,))
        buried.append((member, held + 1, seq + 1, now_ms))
    keys = [(member,) for member in ids]
    for table in _SESSION_TABLES:
        tx.connection.executemany(f"DELETE FROM {table} WHERE session_id = ?", keys)  # noqa: S608
    tx.connection.executemany("DELETE FROM session WHERE id = ?", keys)
    tx.connection.executemany(
        "INSERT OR REPLACE INTO tombstone (session_id, epoch, seq, deleted_ms) VALUES (?, ?, ?, ?)",
        buried,
    )
    return ids, events


def _readable(session_id: str, data: bytes | None) -> Session:
    """The session's record; what is damaged must go as well, so a bare one stands in for it."""
    try:
        return msgspec.json.decode(data or b"", type=Session)
    except ValueError:
        return Session(id=session_id, title="", time=SessionTime(created=0, updated=0))


# --- supervision -------------------------------------------------------------------------------


class RestartRecord(msgspec.Struct, frozen=True):
    """The supervisor's durable memory of a session; see ``schema.Restart``."""

    session_id: str
    total: int = 0
    consecutive: int = 0
    last_ms: int = 0
    reason: str = ""
    culprit: str | None = None
    culprit_count: int = 0
    quarantined_ms: int | None = None


_RESTART: Final = (
    "SELECT session_id, total, consecutive, last_ms, reason, culprit, culprit_count, "
    "quarantined_ms FROM restart WHERE session_id = ?"
)


def restart_record(tx: Transaction, session_id: str) -> RestartRecord | None:
    row = tx.connection.execute(_RESTART, (session_id,)).fetchone()
    return RestartRecord(*row) if row else None


def record_crash(
    tx: Transaction,
    *,
    session_id: str,
    owner: str,
    reason: str,
    culprit: str | None,
    quarantine_at: int,
    now_ms: int,
) -> tuple[RestartRecord, list[Event]]:
    """Count a crash before anybody acts on it, fence the dead actor out, and say so.

    At ``quarantine_at`` crashes in a row the session is quarantined.
    """
    claim = tx.connection.execute(
        "SELECT owner, epoch, seq FROM claim WHERE session_id = ?", (session_id,)
    ).fetchone()
    if claim is None:
        raise SessionNotFound(f"No session {session_id}", session_id=session_id)
    holder, epoch, seq = claim
    if holder != owner:
        raise SessionClaimed(
            f"Session {session_id} was taken over", session_id=session_id, owner=holder
        )
    old = restart_record(tx, session_id) or RestartRecord(session_id)
    consecutive = old.consecutive + 1
    quarantined = now_ms if consecutive >= quarantine_at else old.quarantined_ms
    same = culprit is not None and culprit == old.culprit
    record = RestartRecord(
        session_id=session_id,
        total=old.total + 1,
        consecutive=consecutive,
        last_ms=now_ms,
        reason=reason,
        culprit=culprit,
        culprit_count=old.culprit_count + 1 if same else int(culprit is not None),
        quarantined_ms=quarantined,
    )
    put_restart(tx, record)
    facts: list[AnyFact] = [
        ActorCrashed(session_id=session_id, reason=reason, consecutive=consecutive)
    ]
    if quarantined is not None and old.quarantined_ms is None:
        facts.append(SessionQuarantined(session_id=session_id, reason=reason))
    tx.connection.execute(
        "UPDATE claim SET epoch = ?, seq = ? WHERE session_id = ?",
        (epoch + 1, seq + len(facts), session_id),
    )
    return record, tx.append(session_id, seq, now_ms, facts)


def put_restart(tx: Transaction, record: RestartRecord) -> None:
    tx.connection.execute(
        "INSERT OR REPLACE INTO restart (session_id, total, consecutive, last_ms, reason, "
        "culprit, culprit_count, quarantined_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        msgspec.structs.astuple(record),
    )


def lift_quarantine(
    tx: Transaction, *, session_id: str, facts: tuple[AnyFact, ...], now_ms: int
) -> tuple[bool, list[Event]]:
    """Let a quarantined session run again. False if it was not quarantined."""
    lifted = tx.connection.execute(
        "UPDATE restart SET consecutive = 0, culprit = NULL, culprit_count = 0, "
        "quarantined_ms = NULL WHERE session_id = ? AND quarantined_ms IS NOT NULL",
        (session_id,),
    ).rowcount
    if not lifted:
        return False, []
    (seq,) = tx.connection.execute(
        "UPDATE claim SET seq = seq + ? WHERE session_id = ? RETURNING seq",
        (len(facts), session_id),
    ).fetchone()
    return True, tx.append(session_id, seq - len(facts), now_ms, facts)
