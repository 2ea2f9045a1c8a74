"""A provider on this machine: plain HTTP/1.1 over asyncio streams, answering as it is told."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass
class Answer:
    """``body`` goes out in pieces of ``split`` bytes; then the answer ends, breaks or stalls."""

    body: bytes = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    content_type: str = "text/event-stream"
    split: int = 7
    then: str = "end"  # or "cut": the connection breaks; or "stall": until the client hangs up


def refusal(status, body, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(encoded, status, names, content_type="application/json")


class Provider:
    """Plays ``answers`` in order, the last one for ever. Keeps the ``requests`` it got."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.connections = 0
        self.stalling = asyncio.Event()
        self.hung_up = asyncio.Event()
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader, writer):
        self.connections += 1
        self._tasks.add(asyncio.current_task())
        try:
            while request := await self._read(reader):
                self.requests.append(request)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if not await self._write(answer, reader, writer):
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _read(self, reader):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        line, *lines = head.decode().strip().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        return {"path": line.split()[1], "headers": headers, "body": json.loads(body)}

    async def _write(self, answer, reader, writer):
        head = [f"HTTP/1.1 {answer.status} X", f"Content-Type: {answer.content_type}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        head += ["Transfer-Encoding: chunked", "", ""]
        writer.write("\r\n".join(head).encode())
        for start in range(0, len(answer.body), answer.split):
            piece = answer.body[start : start + answer.split]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0)
        if answer.then == "end":
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return True
        if answer.then == "stall":
            self.stalling.set()
            if await reader.read(1) == b"":
                self.hung_up.set()
        return False


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def provider():
    """``provider(*answers)``: a server to enter with ``async with``; it has a ``url``."""
    return Provider


@pytest.fixture
def streamed():
    """``streamed(body, then="cut")``: an answer of server-sent events."""
    return Answer


@pytest.fixture
def refused():
    """``refused(429, body, retry_after="2")``: an answer that is an error."""
    return refusal
