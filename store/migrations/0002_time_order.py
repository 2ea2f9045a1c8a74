"""Keys that begin with what grows with time.

Ids grow with time and sessions do not: a commit of many sessions' rows now adds to the end of the
keys of messages, parts and prompts, instead of changing one page of each for every session.
"""

from __future__ import annotations

from typing import Any

TABLES = {
    "message": (
        """
        CREATE TABLE message (
            session_id TEXT NOT NULL,
            id TEXT NOT NULL,
            turn INTEGER NOT NULL,
            seq INTEGER NOT NULL,
            role TEXT NOT NULL,
            open INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (id, session_id)
        )""",
        """CREATE INDEX message_order ON message (session_id, turn, seq)""",
        """CREATE INDEX message_open ON message (session_id) WHERE open = 1""",
    ),
    "part": (
        """
        CREATE TABLE part (
            session_id TEXT NOT NULL,
            id TEXT NOT NULL,
            message_id TEXT NOT NULL,
            seq INTEGER NOT NULL,
            kind TEXT NOT NULL,
            open INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (id, session_id)
        )""",
        """CREATE INDEX part_message ON part (session_id, message_id, seq)""",
        """CREATE INDEX part_open ON part (session_id) WHERE open = 1""",
        """CREATE INDEX part_compaction ON part (session_id, seq) WHERE kind = 'compaction'""",
    ),
    "inbox": (
        """
        CREATE TABLE inbox (
            session_id TEXT NOT NULL,
            message_id TEXT NOT NULL,
            seq INTEGER NOT NULL,
            open INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (message_id, session_id)
        )""",
        """CREATE INDEX inbox_session ON inbox (session_id, open, seq)""",
        """CREATE INDEX inbox_open ON inbox (message_id, session_id) WHERE open = 1""",
    ),
}


def up(_migrator: Any, db: Any) -> None:
    for table, (create, *indexes) in TABLES.items():
        db.execute_sql(f"ALTER TABLE {table} RENAME TO {table}_before")
        db.execute_sql(create)
        copy = f"INSERT INTO {table} SELECT * FROM {table}_before ORDER BY rowid"  # noqa: S608 - names of ours
        db.execute_sql(copy)
        db.execute_sql(f"DROP TABLE {table}_before")  # and its indexes, whose names are free then
        for index in indexes:
            db.execute_sql(index)
