"""What is wrong with a database, found without touching it."""

from __future__ import annotations

import fcntl
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy.actors.core.commands import Recover
from understudy.actors.core.decide import decide
from understudy.actors.core.state import Moment, Rules, State
from understudy.actors.loading import loaded_of
from understudy.gateway.audit import audit
from understudy.store import journal
from understudy.store.database import SCHEMA_VERSION, WAL_LIMIT_BYTES, check_existing, translated
from understudy.store.events import decode_fact
from understudy.store.reads import Reads
from understudy.store.records import AnyPart, Ask, Message, Prompt, Session
from understudy.store.unfinished import Unfinished


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong, and where."""

    kind: str
    what: str
    session_id: str = ""


class Diagnosis(msgspec.Struct, kw_only=True):
    """A database's size and shape, and its problems.

    Attributes:
        live: runtimes that have the database open now.
        wal_bytes: the size of the write-ahead log.
        prompts: how many wait for the next start, as they do when a runtime closes.
        asks: how many requests wait for a person's answer, over restarts.
    """

    path: str
    schema: int
    bytes: int
    wal_bytes: int
    sessions: int
    events: int
    prompts: int
    asks: int
    live: list[str]
    problems: list[Problem]


class DamagedRow(msgspec.Struct, frozen=True):
    """A row whose record cannot be read: its table, rowid, and columns as they are."""

    table: str
    rowid: int
    session_id: str
    key: str
    columns: dict[str, Any]


_KEYS: Final = {
    "session": ("id", "id"),
    "message": ("session_id", "id"),
    "part": ("session_id", "id"),
    "inbox": ("session_id", "message_id"),
    "ask": ("session_id", "id"),
    "journal": ("session_id", "cursor"),
}
_DECODERS: Final[dict[str, Callable[[bytes], Any]]] = {
    "session": msgspec.json.Decoder(Session).decode,
    "message": msgspec.json.Decoder(Message).decode,
    "part": msgspec.json.Decoder(AnyPart).decode,
    "inbox": msgspec.json.Decoder(Prompt).decode,
    "ask": msgspec.json.Decoder(Ask).decode,
}


def diagnose(path: Path) -> Diagnosis:
    """Examine a database; it may be in use, and then what runs is no problem.

    Raises ``StoreUnreadable``, ``StoreTooNew``, ``StoreBusy``.
    """
    file = check_existing(path)
    with closing(Reads(file, readonly=True)) as reads, translated(file):
        live = live_runtimes(reads, file)
        found = audit(file, resting=False)
        problems = [
            Problem(each.kind, each.what, each.session_id)
            for each in found.violations
            if each.kind != "damaged" or not each.session_id  # told in more detail below
        ]
        with reads.connection() as c:
            problems += [
                Problem("damaged", f"{row.table} {row.key} cannot be read", row.session_id)
                for row in damaged_rows(c)
            ]
        waiting = _Waiting(reads, live)
        problems += waiting.problems + _quarantined(reads) + _stale(reads, file, live)
    wal_bytes = _size(file.with_name(f"{file.name}-wal"))
    if wal_bytes > 2 * WAL_LIMIT_BYTES:
        problems.append(Problem("wal", f"the write-ahead log has {wal_bytes:,} bytes"))
    return Diagnosis(
        path=str(file),
        schema=SCHEMA_VERSION,
        bytes=_size(file),
        wal_bytes=wal_bytes,
        sessions=found.sessions,
        events=sum(found.events.values()),
        prompts=waiting.prompts,
        asks=waiting.asks,
        live=live,
        problems=problems,
    )


def damaged_rows(c: sqlite3.Connection) -> list[DamagedRow]:
    """Rows that the store cannot read."""
    found = []
    for table, (owner, key) in _KEYS.items():
        cursor = c.execute(f"SELECT rowid AS _rowid, * FROM {table}")  # noqa: S608 - constants
        names = [column[0] for column in cursor.description]
        for values in cursor:
            row = dict(zip(names, values, strict=True))
            if not _is_readable(table, row):
                rowid = row.pop("_rowid")
                found.append(DamagedRow(table, rowid, str(row[owner]), str(row[key]), row))
    return found


def _is_readable(table: str, row: dict[str, Any]) -> bool:
    try:
        if table == "journal":
            for kind, line in journal.parted(row["type"], row["data"], row["size"]):
                decode_fact(kind, line)
        else:
            _DECODERS[table](row["data"])
    except (ValueError, TypeError, KeyError):
        return False
    return True


def live_runtimes(reads: Reads, path: Path) -> list[str]:
    """Runtimes that have the database open, as far as can be told from here."""
    here = socket.gethostname()
    now_ms = time.time() * 1000
    return [
        runtime_id
        for runtime_id, host, _, until_ms in reads.runtimes()
        if (_is_locked(lock_path(path, runtime_id)) if host == here else until_ms > now_ms)
    ]


def lock_path(path: Path, runtime_id: str) -> Path:
    return path.with_name(f"{path.name}-{runtime_id}.lock")


def _is_locked(path: Path) -> bool:
    """Whether a living process holds a runtime's lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def dead_locks(path: Path) -> list[Path]:
    """Lock files that nobody holds."""
    found = sorted(path.parent.glob(f"{path.name}-rtm_*.lock"))
    return [each for each in found if not _is_locked(each)]


class _Waiting:
    """What no live runtime works on: it waits for the next start, or was cut short."""

    def __init__(self, reads: Reads, live: list[str]) -> None:
        self.problems: list[Problem] = []
        self.prompts = self.asks = 0
        unfinished = sorted(reads.unfinished_sessions())
        unattended = [session_id for session_id, owner in unfinished if owner not in live]
        for session_id in unattended:
            found = reads.unfinished([session_id])[session_id]
            self.prompts += sum(prompt.turn is None for prompt, _ in found.prompts)
            self.asks += len(found.asks)
            if _is_cut_short(reads, session_id, found):
                what = "has unfinished work and no live runtime"
                self.problems.append(Problem("unfinished", what, session_id))


def _is_cut_short(reads: Reads, session_id: str, found: Unfinished) -> bool:
    """Whether a recovery that starts nothing would have anything to do."""
    try:
        info = reads.session(session_id)
        if info is None or found.damaged:
            return True
        state, moment = State(info=info, seq=0), Moment(now_ms=0, entropy=0)
        return bool(decide(state, Recover(loaded=loaded_of(found)), moment, Rules(rest=True)).facts)
    except Exception:  # noqa: BLE001 - as its recovery would fail
        return True


def _quarantined(reads: Reads) -> list[Problem]:
    return [
        Problem("quarantined", f"its actor kept dying: {reason}", session_id)
        for session_id, reason in sorted(reads.quarantined().items())
    ]


def _stale(reads: Reads, path: Path, live: list[str]) -> list[Problem]:
    dead = [each[0] for each in reads.runtimes() if each[0] not in live]
    problems = [Problem("stale", f"runtime {each} died and is still listed") for each in dead]
    return problems + [
        Problem("stale", f"the lock file {each.name} is nobody's") for each in dead_locks(path)
    ]


def kinds(problems: list[Problem]) -> Counter[str]:
    return Counter(each.kind for each in problems)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
