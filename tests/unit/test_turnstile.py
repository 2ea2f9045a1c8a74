"""The turnstile lets one thread through at a time, and never holds anybody up for long."""

import threading

import pytest

from understudy.store import turnstile
from understudy.store.turnstile import OneAtATime


@pytest.fixture
def patience(monkeypatch):
    """How long anybody waits is up to the test."""

    def set_to(seconds):
        monkeypatch.setattr(turnstile, "PATIENCE_S", seconds)

    return set_to


@pytest.fixture
def occupied():
    """Somebody is inside, until told to leave."""
    inside, leave = threading.Event(), threading.Event()

    def occupy():
        with OneAtATime():
            inside.set()
            leave.wait(15)

    thread = threading.Thread(target=occupy)
    thread.start()
    assert inside.wait(15)
    yield leave
    leave.set()
    thread.join(15)


def test_threads_go_one_after_the_other(patience):
    patience(15.0)
    inside, most = 0, []

    def work():
        nonlocal inside
        for _ in range(200):
            with OneAtATime():
                inside += 1
                most.append(inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert most == [1] * 800


def test_who_is_inside_may_enter_again():
    with OneAtATime():
        with OneAtATime() as inner:
            assert inner is None
        assert OneAtATime._inside == threading.get_ident()
    assert OneAtATime._inside is None
    assert not OneAtATime._lock.locked()


def test_whoever_waited_in_vain_goes_on(occupied, patience):
    patience(0.001)
    with OneAtATime():
        assert OneAtATime._inside != threading.get_ident()
    assert OneAtATime._lock.locked()


def test_nobody_waits_for_one_that_others_waited_for_in_vain(occupied, patience):
    patience(0.001)
    with OneAtATime():
        pass
    patience(3600.0)
    with OneAtATime():
        pass


def test_one_that_took_long_is_forgotten_when_it_leaves(occupied, patience):
    patience(0.001)
    with OneAtATime():
        pass
    patience(15.0)
    occupied.set()
    while OneAtATime._lock.locked():
        pass
    with OneAtATime():
        assert OneAtATime._inside == threading.get_ident()
        assert not OneAtATime._slow


def test_an_error_leaves_too():
    with pytest.raises(ZeroDivisionError), OneAtATime():
        _ = 1 / 0
    assert not OneAtATime._lock.locked()
