"""bash: commands in a workspace, each in a process group of its own.

The command starts in the root, and that is all: a shell goes where its user may go. Guard it
with the permission ``bash``.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from understudy.actors.tools.commands import always_patterns, command_patterns
from understudy.actors.tools.context import ToolContext, signal_group
from understudy.actors.tools.root import Root
from understudy.actors.tools.tool import ToolResult, tool
from understudy.errors import ToolError

TIMEOUT_S = 120.0
MAX_TIMEOUT_S = 600.0
GRACE_S = 0.3
"""How long a command that must end has between SIGTERM and SIGKILL."""
POLL_S = 0.05
PROGRESS_EVERY_S = 0.1
OUTPUT_BYTES = 40_000
READ_BYTES = 65_536
LEFT_OVER_READS = 64

Seconds = Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)]
Ending: TypeAlias = Literal["exited", "timeout", "cancelled"]


class ShellTools:
    """The tool that runs commands. ``environment`` replaces the one of this process."""

    def __init__(self, root: Root, *, environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.environment = environment
        self.shell = shutil.which("bash") or "/bin/sh"

    def _commands(self, given: Mapping[str, Any]) -> Sequence[str]:
        return command_patterns(str(given.get("command", "")))

    def _any_arguments(self, given: Mapping[str, Any]) -> Sequence[str]:
        return always_patterns(self._commands(given))

    # The runtime's own limit must not come before the one that the model chose.
    @tool(
        permission="bash",
        patterns=_commands,
        always=_any_arguments,
        timeout_s=MAX_TIMEOUT_S + 30,
        max_output=OUTPUT_BYTES + 2000,
    )
    def bash(
        self, command: str, timeout_s: Seconds = TIMEOUT_S, ctx: ToolContext | None = None
    ) -> ToolResult:
        """Run a shell command in the workspace and return its output and exit code.

        There is no standard input and no terminal. What the command leaves running in the
        background is ended with it.

        Args:
            command: what to run.
            timeout_s: after how many seconds to end it.
            ctx: the call; its end is the command's end.
        """
        if ctx is not None:
            ctx.check()
        transcript = Transcript(OUTPUT_BYTES)
        process = self._start(command)
        forget = ctx.track(process) if ctx is not None else _nothing
        try:
            ending = _follow(process, transcript, min(timeout_s, MAX_TIMEOUT_S), ctx)
        finally:
            _end(process)
            forget()
            _drain(process, transcript)
        if ctx is not None:
            ctx.check()
        exit_code = process.returncode if ending == "exited" else None
        metadata: dict[str, Any] = {"output": transcript.text(), "exit": exit_code}
        if transcript.dropped:
            metadata["truncated"] = True
        note = "" if exit_code == 0 else f"\n[{_outcome(exit_code, timeout_s)}]"
        return ToolResult(transcript.text() + note, command, metadata)

    def _start(self, command: str) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(  # noqa: S603  running what it is given is its job
                [self.shell, "-c", command],
                cwd=self.root.path,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ToolError(f"the command cannot be started: {error}") from error


class Transcript:
    """The beginning and the end of an output of any length, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self.half = limit // 2
        self.head = bytearray()
        self.tail = bytearray()
        self.dropped = 0

    def write(self, data: bytes) -> None:
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        excess = len(self.tail) - self.half
        if excess > 0:
            del self.tail[:excess]
            self.dropped += excess

    def text(self) -> str:
        if not self.dropped:
            return (self.head + self.tail).decode("utf-8", "replace")
        note = f"\n\n[… {self.dropped} bytes left out …]\n\n"
        # A character that the cut went through is dropped; it is not the command's mistake.
        return self.head.decode("utf-8", "ignore") + note + self.tail.decode("utf-8", "ignore")


# --- running -----------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _follow(
    process: subprocess.Popen[bytes],
    transcript: Transcript,
    timeout_s: float,
    ctx: ToolContext | None,
) -> Ending:
    """Collect output until the shell has ended, whoever else still holds its pipe."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    publish = _publisher(transcript, ctx)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while process.poll() is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return "timeout"
            if ctx is not None and ctx.cancelled:
                return "cancelled"
            if not selector.get_map():
                _wait(process, min(POLL_S, left_s))
            elif selector.select(min(POLL_S, left_s)):
                if data := os.read(process.stdout.fileno(), READ_BYTES):
                    transcript.write(data)
                else:
                    selector.unregister(process.stdout)
            publish()
    return "exited"


def _publisher(transcript: Transcript, ctx: ToolContext | None) -> Callable[[], None]:
    """Publishes the output when it has grown, and not too often."""
    published, size = -PROGRESS_EVERY_S, 0

    def publish() -> None:
        nonlocal published, size
        grown = len(transcript.head) + len(transcript.tail) + transcript.dropped
        now = time.monotonic()
        if ctx is not None and grown != size and now - published >= PROGRESS_EVERY_S:
            published, size = now, grown
            ctx.progress(output=transcript.text())

    return publish


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group; at once when the shell has ended by itself."""
    if process.poll() is None:
        signal_group(process, signal.SIGTERM)
        _wait(process, GRACE_S)
    signal_group(process, signal.SIGKILL)
    _wait(process, 5.0)  # only a process stuck inside the kernel survives this


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


def _drain(process: subprocess.Popen[bytes], transcript: Transcript) -> None:
    """Read what is left in the pipe; who left the group and still writes is not waited for."""
    assert process.stdout is not None
    with process.stdout as pipe:
        os.set_blocking(pipe.fileno(), False)
        for _ in range(LEFT_OVER_READS):
            try:
                data = os.read(pipe.fileno(), READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                return
            transcript.write(data)


def _outcome(exit_code: int | None, timeout_s: float) -> str:
    if exit_code is None:
        return f"Ended after {timeout_s:g} s, with everything it had started."
    if exit_code < 0:
        return f"Ended by signal {-exit_code}."
    return f"Exit code {exit_code}."
