"""Files of the call's directory, and never outside it: found, listed, read.

A name that is no text is shown with question marks in it.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from understudy.actors.surrogates import storable
from understudy.actors.tools.root import Root, explained
from understudy.actors.tools.search import JUNK, Search, SearchTools, compiled, glob_pattern
from understudy.errors import InvalidInput, ToolError
from understudy.gateway.http.call import Call, hung_up
from understudy.gateway.http.errors import Refused

FILE_BYTES: Final = 4 * 1024 * 1024
FOUND: Final = 100
LINE_CHARS: Final = 2000
TIME_LIMIT_S: Final = 5.0

T = TypeVar("T")


async def text(call: Call) -> Any:
    """Lines of text files that a regular expression matches."""
    pattern = _required(call, "pattern")
    return await _looked(call, lambda root: _lines(root, pattern))


async def names(call: Call) -> Any:
    """Paths of files, and of directories, whose name is like the query; the likest first."""
    query, limit = (call.query("query") or "").lower(), call.limit(FOUND) or FOUND
    kind = call.query("type")
    wants_folders = kind == "directory" or (kind is None and call.query("dirs") != "false")
    return await _looked(
        call,
        lambda root: _paths(root, query, limit, files=kind != "directory", folders=wants_folders),
    )


async def symbols(_: Call) -> Any:
    """Nothing: there is no language server here."""
    return []


async def listing(call: Call) -> Any:
    """What is in a directory."""
    path = call.query("path") or "."
    return await _looked(call, lambda root: _entries(root, path))


async def content(call: Call) -> Any:
    """A file: text as it is, anything else in base64."""
    path = _required(call, "path")
    return await _looked(call, lambda root: _read(root, path))


def _required(call: Call, name: str) -> str:
    value = call.query(name)
    if value is None:
        raise InvalidInput(f"{name} is missing", field=name)
    return value


async def _looked(call: Call, look: Callable[[Root], T]) -> T:
    directory = call.directory

    def work() -> T:
        try:
            return look(Root(directory))
        except ToolError as error:
            raise InvalidInput(str(error), field="path") from error

    looking = asyncio.wrap_future(call.gateway.looking.submit(work))
    leaving = asyncio.ensure_future(hung_up(call.request.receive))
    try:
        both: set[asyncio.Future[Any]] = {looking, leaving}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not looking.done():
            raise Refused(400, "BadRequest", "The client hung up")
        return looking.result()
    finally:
        looking.cancel()  # what waits for its turn is not begun for nobody
        leaving.cancel()


def _lines(root: Root, pattern: str) -> list[dict[str, Any]]:
    wanted = compiled(pattern)
    search = Search(root, ".", None, TIME_LIMIT_S)
    found: list[dict[str, Any]] = []
    for path, data in SearchTools(root).contents(search, glob_pattern("**")):
        offset = 0
        for number, raw in enumerate(data.splitlines(keepends=True), start=1):
            line = raw.decode("utf-8", "replace")[:LINE_CHARS]
            if match := search.apply(wanted.search, line):
                start, end = (len(line[:place].encode()) for place in match.span())
                found.append(
                    {
                        "path": {"text": storable(path)},
                        "lines": {"text": line},
                        "line_number": number,
                        "absolute_offset": offset,
                        "submatches": [{"match": {"text": match[0]}, "start": start, "end": end}],
                    }
                )
            if len(found) >= FOUND or search.stopped:
                return found
            offset += len(raw)
    return found


def _paths(root: Root, query: str, limit: int, *, files: bool, folders: bool) -> list[str]:
    search = Search(root, ".", None, TIME_LIMIT_S)
    ranked: dict[str, tuple[int, int, str]] = {}
    for path, _, _ in search.files():
        parents = path.split("/")[:-1]
        above = ["/".join(parents[: depth + 1]) + "/" for depth in range(len(parents))]
        for each in (*(above if folders else ()), *([path] if files else ())):
            if each not in ranked and (rank := _rank(query, each.lower())) is not None:
                ranked[each] = (rank, len(each), each)
        search.check()
    return [storable(each) for each in sorted(ranked, key=lambda each: ranked[each])[:limit]]


def _rank(query: str, path: str) -> int | None:
    """How unlike a path is to what was asked for; None when nothing fits."""
    name = path.rstrip("/").rpartition("/")[2]
    if name.startswith(query):
        return 0
    if query in name:
        return 1
    if query in path:
        return 2
    left = iter(path)
    return 3 if all(letter in left for letter in query) else None


def _entries(root: Root, path: str) -> list[dict[str, Any]]:
    real = root.resolve(path)
    found = []
    with explained(path), root.directory(real) as descriptor, os.scandir(descriptor) as entries:
        for entry in entries:
            inner = storable((real / entry.name).relative_to(root.path).as_posix())
            found.append(
                {
                    "name": storable(entry.name),
                    "path": inner,
                    "absolute": storable(str(root.path / inner)),
                    "type": "directory" if entry.is_dir(follow_symlinks=False) else "file",
                    "ignored": entry.name in JUNK,
                }
            )
    return sorted(found, key=lambda each: (each["type"], each["name"]))


def _read(root: Root, path: str) -> dict[str, Any]:
    with root.open(path) as file:
        data = file.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise InvalidInput(f"{path} has more than {FILE_BYTES} bytes", field="path")
    kind = mimetypes.guess_type(path)[0]
    try:
        if b"\0" not in data:
            return {"type": "text", "content": data.decode()}
    except UnicodeDecodeError:
        pass
    encoded = base64.b64encode(data).decode()
    mime = kind or "application/octet-stream"
    return {"type": "binary", "content": encoded, "encoding": "base64", "mimeType": mime}
