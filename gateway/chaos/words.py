"""What parent and worker of ``chaos kill`` say to each other, and what the worker was promised."""

from __future__ import annotations

from typing import Literal

import msgspec


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the parent to the worker.

    ``start`` opens a runtime, ``work`` begins and ``rest`` ends the load, ``arm`` sets the point at
    which to die, ``limit`` bounds the database's pages (0: no more), ``close`` ends in good order.

    Attributes:
        point: where to die, the ``nth`` time it is passed.
        again: promises whose prompts are prompted again.
        within_s: seconds in which everything has to settle.
        planted: a program that is run first, to break the runtime on purpose.
    """

    kind: Literal["start", "work", "rest", "arm", "limit", "close"]
    database: str = ""
    ledger: str = ""
    seed: str = ""
    point: str = ""
    nth: int = 1
    lease_s: float = 15.0
    on_restart: Literal["interrupt", "resume"] = "interrupt"
    within_s: float = 0.0
    pages: int = 0
    planted: str = ""
    again: tuple[Promise, ...] = ()


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the worker to the parent.

    ``ready``: a runtime is open (``id``) and has ``recovered`` so many sessions. ``settled``: it
    rests and nothing is open. ``stuck``: something still is, as ``what`` says. ``failed``: it could
    not start, with an error of ours. ``closed``: in good order.
    """

    kind: Literal["ready", "settled", "stuck", "failed", "closed"]
    id: str = ""
    what: str = ""
    recovered: int = 0


class Promise(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something a caller was told, or (``…ing``) is about to ask for: written before the call.

    ==========  ================================================================================
    born        ``session`` was created, below ``parent``; ``said`` is "internal" if it is
    accepted    the prompt ``key``, whose text is ``text``
    outcome     of the prompt ``key``: ``said``, with the answer's ``text``
    deleted     ``session`` and all below it are gone
    reverted    ``session`` may lose messages
    replied     the ask ``key`` was answered with ``said``
    compacted   the marker ``key`` is committed
    claimed     the tracker's ``key``, for the owner ``said``; and ``released``
    published   the event ``key`` (its cursor) of type ``said``
    started     the tool call ``key`` began at ``at_ms`` in process ``pid``
    effect      and did what must not be done twice
    refused     the store could not take it, as ``said``
    broken      what must not happen: ``said``
    ==========  ================================================================================
    """

    kind: Literal[
        "born",
        "accepted",
        "outcome",
        "deleting",
        "deleted",
        "reverting",
        "replied",
        "compacted",
        "claimed",
        "releasing",
        "released",
        "published",
        "started",
        "effect",
        "refused",
        "broken",
    ]
    session: str = ""
    key: str = ""
    said: str = ""
    text: str = ""
    parent: str = ""
    at_ms: int = 0
    pid: int = 0
