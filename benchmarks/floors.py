"""Floors: what SQLite and the disk allow by themselves, with nothing of ours around them."""

from __future__ import annotations

import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, over_floor
from understudy import Runtime
from understudy.store.writer import LOG_PAGES


def one_row_ms(path: Path, *, commits: int = 40) -> float:
    """Milliseconds that a commit of one row takes, at FULL: the median."""
    connection = _opened(path)
    connection.execute("CREATE TABLE prompt (id INTEGER PRIMARY KEY, text TEXT)")
    times = []
    for _ in range(commits):
        start = time.perf_counter()
        connection.execute("INSERT INTO prompt (text) VALUES ('What is 1 + 2?')")
        times.append((time.perf_counter() - start) * 1000)
    connection.close()
    return statistics.median(times)


def raw_group_commit(path: Path, *, prompts: int, group: int = 512) -> float:
    """The standard library writing one row for each prompt, in groups, at FULL."""
    connection = _opened(path)
    connection.execute("CREATE TABLE prompt (id INTEGER PRIMARY KEY, session_id TEXT, text TEXT)")
    start = time.perf_counter()
    for first in range(0, prompts, group):
        rows = [(f"ses_{n}", "What is 1 + 2?") for n in range(first, min(first + group, prompts))]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO prompt (session_id, text) VALUES (?, ?)", rows)
        connection.execute("COMMIT")
    figure = prompts / (time.perf_counter() - start)
    connection.close()
    return figure


def over_sqlite(medians: Mapping[str, float]) -> Figure:
    """What "ours" is beside "alone", a ``Tape`` replayed; "commit" says how fast the disk is."""
    return over_floor(
        "the same statements, by sqlite3 alone",
        medians["ours"],
        "/s",
        "sqlite3, one thread",
        medians["alone"],
        f"a commit of one row takes {medians['commit']:.2f} ms",
    )


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}").fetchall()
    return connection


class Tape:
    """What a runtime writes, to be written again by sqlite3 alone.

    It stands before the runtime's write connection.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._store = runtime.engine.store
        self._writer: Any = self._store._writer
        self._connection: sqlite3.Connection = self._writer._connection
        self._statements: list[tuple[str, Any]] = []
        self._start = 0

    def record(self, work: Callable[[], float]) -> float:
        """Remember what ``work`` writes, instead of what was remembered. It makes its sessions."""
        self._statements = []
        self._stand(self)
        try:
            return work()
        finally:
            self._stand(self._connection)

    def _stand(self, connection: Any) -> None:
        """Let the writer use a connection from its next transaction on."""
        there = threading.Event()

        def stand() -> None:
            self._writer._connection = connection
            there.set()

        self._store.between_commits(stand)
        there.wait()

    def start(self) -> None:
        """From here on it is measured; what came before is needed."""
        self._start = len(self._statements)

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self._statements.append((sql, values))
        return self._connection.execute(sql, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def replayed_s(self, path: Path) -> float:
        """Seconds that the same statements take in a new database, in the same transactions."""
        with Runtime(path):
            pass
        connection = _opened(path)
        before, measured = self._statements[: self._start], self._statements[self._start :]
        for sql, values in before:
            connection.execute(sql, values).fetchall()
        start = time.perf_counter()
        for sql, values in measured:
            connection.execute(sql, values).fetchall()
        took_s = time.perf_counter() - start
        connection.close()
        return took_s
