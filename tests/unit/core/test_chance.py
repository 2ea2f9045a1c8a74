"""A seeded driver that answers, fails, repeats, delays and loses everything, checked at each step.

A failing seed is the bug report: ``run(seed)`` replays it.
"""

from __future__ import annotations

from typing import Any

import pytest
from core_checks import check_all, check_fifo, check_settled
from core_stage import SESSION, Stage, replace

from understudy.actors.core.commands import (
    Abort,
    ExecutionLost,
    OpenAsk,
    Reply,
    RequestCompaction,
    RevertTo,
    StepFailed,
    StepFinished,
    StepProgress,
    StepRetrying,
    ToolFinished,
    ToolProgress,
    Unrevert,
    UpdateSession,
)
from understudy.actors.core.context import plan_compaction
from understudy.actors.core.effects import RunStep, RunSummary, RunTool
from understudy.actors.core.state import CompactionRules, Limits, Rules
from understudy.errors import UnderstudyError
from understudy.store.records import Ask, Failure, ModelRef, PermissionRule, Question, Tokens

FAILURE = Failure(name="Broken", data={"message": "broke"})


class Driver:
    def __init__(self, seed: int) -> None:
        self.stage = Stage(seed=seed)
        self.random = chance = self.stage.random
        self.stage.rules = Rules(
            limits=Limits(
                steps=chance.choice([2, 5, 100]),
                repeated_calls=chance.choice([2, 4]),
                calls_per_step=3,
                model_attempts=chance.choice([1, 3]),
                queue=4,
                resume_attempts=chance.choice([1, 3]),
            ),
            compaction=CompactionRules(auto=chance.random() < 0.8, tail=chance.choice([0, 40])),
            permissions=(
                PermissionRule(permission="bash", pattern="*", action="ask"),
                PermissionRule(permission="rm", pattern="*", action="deny"),
            ),
            on_restart=chance.choice(["interrupt", "resume"]),
            context_limit=10_000,
        )
        self.past: list[Any] = []
        self.texts = 0

    # --- what people do

    def prompt(self) -> None:
        self.texts += 1
        kind = self.random.choices(["queue", "steer", "interrupt", "reject"], [5, 3, 1, 1])[0]
        self.stage.prompt(f"prompt {self.texts}", when_busy=kind)

    def person(self) -> None:
        stage, chance = self.stage, self.random
        ids, prompts = list(stage.rows.messages), list(stage.rows.prompts)
        match chance.randrange(8):
            case 0:
                stage.send(Abort(queued=chance.random() < 0.3))
            case 1 if prompts:
                stage.send(Abort(message_id=chance.choice(prompts[-4:])))
            case 2 | 3:
                self.compact()
            case 4 if ids:
                stage.send(RevertTo(message_id=chance.choice(ids)))
            case 5:
                stage.send(Unrevert())
            case 6:
                model = ModelRef(provider_id="p", model_id="m")
                stage.send(UpdateSession(title=f"title {len(ids)}", model=model))
            case 7:
                stage.send(Abort(reason="timeout"))

    def compact(self) -> None:
        chance = self.random
        command = RequestCompaction(
            auto=chance.random() < 0.4,
            resume=chance.random() < 0.5,
            reverted=self.stage.rows.reverted(),
        )
        self.stage.send(command)

    def reply(self) -> None:
        asks = [ask for ask in self.stage.rows.asks.values() if ask.replied is None]
        if not asks:
            return
        ask = self.random.choice(asks)
        if ask.kind == "question":
            command = Reply(ask_id=ask.id, reply="answered", answers=(("yes",),))
        else:
            kind = self.random.choices(["once", "always", "reject"], [4, 1, 1])[0]
            feedback = self.random.choice([None, "no"])
            command = Reply(ask_id=ask.id, reply=kind, feedback=feedback)
        self.stage.send(command)

    # --- what executors report

    def report(self, *, well: bool = False) -> None:
        stage = self.stage
        if not stage.running:
            return
        key = self.random.choice(list(stage.running))
        effect = stage.running[key]
        if isinstance(effect, RunTool):
            command = self.tool_report(effect, well=well)
        elif isinstance(effect, RunSummary):
            command = self.summary_report(effect, well=well)
        else:
            command = self.step_report(effect, well=well)
        if isinstance(command, StepFinished | StepFailed | ToolFinished):
            del stage.running[key]
        self.past.append(command)
        stage.send(command)

    def text_parts(self, message_id: str, *, done: bool) -> tuple[Any, ...]:
        stage = self.stage
        old = [p for p in stage.rows.parts[message_id].values() if hasattr(p, "text")]
        if self.random.random() < 0.2:
            return ()  # the executor forgot what it has flushed
        grown = tuple(
            stage.text(message_id, part.text + " more", done=done, part_id=part.id)
            for part in old
            if part.time.end is None
        )
        new = () if grown else (stage.text(message_id, "some words", done=done),)
        return grown + new

    def step_report(self, effect: RunStep, *, well: bool) -> Any:
        stage, chance, key = self.stage, self.random, effect.message_id
        roll = chance.random() if not well else 0.5
        if roll < 0.12:
            return StepProgress(message_id=key, parts=self.text_parts(key, done=False))
        if roll < 0.17:
            return StepRetrying(message_id=key, attempt=2, failure=FAILURE, next_ms=stage.now_ms)
        if roll > 0.88:
            return StepFailed(
                message_id=key,
                parts=self.text_parts(key, done=False) if chance.random() < 0.4 else (),
                failure=FAILURE,
                transient=chance.random() < 0.5,
                overflow=chance.random() < 0.4,
            )
        count = chance.choices([0, 1, 2, 5], [6, 3, 2, 1])[0]
        calls = tuple(self.draft_call() for _ in range(count))
        return StepFinished(
            message_id=key,
            parts=self.text_parts(key, done=chance.random() < 0.8),
            calls=calls,
            finish="stop",
            tokens=Tokens(total=chance.choice([100, 100, 100, 9_000])),
        )

    def draft_call(self) -> Any:
        chance = self.random
        tool = chance.choice(["read", "read", "bash", "bash", "rm"])
        return self.stage.call(
            tool,
            permission=None if tool == "read" else tool,
            patterns=(chance.choice(["a", "b"]),),
            call_id=chance.choice(["", "c1", "c2", "c1-2", "c3"]),
            signature=chance.choice(["s1", "s2", "s3"]),
            idempotent=chance.random() < 0.5,
            problem="no such tool" if chance.random() < 0.05 else None,
        )

    def summary_report(self, effect: RunSummary, *, well: bool) -> Any:
        stage, chance, key = self.stage, self.random, effect.message_id
        roll = chance.random() if not well else 0.6
        if roll < 0.15:
            return StepProgress(message_id=key, parts=self.text_parts(key, done=False))
        if roll < 0.2:
            return StepRetrying(message_id=key, attempt=2, failure=FAILURE, next_ms=stage.now_ms)
        if roll > 0.85:
            return StepFailed(
                message_id=key, parts=self.text_parts(key, done=False), failure=FAILURE
            )
        plan = plan_compaction(
            stage.rows.transcript(),
            tail=stage.rules.compaction.tail,
            chunk=1_000,
            revert=stage.rows.info.revert,
        )
        if plan is None:
            return StepFailed(message_id=key, parts=(), failure=FAILURE)
        return StepFinished(
            message_id=key,
            parts=() if roll < 0.25 else (stage.text(key, "a summary"),),
            calls=(self.draft_call(),) if roll < 0.3 else (),
            finish="stop",
            tokens=Tokens(total=7),
            head_end_id=plan.head_end_id,
            tail_start_id=plan.tail_start_id,
            before=100,
            after=200 if roll < 0.35 else 10,
        )

    def tool_report(self, effect: RunTool, *, well: bool) -> Any:
        stage, chance, part = self.stage, self.random, effect.part
        roll = chance.random() if not well else 0.5
        if roll < 0.1:
            return ToolProgress(part_id=part.id, title="half", metadata={"n": 1})
        if roll < 0.3:
            kind = chance.choice(["permission", "question"])
            ask = Ask(
                id=stage.new_id("ask"),
                session_id=SESSION,
                kind=kind,
                created=stage.now_ms,
                message_id=part.message_id,
                call_id=part.call_id,
                permission=chance.choice(["bash", "rm", "read"]),
                patterns=("a",),
                questions=(Question(text="?"),) if kind == "question" else (),
            )
            return OpenAsk(part_id=part.id, ask=ask)
        if roll > 0.9:
            return ToolFinished(part_id=part.id, error="failed", interrupted=roll > 0.95)
        return ToolFinished(part_id=part.id, output="output")

    def again(self) -> None:
        """A late or repeated report of something that is over changes nothing."""
        if not self.past:
            return
        command = self.random.choice(self.past)
        key = getattr(command, "part_id", None) or command.message_id
        over = key not in self.stage.running
        self.stage.send(command)
        if over:
            assert self.stage.facts == (), command

    # --- what goes wrong

    def crash(self) -> None:
        stage, chance = self.stage, self.random
        waiting = [key for key, p in stage.rows.prompts.items() if p.outcome is None]
        aside = chance.choice(waiting) if waiting and chance.random() < 0.2 else None
        stage.crash(reason=chance.choice(["restart", "crash"]), set_aside=aside)
        # A shell drops what executors of its last incarnation still say. Nearly all of it would
        # be harmless; but a call that is repeated may ask again, and only its new run may.
        self.past = [command for command in self.past if not isinstance(command, OpenAsk)]
        if aside is not None:
            assert stage.outcome(aside) == "failed"
        if not stage.running:
            before = replace(stage.state)
            stage.crash()
            assert stage.facts == (), "a second recovery found work"
            assert stage.state == before

    def lose(self) -> None:
        """An executor dies without a word; the watchdog tells."""
        stage = self.stage
        if not stage.running:
            return
        key = self.random.choice(list(stage.running))
        effect = stage.running[key]
        message_id = effect.part.message_id if isinstance(effect, RunTool) else key
        for other in list(stage.running):
            del stage.running[other]
        stage.send(ExecutionLost(message_id=message_id))

    def step(self) -> None:
        chance = self.random
        action = chance.choices(
            [self.prompt, self.report, self.person, self.reply, self.again, self.crash, self.lose],
            [16, 50, 8, 8, 8, 4, 1],
        )[0]
        try:
            action()
        except UnderstudyError:
            return  # refused, and nothing has happened
        check_all(self.stage)

    def settle(self) -> None:
        """From any state, answering everything leads to rest."""
        stage = self.stage
        for _ in range(400):
            if stage.rows.status.type == "idle":
                break
            if stage.running:
                self.report(well=True)
            else:
                self.reply()
            check_all(stage)
        check_settled(stage)


def run(seed: int, steps: int = 80) -> int:
    driver = Driver(seed)
    for _ in range(steps):
        driver.step()
    driver.settle()
    check_fifo(driver.stage.rows)
    return steps


@pytest.mark.parametrize("block", range(8))
def test_no_chance_breaks_a_session(block: int) -> None:
    for seed in range(block * 200, block * 200 + 200):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
