"""Steps and summaries: from an open message to what its session is told of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from understudy.actors.core import context as contexts
from understudy.actors.core.commands import CallDraft, StepFailed, StepFinished
from understudy.actors.core.context import Conversation
from understudy.actors.core.effects import RunStep, RunSummary
from understudy.actors.hooks import HookCall
from understudy.actors.models.protocol import (
    Model,
    ModelRequest,
    ToolCall,
    ToolSpec,
    UserText,
    UserTurn,
)
from understudy.actors.pending import Pending
from understudy.actors.streams import Answer, Broken, ModelStream, failure_of
from understudy.actors.surrogates import storable
from understudy.actors.tools.tool import Tool, words_of
from understudy.errors import (
    InvalidInput,
    MessageNotFound,
    ModelError,
    ModelOverflow,
    SessionNotFound,
    StoreError,
    ToolError,
)
from understudy.store.records import Failure, TextPart, Tokens

if TYPE_CHECKING:
    from understudy.actors.executor import Executor

logger = logging.getLogger("understudy.turns")

_GONE: Final = (SessionNotFound, MessageNotFound)  # what happens when it is deleted meanwhile
SUMMARISE: Final = "Summarise the conversation above. Answer with the summary only."


class StepRun:
    """One model call of a turn. ``term``: of the lease, when its message was committed."""

    def __init__(self, executor: Executor, session_id: str, effect: RunStep, *, term: int) -> None:
        self._executor = executor
        self._term = term
        self._session_id = session_id
        self._effect = effect

    async def run(self) -> None:
        """Report the step's end to its session, whatever it is."""
        if self._effect.delay_s:
            await asyncio.sleep(self._effect.delay_s)
        stream: ModelStream | None = None
        try:
            shown = self._told_on()
            if shown is None:
                shown = await self._executor.read(self._shown)
            request = await self._with_hooks(self._request(shown))
            stream = ModelStream(
                self._executor,
                self._executor.model_for(self._effect.model),
                session_id=self._session_id,
                message_id=self._effect.message_id,
            )
            answer = await stream.call(request)
            report = await self._finished(stream, request, answer)
            self._executor.keep(self._session_id, self._effect.message_id, shown)
        except (Broken, ModelError, StoreError, InvalidInput, *_GONE) as error:
            self._report(self._failed(stream, error))
        except Exception as error:
            logger.exception("A step of session %s failed", self._session_id)
            self._report(self._failed(stream, error))
        else:
            self._report(report)

    async def _with_hooks(self, request: ModelRequest) -> ModelRequest:
        """Keep an internal session's bypass alive, and let ``before_prompt`` add to the system."""
        prompt, host = self._effect.prompt, self._executor.host
        info = host.info(self._session_id)
        await _stay_bypassed(self._executor, self._session_id)
        if prompt.quiet or not host.hooks.wanted("before_prompt"):
            return request
        texts = self._executor.recalled(self._session_id, prompt.message_id)
        if texts is None:
            call = HookCall(
                hook="before_prompt",
                session=host.handle(self._session_id),
                message_id=prompt.message_id,
                text=_asked(request),
            )
            texts = await host.hooks.gather(call, internal=info.internal)
            self._executor.remember(self._session_id, prompt.message_id, texts)
        system = "\n\n".join(filter(None, (request.system, *texts)))
        return msgspec.structs.replace(request, system=system)

    def _report(self, command: StepFinished | StepFailed) -> None:
        self._executor.send(self._session_id, command)

    def _told_on(self) -> Conversation | None:
        """What the answer before was shown, and what was said since; None if that is not all."""
        executor, effect = self._executor, self._effect
        shown = executor.kept.take(self._session_id)
        if effect.follows == "":
            shown = Conversation("", tool_output=executor.rules.limits.tool_output)
        if shown is None or effect.said is None or shown.before != effect.follows:
            return None
        if executor.rules.compaction.prune:
            return None  # what was shown before is shown in part now
        if not executor.lasts(self._term) or executor.is_cancelling(self._session_id):
            return None  # the rows say whether anybody wants an answer, of this process
        shown.add(*effect.said)
        shown.before = effect.message_id
        return shown

    def _shown(self) -> Conversation:
        """Read it from the history. Runs in a reader thread."""
        executor, rules = self._executor, self._executor.rules
        info = executor.info(self._session_id)
        history = executor.store.read.history(self._session_id)
        mine = next((m for m, _ in reversed(history) if m.id == self._effect.message_id), None)
        if mine is None or mine.time.completed is not None:
            # Deleted since, or ended by who took the session over: nobody wants an answer, least
            # of all from a model that costs.
            raise MessageNotFound(
                f"No open message {self._effect.message_id} in session {self._session_id}",
                session_id=self._session_id,
                message_id=self._effect.message_id,
            )
        return contexts.conversation(
            history,
            revert=info.revert,
            before=self._effect.message_id,
            prune=rules.compaction.prune,
            tool_output=rules.limits.tool_output,
        )

    def _request(self, shown: Conversation) -> ModelRequest:
        executor, rules, prompt = self._executor, self._executor.rules, self._effect.prompt
        request = ModelRequest(
            session_id=self._session_id,
            system=prompt.system if prompt.system is not None else executor.system,
            turns=tuple(shown.turns),
            tools=self._specs(),
        )
        if rules.compaction.auto and shown.tokens + _frame_tokens(request) > rules.usable_tokens:
            raise ModelOverflow("The conversation does not fit the model's context")
        return request

    def _specs(self) -> tuple[ToolSpec, ...]:
        wanted = self._effect.prompt.tools or {}
        every = wanted.get("*", True)
        return tuple(
            tool.spec() for name, tool in self._executor.tools.items() if wanted.get(name, every)
        )

    async def _finished(
        self, stream: ModelStream, request: ModelRequest, answer: Answer
    ) -> StepFinished:
        calls = await self._checked(answer.calls)
        parts = stream.parts(ended=True)
        usage = answer.usage
        return StepFinished(
            message_id=self._effect.message_id,
            parts=tuple(parts),
            calls=calls,
            finish=answer.finish,
            tokens=usage.tokens if usage is not None else _estimate(request, parts, answer.calls),
            cost=usage.cost if usage is not None else 0.0,
        )

    async def _checked(self, calls: Sequence[ToolCall]) -> tuple[CallDraft, ...]:
        """Check calls; where the app's own code has a say in that, on a worker."""
        tools = (self._executor.tools.get(call.tool) for call in calls)
        if all(tool is None or (type(tool) is Tool and tool.is_plain) for tool in tools):
            return self._drafts(calls)
        drafts: Pending[tuple[CallDraft, ...]] = Pending()
        self._executor.workers.submit(lambda: drafts.settle(lambda: self._drafts(calls)))
        return await drafts.wait()

    def _drafts(self, calls: Sequence[ToolCall]) -> tuple[CallDraft, ...]:
        drafts = []
        seen: set[str] = set()
        for call in calls:
            call_id = storable(call.call_id) or f"call_{len(seen) + 1}"
            while call_id in seen:
                call_id += "_"
            seen.add(call_id)
            drafts.append(self._draft(call, call_id))
        return tuple(drafts)

    def _draft(self, call: ToolCall, call_id: str) -> CallDraft:
        """Check a call; what cannot run is told to the model as the call's error."""
        tool = self._executor.tools.get(call.tool)
        part_id = self._executor.new_id("prt")
        signature = f"{call.tool}\0{call.arguments}"
        if tool is None:
            known = ", ".join(self._executor.tools) or "none"
            return CallDraft(
                part_id=part_id,
                call_id=call_id,
                tool=storable(call.tool),
                input={"_raw": storable(call.arguments)},
                signature=signature,
                problem=f"There is no tool called {storable(call.tool)!r}. Tools: {known}.",
            )
        given = tool.raw_input(call.arguments)
        problem: str | None = None
        patterns: tuple[str, ...] = ()
        always: tuple[str, ...] = ()
        try:
            tool = tool.at(self._executor.info(self._session_id).directory)
            parsed = tool.parse(call.arguments)
            if tool.permission is not None:
                patterns, always = tool.patterns(parsed), tool.always(parsed)
        except (ToolError, SessionNotFound) as error:  # deleted meanwhile: nobody will read it
            problem = words_of(error)
        except Exception as error:
            logger.exception("Tool %s could not check its input", call.tool)
            problem = words_of(error)
        return CallDraft(
            part_id=part_id,
            call_id=call_id,
            tool=call.tool,
            input=given,
            signature=signature,
            problem=problem,
            permission=tool.permission,
            patterns=patterns,
            always=always,
            idempotent=tool.idempotent,
        )

    def _failed(self, stream: ModelStream | None, error: Exception) -> StepFailed:
        parts = tuple(stream.parts(ended=True)) if stream is not None else ()
        cause = error.error if isinstance(error, Broken) else error
        return StepFailed(
            message_id=self._effect.message_id,
            parts=parts,
            failure=failure_of(cause),
            transient=isinstance(error, Broken),
            overflow=isinstance(cause, ModelOverflow),
        )


class SummaryRun:
    """The summary of one compaction, in as many model calls as the history needs."""

    def __init__(self, executor: Executor, session_id: str, effect: RunSummary) -> None:
        self._executor = executor
        self._session_id = session_id
        self._effect = effect

    async def run(self) -> None:
        try:
            report: StepFinished | StepFailed = await self._summarise()
        except (Broken, ModelError, StoreError, *_GONE) as error:
            report = self._failed(failure_of(error.error if isinstance(error, Broken) else error))
        except Exception as error:
            logger.exception("A compaction of session %s failed", self._session_id)
            report = self._failed(failure_of(error))
        self._executor.send(self._session_id, report)

    def _failed(self, failure: Failure) -> StepFailed:
        return StepFailed(message_id=self._effect.message_id, parts=(), failure=failure)

    def _plan(self) -> contexts.Plan | None:
        executor, rules = self._executor, self._executor.rules
        return contexts.plan_compaction(
            executor.store.read.history(self._session_id),
            tail=rules.compaction.tail,
            chunk=max(256, rules.usable_tokens // 2),
            revert=executor.info(self._session_id).revert,
        )

    async def _summarise(self) -> StepFinished | StepFailed:
        host = self._executor.host
        if host.hooks.wanted("before_compaction"):
            call = HookCall(
                hook="before_compaction",
                session=host.handle(self._session_id),
                message_id=self._effect.marker_id,
            )
            await host.hooks.gather(call, internal=host.info(self._session_id).internal)
        model = self._executor.model_for(self._effect.model)
        plan = await self._executor.read(self._plan)
        await _stay_bypassed(self._executor, self._session_id)
        if plan is None:
            return self._failed(
                Failure(name="CompactionError", data={"message": "There is nothing to summarise"})
            )
        text, tokens, cost = "", Tokens(), 0.0
        for number, chunk in enumerate(plan.chunks, 1):
            stream = ModelStream(
                self._executor,
                model,
                session_id=self._session_id,
                message_id=self._effect.message_id,
                show=number == len(plan.chunks),
            )
            request = self._request(model, text, chunk, plan)
            answer = await stream.call(request)
            parts = stream.parts(ended=True)
            text = "".join(part.text for part in parts if isinstance(part, TextPart))
            text = self._bounded(text)
            used = answer.usage.tokens if answer.usage else _estimate(request, parts, ())
            tokens = tokens + used
            cost += answer.usage.cost if answer.usage else 0.0
        return StepFinished(
            message_id=self._effect.message_id,
            parts=_one_text(parts, text),
            calls=(),
            finish="stop",
            tokens=tokens,
            cost=cost,
            head_end_id=plan.head_end_id,
            tail_start_id=plan.tail_start_id,
            before=plan.before,
            after=contexts.tokens_of(text) + plan.tail,
        )

    def _request(self, model: Model, summary: str, chunk: str, plan: contexts.Plan) -> ModelRequest:
        before = f"Summary of what came before:\n{summary}\n\n" if summary else ""
        return ModelRequest(
            session_id=self._session_id,
            system=contexts.SUMMARY_SYSTEM,
            turns=(UserTurn((UserText(f"{before}{chunk}\n\n{SUMMARISE}"),)),),
            max_output_tokens=min(model.output_limit, max(512, plan.before // 2)),
            purpose="summary",
        )

    def _bounded(self, text: str) -> str:
        """A summary never grows beyond an eighth of what a request may hold."""
        limit = max(2_000, self._executor.rules.usable_tokens // 8 * 4)
        return text if len(text) <= limit else text[:limit] + " […]"


async def _stay_bypassed(executor: Executor, session_id: str) -> None:
    """Before anything leaves an internal session: its hooks are no-ops while it is used."""
    host = executor.host
    if host.info(session_id).internal:
        await executor.read(lambda: host.tracker.touch(session_id))


def _asked(request: ModelRequest) -> str:
    """The text of the last user turn."""
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            return "\n".join(item.text for item in turn.content if isinstance(item, UserText))
    return ""


def _one_text(parts: Sequence[Any], text: str) -> tuple[TextPart, ...]:
    """The summary as one part, under the id its live text had."""
    first = next((part for part in parts if isinstance(part, TextPart)), None)
    return (msgspec.structs.replace(first, text=text),) if first is not None else ()


def _frame_tokens(request: ModelRequest) -> int:
    """What a request takes beside its turns."""
    tools = sum(
        contexts.tokens_of(spec.description) + contexts.tokens_of(str(spec.parameters))
        for spec in request.tools
    )
    return contexts.tokens_of(request.system) + tools


def _estimate(request: ModelRequest, parts: Sequence[Any], calls: Sequence[ToolCall]) -> Tokens:
    """For models that do not count."""
    given = _frame_tokens(request) + contexts.tokens_of_turns(request.turns)
    said = sum(contexts.tokens_of(part.text) for part in parts)
    said += sum(contexts.tokens_of(call.arguments) for call in calls)
    return Tokens(total=given + said, input=given, output=said)
