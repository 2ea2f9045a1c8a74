"""Models and tools the acceptance tests share, in this process and in child processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy import Tool, ToolContext, tool
from understudy.actors.models.protocol import ModelRequest, UserText, UserTurn
from understudy.actors.models.scripted import Call, Say, ScriptedModel, Stall, steps_taken
from understudy.errors import ToolError


def last_text(request: ModelRequest) -> str:
    users = [turn for turn in request.turns if isinstance(turn, UserTurn)]
    return "".join(c.text for c in users[-1].content if isinstance(c, UserText))


def obey(request: ModelRequest) -> list[Any] | None:
    """Do what the last user text says, line by line: ``say X``, ``call TOOL {json}``, ``stall``.

    After calls the next step says "done".
    """
    if request.purpose == "summary":
        return None
    if steps_taken(request):
        return [Say("done")]
    acts: list[Any] = []
    for line in last_text(request).splitlines():
        verb, _, rest = line.partition(" ")
        if verb == "call":
            name, _, arguments = rest.partition(" ")
            acts.append(Call(name, json.loads(arguments or "{}")))
        elif verb == "stall":
            acts.append(Stall())
        else:
            acts.append(Say(rest))
    return acts


def obedient(**options: Any) -> ScriptedModel:
    return ScriptedModel(obey, **options)


class Tools:
    """Tools with a memory: what started and what ended, and tools that hold until told.

    ``note(word)`` is called when a tool starts or ends; ``ledger`` is a file that gets a line for
    every run, whatever becomes of the process.
    """

    def __init__(
        self, note: Callable[[str], None] | None = None, ledger: Path | None = None
    ) -> None:
        self.runs: list[str] = []
        self.started = threading.Event()
        self.release = threading.Event()
        self.ended = threading.Event()
        self._note = note
        self._ledger = ledger

    def _begin(self, name: str) -> None:
        self.runs.append(name)
        if self._ledger is not None:
            with self._ledger.open("a") as file:
                file.write(f"{name}\n")
        if self._note is not None:
            self._note(f"{name} started")

    def all(self) -> list[Tool]:
        @tool
        def quick(n: int = 0) -> str:
            """Answer at once."""
            self._begin("quick")
            return f"quick {n}"

        @tool
        def fails() -> str:
            """Fail."""
            self._begin("fails")
            raise ToolError("it is broken")

        @tool
        def block(n: int = 0) -> str:
            """Hold until released, deaf to cancellation."""
            self._begin("block")
            self.started.set()
            self.release.wait()
            self.ended.set()
            return "late"

        @tool
        def wait(context: ToolContext) -> str:
            """Hold until released or cancelled."""
            self._begin("wait")
            self.started.set()
            context.on_cancel(self.release.set)
            self.release.wait()
            return "waited"

        @tool(permission="guarded")
        def guarded(n: int = 0) -> str:
            """Needs permission where the rules say so."""
            self._begin("guarded")
            return f"guarded {n}"

        @tool(idempotent=True)
        def again(context: ToolContext) -> str:
            """May be run again after a restart; holds the first time."""
            self._begin("again")
            if context.attempt == 1:
                self.started.set()
                self.release.wait()
            return f"attempt {context.attempt}"

        return [quick, fails, block, wait, guarded, again]
