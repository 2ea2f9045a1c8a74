"""A row of the journal has all events of a change. One that has a single event stays as it is."""

from __future__ import annotations

from typing import Any


def up(_migrator: Any, db: Any) -> None:
    db.execute_sql("ALTER TABLE journal RENAME COLUMN type TO types")
