"""A pace: what thousands would do in one moment is done a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

AT_ONCE: Final = 64
WINDOW_S: Final = 0.005


class Pace:
    """Lets ``AT_ONCE`` through in each ``WINDOW_S``, in order. For one event loop.

    Thousands of answers that end together would have their loop for a tenth of a second, and all
    others would stand still. Where there are few, nobody waits.
    """

    def __init__(self) -> None:
        self._since_s = 0.0
        self._left = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Wait for one's turn; who is cancelled gives it to the next."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            now_s = loop.time()
            if now_s - self._since_s >= WINDOW_S:
                self._since_s, self._left = now_s, AT_ONCE
            if self._left > 0:
                self._left -= 1
                return
            loop.call_later(WINDOW_S, self._next)
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        left = AT_ONCE
        while self._waiting and left:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                left -= 1
        if self._waiting:
            asyncio.get_running_loop().call_later(WINDOW_S, self._next)
