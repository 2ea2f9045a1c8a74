"""The same API in an event loop: every call is awaited, nothing blocks.

Two conversations stream side by side; a third is aborted while its model is still talking.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from understudy import Event, Runtime, ScriptedModel, errors, model_from
from understudy.testing import Say, Wait

SCRIPT = ScriptedModel([[Say("One moment, "), Wait(0.05), Say("here you are.")]], repeat=True)
TALKATIVE = ScriptedModel([[Say("To begin with, "), Wait(3600)]], model_id="talkative")


async def converse(runtime: Runtime, title: str) -> None:
    session = await runtime.create_session(title=title)
    turn = await session.prompt(f"Something about {title}, please.")
    text = ""
    async for event in turn:
        if (longer := text_after(event, text)) != text:
            text = longer
            print(f"[{title}] {text}…")
    reply = await turn.result(timeout_s=60)
    print(f"[{title}] {reply.text} ({reply.usage.output} tokens)")


def text_after(event: Event, text: str) -> str:
    """The answer so far: its part opens with the first words, deltas bring the others."""
    if event.type == "message.part.delta":
        return text[: event.data.offset] + str(event.data.delta)
    if event.type == "message.part.updated" and event.data.part.type == "text":
        return str(event.data.part.text)
    return text


async def interrupt(runtime: Runtime) -> None:
    session = await runtime.create_session(title="Abort")
    turn = await session.prompt("Never stop.", model="talkative")
    async for event in turn:
        if event.type == "message.part.updated" and event.data.part.type == "text":
            break
    await session.abort()
    try:
        await turn.result(timeout_s=60)
    except errors.TurnAborted as aborted:
        print(f"[Abort] {aborted.reason}")
    print(f"[Abort] {(await session.status()).type}, and what was said is kept:")
    print(f"[Abort] {(await session.messages())[-1].text}")


async def run(path: Path) -> None:
    model = model_from() if "UNDERSTUDY_MODEL" in os.environ else SCRIPT
    async with Runtime(path, model=model, models=[TALKATIVE]) as runtime:
        await asyncio.gather(converse(runtime, "Oslo"), converse(runtime, "Lima"))
        await interrupt(runtime)
        print(", ".join(sorted(session.title for session in await runtime.sessions())))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "agent.db"))


if __name__ == "__main__":
    main()
