"""understudy: an embeddable runtime for the sessions of AI-agent apps.

    from understudy import Runtime, tool

    with Runtime("agent.db", model="openai/gpt-5", tools=[read_file]) as runtime:
        session = runtime.create_session(title="Review")
        turn = session.prompt("Summarise README.md")
        for event in turn:
            ...
        print(turn.result().text)

General layout:

    actors/    everything that has a mailbox, and the pure session logic it runs
    store/     everything durable
    gateway/   ways in from outside the process
    errors     every error, in one tree
    signals    blinker signals, one per event type
"""

from typing import TYPE_CHECKING, Any

from understudy import errors, signals
from understudy.actors.core.state import CompactionRules, Limits
from understudy.actors.handles import Done, Records, Reply, Snapshot, TranscriptMessage
from understudy.actors.hooks import HookCall
from understudy.actors.models.configured import model_from
from understudy.actors.models.protocol import Model, ModelRequest
from understudy.actors.models.scripted import ScriptedModel
from understudy.actors.recovery_report import RecoveryReport
from understudy.actors.runtime import Runtime
from understudy.actors.session import Session, SessionStatus
from understudy.actors.subscription import Subscription
from understudy.actors.supervisor import RestartPolicy
from understudy.actors.tools.context import ToolContext
from understudy.actors.tools.tool import Tool, ToolResult, tool
from understudy.actors.tracker import SessionTracker
from understudy.actors.turn import Compaction, Turn
from understudy.store.events import Event
from understudy.store.journal import Retention
from understudy.store.records import FilePart, PermissionRule, Question, TextPart, ToolPart

if TYPE_CHECKING:
    from understudy.actors.tools.workspace import workspace

__version__ = "0.1.0"

__all__ = [
    "Compaction",
    "CompactionRules",
    "Done",
    "Event",
    "FilePart",
    "HookCall",
    "Limits",
    "Model",
    "ModelRequest",
    "PermissionRule",
    "Question",
    "Records",
    "RecoveryReport",
    "Reply",
    "RestartPolicy",
    "Retention",
    "Runtime",
    "ScriptedModel",
    "Session",
    "SessionStatus",
    "SessionTracker",
    "Snapshot",
    "Subscription",
    "TextPart",
    "Tool",
    "ToolContext",
    "ToolPart",
    "ToolResult",
    "TranscriptMessage",
    "Turn",
    "errors",
    "model_from",
    "signals",
    "tool",
    "workspace",
]


def __getattr__(name: str) -> Any:
    """``workspace`` needs the extra of its name, so it is loaded when it is asked for."""
    if name == "workspace":
        from understudy.actors.tools.workspace import workspace

        return workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
