"""What OpenCode has no word for: supervision, dead letters, the tracker, the journal."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from understudy.actors.core.recovery import SET_ASIDE
from understudy.gateway.http.call import Call
from understudy.store.records import Prompt

PAGE: Final = 500
RECOVERED: Final = 100


async def state(call: Call) -> Any:
    """The runtime as a whole."""
    gateway, runtime = call.gateway, call.gateway.runtime
    return {
        "id": runtime.id,
        "version": gateway.version,
        "directory": gateway.directory,
        "started": gateway.started_ms,
        "cursor": runtime.cursor,
        "live": runtime.live_sessions(),
        "statuses": runtime.statuses(),
        "restarts": runtime.restarts,
        "quarantined": len(runtime.quarantined()),
        "recovered": list(runtime.recovered)[-RECOVERED:],
        "tracker": runtime.tracker.counts(),
        "connections": len(gateway.hub.connections),
        "dropped": gateway.hub.dropped,
    }


async def quarantine(call: Call) -> Any:
    """Sessions that do not run any more, and why."""
    found = call.gateway.runtime.quarantined()
    return [{"sessionID": key, "reason": reason} for key, reason in found.items()]


async def reset(call: Call) -> Any:
    """Let a quarantined session run again. True if it was quarantined."""
    return bool(await (await call.gateway.session(call.session_id)).reset())


async def session_state(call: Call) -> Any:
    """What one session does, what waits in it, and who owns it."""
    session = await call.gateway.session(call.session_id)
    status = await session.status()
    reads = call.gateway.runtime.engine.store.read
    return {
        "sessionID": session.id,
        "type": status.type,
        "attempt": status.attempt,
        "message": status.message,
        "next": status.next_ms,
        "queued": status.queued,
        "asks": status.asks,
        "owner": await call.gateway.read(lambda: reads.owner(session.id)),
    }


async def prompts(call: Call) -> Any:
    """Every prompt a session accepted, with its outcome, oldest first."""
    await call.gateway.info(call.session_id)
    return list(await call.session().prompts())


async def dead_letters(call: Call) -> Any:
    """Prompts that were set aside because they kept crashing their session."""
    reads = call.gateway.runtime.engine.store.read
    limit = call.limit(PAGE) or PAGE

    def read() -> list[Prompt]:
        with reads.connection() as c:
            rows = c.execute(
                "SELECT data FROM inbox WHERE open = 0 AND instr(data, ?) > 0 LIMIT ?",
                (msgspec.json.encode(SET_ASIDE.message), limit),
            ).fetchall()
        return [msgspec.json.decode(data, type=Prompt) for (data,) in rows]

    return await call.gateway.read(read)


async def claims(call: Call) -> Any:
    """Sessions that outside integrations have claimed."""
    return list(call.gateway.runtime.tracker.claims().values())


async def bypasses(call: Call) -> Any:
    """Sessions whose hooks do nothing."""
    return list(call.gateway.runtime.tracker.bypasses().values())


async def journal(call: Call) -> Any:
    """Events as committed: after a cursor, of one session if named, a page at a time."""
    reads = call.gateway.runtime.engine.store.read
    after, limit = call.number("after") or 0, call.limit(PAGE) or PAGE
    session_id = call.query("sessionID")
    events = await call.gateway.read(
        lambda: reads.events(after=after, limit=limit, session_id=session_id)
    )
    oldest, newest = await call.gateway.read(reads.cursors)
    return {
        "oldest": oldest,
        "newest": newest,
        "events": [
            {
                "cursor": event.cursor,
                "seq": event.seq,
                "time": event.time_ms,
                "type": event.type,
                "sessionID": event.session_id,
                "properties": event.data,
            }
            for event in events
        ],
    }
