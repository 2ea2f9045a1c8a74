"""What a model should be asked, worked out from the journal alone."""

from __future__ import annotations

from understudy.actors.models.protocol import AssistantTurn, ModelRequest, UserText, UserTurn
from understudy.gateway.fold import Row
from understudy.testing.rules import CUT_SHORT
from understudy.testing.story import Story

HEADING = "[Summary of the conversation so far]\n\n"


def problem_of(request: ModelRequest, story: Story | None) -> str | None:
    """What is wrong with a request, or None.

    ``story`` is its session's, if who asks still owns it: then what was said is compared, too.
    """
    return _unanswerable(request) or (_not_said(request, story) if story is not None else None)


def _unanswerable(request: ModelRequest) -> str | None:
    calls = [
        call for turn in request.turns if isinstance(turn, AssistantTurn) for call in turn.calls
    ]
    ids = [call.call_id for call in calls]
    if len(ids) != len(set(ids)):
        return "two calls share an id"
    if not request.turns:
        return "an empty request"
    last = request.turns[-1]
    if isinstance(last, AssistantTurn) and not last.calls:
        return "nothing to answer"
    return None


def _not_said(request: ModelRequest, story: Story) -> str | None:
    if request.purpose == "summary":
        return _not_summarised(request, story)
    message = story.open_answer()
    if request.purpose != "step" or message is None:
        return None
    told = [line for turn in request.turns for line in _lines(turn)]
    expected = conversation(story, message)
    # What was to answer before may not yet have heard that it is over.
    if told == expected or told in story.cut_short:
        return None
    for place, (here, there) in enumerate(zip(told, expected, strict=False)):
        if here != there:
            return f"line {place} is {here!r}, not {there!r}"
    longer = told if len(told) > len(expected) else expected
    place = min(len(told), len(expected))
    return f"{len(told)} lines, not {len(expected)}: {longer[place]!r}"


def _not_summarised(request: ModelRequest, story: Story) -> str | None:
    """A summary begins with what the conversation begins with: all of it in the first request."""
    message = next((each for each in story.open_messages() if each.get("summary")), None)
    if message is None or message["id"] in story.summarised:
        return None
    story.summarised.add(message["id"])
    kind, _, first = (conversation(story, message) or [""])[0].partition(": ")
    first = first.removeprefix(HEADING)[:100]
    told = "".join(line for turn in request.turns for line in _lines(turn))
    return f"{first!r} is not summarised" if kind == "user" and first not in told else None


def _lines(turn: object) -> list[str]:
    if isinstance(turn, UserTurn):
        return [f"user: {item.text}" for item in turn.content if isinstance(item, UserText)]
    assert isinstance(turn, AssistantTurn), "there are two kinds of turns"
    said = [f"assistant: {turn.text}"] if turn.text.strip() else []
    return said + [f"{call.tool}({call.input}) {call.output}" for call in turn.calls]


def conversation(story: Story, answer: Row) -> list[str]:
    """Everything before an answer that its model should see, a line each."""
    shown = []
    for message in story.transcript():
        if message["id"] == answer["id"]:
            break
        withdrawn = message["id"] in story.settled - story.started or message.get("withdrawn")
        if "turn" in message and not withdrawn:
            shown.append(message)
    lines, start = _summary(story, shown)
    for message in shown[start:]:
        parts = story.parts_of(message["id"])
        machinery = message.get("summary") or any(p["type"] == "compaction" for p in parts)
        if machinery:
            continue
        if message["role"] == "user":
            lines += [f"user: {p['text']}" for p in parts if p["type"] == "text" and p["text"]]
            continue
        failed = "error" in message and message["error"]["name"] not in CUT_SHORT
        text = "" if failed else "".join(p["text"] for p in parts if p["type"] == "text")
        lines += [f"assistant: {text}"] if text.strip() else []
        lines += [_call(part) for part in parts if part["type"] == "tool"]
    return lines


def _summary(story: Story, shown: list[Row]) -> tuple[list[str], int]:
    """The last compaction that took effect: its summary, and where what is kept begins."""
    places = {message["id"]: place for place, message in enumerate(shown)}
    for place in range(len(shown) - 1, -1, -1):
        for part in story.parts_of(shown[place]["id"]):
            if part["type"] != "compaction" or part["state"] != "committed":
                continue
            if part["summaryID"] not in places:
                continue
            text = story.text_of(part["summaryID"])
            if not text.strip():
                continue  # edited out: it stands for nothing
            start = place
            if part["headEndID"] in places:
                start = places[part["headEndID"]] + 1
            if part["tailStartID"] in places:
                start = places[part["tailStartID"]]
            return [f"user: {HEADING}{text}"], start
    return [], 0


def _call(part: Row) -> str:
    state = part["state"]
    output = state.get("output", state.get("error", ""))
    if state["status"] == "error" and state.get("interrupted") and "timed out" not in output:
        output = "[Tool execution was interrupted]"
    return f"{part['tool']}({state['input']}) {output}"
