"""Model streams: one model call with its retries, its live text and its deadline for silence."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_any,
    wait_exponential,
)
from tenacity.stop import stop_base

from understudy.actors.core.commands import StepFailed, StepProgress, StepRetrying, StreamedPart
from understudy.actors.live_text import OpenText
from understudy.actors.models.protocol import (
    Finish,
    Model,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    Usage,
)
from understudy.actors.pending import Pending
from understudy.actors.tools.tool import said_by
from understudy.errors import ModelError, ModelUnavailable
from understudy.store.events import PartDelta
from understudy.store.records import Failure, ReasoningPart, Span, TextPart

if TYPE_CHECKING:
    from understudy.actors.clock import Clock
    from understudy.actors.executor import Executor
    from understudy.actors.silence import Silence

logger = logging.getLogger("understudy.models")

E = TypeVar("E", ToolCall, Usage, Finish)

_KINDS: Final[dict[type, type[StreamedPart] | None]] = {
    TextDelta: TextPart,
    ReasoningDelta: ReasoningPart,
    ToolCall: None,
    Usage: None,
    Finish: None,
}

MAX_RETRY_AFTER_S: Final = 300.0
EVENTS_AT_ONCE: Final = 256
_backoff: Final = wait_exponential(multiplier=0.5, max=30)


class Broken(Exception):
    """The stream failed after output that was already shown; ``error`` says how."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Answer(msgspec.Struct):
    """What a model call gave, complete."""

    calls: list[ToolCall]
    usage: Usage | None = None
    finish: str = ""


class ModelStream:
    """Calls a model for an open message, showing its text as it comes.

    Text is published as deltas once its part's row is committed, and flushed to the row about once
    a second. Retries happen only before anything was shown.
    """

    def __init__(
        self,
        executor: Executor,
        model: Model,
        *,
        session_id: str,
        message_id: str,
        show: bool = True,
    ) -> None:
        self.session_id = session_id
        self._executor = executor
        self._model = model
        self.message_id = message_id
        self._show = show
        self._texts: list[OpenText] = []
        self._unflushed = False  # what came is in no row yet
        self._flushing = False
        self._over = False
        self._given_up = False
        self._room = 0  # characters that the answer may still have

    # --- the call ------------------------------------------------------------------------------

    async def call(self, request: ModelRequest) -> Answer:
        """The model's whole answer.

        Raises ``ModelError`` (of which ``ModelUnavailable`` after the last retry), or ``Broken``.
        """
        if self._show:
            self._executor.publisher.attach(self)
        try:
            try:
                return await self._attempt(request)
            except ModelUnavailable as error:
                return await self._again(request, error)
        finally:
            self._over = True
            self._executor.live.forget(self)
            self._end_text()
            self.hand_on()
            self._executor.publisher.detach(self)

    async def _again(self, request: ModelRequest, first: ModelUnavailable) -> Answer:
        """Retry by the policy, which counts the attempt that failed: most calls need none."""
        error: ModelUnavailable | None = first
        async for attempt in self._policy():
            with attempt:
                if error is not None:
                    failed, error = error, None
                    raise failed
                return await self._attempt(request)
        raise AssertionError("tenacity answers or raises")

    def _policy(self) -> AsyncRetrying:
        limits, clock = self._executor.rules.limits, self._executor.clock
        too_late = _StopBefore(clock, clock.monotonic_s() + limits.retry_s)
        return AsyncRetrying(
            retry=retry_if_exception_type(ModelUnavailable),
            stop=stop_any(stop_after_attempt(limits.model_attempts), too_late),
            wait=self._backoff_s,
            before_sleep=self._report_retry,
            sleep=asyncio.sleep,
            reraise=True,
        )

    def _backoff_s(self, state: RetryCallState) -> float:
        """What the provider asks for, within reason; else exponential. Always with jitter."""
        error = state.outcome.exception() if state.outcome is not None else None
        jittered = _backoff(state) * self._executor.chance.random()
        asked = getattr(error, "retry_after_s", None)
        if isinstance(asked, int | float) and asked > 0:
            return min(float(asked), MAX_RETRY_AFTER_S) + min(1.0, jittered)
        return jittered

    def _report_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        pause_s = state.upcoming_sleep
        self._executor.send(
            self.session_id,
            StepRetrying(
                message_id=self.message_id,
                attempt=state.attempt_number,
                failure=failure_of(error or ModelUnavailable()),
                next_ms=self._executor.clock.wall_ms() + int(pause_s * 1000),
            ),
        )

    async def _attempt(self, request: ModelRequest) -> Answer:
        limits = self._executor.rules.limits
        if self._given_up:
            raise ModelError("The step was closed before its model let go")
        task = asyncio.current_task()
        self._texts.clear()
        self._room = limits.answer_chars
        try:
            with self._executor.silences.watch(self._give_up) as silence:
                return await self._consume(self._opened(request), silence)
        except ModelError as error:
            if isinstance(error, ModelUnavailable) and self._texts and self._show:
                raise Broken(error) from error
            raise
        except BaseException as error:
            # Whatever it is: KeyboardInterrupt, say, would end the turns of every session.
            if _is_ending(task, error):
                raise
            logger.exception("Model %s failed", self._model.model_id)
            raise ModelError(f"{type(error).__name__}: {error}") from error

    def _give_up(self) -> None:
        """Close the step of a model that does not let itself be cancelled."""
        self._given_up = True
        self._executor.send(
            self.session_id,
            StepFailed(
                message_id=self.message_id,
                parts=tuple(self.parts(ended=True)) if self._show else (),
                failure=failure_of(ModelUnavailable("The model is silent and cannot be stopped")),
            ),
        )

    def _opened(self, request: ModelRequest) -> AsyncIterator[Any]:
        stream = self._model.stream(request)
        if hasattr(stream, "__aiter__"):
            return stream
        if inspect.iscoroutine(stream):
            stream.close()
        raise ModelError(
            f"{type(self._model).__name__}.stream() gave a {type(stream).__name__}: "
            "write it as `async def` with `yield`"
        )

    async def _consume(self, stream: AsyncIterator[Any], silence: Silence) -> Answer:
        answer = Answer([])
        events = 0
        try:
            async for event in stream:
                events += 1
                if events % EVENTS_AT_ONCE == 0:
                    # A stream that never waits would hold up every other one, and its own abort.
                    # A pause, not a mere look at the loop: that starves the other threads.
                    await asyncio.sleep(0.001)
                kind = _KINDS[type(event)] if type(event) in _KINDS else _kind_of(event)
                if kind is None:
                    silence.heard = True
                    self._take_other(event, answer)
                elif event.text != "":  # which is as silent as nothing
                    silence.heard = True
                    self._append(kind, event.text)
            await self._executor.pace.turn()
        finally:
            if (aclose := getattr(stream, "aclose", None)) is not None:
                await aclose()
        if not answer.finish:
            raise ModelUnavailable("The model's stream ended without a finish")
        return answer

    def _take_other(self, event: Any, answer: Answer) -> None:
        match event:
            case ToolCall():
                call = _checked(event)
                self._room -= len(call.call_id) + len(call.tool) + len(call.arguments)
                if self._room < 0:
                    raise self._too_long()
                answer.calls.append(call)
            case Usage():
                answer.usage = _checked(event)
            case Finish():
                answer.finish = _checked(event).reason
            case _:
                raise ModelError(f"The model sent {type(event).__name__}, not an event")

    # --- live text -----------------------------------------------------------------------------

    def _append(self, kind: type[StreamedPart], text: str) -> None:
        if not isinstance(text, str):
            raise ModelError(f"The model sent {type(text).__name__} as text")
        self._room -= len(text)
        if self._room < 0:
            raise self._too_long()
        last = self._texts[-1] if self._texts else None
        if last is None or last.kind is not kind:
            self._end_text()
            part_id, now = self._executor.new_id("prt"), self._executor.clock.wall_ms()
            last = OpenText(self, part_id, kind, now)
            self._texts.append(last)
        if not last.add(text) or not self._show:
            return
        self._unflushed = True
        if not last.opened:
            if not self._flushing:
                self._executor.live.open_soon(self)
        elif not last.due:
            self._executor.live.hand_on_soon(last)

    def _too_long(self) -> ModelError:
        limit = self._executor.rules.limits.answer_chars
        return ModelError(
            f"The answer is longer than {limit} characters (limits.answer_chars)", limit=limit
        )

    def text_so_far(self) -> list[PartDelta]:
        return [text.so_far() for text in self._texts if text.opened and text.shown]

    def _end_text(self) -> None:
        if self._texts:
            self._texts[-1].end()

    def hand_on(self) -> None:
        """Nothing that is in a row comes as a delta later."""
        texts = [text for text in self._texts if text.opened]
        if texts:
            self._executor.publisher.hand_on(texts, written=True)

    def flush(self) -> bool:
        """Commit what has been received; one flush at a time is under way."""
        if self._flushing or not self._unflushed:
            return False
        parts = self.parts(ended=False)
        texts = list(self._texts)
        for text in texts:
            if not text.opened:
                text.show()  # with its row, which is not there before it is committed
        done: Pending[Any] = Pending()
        loop = asyncio.get_running_loop()

        def committed(done: Pending[Any]) -> None:
            with suppress(RuntimeError):  # the runtime closed meanwhile
                loop.call_soon_threadsafe(self._flushed, texts, done.error)

        done.then(committed)
        progress = StepProgress(message_id=self.message_id, parts=tuple(parts))
        self._executor.send(self.session_id, progress, done)
        self._flushing, self._unflushed = True, False
        return True

    def _flushed(self, texts: Sequence[OpenText], error: BaseException | None) -> None:
        self._flushing = False
        live = self._executor.live
        live.flushed(self)
        if self._over:
            return
        if error is not None:
            self._unflushed = True
            live.flush_later(self)
            return
        for text in texts:
            if not text.opened:
                text.opened = True
                live.hand_on_soon(text)
        if any(not text.opened for text in self._texts):
            live.open_soon(self)
        elif self._unflushed:
            live.flush_later(self)

    def parts(self, *, ended: bool) -> list[StreamedPart]:
        """The text as parts; all but the last are at their end anyway."""
        if ended:
            self._end_text()
        self.hand_on()
        now = self._executor.clock.wall_ms()
        parts: list[StreamedPart] = []
        for open_text in self._texts:
            over = ended or open_text is not self._texts[-1]
            parts.append(
                open_text.kind(
                    id=open_text.part_id,
                    session_id=self.session_id,
                    message_id=self.message_id,
                    text=open_text.text(),
                    time=Span(
                        start=open_text.start,
                        end=max(now, open_text.start) if over else None,
                    ),
                )
            )
        return parts


def _is_ending(task: asyncio.Task[Any] | None, error: BaseException) -> bool:
    """Whether the task is ended from outside, rather than by what its model raised."""
    if isinstance(error, asyncio.CancelledError):
        return task is not None and task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        try:
            return asyncio.current_task() is not task
        except RuntimeError:
            return True  # no loop runs: the task is thrown away
    return False


def _kind_of(event: Any) -> type[StreamedPart] | None:
    """The kind of text an event brings, if any, whatever it is derived from."""
    return next((kind for base, kind in _KINDS.items() if isinstance(event, base)), None)


class _StopBefore(stop_base):
    """tenacity's ``stop_before_delay``, by the runtime's clock."""

    def __init__(self, clock: Clock, deadline_s: float) -> None:
        self._clock = clock
        self._deadline_s = deadline_s

    def __call__(self, state: RetryCallState) -> bool:
        return self._clock.monotonic_s() + state.upcoming_sleep >= self._deadline_s


def _checked(event: E) -> E:
    """An event whose fields are what they should be, whatever the model's adapter put there."""
    try:
        return msgspec.convert(msgspec.to_builtins(event), type(event))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ModelError(f"The model sent a {type(event).__name__} with {error}") from error


def failure_of(error: BaseException) -> Failure:
    """An error as it is kept on a message, in OpenCode's shape."""
    data: dict[str, Any] = {"message": said_by(error) or type(error).__name__}
    if isinstance(error, ModelError):
        status_code = error.data.get("status_code")
        if status_code is not None:
            data["statusCode"] = status_code
        data["isRetryable"] = isinstance(error, ModelUnavailable)
        return Failure(name="APIError", data=data)
    return Failure(name="UnknownError", data=data)
