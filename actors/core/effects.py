"""Effects: what a decision asks the outside to do, once its change is committed."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from understudy.store.records import Ask, ModelRef, Pair, Prompt, ToolPart


class RunStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Call the model for this open assistant message. ``delay_s`` first.

    ``follows`` is the answer after whose beginning nothing was said but that and ``said``: what
    the model was shown for it, and this, is all there is to show. It is empty where ``said`` is
    all that was ever said. Either is None where that is not known.
    """

    message_id: str
    prompt: Prompt
    model: ModelRef
    follows: str | None = None
    said: Pair | None = None
    delay_s: float = 0.0


class RunSummary(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Summarise the history before ``marker_id`` into this open assistant message."""

    message_id: str
    marker_id: str
    model: ModelRef


class RunTool(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Run a tool call whose start is committed.

    ``attempt`` counts runs of the same call. ``quiet``: it works for a hook, and starts none.
    """

    part: ToolPart
    attempt: int = 1
    quiet: bool = False


class Cancel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Stop whatever runs for this session: streams, tools, their processes and children.

    ``turn`` says that a turn ended early, and with it what its children do. Without it they are
    stopped only if anything ran here: an idle session's children work for nobody but their callers.
    """

    reason: str
    turn: bool = True


class ResolveAsk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hand the answer to the tool that waits for it."""

    ask: Ask


class Answered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A turn has its answer, the last of ``said``: its messages, all of them if ``whole``."""

    said: tuple[Pair, ...]
    whole: bool


Effect: TypeAlias = RunStep | RunSummary | RunTool | Cancel | ResolveAsk | Answered
