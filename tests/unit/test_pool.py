"""Threads and queues that outlive what goes wrong on them."""

import logging
import random
import threading

import pytest
from pykka._envelope import Envelope

from understudy import RestartPolicy
from understudy.actors.pool import Mailbox, PooledActor, ThreadPool
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


def test_a_supervisor_that_fails_on_one_session_goes_on_with_the_next(quiet):
    class Charge:
        clock = VirtualClock()
        store = None
        counted = []

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
        charge.store = charge
    assert charge.counted == ["b"]
