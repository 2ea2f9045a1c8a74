"""Threads and queues that outlive what goes wrong on them."""

import asyncio
import logging
import queue
import random
import sys
import threading
import time
from contextvars import ContextVar

import pykka
import pytest
from pykka._envelope import Envelope

from understudy import RestartPolicy
from understudy.actors.pool import BATCH, Mailbox, PooledActor, ThreadPool
from understudy.actors.supervisor import Died, Supervisor
from understudy.actors.workers import WorkerThreads
from understudy.testing import VirtualClock

CLOCK = VirtualClock()


class Careless(PooledActor):
    """Lets escape what it is sent, and reports what else it gets."""

    def __init__(self, mailbox):
        super().__init__(mailbox)
        self.got = []
        self.reached = threading.Event()

    def run_batch(self):
        message = self.actor_inbox.get().message
        if isinstance(message, BaseException):
            raise message
        self.got.append(message)
        self.reached.set()


@pytest.fixture
def quiet(caplog):
    with caplog.at_level(logging.CRITICAL, "understudy"):
        yield


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_that_escapes_a_handler_costs_the_pool_no_thread(quiet, error):
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    pool.start()
    first, second = Mailbox(pool), Mailbox(pool)
    Careless(first)
    other = Careless(second)
    first.put(Envelope(error))
    second.put(Envelope("hello"))
    assert other.reached.wait(15)
    assert other.got == ["hello"]
    assert pool.stop(15)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_mailbox_goes_on_after_an_exception_that_escaped(quiet, waiting):
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    mailbox = Mailbox(pool)
    actor = Careless(mailbox)
    mailbox.put(Envelope(SystemExit(3)))
    if waiting:
        mailbox.put(Envelope("hello"))
    pool.start()
    if not waiting:
        until = time.monotonic() + 15
        while not mailbox.idle and time.monotonic() < until:
            time.sleep(0.001)
        mailbox.put(Envelope("hello"))
    assert actor.reached.wait(15)
    assert actor.got == ["hello"]
    assert pool.stop(15)


def test_what_is_no_exception_stops_its_actor_and_none_of_the_hosts(quiet):
    class Fatal(PooledActor):
        def on_receive(self, message):
            handled.set()
            raise message

    class Host(pykka.ThreadingActor):
        def on_receive(self, message):
            return message

    host = Host.start()
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    handled = threading.Event()
    mailbox = Mailbox(pool)
    actor = Fatal(mailbox)
    mailbox.put(Envelope(SystemExit(3)))
    pool.start()
    assert handled.wait(15)
    assert pool.stop(15)
    assert actor.actor_stopped.is_set()
    assert host.ask("alive", timeout=15) == "alive"
    host.stop()


def test_a_mailbox_that_was_told_to_hang_and_was_not_replaced_goes_on():
    clock = VirtualClock()
    pool = ThreadPool(1, monotonic_s=clock.monotonic_s)
    held, hold, over = threading.Event(), threading.Event(), threading.Event()

    class Slow(PooledActor):
        def on_receive(self, message):
            if message == "last":
                over.set()
                return
            held.set()
            hold.wait(15)

    mailbox = Mailbox(pool)
    Slow(mailbox)
    pool.start()
    mailbox.put(Envelope("first"))
    assert held.wait(15)
    for _ in range(BATCH):
        mailbox.put(Envelope("more"))
    mailbox.put(Envelope("last"))
    clock.advance(2.0)
    assert pool.hung(1.0) == [mailbox]
    hold.set()
    assert over.wait(15)
    assert pool.stop(15)


def test_a_handler_that_hangs_is_told_once_and_its_thread_replaced():
    clock = VirtualClock()
    pool = ThreadPool(1, monotonic_s=clock.monotonic_s)
    pool.start()
    held, hold = threading.Event(), threading.Event()

    class Stuck(PooledActor):
        def run_batch(self):
            held.set()
            hold.wait(15)

    mailbox, other = Mailbox(pool), Mailbox(pool)
    Stuck(mailbox)
    mailbox.put(Envelope("go"))
    assert held.wait(15)
    assert pool.hung(1.0) == []
    clock.advance(2.0)
    assert pool.hung(1.0) == [mailbox]
    assert pool.hung(1.0) == []
    alive = Careless(other)
    other.put(Envelope("hello"))
    assert alive.reached.wait(15)
    hold.set()
    assert pool.stop(15)


def test_a_message_of_the_actors_own_comes_first_and_not_after_the_end():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)  # never started: nothing is taken
    mailbox = Mailbox(pool)
    mailbox.put(Envelope("second"))
    mailbox.put_first("first")
    assert [each.message for each in mailbox.close()] == ["first", "second"]
    mailbox.put_first("late")
    assert not mailbox.put(Envelope("late"))
    assert mailbox.empty()


def test_a_hung_actors_successor_gets_what_waited_in_its_order():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    old, new = Mailbox(pool), Mailbox(pool)
    for n in range(3):
        old.put(Envelope(n))
    old.hand_over(new)
    assert not old.put(Envelope("lost"))
    new.put(Envelope(3))
    assert [each.message for each in new.close()] == [0, 1, 2, 3]


def test_a_job_that_lets_an_exception_escape_costs_the_workers_no_thread(quiet):
    workers = WorkerThreads(1)
    over = threading.Event()
    workers.submit(lambda: 1 / 0)
    workers.submit(lambda: (_ for _ in ()).throw(SystemExit(3)))
    workers.submit(over.set)
    assert over.wait(15)
    workers.close()


def test_a_job_given_up_on_as_it_ended_costs_the_next_one_nothing():
    workers = WorkerThreads(1)
    first, held, hold, last = (threading.Event() for _ in range(4))

    def second():
        held.set()
        hold.wait(15)

    give_up = workers.submit(first.set)
    assert first.wait(15)
    workers.submit(second)
    assert held.wait(15)
    give_up()
    assert workers.lost == 0
    workers.submit(last.set)
    hold.set()
    assert last.wait(15)
    workers.close()


def test_a_job_given_up_on_counts_as_lost_until_it_ends():
    workers = WorkerThreads(1)
    held, hold, other = threading.Event(), threading.Event(), threading.Event()

    def stuck():
        held.set()
        hold.wait(15)

    give_up = workers.submit(stuck)
    assert held.wait(15)
    give_up()
    give_up()
    assert workers.lost == 1
    workers.submit(other.set)
    assert other.wait(15)
    hold.set()
    until = time.monotonic() + 15
    while workers.lost and time.monotonic() < until:
        time.sleep(0.001)
    assert workers.lost == 0
    workers.close()


def test_a_job_given_up_on_before_it_begins_does_not_begin():
    workers = WorkerThreads(1)
    held, hold, other = threading.Event(), threading.Event(), threading.Event()
    began = []

    def first():
        held.set()
        hold.wait(15)

    workers.submit(first)
    assert held.wait(15)
    give_up = workers.submit(lambda: began.append(1))
    workers.submit(other.set)
    give_up()
    give_up()
    hold.set()
    assert other.wait(15)
    assert (began, workers.lost) == ([], 0)
    workers.close()


def test_as_many_jobs_run_at_once_as_there_may_be_threads_and_no_more():
    workers = WorkerThreads(3)
    hold, began, over = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def job():
        began.release()
        hold.wait(15)
        over.release()

    for _ in range(5):
        workers.submit(job)
    for _ in range(3):
        assert began.acquire(timeout=15)
    assert not began.acquire(blocking=False)
    assert (workers._threads, len(workers._jobs)) == (3, 2)
    hold.set()
    for _ in range(5):
        assert over.acquire(timeout=15)
    workers.close()


def test_a_thread_is_called_only_once_the_one_before_has_begun(monkeypatch):
    workers, called = WorkerThreads(8), []

    def call(thread):
        called.append(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", call)
        for _ in range(8):
            workers.submit(lambda: None)
        assert len(called) == 1
    over = threading.Event()
    workers.submit(over.set)
    called[0].start()
    assert over.wait(15)
    workers.close()


def test_a_job_that_is_handed_in_as_a_thread_ends_for_want_of_any_is_done(monkeypatch):
    monkeypatch.setattr("understudy.actors.workers._LINGER_S", 0.0)
    workers = WorkerThreads(2)
    for _ in range(3_000):
        over = threading.Event()
        workers.submit(over.set)
        assert over.wait(15)
    workers.close()


def test_a_call_that_another_thread_takes_as_ones_time_is_up_holds_nobody_up(monkeypatch):
    """Two are idle. One gives up waiting; a call comes at that moment, and the other takes it."""
    taken, over = threading.Event(), threading.Event()

    class Calls:
        """As threads may be switched: the first finds its time up, the other finds the call."""

        def __init__(self):
            self.calls = queue.SimpleQueue()
            self.waiting = 0
            self.up = threading.Event()

        def put(self, call):
            self.calls.put(call)

        def get(self, timeout=None):
            self.waiting += 1
            if self.waiting == 1:
                assert self.up.wait(15)
                raise queue.Empty
            call = self.calls.get(timeout=15)
            taken.set()
            return call

        def empty(self):
            found = self.calls.empty()
            taken.wait(0.2)
            return found

        def get_nowait(self):
            taken.wait(0.2)
            return self.calls.get_nowait()

    workers = WorkerThreads(2)
    workers._calls = calls = Calls()
    both = threading.Barrier(2)
    for _ in range(2):
        workers.submit(lambda: both.wait(15))
    until = time.monotonic() + 15
    while calls.waiting < 2:
        assert time.monotonic() < until
        time.sleep(0.001)
    with workers._lock:
        calls.up.set()
        calls.put(None)
        workers._called, workers._idle = True, workers._idle - 1
    workers.submit(over.set)
    assert over.wait(15)
    workers.close()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_jobs_do_none_is_forgotten_and_no_thread_is_counted_twice(monkeypatch, seed):
    monkeypatch.setattr("understudy.actors.workers._LINGER_S", 0.001)
    chance, workers = random.Random(seed), WorkerThreads(4)
    over, handed_in, given_up = [], [], []

    def job(number, kind):
        if kind == "waits":
            with workers.waiting():
                time.sleep(0.0005)
        elif kind == "takes long":
            time.sleep(0.0005)
        over.append(number)

    for number in range(600):
        kind = chance.choice(["at once", "at once", "waits", "takes long"])
        give_up = workers.submit(lambda number=number, kind=kind: job(number, kind))
        handed_in.append(number)
        if chance.random() < 0.1:
            give_up()
            given_up.append(number)
    until = time.monotonic() + 15
    wanted = set(handed_in) - set(given_up)
    while not (wanted <= set(over) and workers._threads == workers.lost == workers._idle == 0):
        assert time.monotonic() < until, (wanted - set(over), workers.__dict__)
        time.sleep(0.001)
    assert len(over) == len(set(over)), "done twice"
    assert not workers._jobs


@pytest.fixture
def room(monkeypatch):
    """Whether the process may start threads for tools: up to the test."""
    start, room = threading.Thread.start, threading.Event()

    def start_if_there_is_room(thread):
        if thread.name == "understudy-tool" and not room.is_set():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_there_is_room)
    return room


def test_a_thread_that_could_not_be_started_is_not_counted(room):
    workers = WorkerThreads(1)
    refused, ran = [], threading.Event()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="new thread"):
            workers.submit(lambda: refused.append(1))
    room.set()
    workers.submit(ran.set)
    assert ran.wait(15)
    assert (refused, len(workers._jobs)) == ([], 0)
    workers.close()


def test_where_no_thread_can_be_started_those_there_are_do_the_work(room):
    workers = WorkerThreads(2)
    held, hold, other = threading.Event(), threading.Event(), threading.Event()

    def first():
        held.set()
        hold.wait(15)

    room.set()
    workers.submit(first)
    assert held.wait(15)
    room.clear()
    workers.submit(other.set)
    hold.set()
    assert other.wait(15)
    workers.close()


def test_one_that_waits_where_no_thread_can_be_started_goes_on(room):
    workers = WorkerThreads(1)
    held, hold, other, waited = (threading.Event() for _ in range(4))

    def first():
        held.set()
        hold.wait(15)
        with workers.waiting():
            waited.set()

    room.set()
    workers.submit(first)
    assert held.wait(15)
    workers.submit(other.set)
    room.clear()
    hold.set()
    assert waited.wait(15)
    assert other.wait(15)
    assert workers._threads == 1
    workers.close()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_a_supervisor_that_fails_on_one_session_goes_on_with_the_next(quiet, error):
    class Charge:
        clock = VirtualClock()
        counted = []

        @property
        def store(self):
            if not self.counted:
                self.counted.append("failed")
                raise error
            return self

        def record_crash(self, session_id, **_):
            self.counted.append(session_id)

    charge = Charge()
    supervisor = Supervisor(
        Mailbox(ThreadPool(1, monotonic_s=CLOCK.monotonic_s)),
        charge,
        RestartPolicy(),
        random.Random(1),
    )
    supervisor.on_receive("not news")
    for name in ("a", "b"):
        supervisor.on_receive(Died(name, Mailbox(None), ValueError("no"), None))
    assert charge.counted == ["failed", "b"]


# --- threads that callers lend -----------------------------------------------------------------


class Borrower(PooledActor):
    """Does what it is sent, in whatever thread it may."""

    may_borrow = True

    def __init__(self, mailbox):
        super().__init__(mailbox)
        self.threads = []

    def on_receive(self, message):
        self.threads.append(threading.get_ident())
        message()


def in_thread(work):
    """What ``work`` gives in a thread that is not the main one."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(15)
    return results[0]


def test_an_idle_actor_handles_its_callers_message_and_no_other_in_the_thread_lent_to_it():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)  # not started: nothing is taken from it
    mailbox = Mailbox(pool)
    actor = Borrower(mailbox)
    reached = threading.Event()
    mailbox.put(Envelope(lambda: mailbox.put(Envelope(reached.set), lend=True)), lend=True)
    assert actor.threads == [threading.get_ident()]
    assert not reached.is_set()
    pool.start()
    assert reached.wait(15)
    assert actor.threads[1] != threading.get_ident()
    assert pool.stop(15)
    assert mailbox.idle


def test_who_cannot_say_that_its_handlers_never_wait_borrows_no_thread():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    mailbox = Mailbox(pool)
    actor = Careless(mailbox)
    mailbox.put(Envelope("hello"), lend=True)
    assert actor.got == []


def test_threads_are_lent_only_where_nothing_breaks_into_a_handler():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)

    async def in_a_loop():
        return pool.may_lend()

    def deep(calls):
        return deep(calls - 1) if calls else pool.may_lend()

    left = sys.getrecursionlimit() - 260
    assert in_thread(pool.may_lend)
    assert in_thread(lambda: deep(left - 20))
    assert not in_thread(lambda: deep(left + 60))
    assert not in_thread(lambda: asyncio.run(in_a_loop()))
    assert not pool.may_lend(), "signal handlers run here"


def test_a_pool_that_is_awake_borrows_no_thread():
    pool = ThreadPool(1, monotonic_s=CLOCK.monotonic_s)
    mailbox = Mailbox(pool)
    actor = Borrower(mailbox)
    seen = []
    mailbox.put(Envelope(lambda: seen.append(in_thread(pool.may_lend))), lend=True)
    assert actor.threads
    assert seen == [False], "a handler runs"
    assert in_thread(pool.may_lend)
    mailbox.put(Envelope(lambda: None))
    assert not in_thread(pool.may_lend), "a mailbox waits"


def test_a_handler_in_a_thread_that_was_lent_sees_nothing_of_its_callers_context():
    seen = []
    of_caller = ContextVar("of_caller", default="nothing")
    of_caller.set("a secret")
    mailbox = Mailbox(ThreadPool(1, monotonic_s=CLOCK.monotonic_s))
    Borrower(mailbox)

    def look():
        seen.append(of_caller.get())
        of_caller.set("a leak")

    mailbox.put(Envelope(look), lend=True)
    assert seen == ["nothing"]
    assert of_caller.get() == "a secret"


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_exception_that_escapes_a_handler_does_not_reach_who_lent_the_thread(quiet, error):
    class Raising(Careless):
        may_borrow = True

    mailbox = Mailbox(ThreadPool(1, monotonic_s=CLOCK.monotonic_s))
    Raising(mailbox)
    assert mailbox.put(Envelope(error), lend=True)
    assert mailbox.empty()


def test_a_handler_that_hangs_in_a_thread_that_was_lent_is_given_up_like_any_other():
    clock = VirtualClock()
    pool = ThreadPool(1, monotonic_s=clock.monotonic_s)
    pool.start()
    held, hold = threading.Event(), threading.Event()
    mailbox = Mailbox(pool)
    actor = Borrower(mailbox)

    def hang():
        held.set()
        hold.wait(15)

    caller = threading.Thread(target=lambda: mailbox.put(Envelope(hang), lend=True))
    caller.start()
    assert held.wait(15)
    clock.advance(2.0)
    assert pool.hung(1.0) == [mailbox]
    assert pool.hung(1.0) == []
    mailbox.put(Envelope(lambda: None))
    assert not pool.stop(0.1), "a caller is not back"
    hold.set()
    caller.join(15)
    assert pool.stop(15)
    assert actor.threads == [caller.ident], "the mailbox was not the caller's any more"
