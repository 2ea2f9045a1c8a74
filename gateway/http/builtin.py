"""Turns without a language model: a person's own shell command, and a message without an answer.

They are turns like any other, so they are durable, queue behind what runs, and can be aborted.
"""

from __future__ import annotations

from typing import Any, Final

from understudy.actors.models.acts import Call, End
from understudy.actors.models.protocol import ModelRequest
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.gateway.http.wire import USER_SHELL

PROVIDER: Final = "understudy"
SHELL: Final = "understudy/shell"
QUIET: Final = "understudy/quiet"


def builtin_models() -> tuple[ScriptedModel, ...]:
    return (
        ScriptedModel(_run_command, provider_id=PROVIDER, model_id="shell", record=1),
        ScriptedModel(_say_nothing, provider_id=PROVIDER, model_id="quiet", record=1),
    )


def _run_command(request: ModelRequest) -> Any:
    """Runs the command, which is the turn's system prompt, and leaves it at that."""
    if steps_taken(request) == 0:
        return Call(USER_SHELL, {"command": request.system})
    return End("stop")


def _say_nothing(_: ModelRequest) -> Any:
    return End("stop")
