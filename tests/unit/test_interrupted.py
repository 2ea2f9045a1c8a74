"""Ctrl-C comes between any two instructions of whoever waits for events, and holds up nobody."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time

import pytest

from understudy.actors.publisher import Publisher
from understudy.actors.subscription import Subscription
from understudy.store.events import Event, SessionIdle
from understudy.store.lanes import wait_released

TIMES = 1_000


class Reader(threading.Thread):
    """Takes events until told to stop, however often it is interrupted."""

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(daemon=True)
        self.subscription = subscription
        self.interrupted = 0
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            try:
                while not self.stopping:
                    self.subscription.next(0.0)
            except KeyboardInterrupt:
                self.interrupted += 1

    def interrupt(self) -> None:
        ident = ctypes.c_ulong(self.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def test_who_is_interrupted_while_waiting_for_events_holds_up_no_publisher():
    publisher = Publisher(None, wall_ms=lambda: 0)
    chance = random.Random(1)
    reader = Reader(Subscription(publisher))
    reader.start()
    for number in range(TIMES):
        fact = SessionIdle(session_id="ses_a")
        event = Event(fact.type, "ses_a", number + 1, number + 1, 0, fact)
        pushing = threading.Thread(target=publisher.committed, args=([event],), daemon=True)
        pushing.start()
        for _ in range(chance.randrange(200)):
            pass
        reader.interrupt()
        pushing.join(15)
        assert not pushing.is_alive(), f"held up after {number} interrupts"
    reader.stopping = True
    reader.subscription.close()
    reader.join(15)
    assert reader.interrupted > TIMES / 10


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_ctrl_c_that_does_not_wake_the_main_thread_ends_its_wait_all_the_same(timeout_s):
    """It comes to another thread here, as good as just before the wait begins."""
    gate = threading.Lock()
    gate.acquire()
    rescue = threading.Timer(30.0, gate.release)
    rescue.daemon = True
    waiting = threading.Event()

    def send():
        waiting.wait(15)
        os.kill(os.getpid(), signal.SIGINT)

    def wait():
        waiting.set()
        wait_released(gate, timeout_s)

    sending = threading.Thread(target=send)
    sending.start()
    rescue.start()
    began_s = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        rescue.cancel()
        sending.join(15)
    assert time.monotonic() - began_s < 15
