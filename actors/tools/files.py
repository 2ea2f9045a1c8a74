"""read, write and edit: text files of a workspace."""

from __future__ import annotations

import difflib
import io
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

import msgspec

from understudy.actors.tools.context import ToolContext
from understudy.actors.tools.root import Root, explained
from understudy.actors.tools.tool import ToolResult, tool
from understudy.errors import ToolError

READ_LINES = 2000
READ_CHARS = 50_000
LINE_CHARS = 2000
SNIFF_BYTES = 8192
EDIT_BYTES = 10_000_000
"""The largest file that is edited; larger ones are for programs."""
DIFF_CHARS = 200_000
"""Above this, before and after together, a result has no diff: finding it could take seconds."""
CHECK_EVERY_PIECES = 10_000
PLACES = 100

Positive = Annotated[int, msgspec.Meta(ge=1)]

# Two sessions, each with tools of its own, may edit one file of one directory.
_locks: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
_locks_guard = threading.Lock()


class FileTools:
    """The tools that read and change the text files below a root."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def _path(self, given: Mapping[str, Any]) -> Sequence[str]:
        return (self.root.relative(str(given.get("path", ""))),)

    @tool(permission="read", idempotent=True, patterns=_path, max_output=2 * READ_CHARS)
    def read(
        self,
        path: str,
        offset: Positive = 1,
        limit: Positive = READ_LINES,
        ctx: ToolContext | None = None,
    ) -> ToolResult:
        """Read a UTF-8 text file with line numbers.

        Long lines are cut. When there is more than fits, the end says where to go on.

        Args:
            path: the file, relative to the workspace.
            offset: the first line to read, counted from 1.
            limit: how many lines to read at most.
            ctx: the call; reading a long way stops when it is cancelled.
        """
        with self.root.open(path) as binary, explained(path):
            _refuse_binary(path, binary.peek(SNIFF_BYTES)[:SNIFF_BYTES])
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
                try:
                    lines, more = _excerpt(file, offset, limit, ctx)
                except UnicodeDecodeError as error:
                    raise ToolError(f"{path} is not UTF-8 text") from error
        if not lines and offset > 1:
            raise ToolError(f"{path} ends before line {offset}")
        text = "".join(f"{offset + n:>6}\t{line}\n" for n, line in enumerate(lines))
        if more:
            text += f"\n[There is more. Go on with offset={offset + len(lines)}.]"
        return ToolResult(
            text or "[The file is empty.]",
            title=self.root.relative(path),
            metadata={"lines": len(lines), "more": more},
        )

    @tool(permission="edit", patterns=_path)
    def write(self, path: str, content: str) -> ToolResult:
        """Write a whole text file: make it, with its directories, or replace what it holds.

        Args:
            path: the file, relative to the workspace.
            content: all of the file's text.
        """
        with _locked(real := self.root.resolve(path)):
            created = not os.path.exists(real)  # noqa: PTH110 - false also for what is no name
            before = "" if created else self._shown(path)
            self.root.write(path, _encoded(content))
        name = self.root.relative(path)
        changes = "" if before is None else diff(before, content, name)
        metadata = {"lines": content.count("\n"), "created": created, "diff": changes}
        return ToolResult(f"Wrote {len(content)} characters to {name}.", name, metadata)

    @tool(permission="edit", patterns=_path)
    def edit(self, path: str, old: str, new: str, *, replace_all: bool = False) -> ToolResult:
        """Replace text in a file. The old text must match exactly and occur once.

        Args:
            path: the file, relative to the workspace.
            old: the text to replace, with its indentation, without line numbers.
            new: the text to put in its place.
            replace_all: replace every occurrence instead of the only one.
        """
        if not old:
            raise ToolError("old is empty; use write to make a file")
        if old == new:
            raise ToolError("old and new are the same; nothing would change")
        with _locked(self.root.resolve(path)):
            before = self._text(path)
            after, count = replaced(before, old, new, replace_all=replace_all)
            self.root.write(path, _encoded(after))
        name = self.root.relative(path)
        metadata = {"replacements": count, "diff": diff(before, after, name)}
        return ToolResult(f"Replaced {count} in {name}.", name, metadata)

    def _shown(self, path: str) -> str | None:
        """What a file holds, or None if that is nothing for people to read."""
        try:
            return self._text(path)
        except ToolError:
            return None

    def _text(self, path: str) -> str:
        with self.root.open(path) as file, explained(path):
            data = file.read(EDIT_BYTES + 1)
        if len(data) > EDIT_BYTES:
            raise ToolError(f"{path} is larger than {EDIT_BYTES} bytes")
        _refuse_binary(path, data[:SNIFF_BYTES])
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ToolError(f"{path} is not UTF-8 text") from error


def replaced(text: str, old: str, new: str, *, replace_all: bool = False) -> tuple[str, int]:
    """The text after an edit and how many places changed; line ends follow the text's own.

    Raises ``ToolError`` saying how often ``old`` occurs when that is not once.
    """
    for line_end in _line_ends(text):
        wanted = _with_line_ends(old, line_end)
        places = _places(text, wanted)
        if places > 1 and not replace_all:
            more = " or more" if places == PLACES else ""
            raise ToolError(
                f"old occurs {places} times{more}; give more of what stands around the one you "
                "mean, or set replace_all"
            )
        if places:
            count = text.count(wanted)
            return text.replace(wanted, _with_line_ends(new, line_end)), count
    raise ToolError("old does not occur in the file (0 matches); it must match it exactly")


def _places(text: str, wanted: str) -> int:
    """How often a text occurs, in overlapping places too: "aa" is ambiguous in "aaa".

    Not counted past ``PLACES``: many places that overlap far take long, and no other thread runs.
    """
    places, found = 0, text.find(wanted)
    while found >= 0 and places < PLACES:
        places += 1
        found = text.find(wanted, found + 1)
    return places


def diff(before: str, after: str, name: str) -> str:
    """A unified diff, or "" when it would take too long to find."""
    if len(before) + len(after) > DIFF_CHARS:
        return ""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm="")
    return "\n".join(lines)


def _line_ends(text: str) -> list[str]:
    """The line ends a text uses, the most frequent first."""
    windows = text.count("\r\n")
    unix = text.count("\n") - windows
    if windows and unix:
        return ["\r\n", "\n"] if windows > unix else ["\n", "\r\n"]
    return ["\r\n"] if windows else ["\n"]


def _with_line_ends(text: str, line_end: str) -> str:
    return text.replace("\r\n", "\n").replace("\n", line_end)


def _excerpt(
    file: io.TextIOWrapper, offset: int, limit: int, ctx: ToolContext | None
) -> tuple[list[str], bool]:
    """Lines from ``offset`` on, cut to fit, and whether there are more. Memory is bounded."""
    lines: list[str] = []
    chars = 0
    for number, line in enumerate(_cut_lines(file, ctx), start=1):
        if number < offset:
            continue
        if len(lines) == limit or (lines and chars + len(line) > READ_CHARS):
            return lines, True
        lines.append(line)
        chars += len(line)
    return lines, False


def _cut_lines(file: io.TextIOWrapper, ctx: ToolContext | None) -> Iterator[str]:
    """Every line, cut; the rest of a long one is only skipped when the next one is wanted."""
    cut = False
    for pieces in itertools.count(1):
        if ctx is not None and pieces % CHECK_EVERY_PIECES == 0:
            ctx.check()
        piece = file.readline(LINE_CHARS + 1)
        if not piece:
            return
        whole = len(piece) <= LINE_CHARS or piece.endswith("\n")
        if not cut:
            yield piece.removesuffix("\n") if whole else piece[:LINE_CHARS] + " [line cut]"
        cut = not whole


def _refuse_binary(path: str, start: bytes) -> None:
    if b"\0" in start:
        raise ToolError(f"{path} is a binary file")


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ToolError(f"the text cannot be written as UTF-8: {error.reason}") from error


@contextmanager
def _locked(real: Path) -> Iterator[None]:
    with _locks_guard:
        lock = _locks.setdefault(real, threading.Lock())
    with lock:
        yield
