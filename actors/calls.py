"""Tool calls: one run of a tool whose start is committed, up to its one outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from understudy.actors.core.commands import OpenAsk, ToolFinished, ToolProgress
from understudy.actors.coroutines import GRACE_S
from understudy.actors.handles import in_event_loop
from understudy.actors.hooks import enter_hook
from understudy.actors.pending import Pending
from understudy.actors.tools.context import CancellableCall
from understudy.actors.tools.tool import words_of
from understudy.actors.workers import LOST_MAX
from understudy.errors import ToolError
from understudy.store.records import Ask, Question, ToolPart

if TYPE_CHECKING:
    from understudy.actors.core.effects import RunTool
    from understudy.actors.executor import Executor
    from understudy.actors.tools.tool import Tool, ToolResult

logger = logging.getLogger("understudy.tools")

PROGRESS_EVERY_S: Final = 0.1


class CallTime:
    """What is left of a call's time. While it waits for people none goes by.

    For the executor's loop alone, which may learn of an answer before it does of the ask.
    """

    def __init__(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._asking = 0
        self._left_s: float | None = None

    def asking(self, change: int) -> None:
        self._asking += change
        until_s = self._limit.when()
        with suppress(RuntimeError):  # the call is over
            if self._asking > 0 and until_s is not None:
                self._left_s = until_s - self._loop.time()
                self._limit.reschedule(None)
            elif self._asking == 0 and self._left_s is not None:
                self._limit.reschedule(self._loop.time() + self._left_s)
                self._left_s = None


class CallContext(CancellableCall):
    """The ``ToolContext`` of a call in a runtime."""

    def __init__(self, executor: Executor, part: ToolPart, *, attempt: int, directory: str) -> None:
        super().__init__(
            session_id=part.session_id,
            message_id=part.message_id,
            call_id=part.call_id,
            attempt=attempt,
            directory=directory,
        )
        self.part_id = part.id
        self._executor = executor
        self.time: CallTime | None = None
        self._lock_progress = threading.Lock()
        self._title: str | None = None
        self._metadata: dict[str, Any] = {}
        self._dirty = False

    # --- progress ------------------------------------------------------------------------------

    def progress(self, *, title: str | None = None, **metadata: Any) -> None:
        title = None if title is None else _checked("a title", title, str)
        metadata = _checked("progress", metadata, dict[str, Any])
        with self._lock_progress:
            self._title = title if title is not None else self._title
            self._metadata.update(metadata)
            if self._dirty:
                return
            self._dirty = True
        self._executor.call_later(PROGRESS_EVERY_S, self._send_progress)

    def _send_progress(self) -> None:
        with self._lock_progress:
            self._dirty = False
            title, metadata = self._title, dict(self._metadata)
        if not self.cancelled:
            self._executor.send(
                self.session_id,
                ToolProgress(part_id=self.part_id, title=title, metadata=metadata),
            )

    # --- asking people -------------------------------------------------------------------------

    def ask(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        _not_in_a_loop("ask_async")
        ask = self._permission(permission, patterns, always, metadata)
        with self._executor.workers.waiting():
            self._granted(self._open(ask).get())

    def ask_async(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> Awaitable[None]:
        _only_in_a_loop("ask")
        return self._ask(self._permission(permission, patterns, always, metadata))

    async def _ask(self, ask: Ask) -> None:
        self._granted(await self._open(ask).wait())

    def question(self, questions: Sequence[Question]) -> tuple[tuple[str, ...], ...]:
        _not_in_a_loop("question_async")
        ask = self._question(questions)
        with self._executor.workers.waiting():
            return self._answers(self._open(ask).get())

    def question_async(
        self, questions: Sequence[Question]
    ) -> Awaitable[tuple[tuple[str, ...], ...]]:
        _only_in_a_loop("question")
        return self._put(self._question(questions))

    async def _put(self, ask: Ask) -> tuple[tuple[str, ...], ...]:
        return self._answers(await self._open(ask).wait())

    def _permission(
        self,
        permission: str,
        patterns: Sequence[str],
        always: Sequence[str],
        metadata: dict[str, Any],
    ) -> Ask:
        return Ask(
            id=self._executor.new_id("per"),
            session_id=self.session_id,
            kind="permission",
            created=self._executor.clock.wall_ms(),
            message_id=self.message_id,
            call_id=self.call_id,
            permission=_checked("a permission", permission, str),
            patterns=_checked("patterns", patterns, tuple[str, ...]),
            always=_checked("patterns", always, tuple[str, ...]),
            metadata=_checked("metadata", metadata, dict[str, Any]),
        )

    def _question(self, questions: Sequence[Question]) -> Ask:
        return Ask(
            id=self._executor.new_id("que"),
            session_id=self.session_id,
            kind="question",
            created=self._executor.clock.wall_ms(),
            message_id=self.message_id,
            call_id=self.call_id,
            questions=_checked("questions", questions, tuple[Question, ...]),
        )

    def _open(self, ask: Ask) -> Pending[Ask]:
        self.check()
        answer = self._executor.expect(self.session_id, ask.id)
        forget = self.on_cancel(lambda: answer.fail(self.aborted()))
        answer.then(lambda _: forget())
        if (time := self.time) is not None:
            self._executor.call_later(0, lambda: time.asking(1))
            answer.then(lambda _: self._executor.call_later(0, lambda: time.asking(-1)))
        opened: Pending[Any] = Pending()
        opened.then(lambda done: None if done.error is None else answer.fail(done.error))
        self._executor.send(self.session_id, OpenAsk(part_id=self.part_id, ask=ask), opened)
        return answer

    def _granted(self, ask: Ask) -> None:
        if ask.replied in ("once", "always"):
            return
        self.check()
        said = f" They said: {ask.feedback}" if ask.feedback else ""
        raise ToolError(f"The user rejected permission: {ask.permission}.{said}")

    def _answers(self, ask: Ask) -> tuple[tuple[str, ...], ...]:
        if ask.replied == "answered":
            return ask.answers
        self.check()
        raise ToolError(f"The user declined to answer. {ask.feedback or ''}".strip())


def _checked(what: str, value: Any, kind: Any) -> Any:
    """What a tool says, as it can be stored and read back."""
    try:
        return msgspec.json.decode(msgspec.json.encode(value), type=kind)
    except Exception as error:
        raise ToolError(f"{what} cannot be stored: {words_of(error)}") from error


def _not_in_a_loop(instead: str) -> None:
    if in_event_loop():
        raise ToolError(f"This would block the event loop: await {instead}() instead")


def _only_in_a_loop(instead: str) -> None:
    """Refuse what a plain function cannot await: it would go on as if it had been allowed to."""
    if not in_event_loop():
        raise ToolError(f"Only a coroutine can await this: call {instead}() instead")


class CallRun:
    """Runs one call on a worker thread or, if it is a coroutine, on the tools' event loop."""

    def __init__(
        self,
        executor: Executor,
        tool: Tool | None,
        effect: RunTool,
        context: CallContext,
        *,
        term: int,
    ) -> None:
        self.context = context
        self._term = term  # of the lease, when the call's start was committed
        self._executor = executor
        self._tool = tool
        self._part = effect.part
        self._quiet = effect.quiet

    async def run(self) -> None:
        """Report the call's outcome to its session, unless it was cancelled from outside."""
        try:
            if self._quiet:
                enter_hook("tool")
            outcome = await self._outcome()
        except asyncio.CancelledError:
            self.context.cancel("abort")
            raise
        self._executor.send(self._part.session_id, outcome)

    async def _outcome(self) -> ToolFinished:
        tool = self._tool
        if tool is None:
            return self._failed(f"There is no tool called {self._part.tool}")
        try:
            result = await self._result(tool)
        except TimeoutError as error:
            return self._failed(str(error), interrupted=True)
        if isinstance(result, BaseException):
            return self._raised(result)
        return ToolFinished(
            part_id=self._part.id,
            output=result.output,
            title=result.title,
            metadata=result.metadata,
        )

    async def _result(self, tool: Tool) -> ToolResult | BaseException:
        """What the tool gave or raised. Raises ``TimeoutError`` past its time."""
        arguments = msgspec.json.encode(self._part.state.input).decode()
        limit_s = tool.timeout_s or self._executor.rules.limits.tool_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                self.context.time = CallTime(limit)
                run = self._run_async if tool.is_async else self._run_sync
                while (result := await run(tool, arguments)) is None:
                    self._term = await self._executor.prove(self._part.session_id)
                return result
        except TimeoutError:
            self.context.cancel("timeout")
            raise TimeoutError(f"Tool execution timed out after {limit_s:g} s") from None

    def _failed(self, error: str, *, interrupted: bool = False) -> ToolFinished:
        return ToolFinished(part_id=self._part.id, error=error, interrupted=interrupted)

    def _raised(self, error: BaseException) -> ToolFinished:
        if not isinstance(error, ToolError):
            logger.info("Tool %s raised %s", self._part.tool, type(error).__name__)
        return self._failed(words_of(error))

    async def _run_sync(self, tool: Tool, arguments: str) -> ToolResult | BaseException | None:
        """The tool's result or what it raised. Given up on when this is cancelled.

        None: the process may have been replaced while it was frozen, so the tool was not called.
        """
        if self._executor.workers.lost >= LOST_MAX:
            return ToolError(f"Not run: {LOST_MAX:,} calls that were given up on never returned")
        finished: Pending[ToolResult | BaseException | None] = Pending()
        runs = False

        def job() -> None:
            nonlocal runs
            if self._is_over():
                return
            runs = True
            proved = self._executor.lasts(self._term)
            result = _called(tool, arguments, self.context) if proved else None
            runs = False
            finished.set(result)

        def look() -> None:
            if runs:
                name = f"Tool {tool.name} of session {self._part.session_id}"
                logger.warning("%s goes on %g s after it was given up on", name, GRACE_S)

        inherited = contextvars.copy_context()
        give_up = self._executor.workers.submit(lambda: inherited.run(job))
        try:
            return await finished.wait()
        except asyncio.CancelledError:
            give_up()
            if runs:
                self._executor.call_later(GRACE_S, look)
            raise

    def _is_over(self) -> bool:
        """Whether the call was given up on before it began: its session may have been told so."""
        return self.context.cancelled or self._executor.is_cancelling(self._part.session_id)

    async def _run_async(self, tool: Tool, arguments: str) -> ToolResult | BaseException | None:
        """Like ``_run_sync`` on the tools' own loop: one that blocks it cannot stop a stream."""
        coroutines = self._executor.coroutines
        if coroutines.lost >= LOST_MAX:
            return ToolError(f"Not run: {LOST_MAX:,} calls that were cancelled do not end")
        finished: Pending[ToolResult | BaseException | None] = Pending()

        async def job() -> None:
            if self._is_over():
                return
            proved = self._executor.lasts(self._term)
            result = await _awaited(tool, arguments, self.context) if proved else None
            finished.set(result)

        name = f"Tool {tool.name} of session {self._part.session_id}"
        give_up = coroutines.submit(name, job, context=contextvars.copy_context())
        try:
            return await finished.wait()
        except asyncio.CancelledError:
            give_up()
            raise


def _called(tool: Tool, arguments: str, context: CallContext) -> ToolResult | BaseException:
    """Checking and rendering are the tool's code as much as its function is."""
    try:
        return tool.render(tool.invoke(tool.parse(arguments), context))
    except BaseException as error:  # noqa: BLE001 - a tool may raise anything, also to stop us
        return error


async def _awaited(tool: Tool, arguments: str, context: CallContext) -> ToolResult | BaseException:
    try:
        return tool.render(await tool.invoke(tool.parse(arguments), context))
    except BaseException as error:  # noqa: BLE001 - a tool may raise anything, also to stop us
        return error
