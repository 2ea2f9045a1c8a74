"""``understudy sessions``, ``show`` and ``events``: look into a database and touch nothing."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from datetime import datetime
from typing import Any, Final

import msgspec

from understudy.errors import InvalidInput, SessionNotFound
from understudy.gateway import display
from understudy.gateway.display import plain
from understudy.gateway.places import database_path
from understudy.store.events import Event
from understudy.store.reads import Reads, open_readonly
from understudy.store.records import AnyPart, Session, TextPart, ToolCompleted, ToolFailed, ToolPart

PAGE: Final = 500
POLL_S: Final = 0.1


def sessions(args: argparse.Namespace) -> int:
    """Sessions, the most recently changed first."""
    with closing(open_readonly(database_path(args.database))) as reads:
        found = reads.sessions(limit=args.limit, archived=None, internal=None)
        unfinished = {session_id for session_id, _ in reads.unfinished_sessions()}
        quarantined = reads.quarantined()
    states = [
        "quarantined" if each.id in quarantined else "busy" if each.id in unfinished else "idle"
        for each in found
    ]
    if args.json:
        for each, state in zip(found, states, strict=True):
            _print_json({"state": state, "info": each})
        return 0
    rows = [
        (each.id, state, _when(each.time.updated), plain(each.title, one_line=True))
        for each, state in zip(found, states, strict=True)
    ]
    if rows:
        display.table(rows, heads=("session", "state", "changed", "title"))
    else:
        print("No sessions.")
    return 0


def show(args: argparse.Namespace) -> int:
    """A session's transcript."""
    with closing(open_readonly(database_path(args.database))) as reads:
        info = reads.session(args.session)
        if info is None:
            raise SessionNotFound(f"No session {args.session}", session_id=args.session)
        pairs = reads.messages(args.session)
        prompts = {prompt.message_id: prompt for prompt in reads.prompts(args.session)}
    if args.json:
        transcript = [{"info": message, "parts": parts} for message, parts in pairs]
        _print_json({"info": info, "messages": transcript, "prompts": list(prompts.values())})
        return 0
    _show_head(info)
    for message, parts in pairs:
        prompt = prompts.get(message.id)
        outcome = "" if prompt is None else f", {prompt.outcome or 'open'}"
        print(f"\n[{message.role}, {_when(message.time.created)}{outcome}]")
        for part in parts:
            if line := _part_line(part):
                print(line)
        error = getattr(message, "error", None)
        if error is not None:
            print(plain(f"! {error.name}: {error.message}"))
    return 0


def _show_head(info: Session) -> None:
    print(plain(info.title, one_line=True))
    print(f"{info.id}, {_when(info.time.created)}, {info.tokens.total:,} tokens")


def _part_line(part: AnyPart) -> str:
    if isinstance(part, TextPart):
        return plain(part.text)
    if not isinstance(part, ToolPart):
        return ""
    state = part.state
    given = msgspec.json.encode(state.input).decode()
    line = plain(f"* {part.tool} {given}", one_line=True)
    if isinstance(state, ToolCompleted):
        return f"{line}: {len(state.output):,} characters"
    if isinstance(state, ToolFailed):
        return f"{line}: {plain(state.error, one_line=True)}"
    return f"{line}: {state.__struct_config__.tag}"


def events(args: argparse.Namespace) -> int:
    """The journal from a cursor on; with ``--follow`` also what is committed from now on."""
    if args.after < 0:
        raise InvalidInput("--after is a cursor: 0 or more", field="after")
    cursor = args.after
    with closing(open_readonly(database_path(args.database))) as reads:
        if args.session is not None:
            _check_known(reads, args.session)
        while True:
            page = _page(reads, cursor, args.session)
            for event in page:
                cursor = event.cursor or cursor
                _print_event(event, as_json=args.json)
            if len(page) == PAGE:
                continue
            if not args.follow:
                return 0
            time.sleep(POLL_S)


def _check_known(reads: Reads, session_id: str) -> None:
    """The journal knows sessions that are deleted, and forgets what was long ago of the others."""
    if reads.session(session_id) is None and not _page(reads, 0, session_id):
        raise SessionNotFound(f"No session {session_id}", session_id=session_id)


def _page(reads: Reads, after: int, session_id: str | None) -> list[Event]:
    return reads.events(after=after, limit=PAGE, session_id=session_id)


def _print_event(event: Event, *, as_json: bool) -> None:
    if as_json:
        _print_json(event)
    else:
        data = plain(msgspec.json.encode(event.data).decode(), one_line=True)
        print(f"{event.cursor} {event.session_id} {event.seq} {event.type} {data}", flush=True)


def _print_json(value: Any) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def _when(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")
