"""The document at ``/doc``: what is served, as OpenAPI."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from understudy.gateway.http.wire import PROTOCOL

if TYPE_CHECKING:
    from understudy.gateway.http.app import Endpoint

_ERRORS: Final = {
    "400": {"description": "unusable", "content": {"application/json": {}}},
    "404": {"description": "not there", "content": {"application/json": {}}},
}
_DIRECTORY: Final = {
    "name": "directory",
    "in": "query",
    "required": False,
    "schema": {"type": "string"},
}


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    endpoints = list(endpoints)
    bodies = {each.body for each in endpoints if each.body is not None}
    schemas, components = msgspec.json.schema_components(
        sorted(bodies, key=lambda shape: shape.__name__),
        ref_template="#/components/schemas/{name}",
    )
    shapes = dict(zip(sorted(bodies, key=lambda shape: shape.__name__), schemas, strict=True))
    paths: dict[str, Any] = {}
    for each in endpoints:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, shapes)
    return {
        "openapi": "3.1.1",
        "info": {"title": "understudy", "version": PROTOCOL, "description": "OpenCode's protocol"},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(endpoint: Endpoint, shapes: dict[Any, Any]) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)\}", endpoint.path)
    operation: dict[str, Any] = {
        "operationId": endpoint.operation,
        "summary": (endpoint.handler.__doc__ or "").strip().split("\n")[0],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
        + [_DIRECTORY],
        "responses": {endpoint.success: {"description": "done", "content": _content(endpoint)}},
    }
    if names or endpoint.body is not None:
        operation["responses"] |= _ERRORS
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": False,
            "content": {"application/json": {"schema": shapes[endpoint.body]}},
        }
    return operation


def _content(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.success == "204":
        return {}
    return {"text/event-stream" if endpoint.path.endswith("/event") else "application/json": {}}
