"""Time as the runtime sees it: monotonic for durations, wall for display and for rows.

Everything that measures or stamps takes a ``Clock``, so that tests and the simulator decide what
time it is.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from understudy.errors import InvalidInput


class Clock(Protocol):
    """Both methods are cheap and safe from any thread."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment. Never goes back; means nothing after a restart."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since the epoch. May jump either way when someone sets the clock."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class VirtualClock:
    """Stands still until told otherwise. Counts nanoseconds, so steps of 0.1 add up exactly."""

    def __init__(self, *, monotonic_s: float = 1_000.0, wall_ms: int = 1_750_000_000_000) -> None:
        self._lock = threading.Lock()
        self._monotonic_ns = round(monotonic_s * 1e9)
        self._wall_ns = wall_ms * 1_000_000

    def monotonic_s(self) -> float:
        with self._lock:
            return self._monotonic_ns / 1e9

    def wall_ms(self) -> int:
        with self._lock:
            return self._wall_ns // 1_000_000

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises ``InvalidInput`` for a negative step."""
        if seconds < 0:
            raise InvalidInput("monotonic time never goes back", seconds=seconds)
        step_ns = round(seconds * 1e9)
        with self._lock:
            self._monotonic_ns += step_ns
            self._wall_ns += step_ns

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as a person or a time server would."""
        with self._lock:
            self._wall_ns += round(seconds * 1e9)
