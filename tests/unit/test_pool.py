"""The pool of actor threads: a handler that hangs is given up on, and nothing else is lost."""

import threading
import time

from understudy.actors.pool import Mailbox, ThreadPool


class Handler:
    """As much of an actor as a mailbox runs; ``during`` is called in its handler."""

    def __init__(self, during):
        self.run_batch = during


def test_a_thread_given_up_on_as_its_handler_returns_ends_without_a_word():
    pool = ThreadPool(1, monotonic_s=time.monotonic)
    found, ended = [], threading.Event()

    class LastMoment(Mailbox):
        """Is found hanging when its handler has returned, and the thread has not noted it."""

        def run(self, batch=32):
            found.extend(pool.hung(-1.0))
            ended.set()
            return True

    pool.start()
    first = LastMoment(pool)
    pool.schedule(first)
    assert ended.wait(15)
    assert found == [first]
    handled = threading.Event()
    second = Mailbox(pool)
    second.actor = Handler(handled.set)
    pool.schedule(second)
    assert handled.wait(15)
    assert pool.stop(15)
    assert found == [first]  # it was not run again by the thread that was given up
