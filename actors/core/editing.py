"""Editing the transcript of an idle session: messages and parts taken out, a text rewritten."""

from __future__ import annotations

from understudy.actors.core.commands import EditTranscript
from understudy.actors.core.draft import Draft, replace
from understudy.errors import InvalidInput, MessageNotFound, SessionBusy
from understudy.store.events import MessageRemoved, PartRemoved
from understudy.store.records import AnyPart, ReasoningPart, Revert, TextPart


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
        _move_revert(d, command)
    return None


def _move_revert(d: Draft, command: EditTranscript) -> None:
    """A revert that began with what is gone begins with what comes next: that stays hidden."""
    if d.info.revert is not None and d.info.revert.message_id == command.message_id:
        rest = command.hidden[1:]
        d.put_info(replace(d.info, revert=Revert(message_id=rest[0]) if rest else None))
