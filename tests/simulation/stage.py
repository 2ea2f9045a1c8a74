"""A stage for supervision: runtimes in virtual time, sessions, and what became of them."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy import RestartPolicy
from understudy.actors import session_actor
from understudy.actors.core.commands import UpdateSession
from understudy.actors.pending import Pending
from understudy.testing import Say, ScriptedModel, Wait
from understudy.testing.process import Process
from understudy.testing.scheduler import Scheduler

LONG_S = 100.0  # a turn that still runs when the rest is over; a model may pause for 120 s
PATIENCE_S = 3_600.0  # virtual: a bound on failures
NEWS = ("actor.crashed", "actor.restarted", "session.quarantined")


def play(request):
    """Answers with what was asked; "long" takes a while, "endless" for ever."""
    asked = request.turns[-1].content[-1].text
    if asked in ("long", "endless"):
        return [Say("begun "), Wait(LONG_S if asked == "long" else 1e9), Say("and done")]
    return Say(asked)


class Stage:
    """Processes on one database. What actors decide goes through ``before``, by command."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.path = folder / "stage.db"
        self.scheduler = Scheduler("stage")
        self.published: list[tuple[str, str]] = []
        self.hooks: dict[str, Callable[[Any], None]] = {}
        self.processes: list[Process] = []
        self.escaped: list[Exception] = []
        real = session_actor.decide

        def decide(state, command, moment, rules):
            for hook in list(self.hooks.values()):
                hook(state.info.id, command)
            return real(state, command, moment, rules)

        monkeypatch.setattr(session_actor, "decide", decide)

    # --- processes -----------------------------------------------------------------------------

    def start(self, name: str = "one", **options) -> Process:
        options.setdefault("restart", RestartPolicy())
        process = Process(
            self.scheduler,
            name,
            self.path,
            committed=lambda _: None,
            model=ScriptedModel(play, record=0),
            handler_limit_s=5.0,
            passivate_after_s=options.pop("passivate_after_s", 1e6),
            seed=1,
            **options,
        )
        process.run(process.runtime.start)
        process.engine.publisher.observe(
            lambda event: self.published.append((event.session_id, event.type))
        )
        process.life.on_escape = self.escaped.append
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        assert not self.escaped, "nothing escapes into a thread"

    # --- time ----------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.scheduler.clock.monotonic_s()

    def until(self, done: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
        reached = self.scheduler.run_until(lambda: bool(done()), steps=200_000, limit_s=limit_s)
        assert reached, "it did not become true"

    def passes(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        self.until(lambda: self.now_s >= end_s, seconds + 1.0)

    # --- sessions ------------------------------------------------------------------------------

    def create(self, process: Process, session_id: str, **options) -> Any:
        create = process.runtime.create_session
        return process.run(lambda: create(session_id=session_id, title="new", **options))

    def send(self, process: Process, session_id: str, command: Any) -> Pending[Any]:
        """What a caller in another thread would do: the answer comes when it comes."""
        return process.engine.registry.send(session_id, command)

    def update(self, process: Process, session_id: str, title: str) -> Pending[Any]:
        return self.send(process, session_id, UpdateSession(title=title))

    def outcome(self, pending: Pending[Any]) -> Any:
        """What a caller got: the value, or the error."""
        self.until(lambda: pending.done)
        return pending.error if pending.error is not None else pending.result()

    def busy(self, process: Process, session_id: str) -> Any:
        """A prompt whose turn runs for long."""
        return self.prompt(process, session_id, "long")

    def prompt(self, process: Process, session_id: str, text: str) -> Any:
        session = process.run(lambda: process.runtime.session(session_id))
        return process.run(lambda: session.prompt(text))

    def answer(self, process: Process, session_id: str, text: str = "hello") -> str:
        """The next command works, all the way through a model and back."""
        turn = self.prompt(process, session_id, text)
        return process.run(lambda: turn.result(timeout_s=PATIENCE_S).text)

    def actor(self, process: Process, session_id: str) -> Any:
        return process.engine.registry.actor(session_id)

    def is_dead(self, process: Process, session_id: str) -> bool:
        """Its actor died and neither was replaced nor ended yet."""
        actor = self.actor(process, session_id)
        return actor is not None and actor._dead

    # --- what became of it ---------------------------------------------------------------------

    def crashes(self, process: Process, session_id: str) -> tuple[int, int]:
        """The durable count: (in all, in a row)."""
        record = process.engine.store.read.restarts(session_id)
        return (0, 0) if record is None else (record[1], record[2])

    def news(self, session_id: str) -> list[str]:
        """What was published of its supervision, in order; the journal says the same."""
        self.passes(1.0)
        with sqlite3.connect(self.path) as connection:
            rows = connection.execute(
                "SELECT type FROM journal WHERE session_id = ? ORDER BY cursor", (session_id,)
            ).fetchall()
        connection.close()
        stored = [kind for (kinds,) in rows for kind in kinds.split(" ") if kind in NEWS]
        told = [kind for owner, kind in self.published if owner == session_id and kind in NEWS]
        assert told == stored
        return [kind.partition(".")[2] for kind in told]
