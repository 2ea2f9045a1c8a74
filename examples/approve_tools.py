"""A person decides what tools may do: once, always, or not at all and why.

A permission request is durable: it is listed by ``runtime.asks()`` and can be answered by another
thread, another window, or after a restart. Here the terminal answers; without one, a script does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from understudy import Runtime, ScriptedModel, model_from, tool
from understudy.testing import Call

SCRIPTED_ANSWERS = ("no, archive it first", "always")


def about(given: dict[str, Any]) -> list[str]:
    return [f"{given['table']}"]


@tool(permission="drop", patterns=about, always=lambda _given: ["tmp_*"])
def drop(table: str) -> str:
    """Drop a table of the database."""
    return f"dropped {table}"


def script() -> ScriptedModel:
    return ScriptedModel(
        [
            Call("drop", {"table": "invoices"}),
            Call("drop", {"table": "tmp_one"}),
            Call("drop", {"table": "tmp_two"}),
            "Two temporary tables are gone; the invoices are still there.",
        ]
    )


def answers() -> Iterator[str]:
    """What the person says: typed in a terminal, else from the script."""
    if not sys.stdin.isatty():
        for answer in SCRIPTED_ANSWERS:
            print(f"> {answer}")
            yield answer
    while True:
        yield input("> ") if sys.stdin.isatty() else "no"


def main() -> None:
    model = model_from() if "UNDERSTUDY_MODEL" in os.environ else script()
    person = answers()
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(
            Path(folder) / "agent.db", model=model, tools=[drop], permissions={"drop": "ask"}
        ) as runtime,
    ):
        session = runtime.create_session(title="Cleaning up")
        turn = session.prompt("Drop the tables invoices, tmp_one and tmp_two.")
        for event in turn:
            if event.type == "permission.asked":
                ask = event.data.info
                print(f"May it {ask.permission} {', '.join(ask.patterns)}? yes, always, no[, why]")
                decide(runtime, ask.id, next(person).strip())
            elif event.type == "message.part.updated" and event.data.part.type == "tool":
                state = event.data.part.state
                print(f"  {event.data.part.tool} {state.input['table']}: {state.status}")
        print(turn.result().text)


def decide(runtime: Runtime, ask_id: str, said: str) -> None:
    if said == "always":
        runtime.reply(ask_id, "always")
    elif said.startswith("y"):
        runtime.reply(ask_id, "once")
    else:
        # With feedback the model hears why and goes on; without, its turn would end here.
        _, _, why = said.partition(",")
        runtime.reply(ask_id, "reject", feedback=why.strip() or "Not this one.")


if __name__ == "__main__":
    main()
