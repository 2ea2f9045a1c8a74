"""Runtimes, models and stores for the rows to measure."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from understudy import Limits, Runtime, tool
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    ModelEvent,
    ModelRequest,
    TextDelta,
    ToolCall,
    Usage,
)
from understudy.store.records import Tokens

logging.getLogger("understudy").setLevel(logging.CRITICAL)

_USAGE = Usage(Tokens(total=10, input=5, output=5))


class InstantModel:
    """Answers at once: with one tool call and then text, or with text alone."""

    provider_id = "bench"
    model_id = "instant"
    context_limit = 100_000_000
    output_limit = 8_192

    def __init__(self, *, calls_tool: bool = False) -> None:
        self._calls_tool = calls_tool

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        if self._calls_tool and not isinstance(request.turns[-1], AssistantTurn):
            yield ToolCall("call_1", "add", '{"a":1,"b":2}')
            yield _USAGE
            yield Finish("tool-calls")
        else:
            yield TextDelta("It is 3.")
            yield _USAGE
            yield Finish("stop")


class HeldModel(InstantModel):
    """Does not answer while it is asked: prompts are accepted, and wait."""

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        await asyncio.Event().wait()
        yield Finish("stop")


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@contextmanager
def runtime(path: Path, **options: Any) -> Iterator[Runtime]:
    """An open runtime, with limits that no row runs into."""
    limits = Limits(queue=1_000_000, stream_idle_s=600.0, turn_s=None)
    opened = Runtime(path, tools=[add], limits=limits, passivate_after_s=3600.0, **options)
    with opened:
        yield opened


async def in_flight(window: int, jobs: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    """Run jobs with ``window`` of them under way at any time."""
    left = iter(jobs)

    async def worker() -> None:
        for job in left:
            await job()

    await asyncio.gather(*(worker() for _ in range(window)))


_TABLES = ("session", "claim", "message", "part", "inbox", "ask")
_TEMPLATE = "ses_template00000000000000000"


def filled(path: Path, sessions: int) -> None:
    """Fill a store with clean, settled sessions, as an earlier runtime would have left them.

    One real turn is played and its rows are copied under other ids, so what is measured afterwards
    is a real runtime on real rows. Every tenth session has messages; to the others only their
    session and claim rows are given: a million whole ones take minutes to write.
    """
    _fill(path, sessions, InstantModel(), settled=True, whole_every=10)


def interrupted(path: Path, sessions: int) -> None:
    """Fill a store with sessions whose process was killed in the middle of a turn."""
    _fill(path, sessions, HeldModel(), settled=False, whole_every=1)


def _fill(path: Path, sessions: int, model: Any, *, settled: bool, whole_every: int) -> None:
    seed = path.with_suffix(".seed")
    with runtime(seed, model=model) as first:
        turn = first.create_session(session_id=_TEMPLATE).prompt("What is 1 + 2?")
        if settled:
            turn.result(timeout_s=10)
        snapshot = _snapshot(seed)
    with Runtime(path, model=InstantModel()):
        pass
    with _bulk(path) as connection:
        for table, (columns, rows) in snapshot.items():
            step = 1 if table in ("session", "claim") else whole_every
            names = [f"ses_{n:024d}" for n in range(0, sessions, step)]
            for row in rows:
                connection.executemany(
                    f"INSERT INTO {table} ({', '.join(columns)}) "
                    f"VALUES ({', '.join('?' * len(columns))})",
                    (_renamed(columns, row, name) for name in names),
                )


def lengthened(path: Path, session_id: str, messages: int) -> None:
    """Repeat a settled session's one turn until it has so many messages. Nobody has it open."""
    snapshot = _snapshot(path)
    rows = [(table, row) for table in ("message", "part", "inbox") for row in snapshot[table][1]]
    ids = {value for _, row in rows for value in row[1:3] if isinstance(value, str)}
    ids -= {session_id}
    span = max(row[snapshot[table][0].index("seq")] for table, row in rows)
    with _bulk(path) as connection:
        for turn in range(1, messages // 2):
            for table, row in rows:
                columns = snapshot[table][0]
                values = [
                    _shifted(column, value, ids, turn, span)
                    for column, value in zip(columns, row, strict=True)
                ]
                marks = ", ".join("?" * len(columns))
                connection.execute(f"INSERT INTO {table} VALUES ({marks})", values)
        connection.execute("UPDATE claim SET seq = ?", (span * messages,))


def _shifted(column: str, value: Any, ids: set[str], turn: int, span: int) -> Any:
    """A column of a later turn: other ids, later numbers."""
    if column in ("turn", "seq"):
        return value + turn * span
    if isinstance(value, bytes):
        for each in ids:
            value = value.replace(each.encode(), _later(each, turn).encode())
        return re.sub(rb'"turn":(\d+)', lambda m: b'"turn":%d' % (int(m[1]) + turn * span), value)
    return _later(value, turn) if value in ids else value


def _later(name: str, turn: int) -> str:
    return f"{name[:-8]}{name[-1]}{turn:07d}"


Snapshot = dict[str, tuple[list[str], list[tuple[Any, ...]]]]


def _snapshot(path: Path) -> Snapshot:
    """The rows of a store, journal left out, as a kill would leave them now."""
    tables: Snapshot = {}
    connection = sqlite3.connect(path)
    for table in _TABLES:
        cursor = connection.execute(f"SELECT * FROM {table}")
        tables[table] = ([column[0] for column in cursor.description], cursor.fetchall())
    connection.close()
    return tables


@contextmanager
def _bulk(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction of many rows; the file is whole and checkpointed afterwards."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -262144")
    connection.execute("BEGIN")
    yield connection
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def _renamed(columns: list[str], row: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    old, new = _TEMPLATE.encode(), name.encode()
    values = []
    for column, value in zip(columns, row, strict=True):
        if isinstance(value, bytes):
            values.append(value.replace(old, new))
        elif value == _TEMPLATE:
            values.append(name)
        elif column == "owner":
            values.append(None if value is None else "rtm_dead")
        else:
            values.append(value)
    return tuple(values)
