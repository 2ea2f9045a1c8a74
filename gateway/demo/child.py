"""The worker process as the parent holds it: started, ordered, listened to, killed."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from understudy.gateway.demo.ledger import News, Order


class Child:
    """One life of the worker. Its standard error is appended to ``log``."""

    def __init__(self, setup: bytes, *, log: Path) -> None:
        self.news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        command = [sys.executable, "-m", "understudy.gateway.demo.worker", setup.decode()]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._reader = threading.Thread(target=self._read, name="demo-news", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # the last one may have been cut short by a kill
                self.news.put(msgspec.json.decode(line, type=News))
        self.news.put(None)

    def order(self, order: Order) -> None:
        """Tell the worker. One that is dead gets the order again in its next life."""
        assert self._process.stdin is not None, "it was asked for"
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()

    def take(self, timeout_s: float) -> list[News | None]:
        """What has come in, waiting for the first of it; None is the worker's end."""
        found = []
        try:
            found.append(self.news.get(timeout=timeout_s))
            while True:
                found.append(self.news.get_nowait())
        except queue.Empty:
            return found

    def kill(self) -> None:
        """SIGKILL, now. What it had said before can still be taken."""
        self._process.kill()

    def bury(self) -> int:
        """Wait for the end and give its exit code."""
        code = self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it did not live to read
                    pipe.close()
        return code
