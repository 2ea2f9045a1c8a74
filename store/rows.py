"""Rows of a kind to records. Hot queries read tuples; a row that cannot be decoded is reported.

It is left out, so that one bad row does not hide its session.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from understudy.errors import StoreUnreadable
from understudy.store.records import AnyPart, Ask, Message, Prompt, Session

logger = logging.getLogger("understudy.store")

T = TypeVar("T")


class Kind(Generic[T]):
    """Rows of one kind to records: all in one go, or one by one when any of them is damaged."""

    def __init__(self, name: str, record: Any) -> None:
        self._name = name
        self.decode: Callable[[bytes], T] = msgspec.json.Decoder(record).decode
        self._decode_all: Callable[[bytes], list[T]] = msgspec.json.Decoder(list[record]).decode

    def record(self, data: bytes, record_id: str) -> T:
        """One record. Raises ``StoreUnreadable`` when it is damaged."""
        try:
            return self.decode(data)
        except (ValueError, TypeError) as error:
            problem = f"The record of {self._name} {record_id} is damaged and cannot be read"
            raise StoreUnreadable(problem) from error

    def decoded(self, rows: Sequence[tuple[Any, ...]]) -> list[T]:
        """The records in the rows' last columns; a damaged one is reported and left out."""
        records = self._together(rows)
        return [each for _, each in self._one_by_one(rows)] if records is None else records

    def by_session(self, rows: Sequence[tuple[Any, ...]]) -> defaultdict[str, list[T]]:
        """The same of many sessions; their ids are in the rows' first columns."""
        records = self._together(rows)
        pairs = self._one_by_one(rows) if records is None else zip(rows, records, strict=True)
        found: defaultdict[str, list[T]] = defaultdict(list)
        for row, record in pairs:
            found[row[0]].append(record)
        return found

    def _together(self, rows: Sequence[tuple[Any, ...]]) -> list[T] | None:
        try:
            records = self._decode_all(b"[%b]" % b",".join([row[-1] for row in rows]))
        except (ValueError, TypeError):
            return None
        # Two damaged rows can be one record between them.
        return records if len(records) == len(rows) else None

    def _one_by_one(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], T]]:
        for row in rows:
            try:
                yield row, self.decode(row[-1])
            except (ValueError, TypeError):
                logger.exception("A damaged %s row was left out: %.80r", self._name, row)


sessions: Final = Kind[Session]("session", Session)
messages: Final = Kind[Message]("message", Message)
parts: Final = Kind[AnyPart]("part", AnyPart)
prompts: Final = Kind[Prompt]("prompt", Prompt)
asks: Final = Kind[Ask]("ask", Ask)
