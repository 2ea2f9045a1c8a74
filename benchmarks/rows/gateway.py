"""The gateway over HTTP, beside a bare application on the same server that answers a constant."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from benchmarks import stage
from benchmarks.measure import Figure, Run, figure, row

CLIENTS = 16
DEADLINE_S = 60.0
_FLOOR = """
import socket, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def constant(request):
    await request.body()
    return JSONResponse({"id": "ses_1"})

routes = [Route("/{path:path}", constant, methods=["GET", "POST", "DELETE"])]
# asyncio turns Nagle's algorithm off only where the protocol is named.
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
sock.bind(("127.0.0.1", 0))
print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False)
uvicorn.Server(config).run(sockets=[sock])
"""
_PROMPT = b'{"parts":[{"type":"text","text":"hi"}]}'


class Client:
    """One kept connection, speaking as little HTTP as will do: the server is what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer.split(None, 2)[1])
        length = re.search(rb"(?i)content-length: (\d+)", answer)
        data = await self._reader.readexactly(int(length[1])) if length else b""
        assert status == 200, (method, path, status, data)
        return data

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connected(port: int, count: int) -> AsyncIterator[list[Client]]:
    clients = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


class Served:
    """A server in a process of its own, and how long it took to answer."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.rpartition(":")[2])
        asyncio.run(self._answers())
        self.ready_s = time.perf_counter() - began

    async def _answers(self) -> None:
        deadline = time.perf_counter() + DEADLINE_S
        while True:
            try:
                async with connected(self.port, 1) as [client]:
                    await client.call("GET", "/session")
                return
            except (OSError, EOFError):
                assert time.perf_counter() < deadline, "the server does not answer"
                await asyncio.sleep(0.002)

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def served(path: Path) -> Iterator[Served]:
    command = ["-m", "understudy", "serve", "--port", "0", "--model", "scripted"]
    server = Served([sys.executable, *command, "--database", str(path)], path.parent)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def floor(directory: Path) -> Iterator[Served]:
    server = Served([sys.executable, "-c", _FLOOR], directory)
    try:
        yield server
    finally:
        server.end()


@row("gateway")
def gateway(run: Run) -> Iterator[Figure]:
    """Each rate with its own floor: the same calls to an application that answers a constant."""
    count, prompts = run.size(5_000, 500), run.size(40, 10)
    with floor(run.directory) as bare, served(run.path()) as server:
        yield from _ready(run, bare)
        made, created = asyncio.run(_created(server.port, count))
        _, base = asyncio.run(_created(bare.port, count))
        yield _beside(f"sessions created, {CLIENTS} clients", created, base, 1_000)
        yield figure(f"RSS with {count:,} sessions", server.rss_mb(), "MB", "at most", 90)
        yield _listed(f"list of the 100 newest of {count:,}", server, run.size(200, 50), bare)
        ids = made[:CLIENTS]
        one = asyncio.run(_prompted(server.port, ids[:1], 4 * prompts))
        many = asyncio.run(_prompted(server.port, ids, prompts))
        base = asyncio.run(_prompted(bare.port, ids, prompts))
        note = f"one by one: {one:,.0f}/s"
        yield _beside(f"prompts answered, {CLIENTS} sessions", many, base, 250, note)
        deleted = asyncio.run(_deleted(server.port, made))
        base = asyncio.run(_deleted(bare.port, made))
        yield _beside(f"sessions deleted, {CLIENTS} clients", deleted, base, 1_000)
        left = json.loads(asyncio.run(_call(server.port, "GET", "/session")))
        assert left == [], "a deleted session is listed"
        sessions = run.size(100_000, 10_000)
        path = run.path()
        stage.filled(path, sessions)
        with served(path) as large:
            yield _listed(f"list of the 100 newest of {sessions:,}", large, run.size(200, 50), bare)
            what = f"ready, with {sessions:,} sessions"
            yield figure(what, large.ready_s, "s", "at most", 0.5)


def _ready(run: Run, bare: Served) -> Iterator[Figure]:
    times, floors = [], [bare.ready_s]
    for _ in range(run.rounds):
        with served(run.path()) as server:
            times.append(server.ready_s)
        with floor(run.directory) as other:
            floors.append(other.ready_s)
    found = figure("ready: from start to an answer", statistics.median(times), "s", "at most", 0.5)
    found.against, found.base = "a bare application", statistics.median(floors)
    found.ratio = found.base / statistics.median(times)
    yield found


def _beside(what: str, value: float, base: float, least: float, note: str = "") -> Figure:
    found = figure(what, value, "/s", "at least", least, note)
    found.against, found.base, found.ratio = "a bare application", base, value / base
    return found


def _listed(what: str, server: Served, times: int, bare: Served) -> Figure:
    page = json.loads(asyncio.run(_call(server.port, "GET", "/session?limit=100")))
    assert len(page) == 100, "the list is short"
    ours = asyncio.run(_latency_ms(server.port, times))
    base = asyncio.run(_latency_ms(bare.port, times))
    found = figure(f"{what}, p50", ours, "ms", "at most", 5)
    found.against, found.base, found.ratio = "a bare application", base, base / ours
    return found


# --- what clients do ---------------------------------------------------------------------------


async def _call(port: int, method: str, path: str) -> bytes:
    async with connected(port, 1) as [client]:
        return await client.call(method, path)


async def _shared(
    port: int, count: int, job: Callable[[Client, int], Awaitable[bytes]]
) -> tuple[list[bytes], float]:
    """``count`` jobs shared by the clients: their answers, and how many a second."""
    numbers = iter(range(count))
    answers: list[bytes] = []

    async def work(client: Client) -> None:
        answers.extend([await job(client, number) for number in numbers])

    async with connected(port, CLIENTS) as clients:
        began = time.perf_counter()
        await asyncio.gather(*map(work, clients))
        return answers, count / (time.perf_counter() - began)


async def _created(port: int, count: int) -> tuple[list[str], float]:
    answers, rate = await _shared(
        port, count, lambda client, _: client.call("POST", "/session", b'{"title":"x"}')
    )
    return [json.loads(each)["id"] for each in answers], rate


async def _deleted(port: int, ids: Sequence[str]) -> float:
    _, rate = await _shared(
        port, len(ids), lambda client, n: client.call("DELETE", f"/session/{ids[n]}")
    )
    return rate


async def _prompted(port: int, ids: Sequence[str], each: int) -> float:
    """Every session has a client, which prompts when it has been answered."""

    async def work(client: Client, session_id: str) -> None:
        for _ in range(each):
            await client.call("POST", f"/session/{session_id}/message", _PROMPT)

    async with connected(port, len(ids)) as clients:
        began = time.perf_counter()
        await asyncio.gather(*map(work, clients, ids))
        return len(ids) * each / (time.perf_counter() - began)


async def _latency_ms(port: int, times: int) -> float:
    took = []
    async with connected(port, 1) as [client]:
        for _ in range(times):
            began = time.perf_counter()
            await client.call("GET", "/session?limit=100")
            took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)
