"""The list of what is to be done: a tool writes it, and it is kept as the tool's last result.

So it is as durable as the transcript, goes with a fork, and a revert takes it back.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from understudy.actors.tools.tool import Tool, ToolResult
from understudy.gateway.http.call import Call
from understudy.gateway.http.wire import TODO, todos_of


class Todo(msgspec.Struct):
    """One thing to do, in a few words."""

    content: str
    status: Literal["pending", "in_progress", "completed", "cancelled"]
    priority: Literal["high", "medium", "low"] = "medium"


def todowrite(todos: list[Todo]) -> ToolResult:
    """Write down what is to be done, for work of three steps or more, and keep it true.

    Args:
        todos: the whole list; it replaces the one before.
    """
    left = sum(each.status in ("pending", "in_progress") for each in todos)
    shown = msgspec.to_builtins(todos)
    return ToolResult(msgspec.json.encode(todos).decode(), f"{left} todos", {"todos": shown})


def tool() -> Tool:
    return Tool(todowrite, name=TODO, idempotent=True, permission=TODO)


async def todos(call: Call) -> Any:
    """What a session's model has written down to do."""
    session_id = call.session_id
    reads = call.gateway.runtime.engine.store.read
    await call.gateway.info(session_id)
    for part in reversed(await call.gateway.read(lambda: reads.tool_parts(session_id, (TODO,)))):
        if (found := todos_of(part)) is not None:
            return found
    return []
