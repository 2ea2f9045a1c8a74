"""A desktop app around a session, in Tk: the window never waits for the runtime.

The window asks for what is new every 50 ms, by ``after``, from a subscription; sending and
stopping are calls, which wait for the disk, so a thread makes them. All that is in
``Conversation``, which knows no widget. ``--headless`` drives it without a display.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from understudy import Runtime, ScriptedModel, Session, model_from
from understudy.testing import Say, Wait

if TYPE_CHECKING:
    import tkinter as tk

REFRESH_MS = 50
EVENTS_AT_ONCE = 200  # then the window gets its turn: a long history must not freeze it
HEADLESS_LIMIT_S = 60.0


class EventLoop(Protocol):
    """What a conversation needs of Tk: ``tkinter.Tk``, or the bare one below."""

    def after(self, ms: int, callback: Callable[..., Any], *arguments: Any) -> Any: ...


class Conversation:
    """A session as a window shows it: texts by part, in order, and whether it is busy.

    The cursor is taken first, then the transcript, then events after the cursor: what is in both
    says the same, and nothing is missed in between.
    """

    def __init__(self, session: Session) -> None:
        self.texts: dict[str, str] = {}
        self.problem = ""
        self._roles: dict[str, str] = {}
        self._session = session
        cursor = session.runtime.cursor
        self.busy = session.status().type != "idle"
        for message in session.messages():
            self._take_message(message.info)
            for part in message.parts:
                self._take_part(part)
        self._events = session.events(after=cursor)
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="conversation")

    def send(self, text: str) -> None:
        self._calls.submit(self._session.prompt, text).add_done_callback(self._note)

    def stop(self) -> None:
        self._calls.submit(self._session.abort).add_done_callback(self._note)

    def _note(self, call: Future[Any]) -> None:
        if (error := call.exception()) is not None:
            self.problem = str(error)

    def close(self) -> None:
        self._events.close()
        self._calls.shutdown()

    def refresh(self) -> bool:
        """Take in what has happened, without waiting. True if anything has changed."""
        for taken in range(EVENTS_AT_ONCE):
            event = self._events.poll()
            if event is None:
                return taken > 0
            self._take(event.type, event.data)
        return True

    def _take(self, event_type: str, data: Any) -> None:
        if event_type == "message.updated":
            self._take_message(data.info)
        elif event_type == "message.part.updated":
            self._take_part(data.part)
        elif event_type == "message.part.delta":
            opening = len(self._roles[data.message_id]) + 2
            known = self.texts.get(data.part_id, "")
            self.texts[data.part_id] = known[: opening + data.offset] + data.delta
        elif event_type == "session.status":
            self.busy = data.status.type != "idle"

    def _take_message(self, info: Any) -> None:
        self._roles[info.id] = info.role

    def _take_part(self, part: Any) -> None:
        if part.type == "text":
            self.texts[part.id] = f"{self._roles[part.message_id]}: {part.text}"

    def keep_fresh(self, loop: EventLoop, show: Callable[[Conversation], None]) -> None:
        if self.refresh():
            show(self)
        loop.after(REFRESH_MS, self.keep_fresh, loop, show)


class Window:
    """The widgets: they show a conversation and pass on what the person does."""

    def __init__(self, root: tk.Tk, conversation: Conversation) -> None:
        import tkinter as tk

        root.title("understudy")
        self._conversation = conversation
        self._text = tk.Text(root, state="disabled", wrap="word")
        self._entry = tk.Entry(root)
        self._stop = tk.Button(root, text="Stop", command=conversation.stop)
        self._text.pack(fill="both", expand=True)
        self._entry.pack(fill="x")
        self._stop.pack()
        self._entry.bind("<Return>", self._send)
        self._entry.focus_set()
        conversation.keep_fresh(root, self.show)

    def show(self, conversation: Conversation) -> None:
        shown = [*conversation.texts.values(), conversation.problem]
        self._text.configure(state="normal")
        self._text.delete("1.0", "end")
        self._text.insert("end", "\n\n".join(shown))
        self._text.configure(state="disabled")
        self._text.see("end")
        self._stop.configure(state="normal" if conversation.busy else "disabled")

    def _send(self, _event: object) -> None:
        if text := self._entry.get().strip():
            self._conversation.send(text)
            self._entry.delete(0, "end")


class BareLoop:
    """``after`` and nothing else, for a machine without a display."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], Any]]] = []
        self._order = itertools.count()

    def after(self, ms: int, callback: Callable[..., Any], *arguments: Any) -> None:
        due_s = time.monotonic() + ms / 1000
        heapq.heappush(self._due, (due_s, next(self._order), lambda: callback(*arguments)))

    def run_until(self, done: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + HEADLESS_LIMIT_S
        while not done():
            due_s, _, callback = heapq.heappop(self._due)
            if due_s > limit_s:
                raise TimeoutError("the conversation did not get there")
            time.sleep(max(0.0, due_s - time.monotonic()))
            callback()


def headless(conversation: Conversation) -> None:
    """One conversation, as a person at the window would have it."""
    loop = BareLoop()
    shown: list[str] = []

    def show(now: Conversation) -> None:
        shown.extend(text for text in now.texts.values() if text not in shown)

    conversation.keep_fresh(loop, show)
    conversation.send("What is a stage whisper?")
    loop.run_until(lambda: len(conversation.texts) > 1 and not conversation.busy)
    print(*shown, sep="\n")


def script() -> ScriptedModel:
    return ScriptedModel([[Say("Loud "), Wait(0.2), Say("enough for all to hear.")]], repeat=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--headless", action="store_true", help="need no display")
    options = parser.parse_args()
    model = model_from() if "UNDERSTUDY_MODEL" in os.environ else script()
    with tempfile.TemporaryDirectory() as folder, Runtime(Path(folder) / "a.db", model=model) as r:
        conversation = Conversation(r.create_session(title="Desk"))
        if options.headless:
            headless(conversation)
        else:
            import tkinter as tk

            try:
                root = tk.Tk()
            except tk.TclError as error:
                parser.error(f"{error}: there is --headless")
            Window(root, conversation)
            root.mainloop()
        conversation.close()


if __name__ == "__main__":
    main()
