"""Errors in the shapes clients expect: ``{"name": …, "data": {"message": …}}``."""

from __future__ import annotations

import logging
import secrets
from typing import Any, Final

import msgspec
from starlette.responses import Response

from understudy.errors import (
    ActorCrashed,
    AskClosed,
    AskNotFound,
    CommandTimeout,
    CompactionFailed,
    InvalidInput,
    MessageNotFound,
    PromptConflict,
    RuntimeClosed,
    SessionBusy,
    SessionClaimed,
    SessionExists,
    SessionFenced,
    SessionNotFound,
    SessionQuarantined,
    StoreError,
    StoreFull,
    TurnAborted,
    UnderstudyError,
)

logger = logging.getLogger("understudy.gateway")

_STATUS: Final[tuple[tuple[type[UnderstudyError], int, str], ...]] = (
    (InvalidInput, 400, "BadRequest"),
    (SessionNotFound, 404, "NotFoundError"),
    (MessageNotFound, 404, "NotFoundError"),
    (AskNotFound, 404, "NotFoundError"),
    (SessionBusy, 409, "BusyError"),
    (TurnAborted, 409, "MessageAbortedError"),
    (AskClosed, 409, "AskClosed"),
    (PromptConflict, 409, "PromptConflict"),
    (SessionExists, 409, "SessionExists"),
    (SessionClaimed, 409, "SessionClaimed"),
    (SessionQuarantined, 409, "SessionQuarantined"),
    (CompactionFailed, 409, "CompactionFailed"),
    (SessionFenced, 409, "SessionFenced"),
    (ActorCrashed, 503, "ActorCrashed"),
    (RuntimeClosed, 503, "RuntimeClosed"),
    (CommandTimeout, 504, "CommandTimeout"),
    (StoreFull, 507, "StoreFull"),
    (StoreError, 503, "StoreError"),
)


class Refused(Exception):
    """An answer that is an error of HTTP itself: a status, a name and words for people."""

    def __init__(self, status: int, name: str, message: str, **data: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"name": name, "data": {"message": message, **data}}


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: Exception) -> Response:
    """The answer to a call that raised. What nobody expects is logged under a reference."""
    if isinstance(error, Refused):
        return json_response(error.body, error.status)
    if isinstance(error, SessionNotFound):
        message = f"Session not found: {error.session_id}"
        return json_response({"name": "NotFoundError", "data": {"message": message}}, 404)
    for kind, status, name in _STATUS:
        if isinstance(error, kind):
            data: dict[str, Any] = {"message": str(error)}
            if status == 400:  # noqa: PLR2004 - as in the table above
                data["kind"] = "Payload"
            return json_response({"name": name, "data": data}, status)
    reference = f"err_{secrets.token_hex(4)}"
    logger.error("%s: an endpoint failed", reference, exc_info=error)
    message = "Unexpected server error. Check server logs for details."
    body = {"name": "UnknownError", "data": {"message": message, "ref": reference}}
    return json_response(body, 500)
