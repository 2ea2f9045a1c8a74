"""Records and events in OpenCode's shapes.

Records encode to them already, but for what only OpenCode has (projects, slugs, paths) and what
only we have. Fields clients do not know they ignore.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from understudy.errors import UnderstudyError
from understudy.gateway.http.places import place_of
from understudy.store.events import (
    Event,
    MessageUpdated,
    PartUpdated,
    PermissionAsked,
    PermissionReplied,
    QuestionAsked,
    QuestionReplied,
    SessionCreated,
    SessionDeleted,
    SessionUpdated,
)
from understudy.store.ids import make_id
from understudy.store.records import (
    AnyPart,
    Ask,
    CompactionPart,
    Message,
    ModelRef,
    Session,
    ToolCompleted,
    ToolPart,
    UserMessage,
)

Json: TypeAlias = dict[str, Any]

PROTOCOL: Final = "1.18.33"
"""The version of OpenCode whose protocol this is."""
USER_SHELL: Final = "shell"
TODO: Final = "todowrite"
_DIRECTORIES: Final = 50_000
_FILE_TOOLS: Final = ("read", "write", "edit")
_MOODS: Final = (
    *("brave", "calm", "clever", "crisp", "eager", "gentle", "glowing", "happy", "jolly", "kind"),
    *("mighty", "neat", "nimble", "proud", "quick", "quiet", "shiny", "sunny", "swift", "tidy"),
)
_BEINGS: Final = (
    *("badger", "cabin", "canyon", "comet", "eagle", "falcon", "forest", "garden", "harbor"),
    *("island", "knight", "lagoon", "meadow", "moon", "otter", "panda", "planet", "river"),
    *("rocket", "sailor", "squid", "star", "tiger", "wizard"),
)


class Wire:
    """Renders.

    ``look`` finds a session's record by id; ``directory``, ``agent`` and ``model`` are those of
    sessions that name none.
    """

    def __init__(
        self,
        look: Callable[[str], Session],
        *,
        directory: str,
        agent: str,
        model: ModelRef,
    ) -> None:
        self._look = look
        self._directory = directory
        self._agent = agent
        self._model = model
        self._directories: OrderedDict[str, str] = OrderedDict()

    # --- directories ---------------------------------------------------------------------------

    def directory_of(self, session_id: str) -> str:
        """Where a session works."""
        known = self._directories.get(session_id)
        if known is None:
            try:
                known = self._note(self._look(session_id))
            except UnderstudyError:
                return self._directory  # deleted in the meantime
        return known

    def _note(self, info: Session) -> str:
        directory = info.directory or self._directory
        self._directories[info.id] = directory
        self._directories.move_to_end(info.id)
        if len(self._directories) > _DIRECTORIES:
            self._directories.popitem(last=False)
        return directory

    # --- records -------------------------------------------------------------------------------

    def session(self, info: Session) -> Json:
        place = place_of(self._note(info))
        shown: Json = {
            "id": info.id,
            "slug": _slug(info.id),
            "version": PROTOCOL,
            "projectID": place.project_id,
            "directory": place.directory,
            "path": place.path,
            "title": info.title,
            "cost": info.cost,
            "tokens": info.tokens,
            "time": info.time,
        }
        if info.parent_id is not None:
            shown["parentID"] = info.parent_id
        if info.agent is not None:
            shown["agent"] = info.agent
        if info.model is not None:
            shown["model"] = {"id": info.model.model_id, "providerID": info.model.provider_id}
        if info.permission:
            shown["permission"] = info.permission
        if info.revert is not None:
            shown["revert"] = info.revert
        if info.metadata:
            shown["metadata"] = info.metadata
        return shown

    def message(self, message: Message) -> Json:
        shown: Json = msgspec.to_builtins(message)
        shown.pop("turn", None)
        if isinstance(message, UserMessage):
            shown.setdefault("agent", self._agent)
            shown.setdefault("model", msgspec.to_builtins(self._model))
            shown["summary"] = {"diffs": []}
            return shown
        directory = self.directory_of(message.session_id)
        shown["path"] = {"cwd": directory, "root": place_of(directory).worktree}
        shown.setdefault("cost", 0)
        return shown

    def part(self, part: AnyPart) -> Any:
        if isinstance(part, ToolPart):
            return _tool_part(part)
        if isinstance(part, CompactionPart):
            shown = {"id": part.id, "sessionID": part.session_id, "messageID": part.message_id}
            return {**shown, "type": "compaction", "auto": part.auto}
        return part

    def transcript(self, message: Message, parts: Sequence[AnyPart]) -> Json:
        return {"info": self.message(message), "parts": [self.part(part) for part in parts]}

    def ask(self, ask: Ask) -> Json:
        """A permission request, or a question."""
        shown: Json = {"id": ask.id, "sessionID": ask.session_id}
        if ask.kind == "permission":
            given = ask.metadata.get("input")
            metadata = {**ask.metadata, **(given if isinstance(given, Mapping) else {})}
            metadata.pop("input", None)
            if "path" in metadata:
                metadata.setdefault("filepath", metadata["path"])
            shown |= {
                "permission": ask.permission,
                "patterns": ask.patterns,
                "metadata": metadata,
                "always": ask.always,
            }
        else:
            shown["questions"] = [
                {
                    "question": each.text,
                    "header": each.text[:30],
                    "options": [{"label": label, "description": ""} for label in each.options],
                    "multiple": each.multiple,
                }
                for each in ask.questions
            ]
        if ask.message_id is not None and ask.call_id is not None:
            shown["tool"] = {"messageID": ask.message_id, "callID": ask.call_id}
        return shown

    # --- events --------------------------------------------------------------------------------

    def event(self, event: Event) -> tuple[str, Any]:
        """An event's type and properties."""
        fact = event.data
        if isinstance(fact, SessionCreated | SessionUpdated | SessionDeleted):
            return fact.type, {"sessionID": fact.session_id, "info": self.session(fact.info)}
        if isinstance(fact, MessageUpdated):
            return fact.type, {"sessionID": fact.session_id, "info": self.message(fact.info)}
        if isinstance(fact, PartUpdated):
            part = self.part(fact.part)
            return fact.type, {"sessionID": fact.session_id, "part": part, "time": fact.time}
        if isinstance(fact, PermissionAsked | QuestionAsked):
            return fact.type, self.ask(fact.info)
        if isinstance(fact, PermissionReplied | QuestionReplied):
            return _replied(fact.type, fact.info)
        return event.type, fact

    def implied(self, event: Event) -> list[tuple[str, Any]]:
        """Events that clients know beside it, which no journal has."""
        fact = event.data
        if isinstance(fact, PartUpdated) and (todos := todos_of(fact.part)) is not None:
            return [("todo.updated", {"sessionID": fact.session_id, "todos": todos})]
        return []


def todos_of(part: AnyPart) -> list[Json] | None:
    """The list that a finished call of the todo tool left, or None for any other part."""
    if isinstance(part, ToolPart) and part.tool == TODO and isinstance(part.state, ToolCompleted):
        found: list[Json] = part.state.metadata.get("todos", [])
        return found
    return None


def _tool_part(part: ToolPart) -> Json:
    shown: Json = msgspec.to_builtins(part)
    if part.tool == USER_SHELL:
        shown["tool"] = "bash"
    given = shown["state"].get("input")
    if part.tool in _FILE_TOOLS and isinstance(given, dict) and "path" in given:
        given.setdefault("filePath", given["path"])
    if part.tool == "edit" and isinstance(given, dict):
        given.setdefault("oldString", given.get("old", ""))
        given.setdefault("newString", given.get("new", ""))
    return shown


def _replied(kind: str, ask: Ask) -> tuple[str, Json]:
    shown: Json = {"sessionID": ask.session_id, "requestID": ask.id}
    if ask.kind == "question":
        if ask.replied == "answered":
            return kind, {**shown, "answers": ask.answers}
        return "question.rejected", shown
    # Clients know three answers; a request that nobody waits for any more was not granted.
    reply = ask.replied if ask.replied in ("once", "always") else "reject"
    return kind, {**shown, "reply": reply}


def _slug(session_id: str) -> str:
    digest = hashlib.blake2b(session_id.encode(), digest_size=2).digest()
    return f"{_MOODS[digest[0] % len(_MOODS)]}-{_BEINGS[digest[1] % len(_BEINGS)]}"


def event_id(cursor: int | None, time_ms: int, count: int) -> str:
    """The id of an event: the same wherever and whenever it is sent."""
    number = count if cursor is None else cursor
    return make_id("evt", now_ms=time_ms, counter=number, entropy=number)
