"""Prompts and messages: each prompt is durable when accepted and gets its own answer."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
import re
from contextlib import suppress
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import unquote, urlparse

import msgspec
from starlette.responses import Response

from understudy.actors.session import Session
from understudy.actors.tools.root import Root
from understudy.actors.turn import Turn
from understudy.errors import (
    InvalidInput,
    MessageNotFound,
    RuntimeClosed,
    ToolError,
    TurnAborted,
    TurnError,
    TurnFailed,
    UnderstudyError,
)
from understudy.gateway.http import commands
from understudy.gateway.http.builtin import QUIET, SHELL
from understudy.gateway.http.call import Call
from understudy.gateway.http.sessions import ModelChoice
from understudy.gateway.http.wire import USER_SHELL
from understudy.store.records import FilePart, Record, TextPart

LISTED: Final = 1000
FILE_BYTES: Final = 4 * 1024 * 1024
TITLE_CHARS: Final = 60
SHELL_NOTE: Final = "The following tool was executed by the user"
_UNTITLED: Final = re.compile(r"(New|Child) session( - \d{4}-\d\d-\d\dT[\d:.]+Z)?")


class TextGiven(Record, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    id: str | None = None
    synthetic: bool | None = None


class FileGiven(Record, frozen=True, kw_only=True, tag_field="type", tag="file"):
    url: str
    mime: str | None = None
    filename: str | None = None
    id: str | None = None


class AgentGiven(Record, frozen=True, kw_only=True, tag_field="type", tag="agent"):
    name: str
    id: str | None = None


class SubtaskGiven(Record, frozen=True, kw_only=True, tag_field="type", tag="subtask"):
    prompt: str
    description: str = ""
    id: str | None = None


PartGiven: TypeAlias = TextGiven | FileGiven | AgentGiven | SubtaskGiven


class NewPrompt(Record, frozen=True, kw_only=True):
    parts: Annotated[tuple[PartGiven, ...], msgspec.Meta(min_length=1, max_length=1000)]
    message_id: str | None = None
    model: ModelChoice | None = None
    agent: str | None = None
    system: str | None = None
    tools: dict[str, bool] | None = None
    no_reply: bool = msgspec.field(default=False, name="noReply")


class NewCommand(Record, frozen=True, kw_only=True):
    command: str
    arguments: str = ""
    message_id: str | None = None
    model: str | None = None
    agent: str | None = None


class NewInit(Record, frozen=True, kw_only=True):
    message_id: str | None = None
    provider_id: str | None = None
    model_id: str | None = None


class NewShell(Record, frozen=True, kw_only=True):
    command: str
    message_id: str | None = None
    agent: str | None = None


# --- accepting ---------------------------------------------------------------------------------


async def prompt(call: Call) -> Any:
    """Prompt, and answer with the last message of what came of it."""
    body = await call.body(NewPrompt)
    turn = await _accept(call, body)
    if body.no_reply:
        await _outcome(turn)
        return await _shown(call, turn.message_id)
    return await _answered(call, turn)


async def prompt_async(call: Call) -> Any:
    """Prompt; answers as soon as the prompt is durable."""
    await _accept(call, await call.body(NewPrompt))
    return Response(status_code=204)


async def command(call: Call) -> Any:
    """Prompt with one of the directory's commands, and answer like a prompt."""
    body = await call.body(NewCommand)
    info = await call.gateway.info(call.session_id)
    directory = info.directory or call.gateway.directory
    template = await asyncio.to_thread(commands.find, directory, body.command)
    text = commands.fill(template, body.arguments)
    given = NewPrompt(
        parts=(TextGiven(text=text),),
        message_id=body.message_id,
        agent=body.agent or template.agent,
    )
    return await _answered(call, await _accept(call, given, model=body.model or template.model))


async def init(call: Call) -> Any:
    """Prompt with the command that writes AGENTS.md; answers when that is done."""
    body = await call.body(NewInit)
    model = f"{body.provider_id}/{body.model_id}" if body.provider_id and body.model_id else None
    text = commands.fill(commands.INIT, "")
    given = NewPrompt(parts=(TextGiven(text=text),), message_id=body.message_id)
    await _outcome(await _accept(call, given, model=model))
    await call.gateway.hub.flushed(call.session_id)
    return True


async def shell(call: Call) -> Any:
    """Run the user's own command as a turn; answers with the message that has its output."""
    body = await call.body(NewShell)
    if not body.command.strip():
        raise InvalidInput("the command is empty", field="command")
    note = TextPart(id="", session_id="", message_id="", text=SHELL_NOTE, synthetic=True)
    turn = await call.session().prompt(
        [note],
        message_id=body.message_id,
        model=SHELL,
        agent=call.agent(body.agent),
        system=body.command,
        tools={"*": False},
    )
    await _outcome(turn)
    await call.gateway.hub.flushed(call.session_id)
    for each in await turn.session.messages(limit=20):
        if getattr(each.info, "parent_id", None) == turn.message_id and each.tools:
            return call.gateway.wire.transcript(each.info, each.parts)
    return await _answered(call, turn)


async def _accept(call: Call, body: NewPrompt, *, model: str | None = None) -> Turn:
    gateway = call.gateway
    session = await gateway.session(call.session_id)
    directory = session.record.directory or gateway.directory
    if any(isinstance(part, FileGiven) for part in body.parts):
        parts = await asyncio.to_thread(lambda: [_part(each, directory) for each in body.parts])
    else:
        parts = [_part(each, directory) for each in body.parts]
    if body.model is not None:
        model = body.model.name
    # Clients switch off tools of OpenCode's that are not here: they are.
    known = gateway.runtime.engine.tools
    switches = {name: on for name, on in (body.tools or {}).items() if name in known or name == "*"}
    title = _title(session, parts)
    accepting = session.prompt(
        parts,
        message_id=body.message_id,
        model=QUIET if body.no_reply else model,
        agent=call.agent(body.agent),
        system=body.system,
        tools={**switches, USER_SHELL: False},
    )
    # Asked for before the prompt is waited for: nothing is told of a session after it is idle.
    naming = session.update(title=title) if title else None
    try:
        return await accepting
    finally:
        if naming is not None:
            with suppress(UnderstudyError):  # the prompt counts, whatever becomes of the title
                await naming


def _title(session: Session, parts: list[TextPart | FilePart]) -> str:
    """The first words of its first prompt for an untitled session, else ""."""
    if _UNTITLED.fullmatch(session.title) is None:
        return ""
    said = " ".join(
        part.text for part in parts if isinstance(part, TextPart) and not part.synthetic
    )
    words = " ".join(said.split())
    return words if len(words) <= TITLE_CHARS else f"{words[: TITLE_CHARS - 1].rstrip()}…"


def _part(given: PartGiven, directory: str) -> TextPart | FilePart:
    owned: dict[str, Any] = {"id": given.id or "", "session_id": "", "message_id": ""}
    if isinstance(given, TextGiven):
        synthetic = msgspec.UNSET if given.synthetic is None else given.synthetic
        return TextPart(**owned, text=given.text, synthetic=synthetic)
    if isinstance(given, AgentGiven):
        return TextPart(**owned, text=f"@{given.name}", synthetic=True)
    if isinstance(given, SubtaskGiven):
        return TextPart(**owned, text=given.prompt)
    mime = given.mime or mimetypes.guess_type(given.filename or given.url)[0] or "text/plain"
    url = _taken_in(given.url, mime, directory)
    return FilePart(**owned, mime=mime, url=url, filename=given.filename)


def _taken_in(url: str, mime: str, directory: str) -> str:
    """A file of the session's directory as it is now; other URLs as they are."""
    try:
        parsed = urlparse(url)
    except ValueError as error:
        raise InvalidInput(f"{url!r:.200} is no URL: {error}", field="parts") from error
    if parsed.scheme != "file":
        return url
    path = unquote(parsed.path)
    try:
        if os.path.isdir(path):  # noqa: PTH112 - false also for what is no name
            raise InvalidInput(f"{path} is a directory", field="parts")
        with Root(directory).open(path) as file:
            data = file.read(FILE_BYTES + 1)
    except ToolError as error:
        raise InvalidInput(str(error), field="parts") from error
    if len(data) > FILE_BYTES:
        raise InvalidInput(f"{path} has more than {FILE_BYTES} bytes", field="parts")
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


# --- answering ---------------------------------------------------------------------------------


async def _outcome(turn: Turn) -> TurnError | None:
    """Wait for a turn's end, however it ends."""
    try:
        await turn.result()
    except (TurnAborted, TurnFailed) as error:
        return error
    return None


async def _answered(call: Call, turn: Turn) -> Any:
    """The turn's last message. One that was aborted or failed says so in its ``error``."""
    error = await _outcome(turn)
    await call.gateway.hub.flushed(call.session_id)
    session_id, message_id = turn.session.id, turn.message_id
    reads = call.gateway.runtime.engine.store.read

    def last() -> Any:
        accepted, _ = reads.prompt(session_id, message_id)
        if accepted is None:
            call.gateway.runtime.engine.record_of(session_id)  # or it says that it is gone
        if accepted is not None and accepted.reply_id is not None:
            return reads.message(session_id, accepted.reply_id)
        return None

    try:
        pair = await call.gateway.read(last)
    except RuntimeClosed:
        raise error or RuntimeClosed("The server is ending") from None
    if pair is None:
        if error is not None:
            raise error
        raise MessageNotFound(
            f"The answer to {message_id} was removed",
            session_id=session_id,
            message_id=message_id,
        )
    return call.gateway.wire.transcript(*pair)


# --- reading -----------------------------------------------------------------------------------


async def messages(call: Call) -> Any:
    """The transcript in order: the newest ``limit`` messages, before a message if given."""
    found = await call.session().messages(limit=call.limit(LISTED), before=call.query("before"))
    return [call.gateway.wire.transcript(each.info, each.parts) for each in found]


async def message(call: Call) -> Any:
    """One message with its parts."""
    return await _shown(call, call.path("messageID"))


async def _shown(call: Call, message_id: str) -> Any:
    session_id = call.session_id
    reads = call.gateway.runtime.engine.store.read
    pair = await call.gateway.read(lambda: reads.message(session_id, message_id))
    if pair is None:
        await call.gateway.info(session_id)
        raise MessageNotFound(
            f"Message not found: {message_id}", session_id=session_id, message_id=message_id
        )
    return call.gateway.wire.transcript(*pair)
