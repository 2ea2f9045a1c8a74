"""Anthropic's messages endpoint.

Needs ``pip install 'understudy[anthropic]'``; the SDK is imported when the model is made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from understudy.actors.models.anthropic_wire import Answer, Thoughts, conversation
from understudy.actors.models.clients import ClientPerLoop, checked_options, required
from understudy.actors.models.failures import cut_short, malformed, translated
from understudy.actors.models.protocol import ModelEvent, ModelRequest
from understudy.errors import InvalidInput

if TYPE_CHECKING:
    import anthropic

CONNECT_TIMEOUT_S = 15.0
STEPS_REMEMBERED = 1000
_CACHED = {"type": "ephemeral"}


class AnthropicModel:
    """A Claude model.

    Args:
        base_url, api_key: the SDK's own defaults if None.
        output_limit: also what is asked for when a request names no ``max_output_tokens``.
        timeout_s: the longest silence, before the answer and within it.
        client: an ``anthropic.AsyncAnthropic`` of your own, with ``max_retries=0``; you close it.
        headers: sent with every request.
        prompt_cache: mark the system prompt and the end of the conversation for caching.
        extra: more fields of the request body, such as ``{"thinking": {"type": "adaptive"}}``.

    Thinking is signed and must go back with its tool calls. It is kept here, in memory: the steps
    of a turn that outlives its process go on without thinking.

    Raises ``InvalidInput`` for unusable options, ``ModelError`` when the SDK is missing.
    """

    def __init__(
        self,
        model_id: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_id: str = "anthropic",
        context_limit: int = 200_000,
        output_limit: int = 32_000,
        timeout_s: float = 600.0,
        client: anthropic.AsyncAnthropic | None = None,
        headers: Mapping[str, str] | None = None,
        prompt_cache: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        checked_options(
            model_id=model_id,
            context_limit=context_limit,
            output_limit=output_limit,
            base_url=base_url,
            timeout_s=timeout_s,
        )
        self.provider_id = provider_id
        self.model_id = model_id
        self.context_limit = context_limit
        self.output_limit = output_limit
        self._extra = dict(extra or {})
        self._prompt_cache = prompt_cache
        self._thoughts: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        self._sdk: Any = required("anthropic")
        timeout = self._sdk.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))

        def make() -> anthropic.AsyncAnthropic:
            made: anthropic.AsyncAnthropic = self._sdk.AsyncAnthropic(
                base_url=base_url,
                api_key=api_key,
                timeout=timeout,
                max_retries=0,
                default_headers=dict(headers or {}),
            )
            credentials = getattr(made, "credentials", None)
            if not (made.api_key or made.auth_token or credentials):
                raise InvalidInput("no API key: pass api_key= or set ANTHROPIC_API_KEY")
            return made

        try:
            self._clients = ClientPerLoop(make, given=client)
        except self._sdk.AnthropicError as error:
            raise InvalidInput(f"{error}") from error

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        """Answer ``request``; see the protocol for what it yields and raises."""
        answer = Answer()
        content_type = None
        try:
            messages: Any = self._clients.get().messages
            stream = await messages.create(**self._body(request))
            content_type = stream.response.headers.get("content-type")
            async with stream:
                async for event in stream:
                    for ours in answer.take(event):
                        yield ours
        except Exception as error:
            # Once the answer has its stop reason, whatever breaks behind it is of no interest.
            if answer.reason is None:
                raise translated(error, self._sdk, provider_id=self.provider_id) from error
        if answer.reason is None:
            raise cut_short(self.provider_id, content_type, silent=answer.silent)
        try:
            self._remember(answer)
            last = list(answer.closing())
        except Exception as error:
            raise malformed(error, provider_id=self.provider_id) from error
        for ours in last:
            yield ours

    async def aclose(self) -> None:
        """Close the connections made from the running loop. The model can be used again."""
        await self._clients.aclose()

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        extra = dict(self._extra)
        thinking = extra.get("thinking", {}).get("type", "disabled") != "disabled"
        thoughts: Thoughts | None = self._thoughts if thinking else None
        messages, complete = conversation(request.turns, thoughts)
        if thinking and not complete:
            # The API refuses thinking within a turn whose earlier thoughts are lost.
            del extra["thinking"]
            messages, _ = conversation(request.turns, None)
        body: dict[str, Any] = {
            "model": self.model_id,
            "max_tokens": request.max_output_tokens or self.output_limit,
            "messages": messages,
            "stream": True,
            "extra_body": extra,
        }
        if request.system.strip():
            body["system"] = [{"type": "text", "text": request.system}]
        if request.tools:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters}
                for t in request.tools
            ]
        if self._prompt_cache:
            for block in (*body.get("system", ()), messages[-1]["content"][-1]):
                block["cache_control"] = _CACHED
        return body

    def _remember(self, answer: Answer) -> None:
        if (key := answer.first_call_id) and answer.thoughts:
            self._thoughts[key] = answer.thoughts
            if len(self._thoughts) > STEPS_REMEMBERED:
                self._thoughts.popitem(last=False)
