"""Asks: durable permission requests and questions, closed exactly once."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from understudy.actors.core import calls, turns
from understudy.actors.core.commands import CallDraft, OpenAsk, Reply
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import ResolveAsk
from understudy.errors import AskClosed, AskNotFound, InvalidInput
from understudy.store.events import (
    PermissionAsked,
    PermissionReplied,
    QuestionAsked,
    QuestionReplied,
)
from understudy.store.records import (
    AnyPart,
    Ask,
    PermissionRule,
    ToolPart,
    ToolPending,
    ToolRunning,
)

REJECTED = "The user rejected permission to use this specific tool call."


Action: TypeAlias = Literal["allow", "ask", "deny"]


def action_for(
    d: Draft, permission: str | None, patterns: tuple[str, ...], *, unruled: Action = "allow"
) -> Action:
    """What the rules say: the strictest action over the patterns, ``unruled`` where none does."""
    if permission is None:
        return "allow"
    rules = (*d.rules.permissions, *d.info.permission)
    order: dict[str, Action] = {}
    for pattern in patterns or ("*",):
        action = unruled
        for rule in rules:
            if fnmatchcase(permission, rule.permission) and fnmatchcase(pattern, rule.pattern):
                action = rule.action
        order[action] = action
    return order.get("deny") or order.get("ask") or "allow"


def ask_before(d: Draft, part: ToolPart, call: CallDraft) -> None:
    """Ask before a call runs. The call stays pending, also over a restart."""
    ask = Ask(
        id=d.new_id("per"),
        session_id=d.session_id,
        kind="permission",
        created=d.now,
        message_id=part.message_id,
        call_id=part.call_id,
        permission=call.permission or call.tool,
        patterns=call.patterns or ("*",),
        always=call.always,
        metadata={"tool": call.tool, "input": call.input},
    )
    d.asks = {**d.asks, ask.id: ask}
    d.emit(PermissionAsked(session_id=d.session_id, info=ask))


def open_ask(d: Draft, command: OpenAsk) -> None:
    """A running tool asks. Rules answer at once where they can; without one a person does."""
    found = calls.running_call(d, command.part_id)
    if found is None:
        d.start(ResolveAsk(ask=replace(command.ask, replied="closed")))
        return
    part, _ = found
    assert d.turn is not None and d.turn.step is not None, "a call belongs to an open step"
    step = d.turn.step
    if command.ask.id in step.asked:
        return
    d.turn = replace(d.turn, step=replace(step, asked=step.asked | {command.ask.id}))
    ask = replace(
        command.ask, session_id=d.session_id, message_id=part.message_id, call_id=part.call_id
    )
    if ask.kind == "permission":
        action = action_for(d, ask.permission, ask.patterns, unruled="ask")
        if action != "ask":
            replied = "once" if action == "allow" else "reject"
            d.start(ResolveAsk(ask=replace(ask, replied=replied)))
            return
    d.asks = {**d.asks, ask.id: ask}
    if ask.kind == "permission":
        d.emit(PermissionAsked(session_id=d.session_id, info=ask))
    else:
        d.emit(QuestionAsked(session_id=d.session_id, info=ask))


def find_call(d: Draft, ask: Ask) -> ToolPart | None:
    """The open call an ask belongs to."""
    step = d.turn.step if d.turn is not None else None
    if step is None or step.message.id != ask.message_id:
        return None
    for part in step.parts.values():
        if (
            isinstance(part, ToolPart)
            and part.call_id == ask.call_id
            and isinstance(part.state, ToolPending | ToolRunning)
        ):
            return part
    return None


def is_parked(d: Draft, part: AnyPart) -> bool:
    """Whether this call has not run and waits for a person. It can wait over a restart."""
    return (
        isinstance(part, ToolPart)
        and isinstance(part.state, ToolPending)
        and any(
            ask.message_id == part.message_id and ask.call_id == part.call_id
            for ask in d.asks.values()
        )
    )


def reply(d: Draft, command: Reply) -> Ask:
    """A person's answer."""
    ask = d.asks.get(command.ask_id)
    if ask is None:
        raise _not_open(d, command)
    allowed = ("once", "always", "reject") if ask.kind == "permission" else ("answered", "reject")
    if command.reply not in allowed:
        raise InvalidInput(f"A {ask.kind} is answered with one of {', '.join(allowed)}")
    if command.reply == "answered" and len(command.answers) != len(ask.questions):
        raise InvalidInput(f"{len(ask.questions)} questions need as many answers")
    part = find_call(d, ask)
    ask = _close(d, replace(ask, feedback=command.feedback, answers=command.answers), command.reply)
    if command.reply == "always":
        _remember(d, ask)
    if part is not None and isinstance(part.state, ToolPending):
        if command.reply != "reject":
            calls.run_call(d, part)
        else:
            said = f" They said: {command.feedback}" if command.feedback else ""
            calls.refuse_call(d, part, REJECTED + said)
    if command.reply == "always":
        _grant_covered(d)
    if command.reply == "reject" and not command.feedback and ask.kind == "permission":
        _end_after_reject(d)
    turns.settle_step(d)
    return ask


def _not_open(d: Draft, command: Reply) -> Exception:
    if command.known is not None:
        return AskClosed(
            f"{command.ask_id} is closed ({command.known.replied})",
            session_id=d.session_id,
            ask_id=command.ask_id,
            reason=command.known.replied,
        )
    return AskNotFound(
        f"No such request: {command.ask_id}", session_id=d.session_id, ask_id=command.ask_id
    )


def _remember(d: Draft, ask: Ask) -> None:
    # What was asked about is text, not a pattern: allowing ``rm *`` must not allow ``rm -rf /``.
    allowed = ask.always or tuple(map(_literal, ask.patterns))
    known = {(rule.permission, rule.pattern, rule.action) for rule in d.info.permission}
    new = tuple(
        PermissionRule(permission=ask.permission, pattern=pattern, action="allow")
        for pattern in allowed
        if (ask.permission, pattern, "allow") not in known
    )
    if new:
        d.put_info(replace(d.info, permission=(*d.info.permission, *new)))


def _literal(text: str) -> str:
    """The pattern that matches this text only; a lone ``*`` asks about everything, and stays."""
    return text if text == "*" else re.sub(r"([*?[])", r"[\1]", text)


def _grant_covered(d: Draft) -> None:
    """Answer the other requests that a new ``always`` rule covers."""
    for ask in list(d.asks.values()):
        if ask.kind != "permission":
            continue
        if action_for(d, ask.permission, ask.patterns, unruled="ask") == "allow":
            part = find_call(d, ask)
            _close(d, ask, "once")
            if part is not None and isinstance(part.state, ToolPending):
                calls.run_call(d, part)


def _end_after_reject(d: Draft) -> None:
    """A plain refusal ends the turn: nothing else it asked for may run."""
    if d.turn is not None:
        turns.close_turn(d, "rejected")
        turns.advance(d)


def _close(d: Draft, ask: Ask, replied: str) -> Ask:
    ask = replace(ask, replied=replied)
    d.asks = {key: other for key, other in d.asks.items() if key != ask.id}
    if ask.kind == "permission":
        d.emit(PermissionReplied(session_id=d.session_id, info=ask))
    else:
        d.emit(QuestionReplied(session_id=d.session_id, info=ask))
    d.start(ResolveAsk(ask=ask))
    return ask


def close_all(d: Draft) -> None:
    """Close every ask of the session: what asked is gone."""
    for ask in list(d.asks.values()):
        close(d, ask)


def close(d: Draft, ask: Ask) -> None:
    _close(d, ask, "closed")


def close_of_call(d: Draft, message_id: str, call_id: str) -> None:
    """Close what a finished call left unanswered."""
    for ask in list(d.asks.values()):
        if ask.message_id == message_id and ask.call_id == call_id:
            close(d, ask)
