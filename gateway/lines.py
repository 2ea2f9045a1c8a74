"""Append-only files of records, a line of JSON each: they outlive whoever writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import msgspec

R = TypeVar("R", bound=msgspec.Struct)


def append(file: int, records: Iterable[msgspec.Struct]) -> None:
    """Append in one write, so that lines of several threads and processes do not mix."""
    if data := b"".join(msgspec.json.encode(each) + b"\n" for each in records):
        os.write(file, data)


def whole(data: bytes, kind: type[R]) -> tuple[list[R], int]:
    """The records of all whole lines, and their size: the last one may have been cut short.

    Raises ``msgspec.DecodeError`` for lines that are something else.
    """
    size = data.rfind(b"\n") + 1
    return [msgspec.json.decode(line, type=kind) for line in data[:size].splitlines()], size
