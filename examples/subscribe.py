"""Two ways to watch: signals for what happens now, a cursor for what happened while you were away.

A signal's receivers are called in a thread of the runtime's own, after the commit, in order. A
subscription is an iterator over the journal that starts after any cursor and goes on live, without
gap or duplicate, also after a restart: the cursor is all an app has to remember.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from understudy import Event, Runtime, model_from, signals

outcomes: list[str] = []


def note(_runtime: Runtime, event: Event) -> None:
    """A receiver of the signal: called for each prompt that has its outcome."""
    outcomes.append(event.data.info.outcome)


def first_run(path: Path) -> int:
    """Follow one turn live; returns the cursor of the last event that was dealt with."""
    with Runtime(path, model=model_from()) as runtime:
        session = runtime.create_session(session_id="ses_diary", title="Diary")
        with runtime.events(types=["session.status", "session.idle"]) as events:
            session.prompt("Dear diary").result(timeout_s=30)
            seen = show(events, until="session.idle")
        # Nobody watches what comes now.
        session.prompt("Second entry").result(timeout_s=30)
        session.update(title="My diary")
    return seen


def second_run(path: Path, seen: int) -> None:
    """Catch up with what was missed, and then, with the same iterator, go on live."""
    with Runtime(path, model=model_from()) as runtime:
        wanted = ["prompt.accepted", "prompt.settled", "session.updated", "session.deleted"]
        with runtime.events(after=seen, types=wanted, deltas=False) as events:
            runtime.session("ses_diary").delete()
            show(events, until="session.deleted")


def show(events: Any, *, until: str) -> int:
    for event in events:
        print(f"{event.cursor:>4} {event.type}")
        if event.type == until:
            return int(event.cursor)
    raise RuntimeError("the runtime closed first")


def main() -> None:
    signals.prompt_settled.connect(note)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.db"
        seen = first_run(path)
        print(f"the signal said: {', '.join(outcomes)}")
        print(f"--- closed; {seen} is all we remember ---")
        second_run(path, seen)


if __name__ == "__main__":
    main()
