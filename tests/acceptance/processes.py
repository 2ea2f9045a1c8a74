"""Child processes under remote control: real ones, to be killed, stopped and continued."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE_S = 30.0  # a bound on hangs
_CONSOLE = Path(__file__).parent / "children" / "console.py"
_SOURCES = Path(__file__).parents[2] / "src"


class ChildError(Exception):
    """What the child's code raised; ``name`` is its type."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class Child:
    """A process that runs what it is sent: one line in, one line out; notes in between.

    Its namespace has ``Runtime``, the ``cast`` module's names, ``note(word)`` and ``spawn(f)``.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["PYTHONPATH"] = os.pathsep.join([str(_SOURCES), environment["PYTHONPATH"]])
        self._process = subprocess.Popen(
            [sys.executable, str(_CONSOLE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._notes: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # cut short by a kill
                break
            if "note" in message:
                self._notes.put(message["note"])
            else:
                self._answers.put(message)
        self._answers.put(None)
        self._notes.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, code: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        message = self._answers.get(timeout=DEADLINE_S)
        if message is None:
            raise ChildError("EOFError", "the child is dead")
        if "error" in message:
            raise ChildError(*message["error"])
        return message["value"]

    def do(self, code: str) -> Any:
        """Run code there; the value of its last expression, as JSON."""
        self.send(code)
        return self.answer()

    def wait_note(self, word: str) -> None:
        """Wait until the child says ``word``."""
        while (note := self._notes.get(timeout=DEADLINE_S)) != word:
            assert note is not None, f"the child died before it said {word!r}"

    def notes(self) -> list[str]:
        """What a dead child had said and nobody waited for."""
        said = []
        while (note := self._notes.get(timeout=DEADLINE_S)) is not None:
            said.append(note)
        return said

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self._process.kill()
        self.wait_dead()

    def wait_dead(self) -> int:
        code = self._process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        return code

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread of it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def proceed(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait_dead()
