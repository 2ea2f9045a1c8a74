"""A model by its name: ``scripted``, ``openai/<model>`` or ``anthropic/<model>``."""

from __future__ import annotations

import os
from typing import Any

from understudy.actors.models.protocol import Model
from understudy.actors.models.scripted import echo
from understudy.errors import InvalidInput

VARIABLE = "UNDERSTUDY_MODEL"
POSSIBLE = "scripted, openai/<model> or anthropic/<model>"


def model_from(spec: str | None = None, **options: Any) -> Model:
    """The model that ``spec`` names; without one, UNDERSTUDY_MODEL's, or else the scripted one.

    ``options`` go to the model's class. Keys and addresses come from the environment as the SDKs
    read it: OPENAI_API_KEY, OPENAI_BASE_URL, ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL. The scripted
    model answers with what it was asked.

    Raises ``InvalidInput`` for a name or an option that means nothing, ``ModelError`` when the
    provider's package is missing.
    """
    if spec is None:
        spec = os.environ.get(VARIABLE, "").strip() or "scripted"
    if not isinstance(spec, str):
        raise InvalidInput(f"a model's name is text, not {spec!r}: write {POSSIBLE}", spec=spec)
    provider, slash, model_id = spec.strip().partition("/")
    try:
        if provider == "scripted" and not slash:
            return echo(**options)
        if provider == "openai" and model_id:
            from understudy.actors.models.openai import OpenAIModel

            return OpenAIModel(model_id, **options)
        if provider == "anthropic" and model_id:
            from understudy.actors.models.anthropic import AnthropicModel

            return AnthropicModel(model_id, **options)
    except TypeError as error:
        raise InvalidInput(f"{spec}: {error}", spec=spec) from error
    raise InvalidInput(f"no model is called {spec!r}: write {POSSIBLE}", spec=spec)
