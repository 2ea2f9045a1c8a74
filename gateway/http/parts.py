"""Messages and parts of idle sessions: taken out, or a text rewritten."""

from __future__ import annotations

from typing import Any

from understudy.gateway.http.call import Call
from understudy.store.records import Record


class ChangedPart(Record, frozen=True, kw_only=True):
    """A part as the client wants it; of that only the text may differ."""

    text: str


async def delete_message(call: Call) -> Any:
    """Take a message out of an idle session's transcript."""
    await call.session().edit(call.path("messageID"))
    return True


async def delete_part(call: Call) -> Any:
    """Take a part out of a message of an idle session."""
    await call.session().edit(call.path("messageID"), part_id=call.path("partID"))
    return True


async def update_part(call: Call) -> Any:
    """Rewrite the text of a part of an idle session."""
    body = await call.body(ChangedPart)
    done = await call.session().edit(
        call.path("messageID"), part_id=call.path("partID"), text=body.text
    )
    return call.gateway.wire.part(done.value)
