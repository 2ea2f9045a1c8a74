"""Records as Python code sees them, beside their wire shapes."""

import msgspec
import pytest

from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    CompactionPart,
    Message,
    MessageTime,
    Span,
    StepStartPart,
    TextPart,
    Tokens,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    ToolPending,
    ToolRunning,
    UserMessage,
)

IDS = {"id": "prt_1", "session_id": "ses_1", "message_id": "msg_1"}
SPAN = Span(start=1, end=2)
STATES = (
    ToolPending(),
    ToolRunning(input={}, time=SPAN),
    ToolCompleted(input={}, output="", title="", metadata={}, time=SPAN),
    ToolFailed(input={}, error="", time=SPAN),
)
PARTS = (
    TextPart(**IDS),
    StepStartPart(**IDS),
    CompactionPart(**IDS),
    *(ToolPart(**IDS, tool="ls", call_id="call_1", state=state) for state in STATES),
)
MESSAGES = (
    UserMessage(id="msg_1", session_id="ses_1", time=MessageTime(created=1)),
    AssistantMessage(
        id="msg_2",
        session_id="ses_1",
        parent_id="msg_1",
        turn=1,
        time=MessageTime(created=1),
        tokens=Tokens(),
        agent="build",
        mode="build",
        provider_id="scripted",
        model_id="scripted",
    ),
)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.type)
def test_a_part_has_the_type_that_the_wire_has(part):
    wire = msgspec.json.encode(part)
    assert msgspec.json.decode(wire)["type"] == part.type
    assert msgspec.json.decode(wire, type=AnyPart) == part


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.status)
def test_a_tool_state_has_the_status_that_the_wire_has(state):
    assert msgspec.json.decode(msgspec.json.encode(state))["status"] == state.status


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.role)
def test_a_message_has_the_role_that_the_wire_has(message):
    wire = msgspec.json.encode(message)
    assert msgspec.json.decode(wire)["role"] == message.role
    assert msgspec.json.decode(wire, type=Message) == message
