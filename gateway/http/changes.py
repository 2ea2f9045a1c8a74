"""What the write and edit tools have changed, file by file, as they reported it."""

from __future__ import annotations

from typing import Any, Final

from understudy.errors import MessageNotFound
from understudy.gateway.http.call import Call
from understudy.store.records import AssistantMessage, ToolCompleted, ToolPart

TOOLS: Final = ("write", "edit")


async def diff(call: Call) -> Any:
    """Files that the write and edit tools changed, in one turn if its message is named."""
    session_id, message_id = call.session_id, call.query("messageID")
    reads = call.gateway.runtime.engine.store.read
    await call.gateway.info(session_id)
    parts = await call.gateway.read(lambda: reads.tool_parts(session_id, TOOLS))
    if message_id is not None:
        pair = await call.gateway.read(lambda: reads.message(session_id, message_id))
        if pair is None:
            raise MessageNotFound(
                f"Message not found: {message_id}", session_id=session_id, message_id=message_id
            )
        turn = pair[0].turn
        pairs = await call.gateway.read(lambda: reads.turn(session_id, turn)) if turn else []
        theirs = {info.id for info, _ in pairs if isinstance(info, AssistantMessage)}
        parts = [part for part in parts if part.message_id in theirs]
    return changed(parts)


def changed(parts: list[ToolPart]) -> list[dict[str, Any]]:
    """The changes of each file, the first changed first: patches in a row, lines summed."""
    files: dict[str, dict[str, Any]] = {}
    for part in parts:
        state = part.state
        if not isinstance(state, ToolCompleted):
            continue
        patch = str(state.metadata.get("diff", ""))
        status = "added" if state.metadata.get("created") else "modified"
        empty = {"file": state.title, "patch": "", "additions": 0, "deletions": 0, "status": status}
        file = files.setdefault(state.title, empty)
        file["patch"] += f"{patch}\n" if patch else ""
        lines = [line for line in patch.splitlines() if not line.startswith(("+++", "---"))]
        file["additions"] += sum(line.startswith("+") for line in lines)
        file["deletions"] += sum(line.startswith("-") for line in lines)
    return list(files.values())
