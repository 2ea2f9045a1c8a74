"""Models: what a model of your own is made of, and those that are there.

    from understudy.models import Finish, ModelRequest, TextDelta

    class Shouting:
        provider_id, model_id = "mine", "shouting"
        context_limit, output_limit = 100_000, 4_000  # tokens

        async def stream(self, request: ModelRequest):
            yield TextDelta(request.turns[-1].content[0].text.upper())
            yield Finish("stop")

``OpenAIModel`` and ``AnthropicModel`` need the extras ``openai`` and ``anthropic``; each is loaded
when it is asked for. The acts of a ``ScriptedModel`` are in ``understudy.testing``.
"""

from typing import TYPE_CHECKING, Any

from understudy.actors.models.configured import model_from
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    FinishReason,
    Model,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolSpec,
    ToolUse,
    Usage,
    UserFile,
    UserText,
    UserTurn,
)
from understudy.actors.models.scripted import ScriptedModel
from understudy.store.records import CacheTokens, Tokens

if TYPE_CHECKING:
    from understudy.actors.models.anthropic import AnthropicModel
    from understudy.actors.models.openai import OpenAIModel

__all__ = [
    "AnthropicModel",
    "AssistantTurn",
    "CacheTokens",
    "Finish",
    "FinishReason",
    "Model",
    "ModelEvent",
    "ModelRequest",
    "OpenAIModel",
    "ReasoningDelta",
    "ScriptedModel",
    "TextDelta",
    "Tokens",
    "ToolCall",
    "ToolSpec",
    "ToolUse",
    "Usage",
    "UserFile",
    "UserText",
    "UserTurn",
    "model_from",
]


def __getattr__(name: str) -> Any:
    """Those that need an extra, loaded when they are asked for."""
    if name == "AnthropicModel":
        from understudy.actors.models.anthropic import AnthropicModel

        return AnthropicModel
    if name == "OpenAIModel":
        from understudy.actors.models.openai import OpenAIModel

        return OpenAIModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
