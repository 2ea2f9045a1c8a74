"""list, glob and grep: finding files and text in a workspace, within bounds."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from understudy.actors.tools.context import ToolContext
from understudy.actors.tools.root import Root, explained, open_regular
from understudy.actors.tools.tool import ToolResult, tool
from understudy.errors import InvalidInput, ToolError

try:
    import regex
except ModuleNotFoundError as error:  # pragma: no cover
    raise InvalidInput(
        "searching files needs the extra: pip install 'understudy[workspace]'"
    ) from error

Depth = Annotated[int, msgspec.Meta(ge=1, le=20)]
Match: TypeAlias = "regex.Match[str]"

JUNK = frozenset(
    [
        ".git",
        ".hg",
        ".svn",
        "node_modules",
        "__pycache__",
        ".venv",
        "venv",
        ".tox",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
    ]
)
"""Directories that nobody wrote by hand; never entered unless the search starts in one."""
LIST_ENTRIES = 500
GLOB_FILES = 200
GREP_MATCHES = 200
GREP_FILE_BYTES = 5_000_000
GREP_LINE_CHARS = 300
VISITED_FILES = 200_000
TIME_LIMIT_S = 20.0
MAX_REPEATS = 100_000
"""``regex`` writes minimum repeats out, nested ones multiplied, before it looks at any text."""


@dataclass
class Search:
    """One walk below a directory, until it is done or has reached a limit."""

    root: Root
    start: str
    ctx: ToolContext | None
    time_limit_s: float
    deadline: float = field(init=False)
    stopped: str = ""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.time_limit_s

    @property
    def base(self) -> Path:
        return self.root.resolve(self.start)

    def files(self) -> Iterator[tuple[str, str, int]]:
        """Each file's path from the start, its name, and its open directory."""
        visited = 0
        with explained(self.start), self.root.directory(self.base) as descriptor:
            for inner, names, files, directory in os.fwalk(".", dir_fd=descriptor):
                names[:] = sorted(name for name in names if name not in JUNK)
                for name in sorted(files):
                    visited += 1
                    if visited > VISITED_FILES:
                        self.stopped = f"stopped after {VISITED_FILES} files"
                    if self.stopped:
                        return
                    yield f"{inner}/{name}"[2:], name, directory
                self.check()

    def check(self) -> None:
        """Raise ``TurnAborted`` if the call is cancelled; stop the search if time is up."""
        if self.ctx is not None:
            self.ctx.check()
        if time.monotonic() >= self.deadline:
            self.stopped = f"stopped after {self.time_limit_s:g} s"

    def apply(self, match: Callable[..., Match | None], text: str) -> Match | None:
        """Match within the time that is left."""
        left_s = max(1e-3, self.deadline - time.monotonic())
        try:
            # A bad expression takes for ever on one line; concurrent lets other threads run.
            return match(text, timeout=left_s, concurrent=True)
        except TimeoutError:
            self.stopped = f"stopped after {self.time_limit_s:g} s"
            return None

    def shown(self, inner: str) -> str:
        """A path from the start as a path from the root."""
        return (self.base.relative_to(self.root.path) / inner).as_posix()

    def note(self, more: str) -> str:
        """What the reader must know about what is missing."""
        notes = [text for text in (more, self.stopped) if text]
        return f"\n[Incomplete: {'; '.join(notes)}.]" if notes else ""


class SearchTools:
    """The tools that look around below a root."""

    def __init__(self, root: Root, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.root = root
        self.time_limit_s = time_limit_s

    def _path(self, given: Mapping[str, Any]) -> Sequence[str]:
        return (self.root.relative(str(given.get("path", "."))),)

    @tool(name="list", permission="list", idempotent=True, patterns=_path)
    def list_(self, path: str = ".", depth: Depth = 2) -> ToolResult:
        """List a directory as a tree.

        Args:
            path: the directory, relative to the workspace.
            depth: how many levels to show.
        """
        lines: list[str] = []
        real = self.root.resolve(path)
        with explained(path), self.root.directory(real) as directory:
            _tree(directory, depth, "", lines)
        more = len(lines) > LIST_ENTRIES
        note = f"\n[Only the first {LIST_ENTRIES} entries.]" if more else ""
        output = "\n".join(lines[:LIST_ENTRIES]) + note
        metadata = {"count": min(len(lines), LIST_ENTRIES), "more": more}
        return ToolResult(output or "[The directory is empty.]", self.root.relative(path), metadata)

    @tool(permission="glob", idempotent=True, patterns=_path)
    def glob(self, pattern: str, path: str = ".", ctx: ToolContext | None = None) -> ToolResult:
        """Find files by name, the most recently changed first.

        Args:
            pattern: relative to path, such as "*.py", "src/**/*.{ts,tsx}" or "**/test_*".
            path: the directory to search, relative to the workspace.
            ctx: the call; the search stops when it is cancelled.
        """
        wanted = glob_pattern(pattern)
        search = Search(self.root, path, ctx, self.time_limit_s)
        found: list[tuple[int, str]] = []
        for file, name, directory in search.files():
            if search.apply(wanted.fullmatch, file):
                with suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    found.append((-status.st_mtime_ns, file))
        shown = [search.shown(file) for _, file in sorted(found)[:GLOB_FILES]]
        more = f"only the {GLOB_FILES} newest files" if len(found) > GLOB_FILES else ""
        note = search.note(more)
        output = "\n".join(shown) + note if shown else f"No file matches.{note}"
        return ToolResult(output, pattern, {"count": len(shown), "more": bool(note)})

    @tool(permission="grep", idempotent=True, patterns=_path)
    def grep(
        self, pattern: str, path: str = ".", include: str = "**", ctx: ToolContext | None = None
    ) -> ToolResult:
        """Search the lines of text files with a regular expression.

        Args:
            pattern: a Python regular expression; start it with (?i) to ignore case.
            path: the directory or the file to search, relative to the workspace.
            include: which files to search, such as "*.py" (anywhere) or "src/**/*.ts".
            ctx: the call; the search stops when it is cancelled.
        """
        wanted = compiled(pattern)
        chosen = glob_pattern(include if "/" in include else f"**/{include}")
        search = Search(self.root, path, ctx, self.time_limit_s)
        lines: list[str] = []
        for file, data in self.contents(search, chosen):
            lines += _matches(wanted, file, data, search, GREP_MATCHES - len(lines))
            if len(lines) >= GREP_MATCHES or search.stopped:
                break
        more = f"only the first {GREP_MATCHES} matches" if len(lines) == GREP_MATCHES else ""
        note = search.note(more)
        output = "\n".join(lines) + note if lines else f"No line matches.{note}"
        return ToolResult(output, pattern, {"count": len(lines), "more": bool(note)})

    def contents(self, search: Search, chosen: regex.Pattern[str]) -> Iterator[tuple[str, bytes]]:
        """The files to search with their bytes; binary and very large ones are left out."""
        if self.root.resolve(search.start).is_file():
            with self.root.open(search.start) as file, explained(search.start):
                yield self.root.relative(search.start), file.read(GREP_FILE_BYTES)
            return
        for path, name, directory in search.files():
            if not search.apply(chosen.fullmatch, path):
                continue
            with suppress(OSError), open_regular(name, directory) as file:
                data = file.read(GREP_FILE_BYTES + 1)
                if len(data) <= GREP_FILE_BYTES and b"\0" not in data[:8192]:
                    yield search.shown(path), data


def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression that can be stopped. Raises ``ToolError`` when it makes no sense."""
    if math.prod(max(1, int(n)) for n in re.findall(r"\{(\d{1,9})", pattern)) > MAX_REPEATS:
        raise ToolError(f"the regular expression repeats more than {MAX_REPEATS} times")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ToolError(f"not a regular expression: {error}") from error


def glob_pattern(pattern: str) -> regex.Pattern[str]:
    """A glob with ``**``, ``*``, ``?``, ``[…]`` and ``{a,b}`` as a pattern for relative paths."""
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise ToolError(f"the pattern {pattern} leaves the directory; give a relative one")
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\]|\{[^{}]*\})", pattern.removeprefix("./"))
    try:
        return regex.compile("".join(map(_glob_part, parts)), regex.DOTALL)
    except regex.error as error:
        raise ToolError(f"{pattern} is not a glob pattern: {error}") from error


def _glob_part(part: str) -> str:
    fixed = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part in fixed:
        return fixed[part]
    if part.startswith("[") and part.endswith("]") and len(part) > len("[]"):
        inside = part[1:-1].replace("\\", "\\\\").replace("[", "\\[")
        return f"[{'^' + inside[1:] if inside[0] == '!' else inside}]"
    if part.startswith("{") and part.endswith("}"):
        inner = (glob_pattern(choice).pattern for choice in part[1:-1].split(","))
        return f"(?:{'|'.join(inner)})"
    return re.escape(part)


def _matches(
    wanted: regex.Pattern[str], file: str, data: bytes, search: Search, limit: int
) -> list[str]:
    lines: list[str] = []
    search.check()
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        found = search.apply(wanted.search, line)
        if found:
            start = max(0, found.start() - GREP_LINE_CHARS // 2)
            lines.append(f"{file}:{number}: {line[start : start + GREP_LINE_CHARS]}")
        if len(lines) >= limit or search.stopped:
            break
    return lines


def _tree(directory: int, depth: int, indent: str, lines: list[str]) -> None:
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if len(lines) > LIST_ENTRIES:
            return
        if entry.is_symlink():
            lines.append(f"{indent}{entry.name} -> {os.readlink(entry.name, dir_fd=directory)}")
        elif not entry.is_dir(follow_symlinks=False):
            lines.append(f"{indent}{entry.name}")
        else:
            lines.append(f"{indent}{entry.name}/")
            if depth > 1 and entry.name not in JUNK:
                _enter(entry.name, directory, depth - 1, indent + "  ", lines)


def _enter(name: str, parent: int, depth: int, indent: str, lines: list[str]) -> None:
    with suppress(PermissionError, FileNotFoundError):
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            _tree(inner, depth, indent, lines)
        finally:
            os.close(inner)
