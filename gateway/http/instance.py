"""The server as clients see and steer it: settings, a fresh start, log lines, tools."""

from __future__ import annotations

import logging
from typing import Any, Final, Literal

import msgspec

from understudy.errors import InvalidInput
from understudy.gateway.http.call import Call
from understudy.gateway.http.catalog import config
from understudy.gateway.http.events import control
from understudy.gateway.http.wire import USER_SHELL
from understudy.store.records import Record

clients = logging.getLogger("understudy.clients")

LINE_CHARS: Final = 2000


class ChangedConfig(msgspec.Struct, frozen=True):
    """Any settings; see ``configure``."""


class LogLine(Record, frozen=True, kw_only=True):
    message: str
    service: str = "client"
    level: Literal["debug", "info", "warn", "error"] = "info"


async def configure(call: Call) -> Any:
    """The configuration, if the body changes none of it: it is set when the server is started."""
    given = await call.anything()
    now = await config(call)
    other = sorted(key for key, value in given.items() if now.get(key) != value)
    if other:
        names = ", ".join(other)[:200]
        raise InvalidInput(
            f"{names} cannot be changed here: it is set where the server is started", field="body"
        )
    return now


async def dispose(call: Call) -> Any:
    """Tell the directory's clients to ask for everything anew. Nothing that runs is ended."""
    directory = call.directory
    about = {"directory": directory}
    call.gateway.hub.broadcast(control("server.instance.disposed", about, directory))
    return True


async def dispose_all(call: Call) -> Any:
    """Tell all clients to ask for everything anew. Nothing that runs is ended."""
    call.gateway.hub.broadcast(control("global.disposed", {}, call.gateway.directory))
    return True


async def log(call: Call) -> Any:
    """Write a client's line to the server's log."""
    line = await call.body(LogLine)
    level = logging.getLevelNamesMapping()[line.level.upper()]
    shown = (line.service[:100], line.message[:LINE_CHARS])
    clients.log(level, "%r: %r", *shown)
    return True


async def tool_names(call: Call) -> Any:
    """What tools there are."""
    return [each["id"] for each in await tools(call)]


async def tools(call: Call) -> Any:
    """The tools as models are told of them."""
    found = call.gateway.runtime.engine.tools.values()
    return [
        {"id": each.name, "description": each.description, "parameters": each.parameters}
        for each in found
        if each.name != USER_SHELL
    ]


async def capabilities(_: Call) -> Any:
    """None of what OpenCode calls experimental."""
    return {"backgroundSubagents": False}
