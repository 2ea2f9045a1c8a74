"""Events to clients: one subscription, each event encoded once, a bounded buffer per connection.

A connection that falls behind is told so, with the cursor it may resume from, and dropped; no other
connection and no session waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from understudy.actors.subscription import GAP, OVERFLOW
from understudy.errors import RuntimeClosed
from understudy.gateway.http.call import Call, hung_up, number
from understudy.gateway.http.places import place_of
from understudy.gateway.http.texts import Texts
from understudy.gateway.http.wire import event_id
from understudy.store.events import Event

if TYPE_CHECKING:
    from understudy.gateway.http.gateway import Gateway

logger = logging.getLogger("understudy.gateway")

BUFFER_EVENTS: Final = 10_000
BUFFER_BYTES: Final = 8 * 1024 * 1024
HEARTBEAT_S: Final = 10.0
STALLED_S: Final = 30.0
"""How long a client may take nothing at all before it is cut off."""
LINGER_S: Final = 300.0
"""How long a connection that is cut is kept, empty, for the client to read why."""
CHUNK_BYTES: Final = 64 * 1024
"""How much leaves at once: what a client does not read waits for all of them only once."""
FLUSH_S: Final = 0.5
RETRY_S: Final = 1.0
"""Before the journal is read again, when it could not be."""
YOUNG_S: Final = 0.25
"""How old a stream must be for its client to have begun reading it: ``opencode run`` opens one,
prompts at once, and leaves with the answer, printing nothing if the answer was quicker."""
_PAGE: Final = 500
_SUBSCRIPTION: Final = 200_000

_encode = msgspec.json.Encoder().encode
_controls = itertools.count(1)


class Item:
    """An event, encoded at most once for ``/event`` and once for ``/global/event``."""

    __slots__ = ("_global", "_local", "_payload", "cursor", "directory")

    def __init__(self, cursor: int | None, directory: str, payload: bytes) -> None:
        self.cursor = cursor
        self.directory = directory
        self._payload = payload
        self._global: bytes | None = None
        self._local: bytes | None = None

    def local(self) -> bytes:
        if self._local is None:
            self._local = self._framed(self._payload)
        return self._local

    def everywhere(self) -> bytes:
        if self._global is None:
            head = _encode(
                {"directory": self.directory, "project": place_of(self.directory).project_id}
            )
            self._global = self._framed(b'%s,"payload":%s}' % (head[:-1], self._payload))
        return self._global

    def _framed(self, data: bytes) -> bytes:
        # Lines end with LF alone: the first JavaScript SDK splits events at two of them.
        if self.cursor is None:
            return b"data: %s\n\n" % data
        return b"id: %d\ndata: %s\n\n" % (self.cursor, data)


class Chunk(NamedTuple):
    """What is to leave next, the marks to settle then, and the cursor the client then has."""

    data: bytes
    marks: list[asyncio.Future[None]]
    cursor: int


class Connection:
    """One client's stream: what waits for it, and how far it has been handed over (``cursor``)."""

    def __init__(self, directory: str | None, cursor: int) -> None:
        self.directory = directory
        self.cursor = cursor
        self.closed = False
        self.opened_s = time.monotonic()
        self.lagging = False
        self._waiting: deque[Item | asyncio.Future[None]] = deque()
        self._bytes = 0
        self.dropped = 0
        self._told = False
        self._wake = asyncio.Event()

    def wants(self, item: Item) -> bool:
        return self.directory is None or item.directory == self.directory

    def encoded(self, item: Item) -> bytes:
        return item.everywhere() if self.directory is None else item.local()

    def push(self, item: Item) -> None:
        """Let an event wait for the client. Never blocks; too many end the connection."""
        if self.closed:
            return
        self._bytes += len(self.encoded(item))
        if len(self._waiting) >= BUFFER_EVENTS or self._bytes > BUFFER_BYTES:
            self.overflow()
        else:
            self._waiting.append(item)
        self._wake.set()

    def overflow(self) -> None:
        """Drop what waits, for the client reads too slowly; it is told with the last chunk."""
        self.dropped = sum(isinstance(each, Item) for each in self._waiting) + 1
        self.abandon()

    def _release(self) -> None:
        for each in self._waiting:
            if isinstance(each, asyncio.Future) and not each.done():
                each.set_result(None)
        self._waiting.clear()
        self._bytes = 0

    def mark(self) -> asyncio.Future[None] | None:
        """Settled when all that waits now has been handed to the network; None if nothing does."""
        if self.closed or not self._waiting:
            return None
        mark: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mark)
        self._wake.set()
        return mark

    async def take(self) -> Chunk | None:
        """What is to leave next; empty when nothing came for a while, None at the end."""
        if not self._waiting and not self.closed:
            self._wake.clear()
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes with the wake.
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
        if not self._waiting and self.closed:
            return self._last()
        pieces: list[bytes] = []
        marks: list[asyncio.Future[None]] = []
        size, cursor = 0, self.cursor
        while self._waiting and size < CHUNK_BYTES:
            each = self._waiting.popleft()
            if isinstance(each, asyncio.Future):
                marks.append(each)
            else:
                pieces.append(self.encoded(each))
                size += len(pieces[-1])
                cursor = each.cursor or cursor
        self._bytes -= size
        return Chunk(b"".join(pieces), marks, cursor)

    def _last(self) -> Chunk | None:
        if not self.dropped or self._told:
            return None
        self._told = True
        note = {"cursor": self.cursor, "dropped": self.dropped}
        return Chunk(self.encoded(control(OVERFLOW, note, self.directory or "")), [], self.cursor)

    def sent(self, chunk: Chunk) -> None:
        """A chunk has been handed to the network."""
        self.cursor = chunk.cursor
        self.lagging = False
        for mark in chunk.marks:
            if not mark.done():
                mark.set_result(None)

    def close(self) -> None:
        """End the stream after what waits."""
        self.closed = True
        self._wake.set()

    def abandon(self) -> None:
        """Nobody reads any more: whoever waits for the marks is let go."""
        self.closed = True
        self._release()


def control(kind: str, properties: Any, directory: str) -> Item:
    """An event of the connection itself, which no journal has."""
    identity = event_id(None, int(time.time() * 1000), next(_controls))
    return Item(None, directory, _encode({"id": identity, "type": kind, "properties": properties}))


class Hub:
    """Follows the runtime and fans out. Lives in the server's event loop."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.cursor = 0
        self.first = 0
        self.connections: set[Connection] = set()
        self.dropped = 0
        self._count = 0
        self._texts = Texts()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        subscription = self._gateway.runtime.events(buffer=_SUBSCRIPTION)
        self.cursor = self.first = subscription.cursor
        self._task = asyncio.create_task(self._follow(subscription), name="understudy-hub")

    async def _follow(self, subscription: Any) -> None:
        try:
            while True:
                try:
                    async for event in subscription:
                        self._take(event)
                    return
                except RuntimeClosed:
                    return
                except Exception:
                    logger.exception("Events could not be read")
                await asyncio.sleep(RETRY_S)
        finally:
            self.close()

    def _take(self, event: Event) -> None:
        try:
            self._dispatch(event)
        except Exception:
            logger.exception("Event %s could not be sent", event.type)

    def close(self) -> None:
        """End every stream."""
        for connection in list(self.connections):
            connection.close()
        for _, future in self._waiters:
            if not future.done():
                future.set_result(None)
        self._waiters = []

    async def stop(self) -> None:
        self.close()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # --- out -----------------------------------------------------------------------------------

    def _dispatch(self, event: Event) -> None:
        if event.cursor is not None:
            self.cursor = event.cursor
        told = self._texts.told(event)
        if self.connections and told is not None:
            for item in self.items(told):
                self.broadcast(item)
        if self._waiters:
            self._settle()

    def broadcast(self, item: Item) -> None:
        """Send an event to every connection of its directory."""
        for connection in self.connections:
            if connection.wants(item):
                connection.push(item)

    def items(self, event: Event) -> list[Item]:
        """An event, and before it what only clients take for one of its own."""
        item = self.item(event)
        told = self._gateway.wire.implied(event)
        # Without a cursor: whoever resumes after the event has had both.
        return [*(control(kind, about, item.directory) for kind, about in told), item]

    def item(self, event: Event) -> Item:
        kind, properties = self._gateway.wire.event(event)
        self._count += 1
        identity = event_id(event.cursor, event.time_ms, self._count)
        payload = _encode({"id": identity, "type": kind, "properties": properties})
        directory = (
            self._gateway.wire.directory_of(event.session_id)
            if event.session_id
            else self._gateway.directory
        )
        return Item(event.cursor, directory, payload)

    def open_texts(self) -> list[Item]:
        """Every text that is being written, as it stands where the stream is now."""
        return [self.item(event) for event in self._texts.open()]

    async def flushed(self, session_id: str) -> None:
        """Wait until what is published of a session has left for its clients, or a short while.

        ``opencode run`` leaves when its prompt is answered, whatever it has not yet been shown.
        """
        deadline = asyncio.get_running_loop().time() + FLUSH_S
        target = self._gateway.runtime.cursor
        if self.cursor < target:
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((target, arrived))
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await arrived
        directory = self._gateway.wire.directory_of(session_id)
        theirs = [each for each in self.connections if each.directory in (None, directory)]
        marks = {
            mark: each for each in theirs if not each.lagging and (mark := each.mark()) is not None
        }
        if marks:
            left_s = max(0.0, deadline - asyncio.get_running_loop().time())
            _, late = await asyncio.wait(marks, timeout=left_s)
            for mark in late:
                marks[mark].lagging = True  # who reads slowly is waited for once
        youngest_s = max((each.opened_s for each in theirs if each.directory), default=0.0)
        if (young_s := youngest_s + YOUNG_S - time.monotonic()) > 0:
            await asyncio.sleep(young_s)

    def _settle(self) -> None:
        waiting = []
        for target, future in self._waiters:
            if target > self.cursor:
                waiting.append((target, future))
            elif not future.done():
                future.set_result(None)
        self._waiters = waiting


class EventStream(Response):
    """The answer to ``/event`` and ``/global/event``."""

    def __init__(self, gateway: Gateway, directory: str | None, after: int | None) -> None:
        super().__init__(media_type="text/event-stream")
        self._gateway = gateway
        self._directory = directory
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream"),
                    (b"cache-control", b"no-cache, no-transform"),
                    (b"x-accel-buffering", b"no"),
                    (b"x-content-type-options", b"nosniff"),
                ],
            }
        )
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        writing = asyncio.ensure_future(self._write(send))
        listening = asyncio.ensure_future(hung_up(receive))
        try:
            await asyncio.wait({writing, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, listening):
                task.cancel()
            ends = await asyncio.gather(writing, listening, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                logger.error("An event stream broke off", exc_info=end)

    async def _write(self, send: Send) -> None:
        hub = self._gateway.hub
        connection = Connection(self._directory, hub.cursor if self._after is None else self._after)
        try:
            try:
                with suppress(RuntimeClosed):  # the server is ending, and so does the stream
                    await self._serve(connection, send)
            except TimeoutError:
                connection.overflow()
                hub.connections.discard(connection)
                await self._follow(connection, send, timeout_s=LINGER_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            connection.dropped = connection.dropped or 1
        finally:
            hub.dropped += bool(connection.dropped)
            hub.connections.discard(connection)
            connection.abandon()

    async def _serve(self, connection: Connection, send: Send) -> None:
        hub = self._gateway.hub
        await self._send(send, connection.encoded(self._control("server.connected", {})))
        if self._after is not None:
            await self._tell_gap(connection, send)
        else:
            recap = await self._gateway.recap(self._directory)
            if recap:
                await self._send(send, b"".join(map(connection.encoded, recap)))
        await self._replay(connection, send)
        # From here to the end of the loop nothing else runs: what comes, comes after it.
        hub.connections.add(connection)
        for item in hub.open_texts():
            if connection.wants(item):
                connection.push(item)
        await self._follow(connection, send)

    async def _follow(
        self, connection: Connection, send: Send, *, timeout_s: float | None = None
    ) -> None:
        """Send what comes, to the end. Raises ``TimeoutError`` when the client reads nothing."""
        while (chunk := await connection.take()) is not None:
            data = chunk.data
            if not data and not chunk.marks:
                data = connection.encoded(self._control("server.heartbeat", {}))
            if data:
                await self._send(send, data, timeout_s=timeout_s)
            connection.sent(chunk)

    async def _tell_gap(self, connection: Connection, send: Send) -> None:
        """Say so when the journal does not reach back to the cursor, or never came to it."""
        oldest, newest = await self._gateway.read(self._gateway.runtime.engine.store.read.cursors)
        if connection.cursor < oldest - 1 or connection.cursor > newest:
            note = {"after": connection.cursor, "oldest": oldest}
            await self._send(send, connection.encoded(self._control(GAP, note)))
            connection.cursor = min(connection.cursor, newest)

    async def _replay(self, connection: Connection, send: Send) -> None:
        """Send the journal from the cursor on; when this returns nothing lies in between."""
        gateway, hub = self._gateway, self._gateway.hub
        read = gateway.runtime.engine.store.read
        while connection.cursor < hub.cursor:
            after, upto = connection.cursor, hub.cursor

            def page(after: int = after, upto: int = upto) -> list[Event]:
                return read.events(after=after, upto=upto, limit=_PAGE)

            events = await gateway.read(page)
            found = (item for event in events for item in hub.items(event))
            items = [item for item in found if connection.wants(item)]
            if items:
                await self._send(send, b"".join(map(connection.encoded, items)))
            last = events[-1].cursor if len(events) == _PAGE else upto
            connection.cursor = last or upto

    async def _send(self, send: Send, data: bytes, *, timeout_s: float | None = None) -> None:
        # The server waits for room before it writes: what runs out of time has not left.
        message = {"type": "http.response.body", "body": data, "more_body": True}
        async with asyncio.timeout(STALLED_S if timeout_s is None else timeout_s):
            await send(message)

    def _control(self, kind: str, properties: Any) -> Item:
        return control(kind, properties, self._directory or self._gateway.directory)


# --- endpoints ---------------------------------------------------------------------------------


async def local_events(call: Call) -> Response:
    """Events of one directory, as they happen. ``after``, or Last-Event-ID, resumes."""
    return EventStream(call.gateway, call.directory, _after(call))


async def global_events(call: Call) -> Response:
    """Events of every directory, as they happen. ``after``, or Last-Event-ID, resumes."""
    return EventStream(call.gateway, None, _after(call))


def _after(call: Call) -> int | None:
    after = call.number("after")
    if after is not None:
        return after
    last = call.request.headers.get("last-event-id", "")
    return number("Last-Event-ID", last) if last else None
