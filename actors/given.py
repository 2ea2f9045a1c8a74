"""What callers give: checked once at the door, with errors that say what to correct."""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import math
import mimetypes
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, get_args

import msgspec

from understudy.actors.core.commands import SubmitPrompt
from understudy.actors.hooks import inside_hook
from understudy.actors.models.protocol import Model
from understudy.actors.subscription import ALWAYS_TOLD
from understudy.actors.supervisor import RestartPolicy
from understudy.errors import InvalidInput, MessageNotFound
from understudy.store.events import FACTS
from understudy.store.ids import check_id
from understudy.store.records import FilePart, ModelRef, PermissionRule, Record, TextPart, WhenBusy

Permissions: TypeAlias = Mapping[str, str | Mapping[str, str]] | Sequence[PermissionRule]
"""Rules by permission: ``{"bash": "ask", "edit": {"*": "allow", "*.env": "deny"}}``."""

R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=msgspec.Struct)

_EVENTS: Final = frozenset({*FACTS, *ALWAYS_TOLD})

_LONGEST_S: Final = 1e9  # thirty years: a clock's time and the longest timeout have no sum
_TITLE_LIMIT: Final = 1_000
_ACTIONS: Final = ("allow", "ask", "deny")


def text(field: str, value: object, *, limit: int | None = None) -> str:
    """A string that can be stored."""
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be text, not {type(value).__name__}", field=field)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{field} is not valid Unicode: {error}", field=field) from error
    if limit is not None and size > limit:
        raise InvalidInput(f"{field} has {size} bytes; {limit} are allowed", field=field)
    return value


def whole(field: str, value: object, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{field} is a whole number from {least}, not {value!r}", field=field)
    return min(value, sys.maxsize)


def switch(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{field} is True or False, not {value!r}", field=field)
    return value


def record(field: str, value: R) -> R:
    """A record whose values, whatever their callers' types, are what will be read back."""
    try:
        return msgspec.json.decode(msgspec.json.encode(value), type=type(value))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidInput(f"{field} cannot be stored: {error}", field=field) from error


def settings(field: str, value: S | None, default: S) -> S:
    """A group of options, each of its type, and no number below zero."""
    if value is None:
        return default
    kind = type(default)
    if not isinstance(value, kind):
        raise InvalidInput(f"{field} is a {kind.__name__}, not {type(value).__name__}", field=field)
    options = msgspec.structs.asdict(value)
    try:
        msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{field}: {error}", field=field) from error
    for name, option in options.items():
        if isinstance(option, int | float) and not option >= 0:
            raise InvalidInput(f"{field}: {name} is 0 or more, not {option!r}", field=field)
    return value


def restart_policy(value: RestartPolicy | None) -> RestartPolicy:
    """A policy that can be followed: a period and a count to count in, pauses that end."""
    policy = settings("restart", value, RestartPolicy())
    for sound, rule in (
        (policy.period_s > 0, "period_s is more than 0"),
        (policy.quarantine_after >= 1, "quarantine_after is 1 or more"),
        (math.isfinite(policy.max_backoff_s), "max_backoff_s comes to an end"),
        (policy.backoff_s <= policy.max_backoff_s, "backoff_s is no more than max_backoff_s"),
    ):
        if not sound:
            raise InvalidInput(f"restart: {rule}, not {policy!r}", field="restart")
    return policy


def choice(field: str, value: object, choices: object) -> Any:
    """One of a ``Literal``'s values."""
    if not isinstance(value, str) or value not in get_args(choices):
        possible = ", ".join(get_args(choices))
        raise InvalidInput(f"{field} is one of {possible}, not {value!r}", field=field)
    return value


def models(field: str, value: object) -> tuple[Model, ...]:
    """Models: made already, and with everything that a runtime needs of one."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidInput(f"{field} is a list of models", field=field)
    made = tuple(value)
    for each in made:
        if isinstance(each, type):
            name = each.__name__
            raise InvalidInput(f"{field}: pass a model, {name}(…), not its class", field=field)
        if not isinstance(each, Model):
            got = repr(each) if isinstance(each, str) else type(each).__name__
            raise InvalidInput(
                f"{field}: {got} is no model: it needs provider_id, model_id, context_limit, "
                "output_limit and stream()",
                field=field,
            )
        for limit in ("context_limit", "output_limit"):
            tokens = getattr(each, limit)
            if not isinstance(tokens, int) or tokens < 1:
                raise InvalidInput(
                    f"{field}: {limit} is a number of tokens, not {tokens!r}", field=field
                )
    return made


def event_types(value: object) -> frozenset[str]:
    """Names of events, each of which there is."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidInput("types are names of events", field="types")
    types = frozenset(value)
    if unknown := sorted(str(each) for each in types - _EVENTS):
        raise InvalidInput(f"no event is called {', '.join(unknown)}", field="types")
    return types


def answers(value: object) -> tuple[tuple[str, ...], ...]:
    """For each question its answers: texts, or one."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidInput("answers are a list for each question", field="answers")
    lists = [[each] if isinstance(each, str) else each for each in value]
    if not all(isinstance(each, Sequence) for each in lists):
        raise InvalidInput("answers are a list for each question", field="answers")
    return tuple(tuple(text("answers", one) for one in each) for each in lists)


def title(value: object) -> str:
    return text("title", value, limit=_TITLE_LIMIT)


def directory(value: object) -> str:
    """A directory as text. It need not be there: tools look for themselves."""
    return text("directory", os.fspath(value) if isinstance(value, os.PathLike) else value)


def seconds(field: str, value: object) -> float | None:
    """A time to wait, 0 or more; None, or infinity, is as long as it takes."""
    if value is None or value == math.inf:
        return None
    return duration(field, value)


def duration(field: str, value: object, *, least: int = 0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise InvalidInput(f"{field} is {least} s or more, not {value!r}", field=field)
    return float(min(value, _LONGEST_S))


def metadata(value: object) -> dict[str, Any]:
    """A mapping that JSON can express."""
    if not isinstance(value, Mapping):
        raise InvalidInput("metadata must be a mapping", field="metadata")
    try:
        plain = msgspec.json.decode(msgspec.json.encode(dict(value)))
        json.dumps(msgspec.to_builtins(value), allow_nan=False)  # msgspec writes null for NaN
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidInput(f"metadata must be JSON: {error}", field="metadata") from error
    return dict(plain)


def no_message(session_id: str, message_id: str, *, what: str = "message") -> MessageNotFound:
    return MessageNotFound(
        f"No {what} {message_id} in session {session_id}",
        session_id=session_id,
        message_id=message_id,
    )


def permission_rules(value: Permissions | None) -> tuple[PermissionRule, ...]:
    """Rules in order; later ones win."""
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        if not isinstance(value, Sequence) or not all(
            isinstance(rule, PermissionRule) for rule in value
        ):
            raise InvalidInput("permissions are a mapping or PermissionRules", field="permissions")
        return tuple(record("permissions", rule) for rule in value)
    rules = tuple(
        PermissionRule(permission=permission, pattern=pattern, action=action)  # type: ignore[arg-type]  # checked below
        for permission, actions in value.items()
        for pattern, action in (
            actions.items() if isinstance(actions, Mapping) else (("*", actions),)
        )
    )
    for rule in rules:
        if rule.action not in _ACTIONS:
            raise InvalidInput(
                f"permission {rule.permission!r}: {rule.action!r} is not one of "
                f"{', '.join(_ACTIONS)}",
                field="permissions",
            )
    return tuple(record("permissions", rule) for rule in rules)


def prompt_command(
    prompt: str | Sequence[str | TextPart | FilePart | Path],
    *,
    limit_bytes: int,
    message_id: str | None,
    when_busy: WhenBusy,
    system: str | None,
    tools: Mapping[str, bool] | None,
    known_tools: Collection[str],
    model: ModelRef | None,
    agent: str | None,
) -> SubmitPrompt:
    """A prompt as a command, or ``InvalidInput``."""
    choice("when_busy", when_busy, WhenBusy)
    if message_id is not None:
        check_id("message_id", message_id)
    system = None if system is None else text("system", system)
    agent = None if agent is None else text("agent", agent)
    switches = None if tools is None else _switches(tools, known_tools)
    parts = _parts(prompt)
    size = sum(len(_content(part).encode()) for part in parts)
    if size > limit_bytes:
        raise InvalidInput(
            f"the prompt has {size} bytes; {limit_bytes} are allowed (limits.prompt_bytes)",
            field="prompt",
        )
    return SubmitPrompt(
        parts=parts,
        digest=_digest(parts, system, switches, model, agent),
        message_id=message_id,
        when_busy=when_busy,
        system=system,
        tools=switches,
        agent=agent,
        model=model,
        quiet=inside_hook() is not None,
    )


def _switches(tools: object, known: Collection[str]) -> dict[str, bool]:
    if not isinstance(tools, Mapping):
        raise InvalidInput("tools says by name which may be used", field="tools")
    for name, on in tools.items():
        if text("tools", name) not in known and name != "*":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known) or 'none'}"
            raise InvalidInput(f"no tool is called {name!r}: {hint}", field="tools")
        if not isinstance(on, bool):
            raise InvalidInput(f"tools: {name} is True or False, not {on!r}", field="tools")
    return dict(tools)


def _parts(
    prompt: str | Sequence[str | TextPart | FilePart | Path],
) -> tuple[TextPart | FilePart, ...]:
    if isinstance(prompt, str | TextPart | FilePart | Path):
        prompt = [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidInput("a prompt is text, or a sequence of texts and files", field="prompt")
    parts = tuple(_part(each) for each in prompt)
    if not any(_content(part).strip() for part in parts):
        raise InvalidInput("a prompt says something: this one is empty", field="prompt")
    for part in parts:
        if part.id:
            check_id("part id", part.id)
    return parts


def _part(each: object) -> TextPart | FilePart:
    if isinstance(each, str):
        return TextPart(id="", session_id="", message_id="", text=text("prompt", each))
    if isinstance(each, TextPart | FilePart):
        return record("prompt", each)
    if isinstance(each, Path):
        return _file(each)
    raise InvalidInput(f"a prompt has no use for {type(each).__name__}", field="prompt")


def _file(path: Path) -> FilePart:
    """A file, taken in as it is now."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}", field="prompt") from error
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return FilePart(id="", session_id="", message_id="", mime=mime, url=url, filename=path.name)


def _content(part: TextPart | FilePart) -> str:
    return part.text if isinstance(part, TextPart) else part.url


def _digest(
    parts: Sequence[TextPart | FilePart],
    system: str | None,
    tools: Mapping[str, bool] | None,
    model: ModelRef | None,
    agent: str | None,
) -> str:
    """What makes two prompts the same: their content and what it is answered with."""
    content = [(type(part).__name__, _content(part)) for part in parts]
    options = (system, sorted((tools or {}).items()), model, agent)
    return hashlib.sha256(msgspec.json.encode((content, options))).hexdigest()
