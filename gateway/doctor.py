"""``understudy doctor``: says what is wrong with a database, and repairs it on request."""

from __future__ import annotations

import argparse
from typing import Final

import msgspec

from understudy.errors import StoreUnreadable
from understudy.gateway import display
from understudy.gateway.diagnosis import Diagnosis, diagnose, kinds
from understudy.gateway.display import plain
from understudy.gateway.places import database_path
from understudy.gateway.repair import Repair, repair

SHOWN = 50
DAMAGED: Final = (
    "the file itself is damaged, below its rows. Copy it with its -wal and -shm first. Then go "
    'back to a backup, or try `sqlite3 FILE ".recover" | sqlite3 NEW`, and the doctor on NEW.'
)


def doctor(args: argparse.Namespace) -> int:
    """Exit code 0 if healthy, 1 if problems were found (after ``--repair``: are left)."""
    path = database_path(args.database)
    try:
        done = repair(path) if args.repair else None
        found = diagnose(path)
    except StoreUnreadable as error:
        if "malformed" not in str(error):
            raise
        raise StoreUnreadable(f"{error}: {DAMAGED}", path=str(path)) from error
    if args.json:
        print(msgspec.json.encode({"diagnosis": found, "repair": done}).decode())
    else:
        _print(found, done)
    return 1 if found.problems else 0


def _print(found: Diagnosis, done: Repair | None) -> None:
    rows = [
        ("database", found.path),
        ("schema", str(found.schema)),
        ("size", f"{found.bytes:,} bytes and {found.wal_bytes:,} in the write-ahead log"),
        ("content", f"{_counted(found.sessions, 'session')}, {_counted(found.events, 'event')}"),
        ("open in", ", ".join(found.live) or "no runtime"),
    ]
    if waiting := _waiting(found):
        rows.append(("waiting", waiting))
    if done is not None:
        rows += [
            ("rows put back", str(done.restored)),
            ("rows removed", str(done.removed)),
            ("sessions recovered", str(done.recovered)),
            ("lock files removed", str(done.locks)),
        ]
        if done.aside:
            rows.append(("set aside in", done.aside))
    display.table(rows)
    for each in found.problems[:SHOWN]:
        where = f"{each.session_id} " if each.session_id else ""
        print(plain(f"{each.kind}: {where}{each.what}", one_line=True))
    if len(found.problems) > SHOWN:
        print(f"… and {len(found.problems) - SHOWN} more")
    if found.problems:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds(found.problems).items())
        display.emphasise(f"Problems: {counts}", good=False)
    else:
        display.emphasise("Healthy.", good=True)


def _waiting(found: Diagnosis) -> str:
    waiting = []
    if found.prompts:
        waiting.append(f"{_counted(found.prompts, 'prompt')} for the next start")
    if found.asks:
        waiting.append(f"{_counted(found.asks, 'request')} for an answer")
    return ", ".join(waiting)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
