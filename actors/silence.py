"""Silence: a model's stream that nothing comes from is broken off; one timer looks at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Self

from understudy.errors import ModelUnavailable

LOOKS: Final = 8


class Silences:
    """The streams of one event loop, each of which may be silent for ``limit_s``.

    They are looked at ``LOOKS`` times in that time, and looks are what is counted: a stream is
    broken off an eighth too late at most, and a process that was frozen first reads what came.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._watched: dict[Silence, None] = {}
        self._looking = False

    def watch(self, unheeded: Callable[[], None]) -> Silence:
        """A block to read a stream in. ``unheeded()`` is called if it does not heed being cut."""
        return Silence(self, unheeded)

    def add(self, silence: Silence) -> None:
        """Its block begins."""
        self._watched[silence] = None
        if not self._looking:
            self._looking = True
            self._look_later()

    def remove(self, silence: Silence) -> None:
        """Its block is over, or was given up on."""
        self._watched.pop(silence, None)

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(self.limit_s / LOOKS, self._look)

    def _look(self) -> None:
        self._looking = bool(self._watched)
        if self._looking:
            self._look_later()
        for silence in list(self._watched):
            silence.look()


class Silence:
    """Breaks its block off, with ``ModelUnavailable``, when nothing was heard for the limit.

    ``unheeded`` is called when the block has not ended as long again after that.
    """

    __slots__ = ("_broken_off", "_looks", "_silences", "_task", "_unheeded", "heard")

    def __init__(self, silences: Silences, unheeded: Callable[[], None]) -> None:
        self._silences = silences
        self._unheeded = unheeded
        self._task: asyncio.Task[None] | None = None
        self._looks = 0  # since something was heard
        self._broken_off = False
        self.heard = True  # whoever hears something sets it

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._silences.add(self)
        return self

    def look(self) -> None:
        """Count how often nothing was heard since the last look."""
        self._looks = 0 if self.heard else self._looks + 1
        self.heard = False
        if self._looks < LOOKS:
            return
        self._looks = 0
        if self._broken_off:
            self._silences.remove(self)
            self._unheeded()
        elif self._task is not None:
            self._broken_off = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._silences.remove(self)
        if (
            self._broken_off
            and self._task is not None
            and self._task.uncancel() <= 0
            and kind is asyncio.CancelledError
        ):
            raise ModelUnavailable(f"The model said nothing for {self._silences.limit_s:g} s")
