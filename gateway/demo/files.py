"""The real files the demo asks about, and what is true of them."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from understudy.actors.tools.search import GREP_MATCHES, JUNK
from understudy.errors import InvalidInput

PATTERN: Final = r"\bthe\b"
_MAX_BYTES: Final = 40_000
_MAX_LINES: Final = 1_000
_MAX_LINE: Final = 1_000
_ENOUGH: Final = 2_000


class Facts(msgspec.Struct, frozen=True):
    """What an answer says about a file."""

    lines: int
    matches: int
    sha256: str

    def answer(self, path: str) -> str:
        return (
            f"{path} has {self.lines} lines, {self.matches} of them say 'the'; "
            f"its SHA-256 starts with {self.sha256[:16]}."
        )


def choose(root: Path, *, seed: int, leave_out: str) -> list[str]:
    """Text files below ``root`` in a seeded order, as relative paths.

    Files whose name starts with ``leave_out`` (the demo's own) are not among them. Raises
    ``InvalidInput`` if there are none.
    """
    found = []
    for path in _walk(root):
        if not path.name.startswith(leave_out) and facts(path) is not None:
            found.append(path.relative_to(root).as_posix())
        if len(found) == _ENOUGH:
            break
    if not found:
        raise InvalidInput(f"{root} has no text files to ask about", field="root")
    random.Random(seed).shuffle(found)
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in JUNK and not f.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.isprintable() and not path.is_symlink() and str(path).isprintable():
                yield path


def facts(path: Path) -> Facts | None:
    """What is true of a file; None if it is not a text file of readable size."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= _MAX_BYTES:
            return None
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    if "\0" in text or len(lines) > _MAX_LINES or max(map(len, lines)) > _MAX_LINE:
        return None
    matches = sum(re.search(PATTERN, line) is not None for line in text.splitlines())
    return Facts(len(lines), min(matches, GREP_MATCHES), hashlib.sha256(data).hexdigest())


def mtime_ns(path: Path) -> int:
    """When a file last changed; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
