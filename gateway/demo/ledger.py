"""The parent's own record of what it was told, on disk before it counts.

One JSON object a line, beside the database. It outlives the parent: a demo that is killed and
started again goes on from here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from understudy.errors import StoreBusy, StoreUnreadable
from understudy.gateway import lines


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """``task`` names what is to be done, ``accepted`` a prompt's message id."""

    kind: Literal["start", "task", "accepted", "crash", "kill", "death"]
    session: str = ""
    task: str = ""
    accepted: str = ""
    file: str = ""
    root: str = ""
    mtime_ns: int = 0


class Ledger:
    """An append-only file, held by one demo at a time.

    Raises ``StoreBusy`` while another demo has it, ``StoreUnreadable`` if it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StoreUnreadable(f"{path}: {error.strerror}", path=str(path)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise StoreBusy(f"Another demo works with {path}", path=str(path)) from error
        try:
            self.entries = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> list[Entry]:
        try:
            entries, size = lines.whole(self.path.read_bytes(), Entry)
        except msgspec.DecodeError as error:
            raise StoreUnreadable(f"{self.path} is not a ledger: {error}") from error
        os.ftruncate(self._file, size)
        return entries

    def write(self, entries: Iterable[Entry]) -> None:
        """Append, and return when it is on disk."""
        added = list(entries)
        if added:
            lines.append(self._file, added)
            os.fsync(self._file)
            self.entries += added

    def of(self, kind: str) -> list[Entry]:
        return [each for each in self.entries if each.kind == kind]

    def close(self) -> None:
        os.close(self._file)


def effects_of(path: Path) -> list[tuple[str, str]]:
    """What the tool ``note`` did: (session id, call id), once for each time."""
    if not path.exists():
        return []
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return [(session_id, call_id) for session_id, call_id in pairs]


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the parent to the worker, a line of JSON each."""

    kind: Literal["prompt", "crash", "stop"]
    session: str = ""
    task: str = ""
    message: str = ""
    text: str = ""


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the worker to the parent. ``cursor`` counts the events published so far."""

    kind: Literal["ready", "accepted", "settled", "crashed", "restarted", "failed", "stopped"]
    session: str = ""
    task: str = ""
    message: str = ""
    outcome: str = ""
    cursor: int = 0
    recovered: int = 0
