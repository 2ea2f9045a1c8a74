"""Pooled actors: pykka's actors and loop on a handful of shared threads.

An actor holds a thread only while its mailbox has messages and it is not waiting for a commit. That
may be the thread of a caller who would only wait for another one: see ``ThreadPool.may_lend``.
pykka's own loop runs them: its ``get()`` stands outside the ``try``, so a mailbox whose ``get()``
raises ``Yielded`` hands the thread back cleanly.
"""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final, Protocol

import pykka
from pykka._envelope import Envelope

from understudy.actors.handles import in_event_loop
from understudy.actors.pending import Pending
from understudy.store.turnstile import OneAtATime

logger = logging.getLogger("understudy.actors")

BATCH: Final = 32
_STACK: Final = 250  # calls that a handler may be deep, and more


class Yielded(Exception):
    """The mailbox has nothing for the actor now; its thread goes back to the pool."""


class Dispatcher(Protocol):
    """Who runs mailboxes that have something to do."""

    def schedule(self, mailbox: Mailbox) -> None: ...

    def run_here(self, mailbox: Mailbox) -> None:
        """Run a mailbox that was idle, for the one message that its caller waits for."""
        ...


class Pool(Dispatcher, Protocol):
    """A dispatcher with a life, that notices handlers which hang."""

    def start(self) -> None: ...

    def may_lend(self) -> bool:
        """Whether this thread, which will wait for an answer, may run the actor that gives it."""
        ...

    def hung(self, limit_s: float) -> list[Mailbox]:
        """Mailboxes whose handler runs for longer than the limit, each told once."""
        ...

    def stop(self, timeout_s: float) -> bool: ...


class Mailbox:
    """An inbox that can be paused, closed under its lock, and handed to a successor.

    ``put`` says whether the message was taken: after ``close`` nothing is, so that no caller
    waits for a dead actor.
    """

    __slots__ = (
        "_closed",
        "_dispatcher",
        "_items",
        "_left",
        "_lock",
        "_paused",
        "_scheduled",
        "actor",
        "touched_s",
    )

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._items: deque[Envelope[Any]] = deque()
        self._lock = threading.Lock()
        self._scheduled = False
        self._paused = False
        self._closed = False
        self._left = 0
        self.actor: PooledActor | None = None
        self.touched_s = 0.0

    def put(self, envelope: Envelope[Any], /, *, lend: bool = False) -> bool:
        """Take a message. With ``lend`` an idle actor may handle it in this very thread."""
        with self._lock:
            if self._closed:
                return False
            self._items.append(envelope)
            if self._scheduled or self._paused:
                return True
            self._scheduled = True
        if lend and self.actor is not None and self.actor.may_borrow:
            self._dispatcher.run_here(self)
        else:
            self._dispatcher.schedule(self)
        return True

    def put_first(self, message: Any) -> None:
        """Give the actor a message of its own before all others, and wake it; not once closed."""
        with self._lock:
            if self._closed:
                return
            self._items.appendleft(Envelope(message))
            self._paused = False
            if self._scheduled:
                return
            self._scheduled = True
        self._dispatcher.schedule(self)

    def put_back(self, message: Any) -> None:
        """Return a message to the front, for later. Does not wake anybody."""
        with self._lock:
            self._items.appendleft(Envelope(message))

    def drop(self, unwanted: Callable[[Any], bool]) -> list[Any]:
        """Forget messages that nobody may handle any more; returns them."""
        dropped: list[Any] = []
        with self._lock:
            kept: deque[Envelope[Any]] = deque()
            for each in self._items:
                if unwanted(each.message):
                    dropped.append(each.message)
                else:
                    kept.append(each)
            self._items = kept
        return dropped

    def get(self) -> Envelope[Any]:
        with self._lock:
            if self._items and self._left > 0 and not self._paused:
                self._left -= 1
                return self._items.popleft()
        raise Yielded

    def empty(self) -> bool:
        return not self._items

    def pause(self) -> None:
        """Deliver nothing until ``resume``. For the actor itself, inside a handler."""
        self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            if self._scheduled or not self._items:
                return
            self._scheduled = True
        self._dispatcher.schedule(self)

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is being committed."""
        with self._lock:
            return not (self._items or self._scheduled or self._paused)

    def close_if_idle(self, idle: Callable[[], bool]) -> bool:
        """Close unless anything is waiting or running, or the actor is not ``idle()``.

        It is asked under the lock: looked at before, a prompt could come and be committed between
        the look and the close.
        """
        with self._lock:
            if self._items or self._scheduled or self._paused or not idle():
                return False
            self._closed = True
            return True

    def close(self) -> list[Envelope[Any]]:
        """Take nothing more; returns what was waiting, for its senders to be answered."""
        with self._lock:
            self._closed = True
            left = list(self._items)
            self._items.clear()
            return left

    def hand_over(self, successor: Mailbox) -> None:
        """Move what waits to another mailbox: this one's thread is lost."""
        successor._paused = True
        for envelope in self.close():
            successor._items.append(envelope)

    # --- for the dispatcher --------------------------------------------------------------------

    def run(self, batch: int = BATCH) -> bool:
        """Let the actor handle up to ``batch`` messages. True if there is more to do."""
        self._left = batch
        actor = self.actor
        if actor is not None:
            actor.run_batch()
        return self.goes_on()

    def goes_on(self) -> bool:
        """Whether there is more to do. If not, the next message schedules it again."""
        with self._lock:
            self._scheduled = bool(self._items) and not self._paused
            return self._scheduled


class PooledActor(pykka.Actor):
    """A pykka actor without a thread of its own. Not entered in pykka's global registry.

    Subclasses handle everything a handler can raise themselves: what still escapes is logged
    and stops this actor only.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.actor_urn = f"understudy:{id(self):x}"
        self.actor_inbox = mailbox  # type: ignore[assignment]  # put() also answers
        self.actor_stopped = _Flag()  # type: ignore[assignment]  # an Event costs 500 bytes
        self._actor_ref = pykka.ActorRef(self)
        mailbox.actor = self

    @property
    def may_borrow(self) -> bool:
        """Whether handlers may run in a caller's thread: they never wait for others' code."""
        return False

    @staticmethod
    def _create_actor_inbox() -> Any:
        raise NotImplementedError("a pooled actor is given its mailbox")

    @staticmethod
    def _create_future() -> pykka.Future[Any]:
        return Pending()

    def _start_actor_loop(self) -> None:
        """Nothing to start: the mailbox schedules the actor when there is work."""

    def on_yield(self) -> None:
        """Called when the actor gives its thread back."""

    def _handle_receive(self, message: Any) -> Any:
        """For what is no ``Exception`` pykka stops all actors of the process, the host's too."""
        try:
            return super()._handle_receive(message)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"A handler raised {type(error).__name__}") from error

    def run_batch(self) -> None:
        try:
            self._actor_loop_running()
        except Yielded:
            self.on_yield()


class _Flag:
    """As much of ``threading.Event`` as pykka asks of ``actor_stopped``."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True


_numbers = itertools.count(1)


class ThreadPool:
    """The dispatcher of a real runtime: a few daemon threads and a queue of busy mailboxes.

    A thread whose handler hangs is given up by the watchdog and replaced; when the handler
    returns after all, the thread ends. Callers lend theirs for a message of their own.
    """

    def __init__(self, threads: int, *, monotonic_s: Callable[[], float]) -> None:
        self._ready: queue.SimpleQueue[Mailbox | None] = queue.SimpleQueue()
        self._monotonic_s = monotonic_s
        self._size = threads
        self._lock = threading.Lock()
        self._running: dict[int, tuple[Mailbox, float]] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._lent: dict[int, threading.Lock] = {}

    def start(self) -> None:
        for _ in range(self._size):
            self._add_thread()

    def _add_thread(self) -> None:
        number = next(_numbers)
        thread = threading.Thread(
            target=self._run, args=(number,), name=f"understudy-actors-{number}", daemon=True
        )
        self._threads[number] = thread
        thread.start()

    def schedule(self, mailbox: Mailbox) -> None:
        self._ready.put(mailbox)

    def _run(self, number: int) -> None:
        while (mailbox := self._ready.get()) is not None:
            if not self._run_one(number, mailbox, mailbox.run):
                return

    def _run_one(self, number: int, mailbox: Mailbox, run: Callable[[], bool]) -> bool:
        """False if it was given up on, perhaps at this very moment: the thread is replaced."""
        self._running[number] = (mailbox, self._monotonic_s())
        again = False
        try:
            with OneAtATime():
                again = run()
        except BaseException:
            logger.exception("A handler let an exception escape")
            again = mailbox.goes_on()
        with self._lock:
            ours = self._running.pop(number, None) is not None
        if again:  # one that was given up on and replaced is empty: its old actor finds nothing
            self._ready.put(mailbox)
        return ours

    def may_lend(self) -> bool:
        """Only while no actor runs: a thread that is awake takes the next one sooner than this one.

        And not where a handler could be broken into, or off, by what is not its own: signals are
        handled in the main thread, and a deep stack ends in any function. An event loop must not be
        held up.
        """
        if self._running or not self._ready.empty():
            return False
        if threading.get_ident() == threading.main_thread().ident or in_event_loop():
            return False
        try:
            sys._getframe(max(0, sys.getrecursionlimit() - _STACK))  # noqa: SLF001 - looks how deep
        except ValueError:
            return True
        return False

    def run_here(self, mailbox: Mailbox) -> None:
        """Nothing of the caller's context is seen, and no message but its own is handled."""
        number, over = next(_numbers), threading.Lock()
        over.acquire()
        self._lent[number] = over
        try:
            self._run_one(number, mailbox, lambda: Context().run(mailbox.run, 1))
        finally:
            del self._lent[number]
            over.release()

    def hung(self, limit_s: float) -> list[Mailbox]:
        """Mailboxes whose handler runs for longer than the limit; their threads are replaced."""
        now = self._monotonic_s()
        found = []
        with self._lock:
            for number, (mailbox, since) in list(self._running.items()):
                if now - since > limit_s:
                    del self._running[number]
                    if self._threads.pop(number, None) is not None:
                        self._add_thread()
                    found.append(mailbox)
        return found

    def stop(self, timeout_s: float) -> bool:
        """End the threads, and let callers have theirs back; False if one would not end in time."""
        threads = list(self._threads.values())
        for _ in threads:
            self._ready.put(None)
        deadline = self._monotonic_s() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - self._monotonic_s()))
        returned = [
            over.acquire(timeout=max(0.0, deadline - self._monotonic_s()))
            for over in list(self._lent.values())
        ]
        return all(returned) and not any(thread.is_alive() for thread in threads)
