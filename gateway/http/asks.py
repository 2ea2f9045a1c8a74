"""Permissions and questions: listed, and answered exactly once."""

from __future__ import annotations

from typing import Any, Literal

from understudy.gateway.http.call import Call
from understudy.store.records import Record

Answer = Literal["once", "always", "reject"]


class PermissionReply(Record, frozen=True, kw_only=True):
    reply: Answer
    message: str | None = None


class PermissionResponse(Record, frozen=True, kw_only=True):
    response: Answer


class QuestionReply(Record, frozen=True, kw_only=True):
    answers: tuple[tuple[str, ...], ...]


async def permissions(call: Call) -> Any:
    """Permission requests of the call's directory that wait for a person."""
    return await _open(call, "permission")


async def questions(call: Call) -> Any:
    """Questions of the call's directory that wait for a person."""
    return await _open(call, "question")


async def _open(call: Call, kind: str) -> Any:
    wire = call.gateway.wire
    return [
        wire.ask(each)
        for each in await call.gateway.runtime.asks()
        if each.kind == kind and wire.directory_of(each.session_id) == call.directory
    ]


async def reply(call: Call) -> Any:
    """Answer a permission request."""
    body = await call.body(PermissionReply)
    feedback = body.message or None
    await call.gateway.runtime.reply(call.path("requestID"), body.reply, feedback=feedback)
    return True


async def respond(call: Call) -> Any:
    """Answer a permission request, in the words of older clients."""
    body = await call.body(PermissionResponse)
    await call.gateway.info(call.session_id)
    await call.gateway.runtime.reply(call.path("permissionID"), body.response)
    return True


async def answer(call: Call) -> Any:
    """Answer a question: a list of labels for each of its parts."""
    body = await call.body(QuestionReply)
    await call.gateway.runtime.reply(call.path("requestID"), answers=body.answers)
    return True


async def decline(call: Call) -> Any:
    """Decline to answer a question."""
    await call.gateway.runtime.reply(call.path("requestID"), "reject")
    return True
