"""The shortest way through the house: a runtime, a session, a tool, a turn, its answer.

UNDERSTUDY_MODEL=openai/<model> (or anthropic/<model>) makes a real model answer.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from understudy import Runtime, ScriptedModel, model_from
from understudy.testing import Call


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def main() -> None:
    script = ScriptedModel([Call("add", {"a": 2, "b": 3}), "2 + 3 is 5."])
    model = model_from() if "UNDERSTUDY_MODEL" in os.environ else script
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(Path(folder) / "agent.db", model=model, tools=[add]) as runtime,
    ):
        session = runtime.create_session(title="Sums")
        turn = session.prompt("What is 2 + 3?")
        for event in turn:
            print(event.type)
        print(turn.result().text)


if __name__ == "__main__":
    main()
