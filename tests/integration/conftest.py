"""What integration tests share: a provider on this machine, runtimes on real files, and waiting.

The provider speaks plain HTTP/1.1 over asyncio streams and answers as it is told.
"""

import asyncio
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from understudy import Runtime
from understudy.actors.models.scripted import echo

sys.path.insert(0, str(Path(__file__).parent))  # for fold.py

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
        self._writers = set()

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
        for writer in self._writers:  # a server that is closed does not wait for its connections
            writer.transport.abort()
        closed = (writer.wait_closed() for writer in self._writers)
        await asyncio.gather(*closed, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader, writer):
        self.connections += 1
        self._tasks.add(asyncio.current_task())
        self._writers.add(writer)
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


# --- runtimes ----------------------------------------------------------------------------------

PATIENCE_S = 15.0  # a bound on failures; nothing waits that long when all is well


class Watch:
    """Follows a subscription and waits for what is wanted, with a deadline. Keeps ``seen``."""

    def __init__(self, subscription):
        self.subscription = subscription
        self.seen = []

    def until(self, wanted, timeout_s=PATIENCE_S):
        """The next event of this type, or for which this is true."""
        matches = wanted if callable(wanted) else lambda event: event.type == wanted
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            event = self.subscription.next(timeout_s=left_s)
            if event is not None:
                self.seen.append(event)
                if matches(event):
                    return event
        raise AssertionError(f"no {wanted} in {[event.type for event in self.seen]}")

    def types(self):
        return [event.type for event in self.seen]


class Crew:
    """Threads that start at once; what they raise fails the test."""

    def __init__(self):
        self._threads = []
        self._outcomes = []

    def call(self, work, *arguments, times=1):
        for _ in range(times):
            place = len(self._outcomes)
            self._outcomes.append(AssertionError("a thread did not end"))
            self._threads.append(
                threading.Thread(target=self._run, args=(place, work, arguments), daemon=True)
            )
        return self

    def _run(self, place, work, arguments):
        self._barrier.wait(PATIENCE_S)
        try:
            self._outcomes[place] = work(*arguments)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self._outcomes[place] = error

    def start(self):
        self._barrier = threading.Barrier(len(self._threads))
        for thread in self._threads:
            thread.start()
        return self

    def outcomes(self):
        """What each call gave or raised, in order."""
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self._outcomes


def wait_until(condition, timeout_s=PATIENCE_S):
    """Look until it is true: for what no event tells, such as a thread's end."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.005)
    return value


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sessions.db"


@pytest.fixture
def opened(path):
    """``opened(model, at=other, **options)``: a started runtime, closed at the end."""
    runtimes = []

    def open_one(model="scripted", *, at=path, **options):
        options.setdefault("durability", "normal")
        runtime = Runtime(at, model=model, **options)
        runtimes.append(runtime)
        return runtime.start()

    yield open_one
    for runtime in reversed(runtimes):
        runtime.close()


@pytest.fixture
def watching():
    """``watching(source, after=0)``: a ``Watch`` on a runtime's, session's or turn's events."""
    opened = []

    def watch(source, **options):
        opened.append(Watch(source.events(**options)))
        return opened[-1]

    yield watch
    for each in opened:
        each.subscription.close()


@pytest.fixture
def crew():
    return Crew


@pytest.fixture
def eventually():
    return wait_until


@pytest.fixture
def served(path, tmp_path):
    """``served(*models, **options)``: a server of the gateway, stopped at the end."""
    from serving import Served

    servers = []

    def serve(*models, at=path, directory=None, **options):
        home = tmp_path / "work" if directory is None else directory
        home.mkdir(exist_ok=True)
        servers.append(Served(at, home, *(models or (echo(),)), **options))
        return servers[-1]

    yield serve
    for server in reversed(servers):
        server.stop()
