"""The cast: a scripted model and tools whose behaviour follows from what they are asked alone."""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from understudy.actors.models.acts import Call, End, Fail, Say, Stall, Think, Use, Wait
from understudy.actors.models.protocol import ModelRequest, UserText, UserTurn
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
_ASKING: Final = ("asking", "wondering", "guarded")


class Flavour:
    """What kind of model a seed has, now and then."""

    def __init__(self, seed: int | str) -> None:
        chance = random.Random(f"{seed}/flavour")
        talkative = chance.random() < 0.25
        self.asking = chance.random() < 0.2  # it calls tools that ask people
        self.endless = chance.random() < 0.1  # it never comes to an end by itself
        self.hopeless = chance.random() < 0.15  # its summaries come to nothing
        self.talkative = talkative or self.hopeless  # its answers fill the context


def model(seed: int | str, check: Callable[[ModelRequest], None]) -> ScriptedModel:
    """Answers by the seed and the last prompt's text; every request is checked first."""
    flavour = Flavour(seed)

    def script(request: ModelRequest) -> Any:
        check(request)
        if request.purpose == "summary":
            chance = random.Random(f"{seed}/summary/{len(request.turns)}/{_asked(request)}")
            return list(_summary(chance, flavour))
        taken = steps_taken(request)
        chance = random.Random(f"{seed}/{_asked(request)}/{taken}/{len(request.turns)}")
        return list(_step(chance, taken, flavour))

    return ScriptedModel(script, context_limit=2_000, output_limit=500, record=1)


def _asked(request: ModelRequest) -> str:
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            return "\n".join(each.text for each in turn.content if isinstance(each, UserText))
    return ""


def _step(chance: random.Random, taken: int, flavour: Flavour) -> Iterator[Any]:
    if chance.random() < 0.3:
        yield Wait(chance.choice((0.0, 0.2, 2.5)))
    if chance.random() < 0.15:
        yield Think("let me see")
    if chance.random() < 0.8:
        words = chance.choice((1, 3, 60)) * (6 if flavour.talkative else 1)
        yield Say("words " * words, chunks=chance.choice((1, 2, 5)))
    if chance.random() < 0.3:
        for number in range(chance.choice((1, 3, 6))):
            yield Wait(chance.choice((0.1, 0.4, 1.5)))
            yield Say(f"more {number} ", chunks=2)
    if chance.random() < 0.3:
        yield Use(chance.randrange(100, 400), cost=0.25)
    if chance.random() < 0.05:
        for _ in range(8):
            yield Wait(3.0)
            yield Say("slowly ", chunks=1)
    if (trouble := _trouble(chance.random())) is not None:
        yield trouble
    elif flavour.endless or (taken < 3 and chance.random() < 0.5):
        for number in range(chance.choice((2, 3, 4) if flavour.asking else (1, 1, 2, 3))):
            tools = _ASKING if flavour.asking and chance.random() < 0.7 else _CALLS
            yield Call(chance.choice(tools), {"text": f"{taken}.{number}"})
    else:
        yield Say("done")


def _trouble(luck: float) -> Any:
    """How one answer in eight ends badly."""
    for limit, act in (
        (0.05, Fail(ModelUnavailable("overloaded"))),
        (0.07, Fail(ModelError("no"))),
        (0.09, Fail(ModelOverflow("too long"))),
        (0.11, End(None)),
        (0.13, Stall()),
    ):
        if luck < limit:
            return act
    return None


def _summary(chance: random.Random, flavour: Flavour) -> Iterator[Any]:
    if chance.random() < 0.3:
        yield Wait(1.0)
    trouble = chance.random() * (0.25 if flavour.hopeless else 1.0)
    if trouble < 0.1:
        yield Fail(ModelUnavailable("overloaded"))
    elif trouble < 0.2:
        yield Fail(ModelError("no"))
    elif trouble < 0.25:
        yield Say("")
    else:
        yield Say("what was said")


def output_of(tool: str, text: str) -> str | None:
    """What a call of a tool gives, if that is certain."""
    same = dict.fromkeys(("echo", "once", "again", "asking", "guarded"), text)
    return {**same, "slow": text * 200, "wondering": str((("yes",),))}.get(tool)


class Effects:
    """What tools did outside, and what they are checked for."""

    def __init__(self, started: Callable[..., None]) -> None:
        self.done: Counter[tuple[str, str, str]] = Counter()  # a model may use a call's id again
        self.stuck: list[ToolContext] = []
        self.started = started

    @functools.cached_property
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
            effects.done[ctx.session_id, ctx.message_id, ctx.call_id] += 1
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
            effects.started(ctx, "guarded")
            return text

        @tool
        def failing(text: str) -> str:
            """Fail in one of two ways."""
            raise ToolError(text) if text.endswith("0") else ValueError(text)

        @tool
        async def stuck(text: str, ctx: ToolContext) -> str:
            """Never return."""
            effects.stuck.append(ctx)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                effects.stuck.remove(ctx)
            return text

        return [echo, slow, once, again, asking, wondering, guarded, failing, stuck]
