"""What clients ask before they start: configuration, providers, agents, paths, projects."""

from __future__ import annotations

import asyncio
import getpass
from typing import TYPE_CHECKING, Any

from understudy.gateway.http import commands
from understudy.gateway.http.call import Call
from understudy.gateway.http.places import branch_of, place_of
from understudy.gateway.http.wire import PROTOCOL

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model

_NAMES = {"openai": "OpenAI", "anthropic": "Anthropic", "scripted": "Scripted"}


def _model(model: Model) -> dict[str, Any]:
    kinds = {"text": True, "audio": False, "image": True, "video": False, "pdf": True}
    return {
        "id": model.model_id,
        "providerID": model.provider_id,
        "api": {"id": model.model_id, "url": "", "npm": ""},
        "name": model.model_id,
        "family": "",
        "capabilities": {
            "temperature": False,
            "reasoning": True,
            "attachment": True,
            "toolcall": True,
            "input": kinds,
            "output": {**dict.fromkeys(kinds, False), "text": True},
            "interleaved": False,
        },
        "cost": {"input": 0, "output": 0, "cache": {"read": 0, "write": 0}},
        "limit": {"context": model.context_limit, "output": model.output_limit},
        "status": "active",
        "options": {},
        "headers": {},
        "release_date": "",
        "variants": {},
    }


def _providers(call: Call) -> tuple[list[dict[str, Any]], dict[str, str]]:
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for model in call.gateway.models:
        provider = found.setdefault(
            model.provider_id,
            {
                "id": model.provider_id,
                "name": _NAMES.get(model.provider_id, model.provider_id),
                "source": "config",
                "env": [],
                "options": {},
                "models": {},
            },
        )
        provider["models"][model.model_id] = _model(model)
        first.setdefault(model.provider_id, model.model_id)
    return list(found.values()), first


async def config(call: Call) -> Any:
    """The configuration, as far as there is one: it is set where the server is started."""
    model = call.gateway.models[0]
    return {
        "$schema": "https://opencode.ai/config.json",
        "model": f"{model.provider_id}/{model.model_id}",
        "username": _user(),
        "share": "disabled",
        "autoupdate": False,
        "agent": {},
        "mode": {},
        "command": {},
        "plugin": [],
        "provider": {},
    }


async def config_providers(call: Call) -> Any:
    """Providers with their models."""
    found, first = _providers(call)
    return {"providers": found, "default": first}


async def providers(call: Call) -> Any:
    """Providers with their models; all of them are connected."""
    found, first = _providers(call)
    return {"all": found, "default": first, "connected": list(first)}


async def agents(call: Call) -> Any:
    """The one agent: what the server was started with."""
    rules = call.gateway.runtime.engine.rules
    return [
        {
            "name": rules.agent,
            "description": "The default agent.",
            "mode": "primary",
            "native": True,
            "permission": rules.permissions,
            "options": {},
        }
    ]


async def listed_commands(call: Call) -> Any:
    """The directory's commands."""
    found = await asyncio.to_thread(commands.available, call.directory)
    return [each.shown() for each in found]


async def paths(call: Call) -> Any:
    """Where things are on the server's machine."""
    place = place_of(call.directory)
    home = call.gateway.home
    return {
        "home": home,
        "state": call.gateway.state_directory,
        "config": f"{home}/.config/opencode",
        "worktree": place.worktree,
        "directory": place.directory,
    }


async def project(call: Call) -> Any:
    """The project of the call's directory."""
    return place_of(call.directory).project(call.gateway.started_ms)


async def projects(call: Call) -> Any:
    """The projects of the directories that have sessions, the server's own first."""
    gateway = call.gateway
    found = await gateway.runtime.sessions(limit=1000)
    directories = [
        gateway.directory,
        *(each.record.directory or gateway.directory for each in found),
    ]
    places = {place_of(each).project_id: place_of(each) for each in directories}
    return [each.project(gateway.started_ms) for each in places.values()]


async def project_directories(call: Call) -> Any:
    """The directories of a project."""
    return [{"directory": place_of(call.directory).worktree}]


async def vcs(call: Call) -> Any:
    """The branch that is checked out."""
    branch = await asyncio.to_thread(branch_of, call.directory)
    return {} if branch is None else {"branch": branch}


async def health(call: Call) -> Any:
    """Whether the server answers."""
    return {"healthy": True, "version": PROTOCOL, "understudy": call.gateway.version}


async def empty_list(_: Call) -> Any:
    """Nothing of the kind here."""
    return []


async def empty_object(_: Call) -> Any:
    """Nothing of the kind here."""
    return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
