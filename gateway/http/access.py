"""Who may call: password, origins and host names, checked before anything else is looked at."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from understudy.gateway.http.errors import json_response

METHODS: Final = "GET, HEAD, PUT, PATCH, POST, DELETE"
_LOCAL: Final = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?|tauri://localhost")


class Access:
    """ASGI middleware around the whole application.

    Args:
        password: required of every call but OPTIONS, by Basic auth or ``auth_token``; "" for none.
        origins: browser origins that may call, beyond this machine's own.
        names: host names the server may be addressed by, beyond addresses and localhost. Without
            a password others are refused, or any page could reach us through a name of its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        username: str = "opencode",
        password: str = "",
        origins: Iterable[str] = (),
        names: Iterable[str] = (),
    ) -> None:
        self.app = app
        self._secret = f"{username}:{password}".encode() if password else b""
        self._origins = frozenset(origin.rstrip("/") for origin in origins)
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = bool(origin) and self._is_allowed(origin, headers.get("host", ""))
        if allowed:
            send = _with_origin(send, origin)
        refusal = self._refusal(scope, headers, foreign=bool(origin) and not allowed)
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers, *, foreign: bool) -> Response | None:
        if foreign or not (self._secret or self._is_known(headers.get("host", ""))):
            message = "This origin or host name may not call; see --cors"
            return json_response({"name": "Forbidden", "data": {"message": message}}, 403)
        if scope["method"] == "OPTIONS":
            return Response(status_code=204, headers=_preflight(headers))
        if self._secret and not self._is_authorised(scope, headers):
            return _unauthorised(scope["path"])
        return None

    # --- passwords -----------------------------------------------------------------------------

    def _is_authorised(self, scope: Scope, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        tokens = [token] if scheme.lower() == "basic" else []
        tokens += parse_qs(scope.get("query_string", b"").decode("latin-1")).get("auth_token", [])
        # Every candidate is compared, in constant time each.
        return any([hmac.compare_digest(_decoded(each), self._secret) for each in tokens])  # noqa: C419

    # --- browsers ------------------------------------------------------------------------------

    def _is_allowed(self, origin: str, host: str) -> bool:
        same = origin.partition("://")[2] == host
        return same or origin in self._origins or _LOCAL.fullmatch(origin) is not None

    def _is_known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        if not name or name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _decoded(token: str) -> bytes:
    try:
        return base64.b64decode(token.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _unauthorised(path: str) -> Response:
    challenge = {"WWW-Authenticate": 'Basic realm="Secure Area"'}
    if not path.startswith("/api/"):
        return Response(status_code=401, headers=challenge)
    response = json_response(
        {"_tag": "UnauthorizedError", "message": "Authentication required"}, 401
    )
    response.headers.update(challenge)
    return response


def _preflight(headers: Headers) -> dict[str, str]:
    wanted = headers.get("access-control-request-headers", "*")
    return {
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Allow-Headers": wanted,
        "Access-Control-Max-Age": "600",
    }


def _with_origin(send: Send, origin: str) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Credentials"] = "true"
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_origin
