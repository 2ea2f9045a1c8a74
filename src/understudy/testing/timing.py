"""Time limits: whoever was told that its time was up had that time, and people's came on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from understudy.gateway.fold import Row, is_open

_ROUNDING_S: Final = 0.01
_CLOSING_S: Final = 6.0  # from a call's end until the store says that nobody waits for people


class _Since(NamedTuple):
    """When something began, and how much calm time had passed by then."""

    at_s: float
    calm_s: float


class _Asked(NamedTuple):
    """A call waits for people, from then until then. ``calm_s``: as ``from_s``, in calm time.

    A person's answer is heard after it is committed. A call that gives up is over before that is:
    how long it waited is known in time in which nothing was held up, and roughly.
    """

    call_id: str
    from_s: float
    calm_s: float
    until_s: float | None = None
    answered: bool = False


class Times:
    """Since when the calls and turns of one session run, and when they waited for people."""

    def __init__(self, *, tool_s: float, turn_s: float | None, calm_s: Callable[[], float]) -> None:
        self._calm_s = calm_s
        self._tool_s = tool_s
        self._turn_s = turn_s
        self._turns: dict[int, _Since] = {}
        self._starts: dict[str, int] = {}  # by part: what it says of its start
        self._calls: dict[str, _Since] = {}  # by part
        self._running: set[str] = set()  # calls, by their id
        self._asked: dict[str, _Asked] = {}

    def take(self, kind: str, fact: Row, now_s: float) -> Iterator[str]:
        """What is wrong with an event, which is committed now."""
        if kind == "message.part.updated" and fact["part"]["type"] == "tool":
            yield from self._call(fact["part"], now_s)
        elif kind == "prompt.started":
            self._turns.setdefault(fact["info"]["turn"], _Since(now_s, self._calm_s()))
        elif kind == "prompt.settled" and fact["info"].get("reason") == "timeout":
            info = fact["info"]
            since = self._turns.get(info.get("turn"), _Since(now_s, self._calm_s()))
            yield from self._judge(info["messageID"], self._turn_s, since, now_s)
        elif kind.startswith(("permission.", "question.")):
            self._ask(fact["info"], now_s)

    def _call(self, part: Row, now_s: float) -> Iterator[str]:
        state, key = part["state"], part["id"]
        if state["status"] == "running":
            if state["time"]["start"] != self._starts.get(key):
                self._starts[key] = state["time"]["start"]
                self._calls[key] = _Since(now_s, self._calm_s())
            self._running.add(part["callID"])
            return
        if part["callID"] in self._running and "timed out after" in state.get("error", ""):
            since = self._calls[key]
            yield from self._judge(key, self._tool_s, since, now_s, part["callID"])
        self._running.discard(part["callID"])

    def _ask(self, ask: Row, now_s: float) -> None:
        """A person is asked, or answers. Before a call runs it has no time that could pass."""
        key, calm_s = ask["id"], self._calm_s()
        if is_open("ask", ask):
            if ask["callID"] in self._running:
                self._asked[key] = _Asked(ask["callID"], now_s, calm_s)
        elif (asked := self._asked.get(key)) is not None:
            answered = ask["replied"] != "closed"
            until_s = now_s if answered else asked.from_s + calm_s - asked.calm_s
            self._asked[key] = asked._replace(until_s=until_s, answered=answered)

    def _judge(
        self, what: str, limit_s: float | None, since: _Since, now_s: float, call_id: str = ""
    ) -> Iterator[str]:
        spans, room_s = [], _ROUNDING_S
        for asked in self._asked.values():
            until_s = asked.until_s
            if call_id not in ("", asked.call_id) or (until_s is not None and until_s < since.at_s):
                continue
            if not asked.answered:
                room_s = _CLOSING_S
            open_s = self._calm_s() - asked.calm_s
            spans.append((asked.from_s, asked.from_s + open_s if until_s is None else until_s))
        lasted_s, calm_s = now_s - since.at_s, self._calm_s() - since.calm_s
        own_s = lasted_s - _covered_s(spans, since.at_s)
        room_s += lasted_s - calm_s  # what passed at once may have been anybody's
        if limit_s is None or own_s < limit_s - room_s:
            yield f"{what} timed out after {own_s:g} s of its own"


def _covered_s(spans: list[tuple[float, float]], since_s: float) -> float:
    """How long any of them was under way."""
    total_s, end_s = 0.0, since_s
    for from_s, until_s in sorted(spans):
        total_s += max(0.0, until_s - max(from_s, end_s))
        end_s = max(end_s, until_s)
    return total_s
