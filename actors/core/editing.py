"""Editing the transcript of an idle session: messages and parts taken out, a text rewritten."""

from __future__ import annotations

from understudy.actors.core.commands import EditTranscript
from understudy.actors.core.draft import Draft, replace
from understudy.errors import InvalidInput, MessageNotFound, SessionBusy
from understudy.store.events import MessageRemoved, PartRemoved
from understudy.store.records import AnyPart, ReasoningPart, TextPart


def edit(d: Draft, command: EditTranscript) -> AnyPart | None:
    """Carry the edit out. Gives the part as it is now, or None for what is gone."""
    if d.turn is not None or d.compaction is not None or d.queue:
        raise SessionBusy(f"Session {d.session_id} is busy", session_id=d.session_id)
    part = next((each for each in command.parts if each.id == command.part_id), None)
    if not command.found or (command.part_id is not None and part is None):
        missing = command.part_id if command.found else command.message_id
        raise MessageNotFound(
            f"No {missing} in session {d.session_id}",
            session_id=d.session_id,
            message_id=command.message_id,
        )
    if command.text is not None:
        if not isinstance(part, TextPart | ReasoningPart):
            raise InvalidInput("only text can be rewritten", field="part")
        rewritten = replace(part, text=command.text)
        d.put_part(rewritten)
        return rewritten
    if part is not None:
        d.emit(PartRemoved(session_id=d.session_id, message_id=command.message_id, part_id=part.id))
    else:
        d.emit(MessageRemoved(session_id=d.session_id, message_id=command.message_id))
    return None
