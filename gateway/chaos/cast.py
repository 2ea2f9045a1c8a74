"""The model and the tools of ``chaos kill``: what they do follows from the prompt's text.

A prompt is ``<its id>: <plan>``. The steps of a plan are separated by ``|``, the calls of a step by
``+``; the answer after the last one names the prompt, so that it can be told from any other.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from understudy import Question, Runtime, Tool, ToolContext, tool
from understudy.actors.models.protocol import ModelRequest, UserText, UserTurn
from understudy.actors.models.scripted import Call, Fail, Say, ScriptedModel, Think, Wait
from understudy.actors.models.scripted import steps_taken as taken
from understudy.errors import ModelError, ModelUnavailable, ToolError
from understudy.gateway.chaos.points import Points, checked_ms
from understudy.gateway.chaos.words import Promise

Write = Callable[[Promise], None]

LONG: Final = "and so on and so forth, " * 60
CONTEXT: Final = 6_000


def model(points: Points) -> ScriptedModel:
    def script(request: ModelRequest) -> Any:
        if request.purpose == "summary":
            return _summary(points)
        return list(_step(_asked(request), taken(request)))

    return ScriptedModel(script, context_limit=CONTEXT, output_limit=500, record=0)


def _asked(request: ModelRequest) -> str:
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            return "".join(each.text for each in turn.content if isinstance(each, UserText))
    return ""


def answer(message_id: str) -> str:
    """How the answer to a prompt ends."""
    return f"done with {message_id}"


def _step(asked: str, step: int) -> Iterator[Any]:
    name, _, plan = asked.partition(": ")
    steps = plan.split("|") if plan else []
    for word in steps[step].split("+") if step < len(steps) else ():
        if word == "think":
            yield Think("let me see")
        elif word == "wait":
            yield Wait(0.08)
        elif word == "long":
            yield Say(LONG)
        elif word == "fail":
            yield Fail(ModelError("no"))
        elif word == "later":
            if random.random() < 0.5:  # else a call would take all its attempts
                yield Fail(ModelUnavailable("overloaded", retry_after_s=0.02))
        else:
            yield Call(word, {"text": name})
    if step >= len(steps) or not any(word in CALLS for word in steps[step].split("+")):
        yield Say(answer(name))


async def _summary(points: Points) -> AsyncIterator[Any]:
    yield Say("what was ")
    await asyncio.sleep(0.02)
    points.pass_by("summarising")
    yield Say("said")


CALLS: Final = ("note", "look", "slow", "permit", "wonder", "guarded", "delegate", "fall")


def tools(points: Points, write: Write, runtime: Callable[[], Runtime]) -> list[Tool]:
    @tool
    def note(text: str, ctx: ToolContext) -> str:  # noqa: ARG001 - the model gives it
        """Do what must not be done twice."""
        at_ms, pid = checked_ms(), os.getpid()
        write(Promise("started", session=ctx.session_id, key=ctx.call_id, at_ms=at_ms, pid=pid))
        points.pass_by("tool")
        write(Promise("effect", session=ctx.session_id, key=ctx.call_id))
        points.pass_by("effect")
        return f"noted {ctx.session_id} {ctx.call_id}"

    @tool(idempotent=True)
    async def look(text: str) -> str:
        """Do what may be done again."""
        await asyncio.sleep(0.01)
        return text * 10

    @tool
    def slow(text: str, ctx: ToolContext) -> str:
        """Take a while in a thread."""
        ctx.progress(title="slowly")
        time.sleep(0.1)
        return text

    @tool
    def permit(text: str, ctx: ToolContext) -> str:
        """Ask for leave."""
        ctx.ask("permit", patterns=(text,))
        return text

    @tool
    async def wonder(text: str, ctx: ToolContext) -> str:
        """Ask a question."""
        return str(await ctx.question_async([Question(text=text)]))

    @tool(permission="guarded")
    def guarded(text: str) -> str:
        """Need leave before it starts."""
        return text

    @tool
    def delegate(text: str, ctx: ToolContext) -> str:
        """Have a child session answer."""
        child = runtime().create_session(parent_id=ctx.session_id, title="child")
        write(Promise("born", session=child.id, parent=ctx.session_id))
        return child.prompt(f"{text}: look").result(timeout_s=10).text

    @tool
    def fall(text: str) -> str:
        """Fail."""
        raise ToolError(text)

    return [note, look, slow, permit, wonder, guarded, delegate, fall]
