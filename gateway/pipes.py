"""A worker process and its parent: orders go in, news come out, a line of JSON each.

When the input ends the parent is gone, and so is the worker, at once: it may be killed anyway.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

N = TypeVar("N", bound=msgspec.Struct)
O = TypeVar("O", bound=msgspec.Struct)  # noqa: E741 - an order

# --- the parent's end --------------------------------------------------------------------------


class Child(Generic[N]):
    """One life of a worker: ``python -m module arguments``. Its errors are appended to ``log``."""

    def __init__(self, module: str, *arguments: str, news: type[N], log: Path) -> None:
        self.news: queue.SimpleQueue[N | None] = queue.SimpleQueue()
        self._kind = news
        command = [sys.executable, "-m", module, *arguments]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._reader = threading.Thread(target=self._read, name="news", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # the last one may have been cut short by a kill
                self.news.put(msgspec.json.decode(line, type=self._kind))
        self.news.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, order: msgspec.Struct) -> None:
        """Tell the worker. One that is dead gets the order again in its next life."""
        assert self._process.stdin is not None, "it was asked for"
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()

    def take(self, timeout_s: float) -> list[N | None]:
        """What has come in, waiting for the first of it; None is the worker's end."""
        found = []
        try:
            found.append(self.news.get(timeout=timeout_s))
            while True:
                found.append(self.news.get_nowait())
        except queue.Empty:
            return found

    def freeze(self) -> None:
        """SIGSTOP, and wait until every thread of it stands."""
        self._process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

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


# --- the worker's end --------------------------------------------------------------------------


def tell(news: msgspec.Struct) -> None:
    try:
        os.write(sys.stdout.fileno(), msgspec.json.encode(news) + b"\n")
    except OSError:
        os._exit(1)


def read_orders(kind: type[O], take: Callable[[O], object]) -> None:
    """Hand over what is ordered, in a thread of its own."""

    def read() -> None:
        # Not sys.stdin: the interpreter cannot end while a thread waits inside it.
        rest = b""
        while chunk := os.read(0, 65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                take(msgspec.json.decode(line, type=kind))
        os._exit(1)

    threading.Thread(target=read, name="orders", daemon=True).start()
