"""Any OpenAI-compatible chat completions endpoint, local servers included.

Needs ``pip install 'understudy[openai]'``; the SDK is imported when the model is made.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from understudy.actors.models.clients import ClientPerLoop, checked_options, required
from understudy.actors.models.failures import cut_short, translated
from understudy.actors.models.openai_wire import Answer, messages
from understudy.actors.models.protocol import ModelEvent, ModelRequest
from understudy.errors import InvalidInput

if TYPE_CHECKING:
    import openai

CONNECT_TIMEOUT_S = 15.0
_OFFICIAL = "https://api.openai.com"


class OpenAIModel:
    """A chat completions endpoint.

    Args:
        base_url: the endpoint, up to and with ``/v1``; the SDK's own default if None.
        api_key: the SDK's own default if None; not needed with a ``base_url``.
        timeout_s: the longest silence, before the answer and within it.
        client: an ``openai.AsyncOpenAI`` of your own, with ``max_retries=0``; you close it.
        headers: sent with every request.
        extra: more fields of the request body, such as ``{"temperature": 0}``.

    Raises ``InvalidInput`` for unusable options, ``ModelError`` when the SDK is missing.
    """

    def __init__(
        self,
        model_id: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_id: str = "openai",
        context_limit: int = 128_000,
        output_limit: int = 16_384,
        timeout_s: float = 600.0,
        client: openai.AsyncOpenAI | None = None,
        headers: Mapping[str, str] | None = None,
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
        self._sdk: Any = required("openai")
        self._usage_wanted = True
        timeout = self._sdk.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))

        def make() -> openai.AsyncOpenAI:
            made: openai.AsyncOpenAI = self._sdk.AsyncOpenAI(
                base_url=base_url,
                api_key=api_key,
                timeout=timeout,
                max_retries=0,
                default_headers=dict(headers or {}),
            )
            return made

        if api_key is None and (base_url or os.environ.get("OPENAI_BASE_URL")):
            # Local servers want no key; the SDK insists on one.
            api_key = os.environ.get("OPENAI_API_KEY") or "none"
        try:
            self._clients = ClientPerLoop(make, given=client)
        except self._sdk.OpenAIError as error:
            raise InvalidInput(f"{error}") from error

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        """Answer ``request``; see the protocol for what it yields and raises."""
        answer = Answer(request)
        content_type = None
        try:
            stream = await self._open(request)
            content_type = stream.response.headers.get("content-type")
            async with stream:
                async for chunk in stream:
                    for event in answer.take(chunk):
                        yield event
        except Exception as error:
            # Once the answer has its finish, whatever breaks behind it is of no interest.
            if answer.reason is None:
                raise translated(error, self._sdk, provider_id=self.provider_id) from error
        if answer.reason is None:
            raise cut_short(self.provider_id, content_type, silent=answer.silent)
        for event in answer.closing():
            yield event

    async def aclose(self) -> None:
        """Close the connections made from the running loop. The model can be used again."""
        await self._clients.aclose()

    async def _open(self, request: ModelRequest) -> Any:
        completions: Any = self._clients.get().chat.completions
        body = self._body(request)
        if self._usage_wanted:
            try:
                return await completions.create(stream_options={"include_usage": True}, **body)
            except self._sdk.APIStatusError as error:
                refused = "stream_options" in f"{error} {error.body}"
                if error.status_code not in (400, 422) or not refused:
                    raise
                self._usage_wanted = False  # an older server: it answers, and counts nothing
        return await completions.create(**body)

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model_id,
            "messages": messages(request),
            "stream": True,
            "extra_body": self._extra,
        }
        if request.tools:
            body["tools"] = [
                {"type": "function", "function": msgspec.to_builtins(tool)}
                for tool in request.tools
            ]
        if request.max_output_tokens is not None:
            # OpenAI's newer models refuse the old name; the servers of others know no other.
            official = str(self._clients.get().base_url).startswith(_OFFICIAL)
            name = "max_completion_tokens" if official else "max_tokens"
            body[name] = request.max_output_tokens
        return body
