"""The one entrance to the session logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from understudy.actors.core import (
    asks,
    calls,
    commands,
    compaction,
    editing,
    prompts,
    recovery,
    turns,
)
from understudy.actors.core.commands import Command
from understudy.actors.core.draft import Decision, Draft
from understudy.actors.core.state import Moment, Rules, State
from understudy.errors import RuntimeClosed

_HANDLERS: dict[type, Callable[[Draft, Any], Any]] = {
    commands.SubmitPrompt: prompts.submit,
    commands.Abort: prompts.abort,
    commands.RequestCompaction: compaction.request_command,
    commands.UpdateSession: prompts.update,
    commands.RevertTo: prompts.revert,
    commands.EditTranscript: editing.edit,
    commands.Unrevert: lambda d, _: prompts.unrevert(d),
    commands.Reply: asks.reply,
    commands.Recover: recovery.recover,
    commands.StepProgress: turns.step_progress,
    commands.StepRetrying: turns.step_retrying,
    commands.StepFinished: turns.step_finished,
    commands.StepFailed: turns.step_failed,
    commands.ToolProgress: calls.tool_progress,
    commands.ToolFinished: calls.tool_finished,
    commands.OpenAsk: asks.open_ask,
    commands.ExecutionLost: turns.execution_lost,
}

_STARTING: Final = (commands.SubmitPrompt, commands.RequestCompaction, commands.Reply)


def decide(state: State, command: Command, moment: Moment, rules: Rules) -> Decision:
    """What ``command`` does to a session in ``state``: a change, effects and a reply.

    Pure: the same arguments give the same decision. Raises the error a caller should see
    (``InvalidInput``, ``SessionBusy``, ``PromptConflict``, …); nothing has happened then.
    """
    if state.closing and isinstance(command, _STARTING):
        raise RuntimeClosed("The runtime is closing")
    draft = Draft(state, moment, rules)
    reply = _HANDLERS[type(command)](draft, command)
    return draft.finish(reply)
