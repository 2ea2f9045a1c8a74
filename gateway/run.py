"""``understudy run``: one prompt, answered on the terminal as the answer comes."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from understudy.actors.models.configured import model_from
from understudy.actors.runtime import Runtime
from understudy.actors.session import Session
from understudy.actors.tools.workspace import workspace
from understudy.actors.turn import Turn
from understudy.errors import AskClosed, InvalidInput, TurnAborted, UnderstudyError
from understudy.gateway.display import plain
from understudy.gateway.places import database_path, make_room
from understudy.store.events import (
    Event,
    PartDelta,
    PartUpdated,
    PermissionAsked,
    QuestionAsked,
    SessionStatus,
)
from understudy.store.records import Ask, TextPart, ToolCompleted, ToolFailed, ToolPart, ToolRunning

TITLE_CHARS: Final = 60
ABORT_S: Final = 10.0
INTERRUPTED: Final = 130
_ANSWERS: Final[dict[str, Literal["once", "always", "reject"]]] = {
    "o": "once",
    "once": "once",
    "y": "once",
    "yes": "once",
    "a": "always",
    "always": "always",
    "r": "reject",
    "reject": "reject",
    "n": "reject",
    "no": "reject",
}


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when answered, 1 when it failed or was rejected, 128 + N after signal N."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not what nohup set
            signal.signal(number, _end)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    directory = Path(args.directory or ".").resolve()
    tools = workspace(directory)
    asks = sys.stdin.isatty() and args.prompt != "-"
    guarded = {} if args.yes else dict.fromkeys(("bash", "edit"), "ask" if asks else "deny")
    runtime = Runtime(
        make_room(database_path(args.database)),
        model=model_from(args.model),
        tools=tools,
        permissions=guarded,
        directory=str(directory),
    )
    with runtime:
        session = _session(runtime, args.session, text)
        turn = session.prompt(text)
        code = _follow(runtime, turn, asks=asks)
    _note(f"\nsession {session.id}")
    return code


class Ended(KeyboardInterrupt):
    """Told to end, by a signal: as by Ctrl-C, so that no command runs on."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


def _end(number: int, _frame: Any) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # a terminal that closes sends more than one
    raise Ended(number)


def _session(runtime: Runtime, session_id: str | None, text: str) -> Session:
    if session_id is not None:
        return runtime.session(session_id)
    title = " ".join(text.split())[:TITLE_CHARS]
    if not title:
        raise InvalidInput("the prompt is empty", field="prompt")
    return runtime.create_session(title=title)


def _follow(runtime: Runtime, turn: Turn, *, asks: bool) -> int:
    """Print the turn to its end; Ctrl-C ends it, and what it started, cleanly."""
    screen = Screen()
    try:
        for event in turn:
            screen.show(event)
            if isinstance(event.data, PermissionAsked | QuestionAsked):
                _answer(runtime, event.data.info, asks=asks)
        turn.result(timeout_s=ABORT_S)
    except KeyboardInterrupt as interrupt:
        turn.abort()
        try:
            turn.result(timeout_s=ABORT_S)
        except UnderstudyError as error:
            _note(f"\n{error}")
        return interrupt.code if isinstance(interrupt, Ended) else INTERRUPTED
    except TurnAborted as error:
        _note(f"\n{error}")
        return 1
    finally:
        screen.end()
    return 0


class Screen:
    """The answer on standard output, what is done for it on standard error."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}
        self._tools: dict[str, str] = {}
        self._part = ""

    def show(self, event: Event) -> None:
        fact = event.data
        if isinstance(fact, PartDelta) and fact.field == "text":
            # Deltas carry an offset: whatever was missed comes with the part itself.
            if fact.offset <= (shown := self._shown.get(fact.part_id, 0)):
                self._write(fact.part_id, fact.delta[shown - fact.offset :])
        elif isinstance(fact, PartUpdated) and isinstance(fact.part, TextPart):
            if not self._is_prompt(fact.part):
                shown = self._shown.get(fact.part.id, 0)
                self._write(fact.part.id, fact.part.text[shown:])
        elif isinstance(fact, PartUpdated) and isinstance(fact.part, ToolPart):
            self._tool(fact.part)
        elif isinstance(fact, SessionStatus) and fact.status.type == "retry":
            self._break()
            _note(f"retrying: {fact.status.message}")

    @staticmethod
    def _is_prompt(part: TextPart) -> bool:
        return not part.time  # what people wrote has no beginning and no end

    def _write(self, part_id: str, text: str) -> None:
        if not text:
            return
        if part_id != self._part:
            self._break()
            self._part = part_id
        self._shown[part_id] = self._shown.get(part_id, 0) + len(text)
        sys.stdout.write(plain(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _tool(self, part: ToolPart) -> None:
        state = part.state
        tag = str(state.__struct_config__.tag)
        if self._tools.get(part.id) == tag:
            return
        self._tools[part.id] = tag
        self._break()
        if isinstance(state, ToolRunning):
            _note(f"* {part.tool} {_brief(state.input)}")
        elif isinstance(state, ToolCompleted):
            _note(f"  {part.tool}: {len(state.output):,} characters")
        elif isinstance(state, ToolFailed):
            _note(f"  {part.tool} failed: {state.error}")

    def _break(self) -> None:
        if self._part:
            print(flush=True)
            self._part = ""

    def end(self) -> None:
        self._break()


def _brief(given: dict[str, object]) -> str:
    return ", ".join(f"{key}={str(value)[:60]!r}" for key, value in given.items())


def _note(line: str) -> None:
    print(plain(line), file=sys.stderr, flush=True)


def _answer(runtime: Runtime, ask: Ask, *, asks: bool) -> None:
    """Ask the person at the terminal; where there is none, the answer is no."""
    if all(each.id != ask.id for each in runtime.asks()):
        return  # settled by the answer to another one
    with suppress(AskClosed):  # while the person thought about it
        if ask.kind == "question":
            _answer_question(runtime, ask, asks=asks)
        else:
            _answer_permission(runtime, ask, asks=asks)


def _answer_permission(runtime: Runtime, ask: Ask, *, asks: bool) -> None:
    reply: Literal["once", "always", "reject"] | None = None if asks else "reject"
    while reply is None:
        what = " and ".join(ask.patterns)
        sys.stderr.write(plain(f"{ask.permission}: {what} - [o]nce, [a]lways or [r]eject? "))
        sys.stderr.flush()
        line = sys.stdin.readline()
        reply = _ANSWERS.get(line.strip().lower()) if line else "reject"
    runtime.reply(ask.id, reply)


def _answer_question(runtime: Runtime, ask: Ask, *, asks: bool) -> None:
    if not asks:
        runtime.reply(ask.id, "reject")
        return
    answers = []
    for question in ask.questions:
        options = f" ({', '.join(question.options)})" if question.options else ""
        sys.stderr.write(plain(f"{question.text}{options} "))
        sys.stderr.flush()
        answers.append((sys.stdin.readline().strip(),))
    runtime.reply(ask.id, answers=answers)
