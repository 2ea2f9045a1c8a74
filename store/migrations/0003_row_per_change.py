"""A row of the journal may have several events of a change, and says how many.

A process of before that runs on while this is done names its columns: it goes on writing events one
by one, and sees the others as damaged.
"""

from __future__ import annotations

from typing import Any


def up(_migrator: Any, db: Any) -> None:
    db.execute_sql("ALTER TABLE journal ADD COLUMN size INTEGER NOT NULL DEFAULT 1")
