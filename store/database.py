"""Opening a database file: connections, migrations, and what may be wrong with a path."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import peewee
from peewee import SqliteDatabase

from understudy.errors import (
    InvalidInput,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreTooNew,
    StoreUnreadable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Durability = Literal["full", "normal"]

APPLICATION_ID: Final = 0x756E6473  # "unds"
OLDEST_SQLITE: Final = (3, 35)
SCHEMA_VERSION: Final = 3  # the number of the newest migration
MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S: Final = 5.0
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path of a database file that may be made, absolute, or a typed error about it.

    Without links: who opens one file by two names must find the other's lock beside it.
    """
    file = _absolute(path)
    if file.is_dir():
        raise StoreUnreadable(f"{file} is a directory, not a database file", path=str(file))
    if not file.parent.is_dir():
        wrong = "is not a directory" if file.parent.exists() else "does not exist: make it first"
        raise StoreUnreadable(f"{file.parent} {wrong}", path=str(file))
    return file


def _absolute(path: str | os.PathLike[str]) -> Path:
    try:
        text = os.fspath(path)
    except TypeError as error:
        raise InvalidInput(f"a path, not {type(path).__name__}", field="path") from error
    if not isinstance(text, str) or not text or text.startswith((":memory:", "file:")):
        raise InvalidInput(f"a database is a file; {text!r} is not a path to one", field="path")
    if "\0" in text:
        raise InvalidInput("a path has no null character", field="path")
    return Path(os.path.realpath(text))


def connect(
    path: Path, *, durability: Durability = "full", reader: bool = False, readonly: bool = False
) -> SqliteDatabase:
    """One connection, usable from any thread, by one at a time.

    A ``reader`` makes no changes; a ``readonly`` one cannot, and never checkpoints either: it looks
    at what may be damaged.
    """
    pragmas: dict[str, object] = {
        "busy_timeout": int(BUSY_TIMEOUT_S * 1000),
        "synchronous": durability.upper(),
        "journal_size_limit": WAL_LIMIT_BYTES,
        "cache_size": -8 * 1024 if reader else -32 * 1024,
        "temp_store": "MEMORY",
    }
    if reader:
        pragmas["query_only"] = 1
    database = SqliteDatabase(
        f"{path.as_uri()}?mode={'ro' if readonly else 'rw'}" if reader or readonly else str(path),
        uri=reader or readonly,
        pragmas=pragmas,
        lock_type="IMMEDIATE",
        timeout=BUSY_TIMEOUT_S,
        thread_safe=False,
        check_same_thread=False,
        cached_statements=256,
    )
    with translated(path):
        database.connect()
    if readonly:
        database.connection().text_factory = legible
    return database


def legible(text: bytes) -> str:
    """A text that may be no UTF-8, which sqlite3 refuses to read."""
    return text.decode(errors="replace")


def prepare(path: Path, *, durability: Durability = "full") -> SqliteDatabase:
    """The writer's connection to a database of ours, created or migrated as needed.

    Raises ``StoreUnreadable`` for what is not ours, ``StoreTooNew`` for what a newer version
    wrote; neither is touched; ``StoreError`` where SQLite is older than ``OLDEST_SQLITE``.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise StoreError(f"SQLite 3.35 or newer is needed, and this is {sqlite3.sqlite_version}")
    database = connect(path, durability=durability)
    try:
        with translated(path):
            _check_ours(database, path)
            mode = database.pragma("journal_mode", "wal")
            if mode != "wal":
                raise StoreUnreadable(f"{path} does not allow write-ahead logging", path=str(path))
            if database.pragma("user_version") < SCHEMA_VERSION:
                _migrate(database)
            # A read-only file opens and reads; only a write tells.
            database.execute_sql("BEGIN IMMEDIATE")
            database.execute_sql("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def guard(path: Path) -> Callable[[], None]:
    """A check that ``path`` still names the file it names now.

    It raises ``StoreUnreadable`` otherwise: what went into a deleted file would be told as durable.
    """
    file = _identity(path)

    def check() -> None:
        if _identity(path) != file:
            problem = f"{path} was moved, deleted or replaced while it was in use"
            raise StoreUnreadable(problem, path=str(path))

    return check


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_existing(path: str | os.PathLike[str]) -> Path:
    """The path of a database that is there, is ours, and has our schema; it is not touched.

    Raises ``StoreUnreadable``, or ``StoreTooNew``.
    """
    file = _absolute(path)
    if not file.exists():
        raise StoreUnreadable(f"There is no database {file}", path=str(file))
    check_path(file)
    database = connect(file, reader=True, readonly=True)
    try:
        with translated(file):
            _check_ours(database, file)
            version = database.pragma("user_version")
    finally:
        database.close()
    if version < SCHEMA_VERSION:
        raise StoreUnreadable(
            f"{file} has schema {version}: open it with a runtime once, to bring it up to date",
            path=str(file),
        )
    return file


def _check_ours(database: SqliteDatabase, path: Path) -> None:
    version = database.pragma("user_version")
    application = database.pragma("application_id")
    empty = not database.execute_sql("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and not (empty and version == 0):
        raise StoreUnreadable(f"{path} is a database of another application", path=str(path))
    if version > SCHEMA_VERSION:
        raise StoreTooNew(
            f"{path} has schema {version}; this version of understudy knows {SCHEMA_VERSION}",
            path=str(path),
            version=version,
        )


def _migrate(database: SqliteDatabase) -> None:
    """Apply what is pending, all or nothing; a second process waits and finds it done."""
    from playhouse.migrations import Runner

    with database.atomic("EXCLUSIVE"):
        if database.pragma("user_version") >= SCHEMA_VERSION:
            return
        Runner(database, str(MIGRATIONS)).up()
        database.pragma("application_id", APPLICATION_ID)
        database.pragma("user_version", SCHEMA_VERSION)


def room_bytes(path: Path) -> int:
    """The room that is left beside a file."""
    from shutil import disk_usage

    return disk_usage(path.parent).free


# --- errors ------------------------------------------------------------------------------------


@contextmanager
def translated(path: Path | str = "") -> Iterator[None]:
    """Turn what the database layers raise into errors of ours."""
    try:
        yield
    except (sqlite3.Error, peewee.PeeweeException, OSError) as error:
        raise translate(error, path) from error


def translate(error: BaseException, path: Path | str = "") -> StoreError:
    """The error of ours for one of SQLite's, peewee's or the operating system's."""
    words = str(error).lower()
    where = {"path": str(path)} if path else {}
    if isinstance(error, StoreError):
        return error
    if "disk is full" in words or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull("No space left: nothing was written", **where)
    if "locked" in words or "busy" in words:
        return StoreBusy("The database stayed locked by another process", **where)
    unreadable = ("not a database", "malformed", "readonly", "read-only", "unable to open")
    if any(phrase in words for phrase in unreadable) or isinstance(error, PermissionError):
        return StoreUnreadable(f"{path or 'The database'}: {error}", **where)
    return StoreError(f"The database failed: {error}", **where)
