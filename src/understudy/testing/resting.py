"""Rules about a session between two commits: what is true whenever nobody writes."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from understudy.gateway.fold import Row, is_open
from understudy.testing.rules import Finding
from understudy.testing.story import Story


def at_rest(story: Story) -> Iterator[Finding]:
    """Everything that is broken about a living session."""
    for rule in (
        _markers,
        _answers,
        _parts,
        _asks,
        _always,
        _status,
        _turns,
        _revert,
        _tokens,
        _compactions,
    ):
        yield from rule(story)


def _markers(story: Story) -> Iterator[Finding]:
    parts = story.tables["part"].values()
    markers = [p for p in parts if p["type"] == "compaction" and is_open("part", p)]
    if len(markers) > 1:
        yield "one active marker", f"{len(markers)}"


def _answers(story: Story) -> Iterator[Finding]:
    opened = [message["id"] for message in story.open_messages()]
    if len(opened) > 1:
        yield "one open message", f"{opened}"


def _parts(story: Story) -> Iterator[Finding]:
    for part in story.tables["part"].values():
        if is_open("part", part) and part["type"] != "compaction":
            message = story.tables["message"].get(part["messageID"])
            answer = message is not None and message["role"] == "assistant"
            if answer and not is_open("message", message or {}):
                yield "closed means closed", f"{part['id']} is open"


def _asks(story: Story) -> Iterator[Finding]:
    """Whoever asks, waits."""
    for ask in story.tables["ask"].values():
        if is_open("ask", ask) and not any(
            part["type"] == "tool" and part["callID"] == ask.get("callID") and is_open("part", part)
            for part in story.parts_of(ask.get("messageID", ""))
        ):
            yield "who asks waits", f"{ask['id']} is open, its call is not"


def _always(story: Story) -> Iterator[Finding]:
    """What was allowed for good is not asked about."""
    for ask in story.tables["ask"].values():
        if is_open("ask", ask) and ask["kind"] == "permission" and allowed(story, ask):
            yield "always means always", f"{ask['id']} is open"


def allowed(story: Story, ask: Row) -> bool:
    """Whether the session's own rules allow what is asked."""
    rules = [
        rule["pattern"]
        for rule in story.record.get("permission", ())
        if rule["permission"] == ask["permission"] and rule["action"] == "allow"
    ]
    return all(any(fnmatchcase(each, rule) for rule in rules) for each in ask["patterns"])


def _status(story: Story) -> Iterator[Finding]:
    if story.running() if story.status == "idle" else not story.busy():
        yield "status agrees with transcript", f"it is {story.status}"
    if story.status == "retry" and not any(map(story.is_silent, story.open_messages())):
        yield "status agrees with transcript", "it waits for a model that has answered"
    if story.status == "idle" and not story.idle_told and not story.busy():
        yield "idle is told", "it came to rest, and nobody was told"


def _turns(story: Story) -> Iterator[Finding]:
    if len({prompt["turn"] for prompt in story.hosts() if "turn" in prompt}) > 1:
        yield "one turn at a time", f"{[prompt['messageID'] for prompt in story.hosts()]}"


def _revert(story: Story) -> Iterator[Finding]:
    if "revert" in story.record and story.busy():
        yield "work ends a revert", "something runs on what is hidden"


def _tokens(story: Story) -> Iterator[Finding]:
    total = story.record.get("tokens", {}).get("total", 0)
    if story.status == "idle" and not story.running() and total != story.used:
        yield "usage is counted", f"{total} tokens, and its answers used {story.used}"
    cost = story.record.get("cost", 0.0)
    if story.status == "idle" and not story.running() and abs(cost - story.cost) > 1e-6:
        yield "usage is counted", f"it cost {cost}, and its answers {story.cost}"


def _compactions(story: Story) -> Iterator[Finding]:
    if story.failed and not story.record.get("compaction_failures"):
        yield "failures are counted", "a compaction failed, the session says it did not"
    if story.follow_up:
        yield "work goes on after a compaction", "nobody asked to continue"
