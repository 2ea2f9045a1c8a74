"""The load of ``chaos kill``: threads that use the public API in every way, and keep the ledger.

What was promised is written when the call returned; what cannot be undone is written before.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from understudy import Runtime, Session
from understudy.errors import (
    AskClosed,
    CommandTimeout,
    CompactionFailed,
    InternalError,
    RuntimeClosed,
    SessionBusy,
    SessionNotFound,
    StoreError,
    TurnAborted,
    TurnFailed,
    UnderstudyError,
)
from understudy.gateway.chaos.cast import LONG, Write
from understudy.gateway.chaos.points import wall_ms
from understudy.gateway.chaos.words import Promise
from understudy.store.journal import Retention

THREADS: Final = 10
SESSIONS: Final = 30
PATIENCE_S: Final = 10.0
RETENTION: Final = Retention(events=6_000)
PLANS: Final = (
    *("note", "note|note", "look", "note+note+look", "slow+note", "wait+note", "think|note|long"),
    *("permit|note", "wonder", "guarded+note", "delegate", "fall|note", "long", "long+note", ""),
    *("wait", "later", "fail", "slow|slow|note"),
)
ACTS: Final = {
    "create": 8,
    "prompt": 46,
    "twice": 3,
    "abort": 6,
    "compact": 5,
    "revert": 3,
    "fork": 3,
    "update": 3,
    "delete": 4,
    "burst": 1,
    "internal": 2,
    "claim": 3,
    "trim": 1,
    "crash": 1,
    "read": 4,
}
BRISK: Final = {"create": 1, "update": 4, "abort": 1, "read": 1}  # waits for nobody's turn
URGENT: Final = {
    "deleting": "burst",
    "buried": "burst",
    "summarising": "compact",
    "compacting": "compact",
    "compacted": "compact",
    "trimming": "trim",
}


class Work:
    """``start`` begins, ``rest`` ends what the threads do; ``errors`` counts what callers got."""

    def __init__(self, runtime: Runtime, write: Write) -> None:
        self._runtime = runtime
        self._write = write
        self._threads: list[threading.Thread] = []
        self._resting = threading.Event()
        self._urgent: deque[Callable[[random.Random], None]] = deque()
        self._lock = threading.Lock()
        self._sessions: list[str] = []
        self._count = 0
        self._token = f"{os.getpid():x}{time.time_ns() // 1_000_000 & 0xFFFFFF:x}"

    def start(self, seed: str, again: Sequence[Promise] = ()) -> None:
        self._resting.clear()
        self._sessions = []
        for session in self._runtime.sessions(limit=SESSIONS):
            self._born(session)  # by a process that may not have lived to say so
        self._urgent.extend(functools.partial(self._repeat, each) for each in again)
        for number in range(THREADS):
            chance = random.Random(f"{seed}/{number}")
            acts = BRISK if number == 0 else ACTS
            self._spawn(functools.partial(self._loop, chance, acts))
        self._spawn(self._people)

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="chaos", daemon=True)
        self._threads.append(thread)
        thread.start()

    def hurry(self, point: str) -> None:
        """Do next what leads to a point."""
        if point in URGENT:
            self._urgent.extend([getattr(self, f"_{URGENT[point]}")] * 4)

    def rest(self, timeout_s: float) -> str:
        """Stop, let everything settle, and say what did not."""
        self._resting.set()
        deadline = time.monotonic() + timeout_s
        if not any(thread.is_alive() for thread in self._threads):
            self._spawn(self._people)
        while time.monotonic() < deadline:
            busy = [thread for thread in self._threads[:-1] if thread.is_alive()]
            unfinished = self._unfinished()
            if not busy and not unfinished:
                self._threads[-1].join(timeout_s)
                self._threads = []
                return ""
            time.sleep(0.005)
        return f"{len(busy)} callers wait, and open are {unfinished}"

    def _unfinished(self) -> list[str]:
        """Sessions with anything open, or an actor that is not done yet."""
        engine = self._runtime.engine
        open_rows = [session_id for session_id, _ in engine.store.read.unfinished_sessions()]
        live = [each.session_id for each in engine.registry.actors() if not each.settled]
        return sorted({*open_rows, *live})

    # --- the threads ---------------------------------------------------------------------------

    def _loop(self, chance: random.Random, acts: Mapping[str, int]) -> None:
        names, weights = list(acts), list(acts.values())
        while not self._resting.is_set():
            (name,) = chance.choices(names, weights)
            self._do(getattr(self, f"_{name}"), chance)

    def _do(self, act: Callable[[random.Random], None], chance: random.Random) -> None:
        with suppress(IndexError):
            act = self._urgent.popleft()
        try:
            act(chance)
        except InternalError as error:
            self._write(Promise("broken", said=f"{act!r} raised {error!r}"))
        except StoreError as error:
            self._write(Promise("refused", said=type(error).__name__))
            time.sleep(0.02)
        except RuntimeClosed:
            self._resting.set()
        except UnderstudyError:
            pass  # a typed refusal is an answer
        except BaseException:  # noqa: BLE001 - whatever it is, no caller should see it
            self._write(Promise("broken", said=traceback.format_exc(limit=-4)))

    def _people(self) -> None:
        """Answer what tools ask, for as long as anybody could ask."""
        chance = random.Random(self._token)
        with suppress(RuntimeClosed):
            while not self._resting.is_set() or self._unfinished():
                self._do(self._reply, chance)
                time.sleep(0.02)

    # --- acts ----------------------------------------------------------------------------------

    def _some(self, chance: random.Random) -> Session:
        with self._lock:
            session_id = chance.choice(self._sessions) if self._sessions else ""
        if not session_id:
            return self._create(chance)
        try:
            return self._runtime.session(session_id)
        except SessionNotFound:
            self._forget(session_id)
            raise

    def _forget(self, session_id: str) -> None:
        with self._lock:
            if session_id in self._sessions:
                self._sessions.remove(session_id)

    def _born(self, session: Session, said: str = "") -> Session:
        parent = session.parent_id or ""
        self._write(Promise("born", session=session.id, parent=parent, said=said))
        with self._lock:
            self._sessions.append(session.id)
        return session

    def _create(self, chance: random.Random) -> Session:
        if len(self._sessions) > SESSIONS:
            self._delete(chance)
        child = self._sessions and chance.random() < 0.3
        parent = self._some(chance).id if child else None
        return self._born(self._runtime.create_session(title="chaos", parent_id=parent))

    def _internal(self, chance: random.Random) -> None:
        session = self._born(self._runtime.create_session(internal=True), "internal")
        self._ask(session, "look", "queue", chance)

    def _prompt(self, chance: random.Random) -> None:
        when = chance.choices(("queue", "steer", "interrupt", "reject"), (6, 2, 1, 1))[0]
        self._ask(self._some(chance), chance.choice(PLANS), when, chance)

    def _ask(self, session: Session, plan: str, when: Any, chance: random.Random) -> None:
        with self._lock:
            self._count += 1
            message_id = f"msg_{self._token}_{self._count}"
        text = f"{message_id}: {plan}"
        try:
            turn = session.prompt(text, message_id=message_id, when_busy=when)
        except SessionBusy:
            return
        self._write(Promise("accepted", session=session.id, key=message_id, text=text))
        if chance.random() < 0.6:
            self._hear(turn, session.id, message_id)

    def _hear(self, turn: Any, session_id: str, message_id: str) -> None:
        try:
            said, text = "answered", turn.result(timeout_s=PATIENCE_S).text
        except TurnAborted as error:
            said, text = "interrupted", str(error.reason)
        except TurnFailed:
            said, text = "failed", ""
        except CommandTimeout:
            self._check_told(session_id, message_id)
            return
        self._write(Promise("outcome", session=session_id, key=message_id, said=said, text=text))

    def _check_told(self, session_id: str, message_id: str) -> None:
        """Who waited in vain for what was over all the while was forgotten."""
        read = self._runtime.engine.store.read
        prompt, _ = read.prompt(session_id, message_id)
        if prompt is not None and prompt.outcome is None:
            return
        with read.connection() as connection:
            (last_ms,) = connection.execute(
                "SELECT max(time_ms) FROM journal WHERE session_id = ?", (session_id,)
            ).fetchone()
        if wall_ms() - (last_ms or 0) > 1000 * PATIENCE_S / 2:
            self._write(Promise("broken", said=f"nobody was told the end of {message_id}"))

    def _twice(self, chance: random.Random) -> None:
        """The same prompt at once and again is one prompt."""
        session = self._some(chance)
        with self._lock:
            self._count += 1
            message_id = f"msg_{self._token}_{self._count}"
        promise = Promise(
            "accepted", session=session.id, key=message_id, text=f"{message_id}: note"
        )
        self._together([functools.partial(self._repeat, promise)] * 3, chance)

    def _repeat(self, promise: Promise, _: random.Random) -> None:
        session = self._runtime.session(promise.session)
        turn = session.prompt(promise.text, message_id=promise.key)
        self._write(promise)
        self._hear(turn, promise.session, promise.key)

    def _together(
        self, acts: Sequence[Callable[[random.Random], None]], chance: random.Random
    ) -> None:
        """Start them at one moment, and wait for all."""
        barrier = threading.Barrier(len(acts))

        def run(act: Callable[[random.Random], None]) -> None:
            barrier.wait()
            try:
                act(chance)
            except StoreError as error:
                self._write(Promise("refused", said=type(error).__name__))
            except InternalError as error:
                self._write(Promise("broken", said=f"{act!r} raised {error!r}"))
            except UnderstudyError:
                pass
            except BaseException:  # noqa: BLE001 - as in ``_do``
                self._write(Promise("broken", said=traceback.format_exc(limit=-4)))

        threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _abort(self, chance: random.Random) -> None:
        self._some(chance).abort(queued=chance.random() < 0.3)

    def _compact(self, chance: random.Random) -> None:
        session = self._some(chance)
        self._ask(session, "long", "queue", chance)
        compaction = session.compact()
        try:
            compaction.result(timeout_s=PATIENCE_S)
        except CompactionFailed:
            return
        marker_id = compaction.marker_id
        self._write(Promise("compacted", session=session.id, key=marker_id, said="committed"))

    def _revert(self, chance: random.Random) -> None:
        session = self._some(chance)
        users = [message for message in session.messages(limit=12) if message.role == "user"]
        if users:
            self._write(Promise("reverting", session=session.id))
            session.revert(chance.choice(users).id)
            if chance.random() < 0.3:
                session.unrevert()

    def _fork(self, chance: random.Random) -> None:
        self._born(self._some(chance).fork())

    def _update(self, chance: random.Random) -> None:
        session = self._some(chance)
        session.update(title=f"chaos {chance.getrandbits(64)}", metadata={"text": LONG[:500]})
        session.archive(chance.random() < 0.1)

    def _delete(self, chance: random.Random) -> None:
        session = self._some(chance)
        self._write(Promise("deleting", session=session.id))
        session.delete()
        self._write(Promise("deleted", session=session.id))
        self._forget(session.id)

    def _burst(self, chance: random.Random) -> None:
        """Many deletes at once, some of the same session, some of one and its child."""
        parent = self._create(chance)
        child = self._born(self._runtime.create_session(parent_id=parent.id))
        self._ask(child, "wait|note", "queue", random.Random(0))
        doomed = [parent, child, child, *(self._some(chance) for _ in range(2))]

        def delete(session: Session, _: random.Random) -> None:
            self._write(Promise("deleting", session=session.id))
            session.delete()
            self._write(Promise("deleted", session=session.id))
            self._forget(session.id)

        self._together([functools.partial(delete, each) for each in doomed], chance)

    def _claim(self, chance: random.Random) -> None:
        with self._lock:
            self._count += 1
            key = f"key-{self._token}-{self._count}"
        if self._runtime.tracker.claim(key, "harness"):
            self._write(Promise("claimed", key=key, said="harness"))
        if chance.random() < 0.5:
            self._write(Promise("releasing", key=key))
            self._runtime.tracker.release(key, "harness")
            self._write(Promise("released", key=key))

    def _trim(self, _: random.Random) -> None:
        self._runtime.engine.store.trim_journal(RETENTION)

    def _crash(self, chance: random.Random) -> None:
        self._some(chance)._crash("chaos")  # noqa: SLF001 - it is there for chaos

    def _read(self, chance: random.Random) -> None:
        session = self._some(chance)
        session.messages(limit=5)
        session.status()
        session.snapshot(limit=1)

    def _reply(self, chance: random.Random) -> None:
        for ask in self._runtime.asks():
            try:
                if ask.kind == "question":
                    said = "answered"
                    self._runtime.reply(ask.id, answers=[["yes"]])
                else:
                    said = chance.choice(("once", "once", "always", "reject"))
                    self._runtime.reply(ask.id, said)  # type: ignore[arg-type]
            except (AskClosed, SessionNotFound):
                continue
            self._write(Promise("replied", session=ask.session_id, key=ask.id, said=said))
