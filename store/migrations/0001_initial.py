"""The first schema."""

from __future__ import annotations

from typing import Any

STATEMENTS = (
    """
    CREATE TABLE ask (
        session_id TEXT NOT NULL,
        id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        open INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (session_id, id)
    )""",
    """CREATE INDEX ask_open ON ask (session_id, seq) WHERE open = 1""",
    """CREATE INDEX ask_id ON ask (id)""",
    """
    CREATE TABLE claim (
        session_id TEXT NOT NULL PRIMARY KEY,
        owner TEXT,
        epoch INTEGER NOT NULL,
        seq INTEGER NOT NULL
    )""",
    """CREATE INDEX claim_owner ON claim (owner) WHERE owner IS NOT NULL""",
    """
    CREATE TABLE inbox (
        session_id TEXT NOT NULL,
        message_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        open INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (session_id, message_id)
    )""",
    """CREATE INDEX inbox_open ON inbox (session_id, seq) WHERE open = 1""",
    """
    CREATE TABLE journal (
        cursor INTEGER NOT NULL PRIMARY KEY,
        session_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        time_ms INTEGER NOT NULL,
        type TEXT NOT NULL,
        data BLOB NOT NULL
    )""",
    """CREATE INDEX journal_session ON journal (session_id, cursor)""",
    """
    CREATE TABLE message (
        session_id TEXT NOT NULL,
        id TEXT NOT NULL,
        turn INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        role TEXT NOT NULL,
        open INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (session_id, id)
    )""",
    """CREATE INDEX message_order ON message (session_id, turn, seq)""",
    """CREATE INDEX message_open ON message (session_id) WHERE open = 1""",
    """
    CREATE TABLE part (
        session_id TEXT NOT NULL,
        id TEXT NOT NULL,
        message_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        kind TEXT NOT NULL,
        open INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (session_id, id)
    )""",
    """CREATE INDEX part_message ON part (session_id, message_id, seq)""",
    """CREATE INDEX part_open ON part (session_id) WHERE open = 1""",
    """CREATE INDEX part_compaction ON part (session_id, seq) WHERE kind = 'compaction'""",
    """
    CREATE TABLE restart (
        session_id TEXT NOT NULL PRIMARY KEY,
        total INTEGER NOT NULL,
        consecutive INTEGER NOT NULL,
        last_ms INTEGER NOT NULL,
        reason TEXT NOT NULL,
        culprit TEXT,
        culprit_count INTEGER NOT NULL,
        quarantined_ms INTEGER
    )""",
    """CREATE INDEX restart_quarantined ON restart (session_id) WHERE quarantined_ms IS NOT NULL""",
    """
    CREATE TABLE runtime (
        id TEXT NOT NULL PRIMARY KEY,
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        started_ms INTEGER NOT NULL,
        until_ms INTEGER NOT NULL
    )""",
    """
    CREATE TABLE session (
        id TEXT NOT NULL PRIMARY KEY,
        parent_id TEXT,
        title TEXT NOT NULL,
        directory TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        updated_ms INTEGER NOT NULL,
        archived_ms INTEGER,
        internal INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    """
    CREATE INDEX session_listed ON session (updated_ms DESC, id)
        WHERE archived_ms IS NULL AND internal = 0""",
    """CREATE INDEX session_updated ON session (updated_ms DESC, id)""",
    """CREATE INDEX session_created ON session (created_ms DESC, id)""",
    """CREATE INDEX session_directory ON session (directory, updated_ms DESC, id)""",
    """CREATE INDEX session_parent ON session (parent_id) WHERE parent_id IS NOT NULL""",
    """
    CREATE TABLE tombstone (
        session_id TEXT NOT NULL PRIMARY KEY,
        epoch INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        deleted_ms INTEGER NOT NULL
    )""",
    """
    CREATE TABLE tracker_bypass (
        key TEXT NOT NULL PRIMARY KEY,
        expires_at_ms INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    """
    CREATE TABLE tracker_claim (
        key TEXT NOT NULL PRIMARY KEY,
        expires_at_ms INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
)


def up(_migrator: Any, db: Any) -> None:
    for statement in STATEMENTS:
        db.execute_sql(statement)
