"""The one place where providers' errors become ours. Works on the errors of both SDKs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from understudy.errors import ModelError, ModelOverflow, ModelUnavailable

# Errors inside a stream come after a 200: their type says what the status would have been.
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "api_error": 500,
    "server_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_REFUSED = {401, 403, 404}
_TRANSIENT = {408, 409, 425, 429}

_OVERFLOW = re.compile(
    r"context_length_exceeded|exceed_context_size|model_context_window_exceeded"
    r"|prompt (is )?too long|input is too long|input length and .?max_tokens"
    r"|(maximum|max) (context|prompt|sequence) length"
    r"|exceeds? (the |this )?(model'?s )?(available |maximum )?context"
    r"|context (length|window) exceed"
    r"|greater than the context length|context the overflows"
    r"|too large for model with .* context|input token count.*exceeds the maximum"
    r"|inputs?. tokens \+ .?max_new_tokens|reduce the length of (the|your) (messages|prompt|input)"
    r"|exceeded model token limit|prompt token count .* exceeds the limit",
    re.IGNORECASE,
)
# A rate limit that one request exceeds by itself never passes: the request must shrink.
_OVERFLOW_OF_RATE = re.compile(r"context_length_exceeded|request too large for", re.IGNORECASE)
_EXHAUSTED = re.compile(
    r"insufficient_quota|billing_(hard_limit_reached|not_active)|usage_limit_reached"
    r"|insufficient (balance|credits?|funds)|credit balance is too low|account_deactivated",
    re.IGNORECASE,
)
MESSAGE_LIMIT = 1000  # characters: some proxies answer with whole pages


def translated(error: Exception, sdk: Any, *, provider_id: str) -> ModelError:
    """What an exception of ``sdk`` (the openai or anthropic module) means to a runtime."""
    if isinstance(error, ModelError):
        return error
    if isinstance(error, sdk.APIConnectionError):
        cause = error.__cause__ or error
        return ModelUnavailable(
            f"{provider_id}: connection failed: {_brief(cause)}", provider_id=provider_id
        )
    if isinstance(error, sdk.APIResponseValidationError):
        return malformed(error, provider_id=provider_id)
    if isinstance(error, sdk.APIError):
        return _from_body(error, provider_id=provider_id)
    if isinstance(error, OSError) or _is_transport(error):
        return ModelUnavailable(
            f"{provider_id}: the stream broke: {_brief(error)}", provider_id=provider_id
        )
    return malformed(error, provider_id=provider_id)


def malformed(error: Exception, *, provider_id: str) -> ModelError:
    """The provider's answer makes no sense to us."""
    return ModelError(
        f"{provider_id}: not an answer we understand: {_brief(error)}", provider_id=provider_id
    )


def cut_short(provider_id: str, content_type: str | None, *, silent: bool) -> ModelError:
    """The stream ended before its answer did. ``silent``: nothing came at all."""
    if silent and content_type and "event-stream" not in content_type:
        return ModelError(
            f"{provider_id}: answered with {content_type} instead of an event stream; "
            "is the base URL right?",
            provider_id=provider_id,
        )
    return ModelUnavailable(
        f"{provider_id}: the stream ended before the answer did", provider_id=provider_id
    )


def _from_body(error: Any, *, provider_id: str) -> ModelError:
    detail = _detail(error.body)
    response = getattr(error, "response", None)
    headers: Mapping[str, str] = getattr(response, "headers", {})
    status = _status(error, detail)
    text = f"{error} {error.body}"
    message = str(detail.get("message") or error)[:MESSAGE_LIMIT]
    data = {
        "provider_id": provider_id,
        "status_code": status,
        "code": _word(detail.get("code")) or _word(detail.get("type")),
        "request_id": headers.get("x-request-id") or headers.get("request-id"),
    }
    overflow = _OVERFLOW_OF_RATE if status == HTTPStatus.TOO_MANY_REQUESTS else _OVERFLOW
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE or (
        status not in _REFUSED and overflow.search(text)
    ):
        return ModelOverflow(f"{provider_id}: {message}", **data)
    transient = status is None or status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if headers.get("x-should-retry") in ("true", "false"):
        transient = headers["x-should-retry"] == "true"
    if transient and not _EXHAUSTED.search(text):
        wait_s = retry_after_s(headers)
        return ModelUnavailable(f"{provider_id}: {message}", retry_after_s=wait_s, **data)
    return ModelError(f"{provider_id}: {message}", **data)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait a provider asks for, in seconds: ``retry-after-ms``, or either ``Retry-After``."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    try:
        date = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _detail(body: object) -> Mapping[str, Any]:
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        return inner if isinstance(inner, Mapping) else {"message": inner}
    return {"message": body} if isinstance(body, str) else {}


def _status(error: Any, detail: Mapping[str, Any]) -> int | None:
    status: int | None = getattr(error, "status_code", None)
    if status is not None and status >= HTTPStatus.BAD_REQUEST:
        return status
    for name in (detail.get("code"), detail.get("type")):
        if isinstance(name, str) and name in _STATUS_OF_TYPE:
            return _STATUS_OF_TYPE[name]
        if re.fullmatch("[45][0-9][0-9]", str(name)):
            return int(str(name))
    return None


def _is_transport(error: Exception) -> bool:
    return any(c.__module__.startswith(("httpx", "httpcore")) for c in type(error).__mro__)


def _word(value: object) -> str | None:
    return None if value is None else str(value)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:MESSAGE_LIMIT]
