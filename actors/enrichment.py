"""What a decision needs to know from rows: the state holds only what is unfinished."""

from __future__ import annotations

from typing import Any

import msgspec

from understudy.actors.core import commands
from understudy.actors.core.commands import Command
from understudy.actors.core.state import State
from understudy.store.reads import Reads


def enriched(read: Reads, state: State, command: Any) -> Command:
    """Add what only rows know: whether an id was used, what a revert hides."""
    session_id = state.info.id
    replace = msgspec.structs.replace
    changed: Any = command
    if type(command) is commands.SubmitPrompt:
        if command.message_id is not None:
            known, taken = read.prompt(session_id, command.message_id)
            changed = replace(command, known=known, foreign=taken and known is None)
        if state.info.revert is not None:
            hidden = read.positions(session_id, state.info.revert.message_id)
            changed = replace(changed, reverted=hidden or ())
    elif type(command) is commands.RequestCompaction:
        if state.info.revert is not None:
            hidden = read.positions(session_id, state.info.revert.message_id)
            changed = replace(command, reverted=hidden or ())
    elif type(command) is commands.RevertTo:
        found = read.positions(session_id, command.message_id) is not None
        changed = replace(command, found=found)
    elif type(command) is commands.EditTranscript:
        pair = read.message(session_id, command.message_id)
        changed = replace(command, found=pair is not None, parts=pair[1] if pair else ())
        if state.info.revert is not None and state.info.revert.message_id == command.message_id:
            hidden = read.positions(session_id, command.message_id)
            changed = replace(changed, hidden=hidden or ())
    elif type(command) is commands.Reply and command.ask_id not in state.asks:
        changed = replace(command, known=read.ask(session_id, command.ask_id))
    result: Command = changed
    return result
