"""Model streams: one model call with its retries, its live text and its deadline for silence."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

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

logger = logging.getLogger("understudy.models")

E = TypeVar("E", ToolCall, Usage, Finish)

_KINDS: Final[dict[type, type[StreamedPart]]] = {TextDelta: TextPart, ReasoningDelta: ReasoningPart}

FLUSH_EVERY_S: Final = 1.0
FLUSHES_PER_S: Final = 400  # of all streams together
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

    Text is published as deltas once its part's row is committed, and flushed to the row about
    every ``FLUSH_EVERY_S``. Retries happen only before anything was shown.
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
        self._flushing = False
        self._flush_timer: asyncio.TimerHandle | None = None
        self._opening: Literal["no", "waits", "under way"] = "no"
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
            if self._flush_timer is not None:
                self._flush_timer.cancel()
            self._end_opening()
            self._end_text()
            self._hand_on()
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
            async with _Silence(limits.stream_idle_s, self._give_up) as silence:
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

    async def _consume(self, stream: AsyncIterator[Any], silence: _Silence) -> Answer:
        answer = Answer([])
        events = 0
        try:
            async for event in stream:
                events += 1
                if events % EVENTS_AT_ONCE == 0:
                    # A stream that never waits would hold up every other one, and its own abort.
                    # A pause, not a mere look at the loop: that starves the other threads.
                    await asyncio.sleep(0.001)
                kind = _KINDS.get(type(event)) or _kind_of(event)
                if kind is None:
                    silence.broken()
                    self._take_other(event, answer)
                elif event.text != "":  # which is as silent as nothing
                    silence.broken()
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
                self._take(len(call.call_id) + len(call.tool) + len(call.arguments))
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
        self._take(len(text))
        last = self._texts[-1] if self._texts else None
        if last is None or last.kind is not kind:
            self._end_text()
            part_id, now = self._executor.new_id("prt"), self._executor.clock.wall_ms()
            last = OpenText(self, part_id, kind, now)
            self._texts.append(last)
        if not last.add(text) or not self._show:
            return
        if not last.opened:
            self._open_soon()
        else:
            self._executor.live.hand_on(last)
            if self._flush_timer is None and not self._flushing:
                loop = asyncio.get_running_loop()
                self._flush_timer = loop.call_later(self._pause_s(), self._flush)

    def _take(self, characters: int) -> None:
        """Count what was received, before it is kept."""
        self._room -= characters
        if self._room < 0:
            limit = self._executor.rules.limits.answer_chars
            raise ModelError(
                f"The answer is longer than {limit} characters (limits.answer_chars)", limit=limit
            )

    def _pause_s(self) -> float:
        """Until the next flush: longer beside many streams, and not at one with them."""
        usual_s = max(FLUSH_EVERY_S, self._executor.publisher.streams / FLUSHES_PER_S)
        return usual_s * (0.75 + self._executor.chance.random() / 2)

    def _open_soon(self) -> None:
        if self._opening == "no" and not self._flushing:
            self._opening = "waits"
            self._executor.live.open(self)

    def open_texts(self) -> bool:
        if self._opening != "waits":
            return False  # the call has ended
        self._opening = "under way"
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        self._flush()
        return True

    def _end_opening(self) -> None:
        under_way, self._opening = self._opening == "under way", "no"
        if under_way:
            self._executor.live.opened()

    def text_so_far(self) -> list[PartDelta]:
        return [text.so_far() for text in self._texts if text.opened and text.shown]

    def _end_text(self) -> None:
        if self._texts:
            self._texts[-1].end()

    def _hand_on(self) -> None:
        """Nothing that is in a row comes as a delta later."""
        texts = [text for text in self._texts if text.opened]
        if texts:
            self._executor.publisher.hand_on(texts)

    def _flush(self) -> None:
        """Commit what has been received; one flush at a time is under way."""
        self._flush_timer = None
        self._flushing = True
        parts = self.parts(ended=False)
        texts = list(self._texts)
        for text in texts:
            text.show()  # a new text is not open before it is committed
        done: Pending[Any] = Pending()
        loop = asyncio.get_running_loop()

        def committed(_: Pending[Any]) -> None:
            with suppress(RuntimeError):  # the runtime closed meanwhile
                loop.call_soon_threadsafe(self._flushed, texts)

        done.then(committed)
        progress = StepProgress(message_id=self.message_id, parts=tuple(parts))
        self._executor.send(self.session_id, progress, done)

    def _flushed(self, texts: Sequence[OpenText]) -> None:
        self._flushing = False
        for text in texts:
            text.opened = True
            if text.news:
                self._executor.live.hand_on(text)
        self._end_opening()
        if any(not text.opened for text in self._texts):
            self._open_soon()

    def parts(self, *, ended: bool) -> list[StreamedPart]:
        """The text as parts; all but the last are at their end anyway."""
        if ended:
            self._end_text()
        self._hand_on()
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


class _Silence:
    """Breaks the block off when nothing came for a while. Much cheaper than a timeout each.

    ``unheeded`` is called when the block has not ended as long again after that.
    """

    def __init__(self, limit_s: float, unheeded: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._unheeded = unheeded
        self._loop = asyncio.get_running_loop()
        self._last_s = 0.0
        self._expired = False

    def broken(self) -> None:
        self._last_s = self._loop.time()

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(self._limit_s, self._look)
        return self

    def _look(self) -> None:
        left_s = self._last_s + self._limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        elif self._expired:
            self._unheeded()
        elif self._task is not None:
            self._expired = True
            self._task.cancel()
            self._timer = self._loop.call_later(self._limit_s, self._look)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if (
            self._expired
            and self._task is not None
            and self._task.uncancel() <= 0
            and kind is asyncio.CancelledError
        ):
            raise ModelUnavailable(f"The model said nothing for {self._limit_s:g} s")


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
