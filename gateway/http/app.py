"""The table of endpoints, and what surrounds every call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from understudy.gateway.http import (
    asks,
    catalog,
    changes,
    events,
    files,
    instance,
    openapi,
    parts,
    prompts,
    sessions,
    supervision,
    todos,
    unserved,
)
from understudy.gateway.http.access import Access
from understudy.gateway.http.call import Call
from understudy.gateway.http.errors import error_response, json_response
from understudy.gateway.http.gateway import Gateway

Handler = Callable[[Call], Awaitable[Any]]


class Endpoint(NamedTuple):
    """One operation. ``body`` is the shape of what it takes."""

    method: str
    path: str
    handler: Handler
    body: type[Any] | None = None
    success: str = "200"

    @property
    def operation(self) -> str:
        module = self.handler.__module__.rpartition(".")[2]
        words = [word for word in self.path.strip("/").split("/") if not word.startswith("{")]
        return f"{module}.{self.handler.__name__}.{self.method.lower()}.{'.'.join(words) or 'root'}"


async def describe(_: Call) -> Any:
    """This document."""
    return openapi.document(ENDPOINTS)


SESSION: Final = "/session/{sessionID}"
MESSAGE: Final = f"{SESSION}/message/{{messageID}}"
PART: Final = f"{MESSAGE}/part/{{partID}}"

ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    # events
    Endpoint("GET", "/event", events.local_events),
    Endpoint("GET", "/global/event", events.global_events),
    # sessions
    Endpoint("POST", "/session", sessions.create, sessions.NewSession),
    Endpoint("GET", "/session", sessions.listing),
    Endpoint("GET", "/session/status", sessions.status),
    Endpoint("GET", SESSION, sessions.get),
    Endpoint("PATCH", SESSION, sessions.update, sessions.ChangedSession),
    Endpoint("DELETE", SESSION, sessions.delete),
    Endpoint("GET", f"{SESSION}/children", sessions.children),
    Endpoint("GET", f"{SESSION}/todo", todos.todos),
    Endpoint("GET", f"{SESSION}/diff", changes.diff),
    Endpoint("POST", f"{SESSION}/fork", sessions.fork, sessions.Place),
    Endpoint("POST", f"{SESSION}/abort", sessions.abort),
    Endpoint("POST", f"{SESSION}/summarize", sessions.summarize, sessions.Summary),
    Endpoint("POST", f"{SESSION}/revert", sessions.revert, sessions.Place),
    Endpoint("POST", f"{SESSION}/unrevert", sessions.unrevert),
    # prompts and messages
    Endpoint("POST", f"{SESSION}/message", prompts.prompt, prompts.NewPrompt),
    Endpoint("POST", f"{SESSION}/prompt_async", prompts.prompt_async, prompts.NewPrompt, "204"),
    Endpoint("POST", f"{SESSION}/command", prompts.command, prompts.NewCommand),
    Endpoint("POST", f"{SESSION}/shell", prompts.shell, prompts.NewShell),
    Endpoint("POST", f"{SESSION}/init", prompts.init, prompts.NewInit),
    Endpoint("GET", f"{SESSION}/message", prompts.messages),
    Endpoint("GET", MESSAGE, prompts.message),
    Endpoint("DELETE", MESSAGE, parts.delete_message),
    Endpoint("PATCH", PART, parts.update_part, parts.ChangedPart),
    Endpoint("DELETE", PART, parts.delete_part),
    # permissions and questions
    Endpoint("GET", "/permission", asks.permissions),
    Endpoint("POST", "/permission/{requestID}/reply", asks.reply, asks.PermissionReply),
    Endpoint(
        "POST", f"{SESSION}/permissions/{{permissionID}}", asks.respond, asks.PermissionResponse
    ),
    Endpoint("GET", "/question", asks.questions),
    Endpoint("POST", "/question/{requestID}/reply", asks.answer, asks.QuestionReply),
    Endpoint("POST", "/question/{requestID}/reject", asks.decline),
    # what clients ask before they start
    Endpoint("GET", "/config", catalog.config),
    Endpoint("GET", "/global/config", catalog.config),
    Endpoint("PATCH", "/config", instance.configure, instance.ChangedConfig),
    Endpoint("PATCH", "/global/config", instance.configure, instance.ChangedConfig),
    Endpoint("GET", "/config/providers", catalog.config_providers),
    Endpoint("GET", "/provider", catalog.providers),
    Endpoint("GET", "/provider/auth", catalog.empty_object),
    Endpoint("GET", "/agent", catalog.agents),
    Endpoint("GET", "/command", catalog.listed_commands),
    Endpoint("GET", "/path", catalog.paths),
    Endpoint("GET", "/project", catalog.projects),
    Endpoint("GET", "/project/current", catalog.project),
    Endpoint("GET", "/project/{projectID}/directories", catalog.project_directories),
    Endpoint("GET", "/vcs", catalog.vcs),
    Endpoint("GET", "/lsp", catalog.empty_list),
    Endpoint("GET", "/formatter", catalog.empty_list),
    Endpoint("GET", "/mcp", catalog.empty_object),
    Endpoint("GET", "/skill", catalog.empty_list),
    Endpoint("GET", "/experimental/capabilities", instance.capabilities),
    Endpoint("GET", "/experimental/resource", catalog.empty_object),
    Endpoint("GET", "/experimental/tool", instance.tools),
    Endpoint("GET", "/experimental/tool/ids", instance.tool_names),
    # files of the directory
    Endpoint("GET", "/find", files.text),
    Endpoint("GET", "/find/file", files.names),
    Endpoint("GET", "/find/symbol", files.symbols),
    Endpoint("GET", "/file", files.listing),
    Endpoint("GET", "/file/content", files.content),
    # the server
    Endpoint("POST", "/instance/dispose", instance.dispose),
    Endpoint("POST", "/global/dispose", instance.dispose_all),
    Endpoint("POST", "/log", instance.log, instance.LogLine),
    Endpoint("GET", "/global/health", catalog.health),
    Endpoint("GET", "/doc", describe),
    # beyond OpenCode
    Endpoint("GET", "/understudy/state", supervision.state),
    Endpoint("GET", "/understudy/quarantine", supervision.quarantine),
    Endpoint("GET", "/understudy/dead-letters", supervision.dead_letters),
    Endpoint("GET", "/understudy/claims", supervision.claims),
    Endpoint("GET", "/understudy/bypasses", supervision.bypasses),
    Endpoint("GET", "/understudy/journal", supervision.journal),
    Endpoint("GET", f"/understudy{SESSION}", supervision.session_state),
    Endpoint("GET", f"/understudy{SESSION}/prompts", supervision.prompts),
    Endpoint("POST", f"/understudy{SESSION}/reset", supervision.reset),
)


def application(
    gateway: Gateway,
    *,
    username: str = "opencode",
    password: str = "",
    origins: Iterable[str] = (),
    names: Iterable[str] = (),
) -> ASGIApp:
    """The ASGI application for a runtime that has been started; see ``Access`` for the rest."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        gateway.hub.start()
        try:
            yield
        finally:
            gateway.looking.shutdown(wait=False, cancel_futures=True)
            await gateway.hub.stop()

    app = Starlette(
        routes=[_route(gateway, each) for each in ENDPOINTS],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Access(app, username=username, password=password, origins=origins, names=names)


def _route(gateway: Gateway, endpoint: Endpoint) -> Route:
    async def serve(request: Request) -> Response:
        try:
            answer = await endpoint.handler(Call(gateway, request))
            return answer if isinstance(answer, Response) else json_response(answer)
        except Exception as error:  # noqa: BLE001 - answered, and logged if unexpected
            return error_response(error)

    return Route(endpoint.path, serve, methods=[endpoint.method], name=endpoint.operation)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method: JSON, for no client expects a page."""
    assert isinstance(error, HTTPException), "registered for these"
    name = "NotFoundError" if error.status_code == 404 else "BadRequest"  # noqa: PLR2004
    path = request.url.path
    message = f"{request.method} {path}: {unserved.why(path) or error.detail}"
    return json_response({"name": name, "data": {"message": message}}, error.status_code)
