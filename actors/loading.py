"""Loading: what a new actor reads of its session before it handles anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from understudy.actors.core.commands import Loaded, Recover
from understudy.actors.core.context import boundary
from understudy.actors.core.state import Entry, State
from understudy.errors import SessionNotFound
from understudy.store.records import BUSY

if TYPE_CHECKING:
    from understudy.actors.core.state import Rules
    from understudy.actors.messages import Activated
    from understudy.store.records import Session
    from understudy.store.store import Store
    from understudy.store.unfinished import Unfinished

SET_ASIDE_AT: Final = 2  # crashes on the same prompt before it is set aside


class Found(msgspec.Struct, frozen=True):
    """A session as its rows say it is, and what makes it whole.

    ``crashes`` of its actors, one after the other; until the recovery is committed its state is
    ``before``.
    """

    state: State
    before: State
    recover: Recover
    crashes: int


def find(store: Store, rules: Rules, session_id: str, message: Activated) -> Found:
    """Load a session that was claimed just now. Raises ``SessionNotFound``."""
    info = store.read.session(session_id)
    if info is None:
        raise SessionNotFound(f"No session {session_id}", session_id=session_id)
    rows = store.read.unfinished([session_id])[session_id]
    if rows.damaged:
        store.give_up_damaged(session_id)
    record, state = message.record, State(info=info, seq=message.claimed.seq)
    set_aside = record is not None and record.culprit_count >= SET_ASIDE_AT
    works = rows.prompts or rows.messages or rows.parts
    return Found(
        state=state,
        before=msgspec.structs.replace(state, status=BUSY) if works else state,
        recover=Recover(
            loaded=loaded_of(rows, tails=_boundaries(store, rules, info, rows.summarised)),
            reason=message.reason,
            epoch=message.claimed.epoch,
            restarted=message.restarted,
            set_aside=record.culprit if record is not None and set_aside else None,
        ),
        crashes=record.consecutive if record is not None else 0,
    )


def _boundaries(
    store: Store, rules: Rules, info: Session, summarised: dict[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """What summaries cover whose markers were never told."""
    if not summarised:
        return {}
    history, tail = store.read.history(info.id), rules.compaction.tail
    return {
        marker_id: boundary(history, marker_id, tail=tail, revert=info.revert)
        for marker_id in summarised
    }


def loaded_of(
    rows: Unfinished, *, tails: Mapping[str, tuple[str | None, str | None]] | None = None
) -> Loaded:
    """What was read as what is decided about."""
    return Loaded(
        prompts=tuple(Entry(prompt, mine) for prompt, mine in rows.prompts),
        messages=rows.messages,
        parts=rows.parts,
        markers=rows.markers,
        asks=rows.asks,
        later=rows.later,
        summarised=rows.summarised,
        tails=dict(tails or {}),
        lost=rows.lost,
        steps=rows.steps,
    )
