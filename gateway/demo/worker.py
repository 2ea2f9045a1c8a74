"""The demo's worker: an app that embeds a runtime, and is killed again and again.

Orders and news: see ``pipes``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from understudy import Runtime, Session, Tool, ToolContext, tool
from understudy.actors.models.protocol import AssistantTurn, ModelRequest, UserText, UserTurn
from understudy.actors.models.scripted import Call, Say, ScriptedModel, Wait, steps_taken
from understudy.actors.tools.workspace import workspace
from understudy.errors import (
    ActorCrashed,
    SessionClaimed,
    SessionExists,
    StoreBusy,
    TurnAborted,
    TurnFailed,
    UnderstudyError,
)
from understudy.gateway.demo.files import PATTERN, Facts
from understudy.gateway.demo.ledger import News, Order
from understudy.gateway.pipes import read_orders, tell

T = TypeVar("T")

PATIENCE_S: Final = 30.0
PAUSE_S: Final = 0.1
THINK_S: Final = 0.4
TOOL_S: Final = 0.25


class Setup(msgspec.Struct, frozen=True):
    """What the worker is started with."""

    database: str
    root: str
    effects: str


# --- the app: tools and a model ----------------------------------------------------------------


def tools(setup: Setup) -> list[Tool]:
    """The workspace's reading tools, and two slow ones of the demo's own."""

    @tool(idempotent=True)
    def checksum(path: str) -> str:
        """The SHA-256 of a file."""
        time.sleep(random.uniform(0, TOOL_S))
        return hashlib.sha256(Path(setup.root, path).read_bytes()).hexdigest()

    @tool
    def note(text: str, ctx: ToolContext) -> str:
        """Write a line into the log outside. Doing it twice would show."""
        time.sleep(random.uniform(0, TOOL_S))
        file = os.open(setup.effects, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, f"{ctx.session_id} {ctx.call_id}\n".encode())
        os.close(file)
        time.sleep(random.uniform(0, TOOL_S))
        return f"Noted: {text}"

    found = [each for each in workspace(setup.root) if each.name in ("read", "grep")]
    return [*found, checksum, note]


def answer(request: ModelRequest) -> list[object]:
    """Read and search the file; checksum and note; then say what the tools have shown."""
    path = _path(request)
    think = Wait(random.uniform(0, THINK_S))
    step = steps_taken(request)
    if step == 0:
        search = Call("grep", {"pattern": PATTERN, "path": path})
        return [Say(f"Let me look at {path}."), think, Call("read", {"path": path}), search]
    if step == 1:
        return [think, Call("checksum", {"path": path}), Call("note", {"text": f"read {path}"})]
    return [think, Say(_facts(request, path).answer(path))]


def _path(request: ModelRequest) -> str:
    asked = next(turn for turn in reversed(request.turns) if isinstance(turn, UserTurn))
    text = "".join(each.text for each in asked.content if isinstance(each, UserText))
    return text.partition("file ")[2]


def _facts(request: ModelRequest, path: str) -> Facts:
    """What the outputs of this turn's tools say; nothing else is known."""
    turns = [turn for turn in request.turns[-2:] if isinstance(turn, AssistantTurn)]
    output = {call.tool: call.output for turn in turns for call in turn.calls}
    lines = re.findall(r"^ *(\d+)\t", output["read"], re.MULTILINE)
    found = [line for line in output["grep"].splitlines() if line.startswith(f"{path}:")]
    return Facts(int(lines[-1]), len(found), output["checksum"])


# --- orders ------------------------------------------------------------------------------------


class Worker:
    """Carries out orders, each in a task of its own."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, orders: asyncio.Queue[Order]) -> None:
        """Work until told to stop."""
        follow = asyncio.create_task(self._follow())
        tell(News("ready", recovered=len(self._runtime.recovered), cursor=self._runtime.cursor))
        while (order := await orders.get()).kind != "stop":
            work = self._prompt(order) if order.kind == "prompt" else self._crash(order)
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        follow.cancel()

    async def _follow(self) -> None:
        """Pass on what the supervisor publishes."""
        async with self._runtime.events(types=("actor.crashed", "actor.restarted")) as events:
            async for event in events:
                crashed = event.type == "actor.crashed"
                tell(News("crashed" if crashed else "restarted", session=event.session_id))

    async def _prompt(self, order: Order) -> None:
        """Have a prompt accepted, say so, and say how it ended."""
        news = News("accepted", session=order.session, task=order.task, message=order.message)
        outcome = "answered"
        try:
            session = await self._persist(lambda: self._session(order))
            turn = await self._persist(lambda: session.prompt(order.text, message_id=order.message))
            tell(news)
            await turn.result()
        except TurnAborted:
            outcome = "interrupted"
        except TurnFailed as error:
            outcome = f"failed: {error}"
        except UnderstudyError as error:
            tell(msgspec.structs.replace(news, kind="failed", outcome=str(error)))
            return
        cursor = self._runtime.cursor
        tell(msgspec.structs.replace(news, kind="settled", outcome=outcome, cursor=cursor))

    async def _session(self, order: Order) -> Session:
        title = order.text.partition("file ")[2]
        try:
            return await self._runtime.create_session(session_id=order.session, title=title)
        except SessionExists:
            return await self._runtime.session(order.session)

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it is carried out: prompts have ids, so asking again does no harm."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await call()
            except (ActorCrashed, SessionClaimed, StoreBusy):
                # Its actor just died, or a worker that lost its parent has not yet let go.
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(PAUSE_S)

    async def _crash(self, order: Order) -> None:
        try:
            session = await self._runtime.session(order.session)
            await session._crash("crash injected by the demo")  # noqa: SLF001 - what it is for
        except UnderstudyError:
            pass  # it tells whoever asked for it that the actor crashed


# --- its life ----------------------------------------------------------------------------------


async def main(setup: Setup) -> None:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[Order] = asyncio.Queue()
    read_orders(Order, lambda order: loop.call_soon_threadsafe(orders.put_nowait, order))
    model = ScriptedModel(answer, record=0)
    async with Runtime(setup.database, model=model, tools=tools(setup)) as runtime:
        await Worker(runtime).serve(orders)
    tell(News("stopped"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends us
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Setup)))
