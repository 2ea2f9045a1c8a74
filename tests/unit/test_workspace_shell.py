"""bash: output, exit codes, time limits, and nothing left running."""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from understudy.actors.tools.commands import always_patterns, command_patterns
from understudy.actors.tools.context import DetachedContext
from understudy.actors.tools.root import Root
from understudy.actors.tools.shell import OUTPUT_BYTES, ShellTools, Transcript
from understudy.errors import ToolError, TurnAborted


@pytest.fixture
def shell(tmp_path: Path) -> ShellTools:
    return ShellTools(Root(tmp_path))


def gone(pid_file: Path, within_s: float = 5.0) -> bool:
    """Whether the process whose id is in the file ends in time."""
    try:
        descriptor = os.pidfd_open(int(pid_file.read_text()))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


# --- results -----------------------------------------------------------------------------------


def test_output_and_exit_code_come_back(shell: ShellTools, tmp_path: Path) -> None:
    result = shell.bash("pwd; echo wrong >&2")
    assert result.output == f"{os.path.realpath(tmp_path)}\nwrong\n"
    assert result.metadata == {"output": result.output, "exit": 0}
    failed = shell.bash("echo no; exit 3")
    assert failed.output == "no\n\n[Exit code 3.]"
    assert failed.metadata["exit"] == 3
    assert shell.bash("kill -9 $$").output == "\n[Ended by signal 9.]"


def test_standard_input_is_empty_and_there_is_no_terminal(shell: ShellTools) -> None:
    assert shell.bash("cat; test -t 0 || echo none", timeout_s=10).output == "none\n"


def test_the_environment_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    bare = ShellTools(Root(tmp_path), environment={"PATH": os.environ["PATH"], "A": "b"})
    assert bare.bash("echo $A$API_KEY").output == "b\n"
    assert ShellTools(Root(tmp_path)).bash("echo $API_KEY").output == "s3cret\n"


def test_a_long_output_keeps_its_head_and_tail(shell: ShellTools) -> None:
    result = shell.bash("echo start; head -c 5000000 /dev/zero | tr '\\0' x; echo; echo end")
    assert result.output.startswith("start\nxxx")
    assert result.output.endswith("xxx\nend\n")
    assert "bytes left out" in result.output
    assert len(result.output) < OUTPUT_BYTES + 100
    assert result.metadata["truncated"] is True


def test_a_transcript_is_bounded_and_cuts_no_character() -> None:
    transcript = Transcript(20)
    for _ in range(1000):
        transcript.write("é".encode() * 7)
    assert len(transcript.head) == len(transcript.tail) == 10
    assert transcript.dropped == 14_000 - 20
    assert transcript.text().startswith("ééééé\n") and "\ufffd" not in transcript.text()
    short = Transcript(20)
    short.write(b"12345678901234567890")
    assert short.text() == "12345678901234567890"


def test_what_cannot_be_started_is_a_tool_error(shell: ShellTools) -> None:
    with pytest.raises(ToolError, match="cannot be started"):
        shell.bash("echo \0")
    with pytest.raises(ToolError, match="cannot be started"):
        shell.bash("x" * 3_000_000)
    with pytest.raises(ToolError, match="`timeout_s`"):
        shell.bash.parse('{"command": "ls", "timeout_s": 601}')


def test_progress_shows_the_growing_output(shell: ShellTools, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    seen: list[str] = []

    class Watched(DetachedContext):
        def progress(self, *, title: str | None = None, **metadata: Any) -> None:
            seen.append(metadata["output"])
            if len(seen) == 1:
                (tmp_path / "gate").write_text("go")

    result = shell.bash("echo one; cat gate; echo two", timeout_s=10, ctx=Watched())
    assert seen[0] == "one\n"
    assert result.output == "one\ngotwo\n"


# --- endings -----------------------------------------------------------------------------------


def test_a_time_limit_ends_the_command_and_its_children(shell: ShellTools, tmp_path: Path) -> None:
    result = shell.bash("sleep 60 & echo $! > pid; echo so far; wait", timeout_s=0.5)
    assert result.output == "so far\n\n[Ended after 0.5 s, with everything it had started.]"
    assert result.metadata["exit"] is None
    assert gone(tmp_path / "pid")


def test_a_stubborn_command_is_killed(shell: ShellTools, tmp_path: Path) -> None:
    begun = time.monotonic()
    shell.bash("trap '' TERM; echo $$ > pid; while :; do sleep 60; done", timeout_s=0.3)
    assert time.monotonic() - begun < 3
    assert gone(tmp_path / "pid")


def test_a_background_process_that_holds_the_pipe_does_not_hang_the_call(
    shell: ShellTools, tmp_path: Path
) -> None:
    begun = time.monotonic()
    result = shell.bash("(trap '' TERM; exec sleep 60) & echo $! > pid; echo done")
    assert time.monotonic() - begun < 3
    assert (result.output, result.metadata["exit"]) == ("done\n", 0)
    assert gone(tmp_path / "pid")


def test_a_process_that_left_the_group_does_not_hang_the_call(
    shell: ShellTools, tmp_path: Path
) -> None:
    begun = time.monotonic()
    result = shell.bash("setsid sh -c 'echo $$ > pid; exec yes' & while ! test -s pid; do :; done")
    assert time.monotonic() - begun < 5
    assert result.metadata["exit"] == 0
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_a_command_that_closes_its_output_is_waited_for(shell: ShellTools) -> None:
    assert shell.bash("exec >&- 2>&-; sleep 0.2; exit 5").metadata["exit"] == 5


@pytest.mark.parametrize(
    "command",
    [
        "sleep 60 & echo $! > pid; echo on; wait",
        "trap '' TERM; echo $$ > pid; echo on; while :; do sleep 60; done",
    ],
)
def test_cancelling_ends_everything_within_a_second(
    shell: ShellTools, tmp_path: Path, command: str
) -> None:
    started = threading.Event()

    class Watched(DetachedContext):
        def progress(self, *, title: str | None = None, **metadata: Any) -> None:
            started.set()

    context = Watched()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            shell.bash(command, ctx=context)
        except TurnAborted as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    begun = time.monotonic()
    context.cancel("abort")
    thread.join(10)
    assert time.monotonic() - begun < 1.5
    assert [error.reason for error in ended if isinstance(error, TurnAborted)] == ["abort"]
    assert gone(tmp_path / "pid")


def test_a_cancelled_call_starts_nothing(shell: ShellTools, tmp_path: Path) -> None:
    context = DetachedContext()
    context.cancel()
    with pytest.raises(TurnAborted):
        shell.bash("touch made", ctx=context)
    assert not (tmp_path / "made").exists()


# --- permission --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "patterns"),
    [
        ("git status", ["git status"]),
        ("git status && rm -rf x", ["git status", "rm -rf x"]),
        ("git log | head -3; ls\nrm x &", ["git log", "head -3", "ls", "rm x"]),
        ("git commit -m 'a; b\nc'", ["git commit -m a; b\nc"]),
        ("git log > /etc/passwd", ["git log", "> /etc/passwd"]),
        ("git log 2>&1 >/dev/null", ["git log"]),
        ("git log 2>/dev/nullx", ["git log 2", "> /dev/nullx"]),
        ("(cd x; git pull)", ["cd x", "git pull"]),
        ("git a#b; rm x", ["git a#b", "rm x"]),
        ("git a # b\nrm x", ["git a # b", "rm x"]),
        ("X=1 git push", ["X=1 git push"]),
        ("'git x' y", ["'git x' y"]),
        ("git() { rm; }; git", ["git", "{ rm", "}"]),
        ("", ["sh -c "]),
    ],
)
def test_each_simple_command_needs_permission(command: str, patterns: list[str]) -> None:
    assert command_patterns(command) == tuple(patterns)


@pytest.mark.parametrize(
    "command",
    [
        "git log $(rm x)",
        'git log "`rm x`"',
        "git log $'\\'' ; rm x #'",
        "git diff <(rm x)",
        "git log ${x:-y}",
        "cat <<E\nit's\nE",
        "git log 'open",
    ],
)
def test_what_cannot_be_split_is_asked_as_a_whole(command: str) -> None:
    assert command_patterns(command) == (f"sh -c {command}",)
    assert always_patterns(command_patterns(command)) == (f"sh -c {command}",)


def test_always_allows_the_program_and_never_one_that_runs_others() -> None:
    patterns = ["git log -3", "ls", "> out", "X=1 git x", "then rm x", "sudo ls", "$x y"]
    assert always_patterns(patterns) == (
        "git *",
        "ls",
        "ls *",
        "> out",
        "X=1 git x",
        "then rm x",
        "sudo ls",
        "$x y",
    )


def test_the_tool_asks_by_command(shell: ShellTools) -> None:
    assert shell.bash.permission == "bash"
    assert shell.bash.patterns({"command": "git log; ls -l"}) == ("git log", "ls -l")
    assert shell.bash.always({"command": "git log; ls -l"}) == ("git *", "ls *")
