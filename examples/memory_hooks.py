"""A memory: what one session found out is kept after its turn, and recalled before another's.

To keep something, the hook prompts a session of its own, the scribe. The scribe's turn would fire
the same hooks, whose scribe would fire them again, for ever. It does not: what is made inside a
hook is internal, and hooks of internal sessions are no-ops, at no cost.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from understudy import HookCall, Runtime, ScriptedModel, model_from
from understudy.models import ModelRequest, UserText, UserTurn
from understudy.testing import Say

TO_SCRIBE = "Write down in one line what there is to remember: "


class Memory:
    """Notes of all sessions. A real one would search them, and keep them in a file."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.kept = threading.Event()

    def recall(self, call: HookCall) -> str | None:
        """Before a prompt: what is returned is added to the turn's system prompt."""
        print(f"[recall] for {call.text!r}: {len(self.notes)} notes")
        return "You remember:\n" + "\n".join(self.notes) if self.notes else None

    def keep(self, call: HookCall) -> None:
        """After a turn, in a thread of its own; nobody waits for it."""
        if call.outcome == "answered":
            scribe = call.session.runtime.create_session(title="Scribe")
            self.notes.append(scribe.prompt(TO_SCRIBE + call.text).result(timeout_s=60).text)
            print(f"[keep] {self.notes[-1]}")
        self.kept.set()


def play(request: ModelRequest) -> Say | None:
    """The scripted model's part: says what it was told, and what it remembers."""
    last = request.turns[-1]
    if request.purpose == "summary" or not isinstance(last, UserTurn):
        return None
    [said] = [content.text for content in last.content if isinstance(content, UserText)]
    if said.startswith(TO_SCRIBE):
        return Say("- " + " ".join(said.removeprefix(TO_SCRIBE).split()))
    return Say(request.system or f"You said: {said}")


def main() -> None:
    model = model_from() if "UNDERSTUDY_MODEL" in os.environ else ScriptedModel(play)
    memory = Memory()
    hooks = {"before_prompt": memory.recall, "after_turn": memory.keep}
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(Path(folder) / "agent.db", model=model, hooks=hooks) as runtime,
    ):
        for text in ("I keep bees.", "What do you know about me?"):
            memory.kept.clear()
            session = runtime.create_session(title=text)
            reply = session.prompt(text).result(timeout_s=60)
            memory.kept.wait(60)
            print(f"[{text}] {reply.text}")
        scribes = runtime.sessions(internal=True)
        print(f"{len(runtime.sessions())} sessions, and {len(scribes)} of the memory's own")


if __name__ == "__main__":
    main()
