"""Cancelling a call: callbacks, processes and the context of no runtime."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from understudy.actors.tools.context import Cancellation, DetachedContext
from understudy.errors import InvalidInput, ToolError, TurnAborted
from understudy.store.records import Question

STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
time.sleep(60)
"""


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def pipe_closed(process: subprocess.Popen[bytes]) -> None:
    """Wait until nobody holds the pipe: the process and all its children are gone."""
    assert process.stdout is not None
    with process.stdout as pipe:
        assert pipe.read() == b""
    process.wait(5)


def test_cancel_ends_a_stubborn_process_and_its_child_within_a_second() -> None:
    cancellation = Cancellation()
    process = start(STUBBORN)
    forget = cancellation.track(process)
    begun = time.monotonic()
    cancellation.cancel()
    assert time.monotonic() - begun < 0.2
    pipe_closed(process)
    assert time.monotonic() - begun < 1.0
    forget()
    assert process.returncode == -signal.SIGKILL


def test_forgetting_a_dead_process_ends_the_children_it_left() -> None:
    cancellation = Cancellation()
    process = start(
        STUBBORN.replace("if os.fork():", "if os.fork():\n    signal.signal(15, signal.SIG_DFL)")
    )
    forget = cancellation.track(process)
    cancellation.cancel()
    assert process.wait(5) == -signal.SIGTERM
    forget()
    pipe_closed(process)


def test_a_process_tracked_too_late_is_ended_too() -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    process = start("import time; print('ready', flush=True); time.sleep(60)")
    forget = cancellation.track(process)
    pipe_closed(process)
    forget()


def test_a_forgotten_process_is_left_alone() -> None:
    cancellation = Cancellation()
    process = start("import time; print('ready', flush=True); time.sleep(60)")
    cancellation.track(process)()
    cancellation.cancel()
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    pipe_closed(process)


def test_a_process_of_our_own_group_is_refused() -> None:
    command = [sys.executable, "-S", "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with pytest.raises(InvalidInput, match="start_new_session"):
            Cancellation().track(process)
        process.kill()


def test_an_asyncio_process_can_be_tracked() -> None:
    async def scenario() -> int:
        cancellation = Cancellation()
        process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
        forget = cancellation.track(process)
        cancellation.cancel()
        code = await asyncio.wait_for(process.wait(), 5)
        forget()
        return code

    assert asyncio.run(scenario()) == -signal.SIGTERM


def test_callbacks_run_once_and_one_that_raises_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cancellation = Cancellation()
    called: list[str] = []

    def broken() -> None:
        raise RuntimeError("broken")

    cancellation.on_cancel(broken)
    cancellation.on_cancel(lambda: called.append("first"))
    cancellation.on_cancel(lambda: called.append("forgotten"))()
    cancellation.cancel("abort")
    cancellation.cancel("again")
    cancellation.on_cancel(lambda: called.append("late"))
    assert called == ["first", "late"]
    assert cancellation.reason == "abort"
    assert "broken" in caplog.text


def test_cancel_from_many_threads_counts_once() -> None:
    cancellation = Cancellation()
    called: list[int] = []
    cancellation.on_cancel(lambda: called.append(1))
    barrier = threading.Barrier(8)

    def race() -> None:
        barrier.wait(5)
        cancellation.cancel()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert called == [1]
    assert cancellation.wait(0)


def test_a_detached_context_answers_and_remembers() -> None:
    context = DetachedContext(
        session_id="ses_1", allow=lambda permission, patterns: "rm" not in patterns
    )
    context.progress(title="one", a=1)
    context.progress(b=2)
    assert (context.title, context.metadata) == ("one", {"a": 1, "b": 2})
    context.ask("bash", patterns=["ls"])
    with pytest.raises(ToolError, match="bash"):
        asyncio.run(context.ask_async("bash", patterns=["rm"]))
    assert context.asked == [("bash", ("ls",)), ("bash", ("rm",))]
    with pytest.raises(ToolError, match="nobody"):
        context.question([Question(text="why?")])
    assert DetachedContext(answers=(("so",),)).question([Question(text="why?")]) == (("so",),)


def test_a_cancelled_context_refuses_to_go_on() -> None:
    context = DetachedContext(session_id="ses_1", message_id="msg_1")
    context.check()
    context.cancel("delete")
    with pytest.raises(TurnAborted) as caught:
        context.check()
    assert (caught.value.reason, caught.value.session_id) == ("delete", "ses_1")
    with pytest.raises(TurnAborted):
        context.ask("bash")
