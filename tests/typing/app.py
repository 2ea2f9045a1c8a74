"""An app as type checkers see it: checked, never run. An error that stays out is one, too."""

from collections.abc import AsyncIterator
from typing import assert_type

from understudy import Event, Runtime, Session
from understudy.events import MessageUpdated, PartDelta, PromptSettled
from understudy.models import Finish, Model, ModelEvent, ModelRequest, TextDelta
from understudy.store.records import Prompt


class Shouting:
    provider_id, model_id = "mine", "shouting"
    context_limit, output_limit = 100_000, 4_000

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        yield TextDelta("HELLO")
        yield Finish("stop")


def told(session: Session) -> str | None:
    for event in session.events():
        assert_type(event, Event)
        match event.data:
            case MessageUpdated(info=message):
                assert_type(message.id, str)
            case PartDelta(delta=text):
                return text
            case PromptSettled(info=prompt):
                assert_type(prompt, Prompt)
        if isinstance(event.data, MessageUpdated):
            _ = event.data.part_id  # type: ignore[attr-defined]  # it is a message, not a part
        assert_type(event.data.session_id, str)
    return None


model: Model = Shouting()
runtime = Runtime("agent.db", model=model)
