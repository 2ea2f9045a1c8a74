"""Damage: rows that cannot be read, and how they are kept from holding a session up."""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from understudy.store.changes import Transaction
from understudy.store.records import AnyPart, Ask, Message, Prompt

logger = logging.getLogger("understudy.store")

_OPEN: Final = {
    "message": msgspec.json.Decoder(Message),
    "part": msgspec.json.Decoder(AnyPart),
    "inbox": msgspec.json.Decoder(Prompt),
    "ask": msgspec.json.Decoder(Ask),
}


def give_up_damaged(tx: Transaction, session_id: str) -> int:
    """Mark unfinished rows that cannot be read as finished: nobody could ever finish them.

    Their data stays as it is, for ``understudy doctor``. Returns how many there were.
    """
    given_up = 0
    for table, decoder in _OPEN.items():
        rows = tx.connection.execute(
            f"SELECT rowid, data FROM {table} WHERE session_id = ? AND open = 1",  # noqa: S608
            (session_id,),
        ).fetchall()
        for rowid, data in rows:
            try:
                decoder.decode(data)
            except (ValueError, TypeError):
                tx.connection.execute(
                    f"UPDATE {table} SET open = 0 WHERE rowid = ?",  # noqa: S608
                    (rowid,),
                )
                logger.error("Gave up a damaged %s of session %s", table, session_id)  # noqa: TRY400
                given_up += 1
    return given_up
