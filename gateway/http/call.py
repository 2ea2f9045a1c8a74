"""One request: its path, its query, its directory, its checked body."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import unquote

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from understudy.actors.session import Session
from understudy.errors import InvalidInput
from understudy.gateway.http.errors import Refused
from understudy.store.ids import check_id

if TYPE_CHECKING:
    from understudy.gateway.http.gateway import Gateway

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
PAGE_LIMIT: Final = 10_000
MAX_NUMBER: Final = 2**63 - 1

B = TypeVar("B", bound=msgspec.Struct)


class Call:
    """What an endpoint is given. Reading from it raises ``InvalidInput`` for what is unusable."""

    def __init__(self, gateway: Gateway, request: Request) -> None:
        self.gateway = gateway
        self.request = request

    def path(self, name: str) -> str:
        """An id from the path."""
        return check_id(name, self.request.path_params[name])

    @property
    def session_id(self) -> str:
        return self.path("sessionID")

    def session(self) -> Session:
        """A handle on the session of the path; its commands find out whether it exists."""
        return Session(self.gateway.runtime, self.session_id)

    # --- the query -----------------------------------------------------------------------------

    def query(self, name: str) -> str | None:
        return self.request.query_params.get(name) or None

    def number(self, name: str) -> int | None:
        """A number of 0 or more."""
        text = self.query(name)
        return None if text is None else number(name, text)

    def limit(self, default: int | None) -> int | None:
        number = self.number("limit")
        return default if number is None else min(number, PAGE_LIMIT)

    def flag(self, name: str) -> bool:
        return (self.query(name) or "").lower() in ("true", "1")

    def agent(self, name: str | None) -> str | None:
        """An agent of the body, which must be one that ``/agent`` lists."""
        known = self.gateway.runtime.engine.rules.agent
        if name is not None and name != known:
            raise InvalidInput(f"there is no agent {name!r:.100}; there is {known}", field="agent")
        return name

    @property
    def directory(self) -> str:
        """Where the client works: ``?directory=``, or its header, or the server's own."""
        given = self.query("directory")
        if given is None:
            given = unquote(self.request.headers.get("x-opencode-directory", "")) or None
        if given is None:
            return self.gateway.directory
        if not posixpath.isabs(given) or "\0" in given:
            raise InvalidInput(f"directory is an absolute path, not {given!r:.200}", field="dir")
        return posixpath.normpath(given)

    # --- the body ------------------------------------------------------------------------------

    async def body(self, shape: type[B]) -> B:
        """The body as ``shape``; unknown fields are ignored, no body at all is an empty object."""
        data = await self._read()
        try:
            return msgspec.json.decode(data or b"{}", type=shape)
        except msgspec.ValidationError as error:
            raise InvalidInput(str(error), field="body") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"the body is not JSON: {error}", field="body") from error

    async def anything(self) -> dict[str, Any]:
        """The body as an object with any fields."""
        data = await self._read()
        try:
            return msgspec.json.decode(data or b"{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"the body is not an object: {error}", field="body") from error

    async def _read(self) -> bytes:
        announced = self.request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            raise _too_large()
        pieces, size = [], 0
        try:
            async for piece in self.request.stream():
                size += len(piece)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                pieces.append(piece)
        except ClientDisconnect as error:
            raise Refused(400, "BadRequest", "The client hung up") from error
        return b"".join(pieces)


async def hung_up(receive: Receive) -> None:
    """Wait until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def number(name: str, text: str) -> int:
    """A number of 0 or more that a database can hold. Raises ``InvalidInput``."""
    try:
        found = int(float(text))
    except (ValueError, OverflowError):
        found = -1
    if not 0 <= found <= MAX_NUMBER:
        raise InvalidInput(f"{name} is a number of 0 or more, not {text!r:.60}", field=name)
    return found


def _too_large() -> Refused:
    return Refused(413, "BadRequest", f"A body has at most {MAX_BODY_BYTES} bytes", kind="Payload")
