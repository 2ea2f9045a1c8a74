"""Intensity and period to the instant, and pauses: a supervisor alone, on the clock of a test."""

import random

import pytest

from understudy import RestartPolicy, errors
from understudy.actors.pool import Mailbox
from understudy.actors.supervisor import Died, Supervisor
from understudy.store.claims import RestartRecord
from understudy.testing import VirtualClock


class Charge:
    """A runtime whose store counts at once. Keeps ``verdicts``."""

    def __init__(self):
        self.clock = VirtualClock()
        self.store = self
        self.total = 0
        self.pauses = []
        self.verdicts = []
        self.failures = []

    def record_crash(self, session_id, *, reason, culprit, quarantine_at, done):
        if self.failures:
            done(None, [], self.failures.pop(0))
            return
        self.total += 1
        quarantined = 1 if self.total >= quarantine_at else None
        record = RestartRecord(
            session_id, self.total, self.total, reason=reason, quarantined_ms=quarantined
        )
        done(record, [], None)

    def call_later(self, delay_s, callback):
        self.pauses.append(delay_s)
        callback()

    def revive(self, session_id, mailbox, reason):
        self.verdicts.append("restarted")

    def actor_ended(self, session_id, mailbox, error):
        self.verdicts.append(type(error).__name__)

    def quarantined_now(self, session_id, reason):
        self.reason = reason


class Nobody:
    def schedule(self, mailbox):
        """Messages are handed over by the test."""


def supervised(**options):
    charge = Charge()
    policy = RestartPolicy(quarantine_after=10**30, **options)
    return charge, Supervisor(Mailbox(Nobody()), charge, policy, random.Random(1))


def die(supervisor, error=None, session_id="s"):
    mailbox = Mailbox(Nobody())
    supervisor.on_receive(Died(session_id, mailbox, error or ValueError("no"), None))


@pytest.mark.parametrize(
    ("intensity", "moments", "verdict"),
    [
        (0, [0], "SessionQuarantined"),
        (1, [0], "restarted"),
        (1, [0, 0], "SessionQuarantined"),
        (1, [0, 59], "SessionQuarantined"),
        (1, [0, 60], "SessionQuarantined"),  # the period's last instant is within
        (1, [0, 60.5], "restarted"),
        (3, [0, 1, 2], "restarted"),
        (3, [0, 1, 2, 3], "SessionQuarantined"),
        (3, [0, 20, 40, 60], "SessionQuarantined"),
        (3, [0, 20, 40, 60.5], "restarted"),  # the window slides,
        (3, [0, 20, 40, 60.5, 61], "SessionQuarantined"),  # it does not start anew
        (3, [0, 61, 122, 183, 244, 305, 366], "restarted"),
    ],
)
def test_more_crashes_than_the_intensity_within_the_period_are_quarantine(
    intensity, moments, verdict
):
    charge, supervisor = supervised(intensity=intensity, period_s=60.0)
    now = 0.0
    for moment in moments:
        charge.clock.advance(moment - now)
        now = moment
        die(supervisor)
    assert charge.verdicts == ["restarted"] * (len(moments) - 1) + [verdict]
    assert supervisor.restarts == charge.verdicts.count("restarted")
    assert len(supervisor._recent.get("s", ())) <= intensity + 1


def test_each_session_has_a_window_of_its_own():
    charge, supervisor = supervised(intensity=1)
    for name in "abcdef":
        die(supervisor, session_id=name)
    assert charge.verdicts == ["restarted"] * 6
    supervisor.forget("a")
    die(supervisor, session_id="a")
    die(supervisor, session_id="b")
    assert charge.verdicts[6:] == ["restarted", "SessionQuarantined"]
    assert sorted(supervisor._recent) == ["a", "c", "d", "e", "f"]


def test_no_policy_makes_a_pause_that_cannot_be_reckoned():
    charge, supervisor = supervised(intensity=10**30, backoff_s=1e-9, max_backoff_s=2.0)
    charge.total = 5_000  # crashes of days, none forgiven
    die(supervisor)
    assert charge.verdicts == ["restarted"]
    assert 1.0 <= charge.pauses[0] <= 2.0
    policy = RestartPolicy(backoff_s=0.5, max_backoff_s=3.0)
    assert [policy.pause_s(n, 0.0) for n in (1, 2, 3, 4, 5_000)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert policy.pause_s(3, 1.0) == 1.0
    assert RestartPolicy(backoff_s=0).pause_s(5_000, 0.5) == 0.0


@pytest.mark.parametrize("error", [errors.StoreFull("full"), ZeroDivisionError("a bug")])
def test_a_crash_that_cannot_be_counted_is_counted_later_and_once(error):
    charge, supervisor = supervised()
    charge.failures = [error] * 3
    die(supervisor)
    assert charge.verdicts == ["restarted"] and charge.total == 1
    assert charge.pauses[:3] == [1.0] * 3


@pytest.mark.parametrize(
    "error", [errors.SessionNotFound(""), errors.SessionClaimed(""), errors.RuntimeClosed("")]
)
def test_nothing_is_restarted_that_is_gone_or_somebody_elses(error):
    charge, supervisor = supervised()
    charge.failures = [error]
    die(supervisor)
    assert charge.verdicts == [type(error).__name__]
    assert supervisor.restarts == 0 and not supervisor._recent


def test_what_an_error_says_is_cut_to_what_can_be_stored():
    charge, supervisor = supervised(intensity=0)
    die(supervisor, ValueError("half a character: \ud800, " + "word " * 10_000))
    assert charge.reason.startswith("ValueError: half a character: ?, word")
    assert len(charge.reason) < 2_100
    charge.reason.encode()
