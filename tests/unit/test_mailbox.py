"""The mailbox: what it takes, and when it closes."""

import threading

from pykka._envelope import Envelope

from understudy.actors.pool import Mailbox


class Nobody:
    """A dispatcher that runs nothing."""

    def schedule(self, mailbox):
        pass


def test_nothing_comes_in_between_the_look_at_an_idle_actor_and_the_close():
    mailbox = Mailbox(Nobody())
    taken = []
    sender = threading.Thread(target=lambda: taken.append(mailbox.put(Envelope("late"))))

    def idle():
        sender.start()
        sender.join(0.05)
        assert sender.is_alive(), "the message has to wait until it is decided"
        return True

    assert mailbox.close_if_idle(idle)
    sender.join(10)
    assert taken == [False]


def test_a_mailbox_whose_actor_is_busy_stays_open():
    mailbox = Mailbox(Nobody())
    assert not mailbox.close_if_idle(lambda: False)
    assert mailbox.put(Envelope("taken"))
    assert not mailbox.close_if_idle(lambda: True)
