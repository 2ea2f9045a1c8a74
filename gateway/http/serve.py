"""``understudy serve``: from settings to a listening server, and its orderly end."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from understudy.actors.models.configured import model_from
from understudy.actors.pending import Pending
from understudy.actors.runtime import Runtime
from understudy.errors import InvalidInput, UnderstudyError
from understudy.gateway.http import todos
from understudy.gateway.http.app import application
from understudy.gateway.http.builtin import PROVIDER, builtin_models
from understudy.gateway.http.gateway import Gateway
from understudy.gateway.http.tools import Workspaces
from understudy.gateway.places import database_path, make_room

try:
    import uvicorn
except ModuleNotFoundError as error:  # pragma: no cover
    raise InvalidInput("serving needs the extra: pip install 'understudy[server]'") from error

if TYPE_CHECKING:
    from understudy.actors.given import Permissions
    from understudy.actors.models.protocol import Model
    from understudy.actors.tools.context import ToolContext

CLOSE_S: Final = 3.0
"""How long turns, tools and the store have to end; the rest of five seconds is the network's."""
LINGER_S: Final = 1
BACKLOG: Final = 2048
GUARDED: Final = {"bash": "ask"}
"""A command can go where its user can, so a person is asked first, unless told otherwise."""


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Raises what cannot be started; exit code 0 otherwise."""
    password = os.environ.get("UNDERSTUDY_SERVER_PASSWORD") or os.environ.get(
        "OPENCODE_SERVER_PASSWORD", ""
    )
    username = (
        os.environ.get("UNDERSTUDY_SERVER_USERNAME")
        or os.environ.get("OPENCODE_SERVER_USERNAME")
        or "opencode"
    )
    check_bind(args.hostname, password=password, insecure=args.insecure)
    directory = Path(args.directory or ".").resolve()
    if not directory.is_dir():
        raise InvalidInput(f"there is no directory {directory}", field="directory")
    allowed = dict.fromkeys(args.allow or (), "allow")
    gateway = build(
        make_room(database_path(args.database)),
        models=[model_from(name) for name in args.model or (None,)],
        directory=str(directory),
        permissions=GUARDED | dict.fromkeys(args.ask or (), "ask") | allowed,
    )
    check_permissions(gateway, [*(args.ask or ()), *allowed])
    if not password:
        print("Anybody who reaches this address may use it: no password is set.", file=sys.stderr)
    run(
        gateway,
        hostname=args.hostname,
        port=args.port,
        username=username,
        password=password,
        origins=args.cors or (),
    )
    return 0


def check_permissions(gateway: Gateway, names: Iterable[str]) -> None:
    """Refuse what no tool needs: a slip of the pen would leave a tool unguarded."""
    tools = gateway.runtime.engine.tools.values()
    known = {each.permission for each in tools if each.permission is not None}
    for name in names:
        if not any(fnmatchcase(each, name) for each in known):
            raise InvalidInput(
                f"no tool needs the permission {name!r}; there is {', '.join(sorted(known))}",
                field="permission",
            )


def run(
    gateway: Gateway,
    *,
    hostname: str = "127.0.0.1",
    port: int = 0,
    username: str = "opencode",
    password: str = "",
    origins: Iterable[str] = (),
) -> None:
    """Start a gateway's runtime, then bind and answer, until SIGTERM or SIGINT."""
    # What comes too early, or a second time, must not cut the orderly way short.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _quit)
    with gateway.runtime:
        sock = listen(hostname, port)
        app = application(
            gateway, username=username, password=password, origins=origins, names=(hostname,)
        )
        server = Server(gateway, config(app))
        shown = f"[{hostname}]" if ":" in hostname else hostname
        server.ready = f"understudy server listening on http://{shown}:{sock.getsockname()[1]}"
        asyncio.run(server.serve(sockets=[sock]))


def _quit(_number: int, _frame: Any) -> None:
    """Before the server listens for signals, and after: leave the orderly way, once."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


def build(
    database: str | os.PathLike[str],
    *,
    models: list[Model],
    directory: str,
    permissions: Permissions | None = None,
    **options: Any,
) -> Gateway:
    """A gateway with the workspace tools of each session's directory; start its runtime first.

    ``options`` are the runtime's.
    """
    workspaces = Workspaces(directory)
    runtime = Runtime(
        database,
        model=models[0],
        models=[*models[1:], *builtin_models()],
        tools=[*workspaces.tools(), todos.tool(), *options.pop("tools", ())],
        directory=directory,
        permissions=permissions,
        **options,
    )

    def is_users(context: ToolContext) -> bool:
        pair = runtime.engine.store.read.message(context.session_id, context.message_id)
        return pair is not None and getattr(pair[0], "provider_id", None) == PROVIDER

    workspaces.allow_shell = is_users
    return Gateway(runtime, directory=directory)


def check_bind(hostname: str, *, password: str, insecure: bool) -> None:
    """Refuse to offer a shell to a network. Raises ``InvalidInput``."""
    if password or insecure:
        return
    try:
        loopback = ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        loopback = hostname == "localhost"
    if not loopback:
        raise InvalidInput(
            f"{hostname} can be reached from outside, and whoever reaches it runs commands here: "
            "set OPENCODE_SERVER_PASSWORD, or say --insecure",
            field="hostname",
        )


def listen(hostname: str, port: int) -> socket.socket:
    """A bound socket; nobody is answered before the server runs. Raises ``InvalidInput``."""
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: 40 ms for each answer.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((hostname, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"{hostname}:{port} cannot be served: {reason}", field="port") from error
    sock.setblocking(False)
    return sock


def config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=LINGER_S,
        server_header=False,
        date_header=False,
    )


class Server(uvicorn.Server):
    """Closes the runtime first when told to stop: that answers and ends every open request."""

    def __init__(self, gateway: Gateway, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self._gateway = gateway
        self.ready = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready:
            print(self.ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        runtime = self._gateway.runtime
        closed: Pending[bool] = Pending()

        def close() -> None:
            try:
                closed.set(runtime.close(timeout_s=CLOSE_S))
            except BaseException as error:
                closed.fail(error)
                raise

        threading.Thread(target=close, name="understudy-close", daemon=True).start()
        with suppress(UnderstudyError):
            await closed.wait(timeout_s=CLOSE_S + 0.5)
        self._gateway.hub.close()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its client never read the end
        await asyncio.sleep(0)
