"""The cast: a scripted model and tools whose behaviour follows from what they are asked alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from understudy.actors.models.acts import Call, End, Fail, Say, Stall, Think, Wait
from understudy.actors.models.protocol import AssistantTurn, ModelRequest, UserText, UserTurn
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.actors.tools.context import ToolContext
from understudy.actors.tools.tool import Tool, tool
from understudy.errors import ModelError, ModelOverflow, ModelUnavailable, ToolError
from understudy.store.records import Question

_CALLS: Final = (
    "echo",
    "echo",
    "slow",
    "once",
    "once",
    "again",
    "asking",
    "wondering",
    "guarded",
    "failing",
    "stuck",
    "nothing",
)


def model(seed: int | str, check: Callable[[ModelRequest], None]) -> ScriptedModel:
    """Answers by the seed and the last prompt's text; every request is checked first."""

    def script(request: ModelRequest) -> Any:
        check(request)
        if request.purpose == "summary":
            chance = random.Random(f"{seed}/summary/{len(request.turns)}/{_asked(request)}")
            return list(_summary(chance))
        taken = steps_taken(request)
        chance = random.Random(f"{seed}/{_asked(request)}/{taken}/{len(request.turns)}")
        return list(_step(chance, taken))

    return ScriptedModel(script, context_limit=2_000, output_limit=500, record=1)


def _asked(request: ModelRequest) -> str:
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            return "\n".join(each.text for each in turn.content if isinstance(each, UserText))
    return ""


def _step(chance: random.Random, taken: int) -> Iterator[Any]:
    if chance.random() < 0.3:
        yield Wait(chance.choice((0.0, 0.2, 2.5)))
    if chance.random() < 0.15:
        yield Think("let me see")
    if chance.random() < 0.8:
        yield Say("words " * chance.choice((1, 3, 60)), chunks=chance.choice((1, 2, 5)))
    if chance.random() < 0.2:
        yield Wait(1.5)
        yield Say("more words")
    trouble = chance.random()
    if trouble < 0.05:
        yield Fail(ModelUnavailable("overloaded"))
    elif trouble < 0.07:
        yield Fail(ModelError("no"))
    elif trouble < 0.09:
        yield Fail(ModelOverflow("too long"))
    elif trouble < 0.11:
        yield End(None)
    elif trouble < 0.13:
        yield Stall()
    elif taken < 3 and chance.random() < 0.5:
        for number in range(chance.choice((1, 1, 2, 3))):
            yield Call(chance.choice(_CALLS), {"text": f"{taken}.{number}"})
    else:
        yield Say("done")


def _summary(chance: random.Random) -> Iterator[Any]:
    if chance.random() < 0.3:
        yield Wait(1.0)
    trouble = chance.random()
    if trouble < 0.1:
        yield Fail(ModelUnavailable("overloaded"))
    elif trouble < 0.2:
        yield Fail(ModelError("no"))
    elif trouble < 0.25:
        yield Say("")
    else:
        yield Say("what was said")


class Effects:
    """What tools did outside, and what they are checked for."""

    def __init__(self, started: Callable[[ToolContext], None]) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self.started = started

    def tools(self) -> list[Tool]:
        effects = self

        @tool
        def echo(text: str, ctx: ToolContext) -> str:
            """Say it back."""
            effects.started(ctx)
            return text

        @tool
        async def slow(text: str, ctx: ToolContext) -> str:
            """Say it back after a while."""
            effects.started(ctx)
            ctx.progress(title="slowly")
            await asyncio.sleep(1.0)
            return text * 200

        @tool
        def once(text: str, ctx: ToolContext) -> str:
            """Do what must not be done twice."""
            effects.started(ctx)
            effects.done[ctx.session_id, ctx.call_id] += 1
            return text

        @tool(idempotent=True)
        async def again(text: str, ctx: ToolContext) -> str:
            """Do what may be done again."""
            effects.started(ctx)
            await asyncio.sleep(0.3)
            return text

        @tool
        async def asking(text: str, ctx: ToolContext) -> str:
            """Ask for leave."""
            effects.started(ctx)
            await ctx.ask_async("asking", patterns=(text,))
            return text

        @tool
        async def wondering(text: str, ctx: ToolContext) -> str:
            """Ask a question."""
            effects.started(ctx)
            answers = await ctx.question_async([Question(text=text)])
            return str(answers)

        @tool(permission="guarded")
        def guarded(text: str, ctx: ToolContext) -> str:
            """Need leave before it runs."""
            effects.started(ctx)
            return text

        @tool
        def failing(text: str) -> str:
            """Fail in one of two ways."""
            raise ToolError(text) if text.endswith("0") else ValueError(text)

        @tool
        async def stuck(text: str) -> str:
            """Never return."""
            await asyncio.get_running_loop().create_future()
            return text

        return [echo, slow, once, again, asking, wondering, guarded, failing, stuck]


def unpaired(request: ModelRequest) -> str | None:
    """What is wrong with a request's calls and results, or None."""
    calls = [
        call for turn in request.turns if isinstance(turn, AssistantTurn) for call in turn.calls
    ]
    ids = [call.call_id for call in calls]
    if len(ids) != len(set(ids)):
        return "two calls share an id"
    if not request.turns:
        return "an empty request"
    last = request.turns[-1]
    if isinstance(last, AssistantTurn) and not last.calls:
        return "nothing to answer"
    return None
