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

from understudy.gateway.audit import audit
from understudy.store.database import SCHEMA_VERSION, WAL_LIMIT_BYTES, check_existing, translated
from understudy.store.events import decode_fact
from understudy.store.reads import Reads
from understudy.store.records import AnyPart, Ask, Message, Prompt, Session


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
    """

    path: str
    schema: int
    bytes: int
    wal_bytes: int
    sessions: int
    events: int
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
        problems += _unattended(reads, live) + _quarantined(reads) + _stale(reads, file, live)
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
            decode_fact(row["type"], row["data"])
        else:
            _DECODERS[table](row["data"])
    except (msgspec.DecodeError, TypeError, KeyError):
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


def _unattended(reads: Reads, live: list[str]) -> list[Problem]:
    return [
        Problem("unfinished", "has unfinished work and no live runtime", session_id)
        for session_id, owner in sorted(reads.unfinished_sessions())
        if owner not in live
    ]


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
