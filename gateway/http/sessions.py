"""Sessions: made, listed, changed, copied, deleted."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from typing import Any

import msgspec

from understudy.errors import InvalidInput
from understudy.gateway.http.call import Call
from understudy.store.records import PermissionRule, Record

LISTED = 100


class ModelChoice(Record, frozen=True, kw_only=True):
    """A model by its provider; sessions call it ``id``, prompts ``modelID``."""

    provider_id: str
    id: str | None = None
    model_id: str | None = None

    @property
    def name(self) -> str:
        return f"{self.provider_id}/{self.model_id or self.id or ''}"


class NewSession(Record, frozen=True, kw_only=True):
    title: str | None = None
    parent_id: str | None = None
    agent: str | None = None
    model: ModelChoice | None = None
    permission: tuple[PermissionRule, ...] | None = None
    metadata: dict[str, Any] | None = None


class ChangedTime(Record, frozen=True, kw_only=True):
    archived: float | msgspec.UnsetType | None = msgspec.UNSET


class ChangedSession(Record, frozen=True, kw_only=True):
    title: str | None = None
    time: ChangedTime | None = None
    permission: tuple[PermissionRule, ...] | None = None
    metadata: dict[str, Any] | None = None


class Place(Record, frozen=True, kw_only=True):
    """Where in the transcript: a message, and a part that is not looked at."""

    message_id: str | None = None
    part_id: str | None = None


class Summary(Record, frozen=True, kw_only=True):
    """The model that is to write it; without one it is the session's."""

    provider_id: str | None = None
    model_id: str | None = None


def untitled(parent: bool = False) -> str:  # noqa: FBT001, FBT002 - reads as said
    """The title a session has until its first prompt."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"{'Child' if parent else 'New'} session - {now}"


async def create(call: Call) -> Any:
    """Create a session in the call's directory."""
    body = await call.body(NewSession)
    directory = call.directory
    own = directory == call.gateway.directory  # it was there when the server started
    if not own and not await asyncio.to_thread(os.path.isdir, directory):
        raise InvalidInput(f"there is no directory {directory}", field="directory")
    session = await call.gateway.runtime.create_session(
        title=body.title or untitled(body.parent_id is not None),
        parent_id=body.parent_id,
        directory=directory,
        metadata=body.metadata,
        model=body.model.name if body.model is not None else None,
        agent=call.agent(body.agent),
        permissions=body.permission,
    )
    return call.gateway.wire.session(session.record)


async def listing(call: Call) -> Any:
    """Sessions of the call's directory, the most recently changed first."""
    gateway, limit, since = call.gateway, call.limit(LISTED), call.number("start") or 0
    # Sessions that name no directory, of a program's own runtime, work in the server's.
    directories = [call.directory, ""] if call.directory == gateway.directory else [call.directory]
    records = [
        each.record
        for directory in directories
        for each in await gateway.runtime.sessions(
            directory=directory,
            roots=call.flag("roots"),
            search=call.query("search"),
            archived=None if call.flag("archived") else False,
            limit=limit,
        )
        if each.record.time.updated >= since
    ]
    if len(directories) > 1:
        records.sort(key=lambda each: (-each.time.updated, each.id))
    return [gateway.wire.session(each) for each in records[:limit]]


async def get(call: Call) -> Any:
    """One session."""
    return call.gateway.wire.session(await call.gateway.info(call.session_id))


async def update(call: Call) -> Any:
    """Rename or archive a session, or add permission rules to it."""
    body = await call.body(ChangedSession)
    changes: dict[str, Any] = {}
    if body.title is not None:
        changes["title"] = body.title
    if body.metadata is not None:
        changes["metadata"] = body.metadata
    async with call.gateway.changing(call.session_id):
        session = await call.gateway.session(call.session_id)
        if body.permission:
            changes["permissions"] = (*session.record.permission, *body.permission)
        if changes:
            session = await session.update(**changes)
    if body.time is not None and body.time.archived is not msgspec.UNSET:
        session = await session.archive(bool(body.time.archived))
    return call.gateway.wire.session(session.record)


async def delete(call: Call) -> Any:
    """Delete a session and its children; gone when this answers."""
    await call.session().delete()
    return True


async def status(call: Call) -> Any:
    """Sessions that are not idle, with what they do."""
    gateway = call.gateway
    found: dict[str, Any] = {}
    for actor in gateway.runtime.engine.registry.actors():
        state = actor.state
        if state is None or state.status.type == "idle":
            continue
        if gateway.wire.directory_of(actor.session_id) == call.directory:
            found[actor.session_id] = state.status
    return found


async def children(call: Call) -> Any:
    """The sessions whose parent this is."""
    session = await call.gateway.session(call.session_id)
    return [call.gateway.wire.session(each.record) for each in await session.children()]


async def fork(call: Call) -> Any:
    """Copy the history, up to a message, into a new session."""
    body = await call.body(Place)
    copy = await call.session().fork(before=body.message_id)
    return call.gateway.wire.session(copy.record)


async def abort(call: Call) -> Any:
    """End what runs and what waits, with its tools and their processes."""
    await call.session().abort(queued=True)
    await call.gateway.hub.flushed(call.session_id)
    return True


async def summarize(call: Call) -> Any:
    """Compact the session; answers when the summary has replaced the history."""
    body = await call.body(Summary)
    model = None
    if body.model_id is not None:
        model = body.model_id if body.provider_id is None else f"{body.provider_id}/{body.model_id}"
    compaction = await call.session().compact(model=model)
    await compaction.result()
    await call.gateway.hub.flushed(call.session_id)
    return True


async def revert(call: Call) -> Any:
    """Hide a message and all after it."""
    body = await call.body(Place)
    if body.message_id is None:
        raise InvalidInput("messageID is missing", field="messageID")
    session = await call.session().revert(body.message_id)
    return call.gateway.wire.session(session.record)


async def unrevert(call: Call) -> Any:
    """Show again what was hidden."""
    session = await call.session().unrevert()
    return call.gateway.wire.session(session.record)
