"""A model that plays a script: deterministic, offline, built in.

    ScriptedModel("Hello.")                                      always answers this
    ScriptedModel([Call("ls", {"path": "."}), Say("Empty.")])    one item for each model call
    ScriptedModel([[Think("Hm."), Say("One moment"), Call("ls")], "Done."])
    ScriptedModel(lambda request: Say(f"{len(request.turns)} turns"))
    echo()                                                       answers with the last user text

An item of a list is an act, or several acts that make up one answer. Each session plays its own
copy of a list. A failed or aborted call has used up its item, so ``[Fail(error), "Done."]`` fails
once. In a process that has not seen the session yet, the position is read off the request: as many
items are done as it has assistant turns.

A callable sees every request, also those with ``purpose == "summary"``, and returns acts, events,
an (asynchronous) iterable of both, or None for the default. Lists and strings do not see summary
requests: give ``summary=`` another script, or take the default, a one-line summary.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from understudy.actors.models.acts import (
    Act,
    Answer,
    Call,
    End,
    Fail,
    Gate,
    Say,
    Stall,
    Think,
    Use,
    Wait,
    input_tokens,
)
from understudy.actors.models.protocol import (
    AssistantTurn,
    ModelEvent,
    ModelRequest,
    UserText,
    UserTurn,
)
from understudy.errors import InvalidInput, ModelError, ModelOverflow

__all__ = [
    "Act",
    "Call",
    "End",
    "Fail",
    "Gate",
    "Say",
    "ScriptedModel",
    "Stall",
    "Think",
    "Use",
    "Wait",
    "echo",
    "steps_taken",
]

Script: TypeAlias = str | Sequence[Any] | Callable[[ModelRequest], Any]

DELTAS_PER_YIELD = 64  # then the loop gets a turn: a long answer starves nobody
SESSIONS_REMEMBERED = 100_000


class ScriptedModel:
    """Plays ``script`` (see the module). For use from one asyncio loop at a time.

    Args:
        script: a str, a sequence of items, or a callable ``(request) -> acts | None``.
        summary: the script for requests whose purpose is "summary"; a one-line summary if None.
        repeat: start a list again when it has been played; otherwise its end is a ``ModelError``.
        overflow: raise ``ModelOverflow`` when the estimated input exceeds ``context_limit``.
        record: how many requests ``requests`` keeps, the latest ones.

    Attributes:
        requests: what the model was given, oldest first.
        calls: how many requests there were in all.
    """

    def __init__(
        self,
        script: Script,
        *,
        provider_id: str = "scripted",
        model_id: str = "scripted",
        context_limit: int = 200_000,
        output_limit: int = 8192,
        summary: Script | None = None,
        repeat: bool = False,
        overflow: bool = False,
        record: int = 1000,
    ) -> None:
        self._script = _checked(script)
        self._summary = None if summary is None else _checked(summary)
        self.provider_id = provider_id
        self.model_id = model_id
        self.context_limit = context_limit
        self.output_limit = output_limit
        self.requests: deque[ModelRequest] = deque(maxlen=int(record))
        self.calls = 0
        self._repeat = repeat
        self._overflow = overflow
        self._positions: OrderedDict[tuple[str, str], int] = OrderedDict()

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        """Play the answer to ``request``; the finish reason and the usage are derived."""
        self.calls += 1
        self.requests.append(request)
        self._check_fit(request)
        position, item = self._next(request)
        answer = Answer(request, position)
        async with aclosing(_acts(item, request)) as acts:
            async for act in acts:
                if isinstance(act, Wait | Stall):
                    await act.wait()
                    continue
                for event in answer.play(act):
                    yield event
                    if answer.deltas % DELTAS_PER_YIELD == DELTAS_PER_YIELD - 1:
                        await asyncio.sleep(0)
        for event in answer.closing():
            yield event

    def _check_fit(self, request: ModelRequest) -> None:
        if self._overflow and (tokens := input_tokens(request)) > self.context_limit:
            raise ModelOverflow(
                f"about {tokens} tokens do not fit a context of {self.context_limit}",
                tokens=tokens,
                context_limit=self.context_limit,
            )

    def _next(self, request: ModelRequest) -> tuple[int, Any]:
        """The position of this call in its session, and what to play."""
        script = self._script
        if request.purpose == "summary":
            if self._summary is not None:
                script = self._summary
            elif not callable(script):
                script = _summarise
        position = self._advance(request)
        if callable(script):
            item = script(request)
            return position, _summarise(request) if _unhandled(item, request) else item
        if isinstance(script, str):
            return position, Say(script)
        if position >= len(script) and not (self._repeat and script):
            raise ModelError(f"the script ended after {len(script)} steps", steps=len(script))
        item = script[position % len(script)]
        return position, item(request) if callable(item) else item

    def _advance(self, request: ModelRequest) -> int:
        key = (request.session_id, request.purpose)
        position = self._positions.pop(key, None)
        if position is None:
            position = 0
            if request.purpose == "step":
                position = sum(1 for turn in request.turns if isinstance(turn, AssistantTurn))
        self._positions[key] = position + 1
        if len(self._positions) > SESSIONS_REMEMBERED:
            self._positions.popitem(last=False)
        return position


def echo(**options: Any) -> ScriptedModel:
    """A model that answers with the last user text. ``options`` are ``ScriptedModel``'s."""
    return ScriptedModel(_echo, **options)


def steps_taken(request: ModelRequest) -> int:
    """How many steps this turn has behind it: the assistant turns since the last user turn."""
    count = 0
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            break
        count += 1
    return count


async def _acts(item: Any, request: ModelRequest) -> AsyncGenerator[Any, None]:
    """Whatever a script may return, as one stream of acts and events."""
    if hasattr(item, "__await__"):
        item = await item
        if _unhandled(item, request):
            item = _summarise(request)
    if isinstance(item, AsyncGenerator):
        async with aclosing(item):
            async for act in item:
                yield act
    elif isinstance(item, AsyncIterator):
        async for act in item:
            yield act
    elif isinstance(item, Iterable) and not isinstance(item, str):
        for act in item:
            yield act
    else:
        yield item


def _unhandled(item: Any, request: ModelRequest) -> bool:
    return item is None and request.purpose == "summary"


def _checked(script: Any) -> Any:
    if isinstance(script, str) or callable(script):
        return script
    if isinstance(script, Sequence) and not isinstance(script, bytes):
        return tuple(script)
    raise InvalidInput(f"a script is a str, a sequence or a callable, not {script!r}")


def _user_text(turn: UserTurn) -> str:
    return "\n".join(c.text for c in turn.content if isinstance(c, UserText))


def _echo(request: ModelRequest) -> Say | None:
    if request.purpose == "summary":
        return None
    users = (turn for turn in reversed(request.turns) if isinstance(turn, UserTurn))
    return Say(next((text for text in map(_user_text, users) if text), ""))


def _summarise(request: ModelRequest) -> Say:
    users = (turn for turn in request.turns if isinstance(turn, UserTurn))
    first = " ".join(next(map(_user_text, users), "").split())[:60]
    return Say(f"Summary of {len(request.turns)} turns, from: {first}")
