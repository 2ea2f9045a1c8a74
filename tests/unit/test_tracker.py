"""The session tracker, statement by statement (D in the requirements; Signet-AI/signetai#502)."""

import logging
import math
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from understudy.actors.clock import VirtualClock
from understudy.actors.leases import DEFAULT_TTL_S, MAX_TTL_S, Swept
from understudy.actors.tracker import SessionTracker, normalise_key
from understudy.errors import InvalidInput, StoreFull
from understudy.store.tracker_entries import BypassEntry, ClaimEntry, MemoryTrackerStore

TTL = 4 * 3600
NONSENSE = [None, math.nan, math.inf, -math.inf, 0, -1, -0.0, 1e-320, "60", True, False, [], 1j]


class CountingStore(MemoryTrackerStore):
    """Counts writes, and fails them on demand."""

    def __init__(self):
        super().__init__()
        self.writes = 0
        self.full = False
        self.on_write: Callable[[], None] = lambda: None

    def save(self, entries):
        self._write()
        super().save(entries)

    def remove(self, entries):
        self._write()
        super().remove(entries)

    def _write(self):
        self.on_write()
        if self.full:
            raise StoreFull("no space left")
        self.writes += 1


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def store():
    return CountingStore()


@pytest.fixture
def tracker(clock, store):
    return SessionTracker(store=store, clock=clock)


def restart(store, clock):
    """What the next process sees: the rows, and a monotonic clock that started anew."""
    next_clock = VirtualClock(monotonic_s=5.0, wall_ms=clock.wall_ms())
    return SessionTracker(store=store, clock=next_clock), next_clock


def rows(store, kind):
    return {row.key: row for row in store.load() if isinstance(row, kind)}


def held(tracker):
    """What is in memory, expired or not."""
    return len(tracker._leases._claims), len(tracker._leases._bypasses)


def test_d01_a_bypass_is_durable_when_the_call_returns(tracker, store):
    assert tracker.bypass("ses_1", allow_unknown=True)
    assert set(rows(store, BypassEntry)) == {"ses_1"}


def test_d01_a_bypass_that_could_not_be_stored_is_not_pretended(tracker, store):
    store.full = True
    with pytest.raises(StoreFull):
        tracker.bypass("ses_1", allow_unknown=True)
    assert not tracker.is_bypassed("ses_1")
    store.full = False
    tracker.claim("ses_1", "a")
    store.full = True
    for change in (tracker.bypass, lambda key: tracker.release(key, "a")):
        with pytest.raises(StoreFull):
            change("ses_1")
    assert list(tracker.claims()) == ["ses_1"]


@pytest.mark.parametrize("hook", ["session-start", "user-prompt", "pre-compaction", "session-end"])
def test_d02_a_hook_of_a_bypassed_session_is_a_noop_without_a_store_write(tracker, store, hook):
    tracker.touch("ses_1")
    tracker.claim("ses_2", "a")
    tracker.bypass("ses_2")
    before = store.writes
    assert tracker.gate(hook, "ses_1", "a").action == "no-op"
    assert tracker.gate(hook, "ses_2", "b").action == "no-op"
    assert store.writes == before


def test_d02_a_hook_of_a_bypassed_session_does_not_wait_for_anothers_commit(tracker, store):
    tracker.touch("ses_1")
    writing, done = threading.Event(), threading.Event()
    store.on_write = lambda: (writing.set(), done.wait(30))
    other = threading.Thread(target=tracker.touch, args=("ses_2",))
    other.start()
    try:
        assert writing.wait(30)
        assert tracker.gate("user-prompt", "ses_1", "a").bypassed
        assert tracker.counts().bypasses == 1
    finally:
        done.set()
        other.join(30)
    assert tracker.is_bypassed("ses_2")


def test_d03_hooks_run_again_once_the_bypass_has_expired(tracker, clock):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 60)
    for _ in range(59):
        clock.advance(1)
        assert tracker.gate("user-prompt", "ses_1", "a").action == "no-op"
    clock.advance(1)
    assert tracker.gate("user-prompt", "ses_1", "a").action == "run"


def test_d04_the_default_ttl_is_four_hours(tracker, clock):
    assert DEFAULT_TTL_S == TTL
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1")
    clock.advance(TTL - 0.001)
    assert tracker.is_bypassed("ses_1")
    assert tracker.claims()
    clock.advance(0.001)
    assert not tracker.is_bypassed("ses_1")
    assert not tracker.claims()


@pytest.mark.parametrize("ttl_s", [0.001, 1, 59.5, 8 * TTL, MAX_TTL_S])
def test_d05_an_explicit_ttl_is_honoured(tracker, clock, ttl_s):
    tracker.bypass("ses_1", ttl_s, allow_unknown=True)
    tracker.claim("ses_2", "a", ttl_s)
    entry = tracker.bypasses()["ses_1"]
    assert entry.expires_at_ms - clock.wall_ms() == round(ttl_s * 1000)
    clock.advance(ttl_s * 0.5)
    assert tracker.is_bypassed("ses_1")
    assert tracker.claims()
    clock.advance(ttl_s * 0.5)
    assert not tracker.is_bypassed("ses_1")
    assert not tracker.claims()


@pytest.mark.parametrize("ttl_s", NONSENSE, ids=repr)
def test_d06_a_ttl_that_makes_no_sense_is_the_default(tracker, clock, ttl_s):
    tracker.claim("ses_1", "a", ttl_s)
    tracker.bypass("ses_1", ttl_s)
    tracker.touch("ses_2", ttl_s)
    clock.advance(TTL - 1)
    assert tracker.is_bypassed("ses_1")
    assert tracker.is_bypassed("ses_2")
    assert list(tracker.claims()) == ["ses_1"]
    clock.advance(1)
    assert tracker.counts().bypasses == tracker.counts().claims == 0


@pytest.mark.parametrize("ttl_s", [1e308, 10**400, MAX_TTL_S + 1], ids=["1e308", "10**400", "max"])
def test_d06_a_finite_ttl_makes_nothing_immortal(tracker, clock, ttl_s):
    tracker.touch("ses_1", ttl_s)
    clock.advance(MAX_TTL_S)
    assert not tracker.is_bypassed("ses_1")


@pytest.mark.parametrize("ttl_s", NONSENSE, ids=repr)
def test_d06_a_default_ttl_that_makes_no_sense_is_refused(ttl_s):
    with pytest.raises(InvalidInput):
        SessionTracker(default_ttl_s=ttl_s)


def test_d07_is_bypassed_checks_the_expiry_itself_and_evicts(tracker, clock, store):
    tracker.touch("ses_1")
    clock.advance(TTL)
    writes = store.writes
    assert held(tracker) == (0, 1)
    assert not tracker.is_bypassed("ses_1")
    assert held(tracker) == (0, 0)
    assert store.writes == writes
    assert tracker.sweep().bypasses == 0
    assert not store.load()


def test_d08_the_sweep_removes_expired_bypasses_and_expired_claims(tracker, clock, store):
    tracker.touch("ses_1", 60)
    tracker.claim("ses_2", "a", 60)
    clock.advance(60)
    swept = tracker.sweep()
    assert (swept.claims, swept.bypasses) == (1, 1)
    assert held(tracker) == (0, 0)
    assert not store.load()


def test_d09_the_sweep_removes_nothing_live(tracker, clock, store):
    tracker.touch("ses_1", 60)
    tracker.claim("ses_2", "a", 60)
    clock.advance(59.999)
    tracker.sweep()
    assert tracker.is_bypassed("ses_1")
    assert list(tracker.claims()) == ["ses_2"]
    assert len(store.load()) == 2


def test_d10_a_sweep_is_a_call_and_time_is_injected(tracker, clock):
    tracker.touch("ses_1")
    assert tracker.sweep().bypasses == 0
    clock.advance(TTL)
    assert tracker.sweep().bypasses == 1
    assert tracker.sweep().bypasses == 0


def test_d11_views_and_counts_exclude_the_expired_before_any_sweep(tracker, clock):
    tracker.touch("ses_1", 60)
    tracker.touch("ses_2", 120)
    tracker.claim("ses_3", "a", 60)
    clock.advance(60)
    assert list(tracker.bypasses()) == ["ses_2"]
    assert not tracker.claims()
    counts = tracker.counts()
    assert (counts.claims, counts.bypasses, counts.bypass_only) == (0, 1, 1)


def test_d12_a_view_is_a_read_only_snapshot(tracker):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1")
    claims, bypasses = tracker.claims(), tracker.bypasses()
    for view in (claims, bypasses):
        with pytest.raises(TypeError):
            view["ses_2"] = view["ses_1"]
        with pytest.raises(AttributeError):
            view["ses_1"].ttl_s = 0.0
    tracker.release("ses_1", "a")
    assert len(claims) == len(bypasses) == 1
    assert len(tracker.claims()) == len(tracker.bypasses()) == 0


@pytest.mark.parametrize("again", ["renew", "claim"])
def test_d13_a_renewed_claim_never_outlives_its_bypass(tracker, clock, again):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 2 * 3600)
    for _ in range(10):
        clock.advance(3600)
        assert getattr(tracker, again)("ses_1", "a")
        left = tracker.bypasses()["ses_1"].expires_at_ms
        assert left >= tracker.claims()["ses_1"].expires_at_ms
    clock.advance(TTL - 1)
    assert tracker.is_bypassed("ses_1")


def test_d13_the_extended_bypass_is_durable(tracker, clock, store):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 60)
    tracker.renew("ses_1", "a")
    after, next_clock = restart(store, clock)
    next_clock.advance(TTL - 1)
    assert after.is_bypassed("ses_1")


def test_d14_renewing_creates_nothing(tracker, clock, store):
    assert not tracker.renew("ses_1", "a")
    assert not store.load()
    tracker.claim("ses_1", "a")
    assert tracker.renew("ses_1", "a")
    assert not tracker.is_bypassed("ses_1")
    clock.advance(TTL)
    assert not tracker.renew("ses_1", "a")
    assert not tracker.claims()
    assert not tracker.bypasses()


def test_d15_renewing_does_not_revive_an_expired_bypass(tracker, clock):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 60)
    clock.advance(60)
    assert held(tracker) == (1, 1)
    assert tracker.renew("ses_1", "a")
    assert not tracker.is_bypassed("ses_1")


def test_d16_nothing_shortens_a_bypass(tracker, clock):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 3 * TTL)
    tracker.renew("ses_1", "a")
    tracker.claim("ses_1", "a", 60)
    tracker.bypass("ses_1", 60)
    tracker.touch("ses_1", 60)
    clock.advance(3 * TTL - 1)
    assert tracker.is_bypassed("ses_1")
    clock.advance(1)
    assert not tracker.is_bypassed("ses_1")


def test_d16_a_claim_is_not_shortened_either(tracker, clock):
    tracker.claim("ses_1", "a", 3 * TTL)
    tracker.claim("ses_1", "a", 60)
    clock.advance(3 * TTL - 1)
    assert tracker.claims()


@pytest.mark.parametrize("ttl_s", [None, 60])
def test_d17_a_session_in_use_stays_bypassed_over_many_ttls(tracker, clock, store, ttl_s):
    step_s = (ttl_s or TTL) - 0.001
    tracker.bypass("ses_1", ttl_s, allow_unknown=True)
    for _ in range(50):
        clock.advance(step_s)
        assert tracker.is_bypassed("ses_1")
        tracker.touch("ses_1")
        tracker.sweep()
        after, next_clock = restart(store, clock)
        next_clock.advance(step_s)
        assert after.is_bypassed("ses_1")


def test_d18_a_send_after_a_long_idle_time_is_bypassed_again(tracker, clock, store):
    tracker.bypass("ses_1", allow_unknown=True)
    clock.advance(10 * TTL)
    tracker.sweep()
    assert not tracker.is_bypassed("ses_1")
    tracker.touch("ses_1")
    assert tracker.is_bypassed("ses_1")
    assert "ses_1" in rows(store, BypassEntry)


def test_d18_a_touch_that_could_not_be_stored_stops_the_send(tracker, store):
    store.full = True
    with pytest.raises(StoreFull):
        tracker.touch("ses_1")


def test_d19_an_unused_internal_session_lapses_and_its_memory_is_freed(tracker, clock, store):
    tracker.touch("ses_1")
    clock.advance(TTL)
    assert tracker.gate("user-prompt", "ses_1").action == "run"
    tracker.sweep()
    assert held(tracker) == (0, 0)
    assert not tracker._leases._gone
    assert not store.load()


def test_d20_d21_rotation_leaves_the_old_session_bypassed_and_bypasses_the_new(tracker, clock):
    tracker.touch("ses_old")
    clock.advance(TTL / 2)
    tracker.touch("ses_new")
    assert tracker.gate("session-end", "ses_old").bypassed
    clock.advance(TTL / 2 - 1)
    for hook in ("user-prompt", "session-end", "stop"):
        assert tracker.gate(hook, "ses_old", "a").bypassed
        assert tracker.gate(hook, "ses_new", "a").bypassed
    clock.advance(1)
    assert not tracker.is_bypassed("ses_old")
    assert tracker.is_bypassed("ses_new")


def test_d22_only_unbypass_release_and_forget_end_a_bypass_early(tracker, clock):
    tracker.claim("ses_1", "a")
    tracker.touch("ses_1")
    tracker.claim("ses_1", "b")
    tracker.renew("ses_1", "a")
    tracker.renew("ses_1", "b")
    tracker.release("ses_1", "b")
    tracker.bypass("ses_1", 1)
    tracker.sweep()
    tracker.start()
    tracker.stop()
    for hook in ("session-start", "user-prompt", "session-end", "user-prompt"):
        assert tracker.gate(hook, "ses_1", "a").bypassed
    clock.advance(TTL - 1)
    assert tracker.is_bypassed("ses_1")
    for end in (tracker.unbypass, tracker.forget):
        tracker.touch("ses_1")
        end("ses_1")
        assert not tracker.is_bypassed("ses_1")


def test_d23_an_unknown_key_is_not_bypassed_and_warned_about(tracker, clock, store, caplog):
    assert not tracker.bypass("ses_1")
    assert [(r.name, r.levelno) for r in caplog.records] == [
        ("understudy.tracker", logging.WARNING)
    ]
    assert "ses_1" in caplog.text
    tracker.claim("ses_2", "a")
    clock.advance(TTL)
    assert not tracker.bypass("ses_2")
    assert not tracker.bypasses()
    assert not rows(store, BypassEntry)


def test_d24_an_allowed_unknown_key_is_bypassed_but_no_active_session(tracker, caplog):
    assert tracker.bypass("ses_1", allow_unknown=True)
    assert tracker.is_bypassed("ses_1")
    assert not tracker.claims()
    counts = tracker.counts()
    assert (counts.claims, counts.bypasses, counts.bypass_only) == (0, 1, 1)
    assert not caplog.records
    assert tracker.bypass("ses_1", 2 * TTL), "a live bypass makes a key known"


def test_d25_size_is_bounded_by_what_one_ttl_uses(tracker, clock, store):
    for number in range(10_000):
        tracker.touch(f"ses_{number}")
        tracker.gate("user-prompt", f"outside_{number}", "a")
        clock.advance(TTL / 100)
        if number % 50 == 0:
            tracker.sweep()
    tracker.sweep()
    assert held(tracker) == (99, 99)
    assert len(store.load()) == 198
    assert not tracker._leases._gone


def test_d25_evictions_without_a_store_leave_nothing_behind(clock):
    tracker = SessionTracker(clock=clock)
    tracker.touch("warm")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2_000):
            tracker.touch(f"ses_{number}", 1)
            clock.advance(1)
            assert not tracker.is_bypassed(f"ses_{number}")
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000


def test_d26_release_clears_claim_and_bypass(tracker, store):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1")
    assert tracker.release("ses_1", "a")
    assert not tracker.claims()
    assert not tracker.is_bypassed("ses_1")
    assert not store.load()
    assert not tracker.release("ses_1", "a")


def test_d27_unbypass_takes_effect_at_the_next_hook(tracker, store):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1")
    assert tracker.gate("user-prompt", "ses_1", "a").action == "no-op"
    assert tracker.unbypass("ses_1")
    assert tracker.gate("user-prompt", "ses_1", "a").action == "run"
    assert not rows(store, BypassEntry)
    assert not tracker.unbypass("ses_1")


@pytest.mark.parametrize("hook", ["session-end", "session_end", "SessionEnd", "Session End"])
def test_d28_hooks_after_the_end_of_an_internal_session_are_noops_until_ttl(tracker, clock, hook):
    tracker.touch("ses_1")
    tracker.gate(hook, "ses_1", "a")
    clock.advance(TTL - 1)
    assert tracker.gate("user-prompt", "ses_1", "a").bypassed
    assert tracker.gate(hook, "ses_1", "a").bypassed
    clock.advance(1)
    assert tracker.gate("user-prompt", "ses_1", "a").action == "run"


def test_d29_the_end_of_a_bypassed_session_releases_its_claim(tracker, store):
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1")
    verdict = tracker.gate("session-end", "ses_1", "a")
    assert (verdict.action, verdict.bypassed, verdict.released) == ("no-op", True, True)
    assert not tracker.claims()
    assert not rows(store, ClaimEntry)
    assert tracker.is_bypassed("ses_1")


def test_d29_the_end_of_a_session_that_is_not_bypassed_releases_its_claim_and_runs(tracker):
    tracker.claim("ses_1", "a")
    verdict = tracker.gate("session-end", "ses_1", "a")
    assert (verdict.action, verdict.bypassed, verdict.released) == ("run", False, True)
    assert not tracker.claims()


def test_d30_the_claim_rule(tracker, clock):
    assert tracker.claim("ses_1", "a")
    clock.advance(TTL - 1)
    refreshed = tracker.claim("ses_1", "a")
    assert (refreshed.ok, refreshed.owner) == (True, "a")
    clock.advance(TTL - 1)
    refused = tracker.claim("ses_1", "b")
    assert (refused.ok, refused.owner) == (False, "a")
    assert not refused
    conflict = tracker.gate("user-prompt", "ses_1", "b")
    assert (conflict.action, conflict.owner) == ("conflict", "a")
    clock.advance(1)
    taken = tracker.claim("ses_1", "b")
    assert (taken.ok, taken.owner) == (True, "b")
    assert tracker.claims()["ses_1"].owner == "b"


@pytest.mark.parametrize("swept", [False, True])
def test_d31_a_takeover_does_not_inherit_the_former_owners_bypass(tracker, clock, store, swept):
    tracker.claim("ses_1", "a", 60)
    tracker.bypass("ses_1", TTL)
    clock.advance(60)
    if swept:
        tracker.sweep()
    assert tracker.is_bypassed("ses_1"), "each expires by its own time"
    tracker.claim("ses_1", "b")
    assert not tracker.is_bypassed("ses_1")
    assert not rows(store, BypassEntry)


def test_d31_the_former_owner_itself_keeps_its_bypass(tracker, clock):
    tracker.claim("ses_1", "a", 60)
    tracker.bypass("ses_1", TTL)
    clock.advance(60)
    tracker.claim("ses_1", "a")
    assert tracker.is_bypassed("ses_1")


def test_d31_an_internal_sessions_bypass_is_nobodys_inheritance(tracker, clock):
    tracker.claim("ses_1", "a", 60)
    tracker.bypass("ses_1", TTL)
    tracker.touch("ses_1")
    clock.advance(60)
    tracker.claim("ses_1", "b")
    assert tracker.is_bypassed("ses_1")


@pytest.mark.parametrize("bypassed", [False, True])
def test_d32_a_stranger_neither_releases_nor_renews(tracker, clock, bypassed):
    tracker.claim("ses_1", "a")
    if bypassed:
        tracker.bypass("ses_1")
    clock.advance(60)
    before = tracker.claims()["ses_1"].expires_at_ms
    for owner in ("b", "", "A"):
        assert not tracker.renew("ses_1", owner)
        assert not tracker.release("ses_1", owner)
        assert not tracker.gate("session-end", "ses_1", owner).released
    assert not tracker.gate("session-end", "ses_1").released
    assert tracker.claims()["ses_1"].expires_at_ms == before
    assert tracker.is_bypassed("ses_1") is bypassed
    expected = "no-op" if bypassed else "conflict"
    assert tracker.gate("session-end", "ses_1", "b").action == expected


def test_d33_hooks_keep_the_claim_of_an_active_session(tracker, clock):
    assert tracker.gate("session-start", "ses_1", "a").action == "run"
    for _ in range(20):
        clock.advance(3600)
        assert tracker.gate("user-prompt", "ses_1", "a").action == "run"
        assert tracker.claim("ses_1", "b").owner == "a"
    clock.advance(TTL)
    assert tracker.counts().claims == 0


def test_d33_hooks_renew_by_the_claims_own_ttl(tracker, clock):
    tracker.claim("ses_1", "a", 60)
    clock.advance(59)
    tracker.gate("user-prompt", "ses_1", "a")
    clock.advance(59)
    assert tracker.claims()
    clock.advance(1)
    assert not tracker.claims()


def test_d33_renewal_by_hooks_is_written_seldom_but_in_time(tracker, clock, store):
    tracker.gate("session-start", "ses_1", "a")
    before = store.writes
    for _ in range(TTL):
        clock.advance(1)
        tracker.gate("user-prompt", "ses_1", "a")
        lag_ms = (
            tracker.claims()["ses_1"].expires_at_ms - rows(store, ClaimEntry)["ses_1"].expires_at_ms
        )
        assert lag_ms <= TTL * 1000 / 16
    assert 0 < store.writes - before <= 16


def test_d34_logs_are_quiet_and_say_what_they_count(tracker, clock, caplog):
    caplog.set_level(logging.DEBUG, "understudy.tracker")
    tracker.touch("ses_1")
    tracker.unbypass("ses_1")
    assert [r.levelno for r in caplog.records] == [logging.DEBUG, logging.DEBUG]
    caplog.clear()
    tracker.sweep()
    assert not caplog.records
    tracker.touch("ses_2", 60)
    tracker.touch("ses_3")
    tracker.claim("ses_4", "a")
    tracker.bypass("ses_4")
    clock.advance(60)
    caplog.clear()
    tracker.sweep()
    (message,) = caplog.messages
    assert message == (
        "swept: expired_claims=0 expired_bypasses=1"
        " live_claims=1 live_bypasses=2 live_bypass_only=1"
    )


@pytest.mark.parametrize(
    ("key", "normal"),
    [
        ("ses_1", "ses_1"),
        (" ses_1\n", "ses_1"),
        ("session:ses_1", "ses_1"),
        (" session: session:ses_1 ", "ses_1"),
        ("Ses_1", "Ses_1"),
        ("agent:main", "agent:main"),
        ("", None),
        (" \t", None),
        ("session:", None),
        (None, None),
    ],
)
def test_d35_one_normalisation_of_keys(key, normal):
    assert normalise_key(key) == normal
    assert normalise_key(normal) == normal


def test_d35_every_spelling_means_the_same_session(tracker):
    tracker.claim("session:ses_1", " a ")
    assert list(tracker.claims()) == ["ses_1"]
    assert tracker.bypass(" ses_1")
    assert tracker.is_bypassed("session:ses_1")
    assert tracker.gate("user-prompt", "session:ses_1 ", "a").bypassed
    assert tracker.renew("ses_1 ", "a ")
    assert tracker.unbypass("session: ses_1")
    assert tracker.release("ses_1", "a")
    tracker.touch("session:ses_1")
    assert list(tracker.bypasses()) == ["ses_1"]


@pytest.mark.parametrize("key", ["", " ", "session:", None])
def test_d35_an_empty_key_is_no_key_and_matches_nobody(tracker, store, key):
    assert tracker.gate("user-prompt", key, "a").action == "run"
    assert tracker.gate("user-prompt", key, "b").action == "run"
    assert tracker.gate("session-end", key, "b").action == "run"
    assert not tracker.is_bypassed(key)
    for refused in (tracker.bypass, tracker.touch, lambda key: tracker.claim(key, "a")):
        with pytest.raises(InvalidInput):
            refused(key)
    assert not tracker.renew(key, "a")
    assert not tracker.release(key, "a")
    assert not tracker.unbypass(key)
    tracker.forget(key)
    assert store.writes == 0


@pytest.mark.parametrize("key", [1, b"ses_1", "x" * 513], ids=["int", "bytes", "long"])
def test_d35_a_key_that_is_no_key_is_refused_everywhere(tracker, key):
    for call in (
        tracker.is_bypassed,
        tracker.touch,
        tracker.unbypass,
        tracker.forget,
        lambda key: tracker.gate("user-prompt", key, "a"),
        lambda key: tracker.claim(key, "a"),
        lambda key: tracker.renew(key, "a"),
    ):
        with pytest.raises(InvalidInput):
            call(key)
    with pytest.raises(InvalidInput):
        tracker.claim("ses_1", "")
    with pytest.raises(InvalidInput):
        tracker.gate("user-prompt", "ses_1", 7)


@pytest.mark.parametrize(("before_s", "live"), [(0.001, True), (0, False), (-0.001, False)])
def test_d36_now_equal_to_the_expiry_is_expired_everywhere(clock, before_s, live):
    def aged():
        tracker = SessionTracker(clock=clock)
        tracker.claim("ses_1", "a", 60)
        tracker.bypass("ses_1", 60)
        clock.advance(60 - before_s)
        return tracker

    assert aged().is_bypassed("ses_1") is live
    assert aged().gate("user-prompt", "ses_1", "a").bypassed is live
    assert bool(aged().bypasses()) is live
    assert bool(aged().claims()) is live
    assert aged().counts().claims == aged().counts().bypasses == live
    assert aged().sweep().claims == aged().sweep().bypasses == (not live)
    assert aged().renew("ses_1", "a") is live
    assert aged().release("ses_1", "a") is live
    assert aged().bypass("ses_1") is live
    assert aged().claim("ses_1", "b").ok is not live


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86400, -TTL, TTL, 10 * 365 * 86400])
class TestTheWallClockIsSet:
    def test_d37_in_process_it_changes_nothing(self, tracker, clock, jump_s):
        tracker.claim("ses_1", "a")
        tracker.touch("ses_2")
        clock.jump_wall(jump_s)
        clock.advance(TTL - 1)
        tracker.sweep()
        assert (tracker.counts().claims, tracker.counts().bypasses) == (1, 1)
        assert tracker.bypasses()["ses_2"].expires_at_ms - clock.wall_ms() == 1000
        clock.advance(1)
        assert tracker.sweep() == Swept(claims=1, bypasses=1)
        assert (tracker.counts().claims, tracker.counts().bypasses) == (0, 0)

    def test_d37_a_sweep_makes_the_rows_right_again(self, tracker, clock, store, jump_s):
        tracker.claim("ses_1", "a")
        tracker.touch("ses_2")
        clock.advance(3600)
        clock.jump_wall(jump_s)
        tracker.sweep()
        after, next_clock = restart(store, clock)
        next_clock.advance(TTL - 3600 - 1)
        assert (after.counts().claims, after.counts().bypasses) == (1, 1)
        next_clock.advance(1)
        assert (after.counts().claims, after.counts().bypasses) == (0, 0)
        clock.advance(TTL)
        tracker.sweep()
        assert not store.load()

    def test_d37_a_sweep_without_a_jump_writes_nothing(self, tracker, clock, store, jump_s):
        clock.jump_wall(jump_s)
        tracker.sweep()
        tracker.touch("ses_2")
        before = store.writes
        clock.advance(60)
        tracker.sweep()
        assert store.writes == before


def test_d37_a_loaded_entry_has_no_more_time_than_when_it_was_saved(tracker, clock, store):
    tracker.touch("ses_1", 600)
    clock.jump_wall(-365 * 86400)
    used_s = 0
    for _ in range(5):  # restarts do not add up to more either
        tracker, clock = restart(store, clock)
        tracker.sweep()
        assert tracker.is_bypassed("ses_1")
        clock.advance(100)
        used_s += 100
    tracker, clock = restart(store, clock)
    assert used_s == 500
    clock.advance(100)
    assert not tracker.is_bypassed("ses_1")


def test_d37_absurd_rows_are_clamped(clock, store):
    store.save(
        [
            BypassEntry(
                key="ses_1", owner=None, ttl_s=math.nan, expires_at_ms=10**30, as_of_ms=-(10**30)
            ),
            BypassEntry(key="ses_2", owner=None, ttl_s=60, expires_at_ms=-1, as_of_ms=0),
        ]
    )
    tracker = SessionTracker(store=store, clock=clock)
    assert list(tracker.bypasses()) == ["ses_1"]
    tracker.touch("ses_1")
    clock.advance(MAX_TTL_S)
    assert not tracker.bypasses()


@pytest.mark.parametrize("change", ["touch", "renew", "claim"])
def test_d38_what_is_refreshed_while_the_sweep_removes_rows_survives(clock, store, change):
    tracker = SessionTracker(store=store, clock=clock)
    tracker.claim("ses_1", "a")
    tracker.bypass("ses_1", 60)
    tracker.touch("ses_2", 60)
    clock.advance(60)
    refresh = {
        "touch": lambda: tracker.touch("ses_2"),
        "renew": lambda: tracker.renew("ses_1", "a"),
        "claim": lambda: tracker.claim("ses_2", "b"),
    }[change]
    thread = threading.Thread(target=refresh)

    def once():
        assert tracker._leases.writing.locked(), "one writer at a time"
        store.on_write = lambda: None
        thread.start()

    store.on_write = once
    tracker.sweep()
    thread.join(30)
    after, _ = restart(store, clock)
    for seen in (tracker, after):
        assert seen.is_bypassed("ses_2") is (change == "touch")
        assert set(seen.claims()) == ({"ses_1", "ses_2"} if change == "claim" else {"ses_1"})


def test_d38_an_evicted_and_renewed_bypass_keeps_its_row(tracker, clock, store):
    tracker.touch("ses_1")
    clock.advance(TTL)
    assert not tracker.is_bypassed("ses_1")
    clock.jump_wall(-10 * TTL)
    tracker.touch("ses_1")
    seen = []
    store.on_write = lambda: seen.append(set(rows(store, BypassEntry)))
    tracker.sweep()
    seen.append(set(rows(store, BypassEntry)))
    assert all(keys == {"ses_1"} for keys in seen), "at no moment is it gone"


def test_d38_threads_that_touch_sweep_read_and_let_time_pass_lose_nothing(clock, store):
    tracker = SessionTracker(store=store, clock=clock)
    rounds, keys = 300, [f"ses_{n}" for n in range(4)]
    lost: list[str] = []
    barrier = threading.Barrier(len(keys) + 2)
    working = threading.Semaphore(0)

    def use(key):
        barrier.wait()
        for _ in range(rounds):
            tracker.touch(key, MAX_TTL_S)
            if not tracker.gate("user-prompt", key, "a").bypassed:
                lost.append(key)
            tracker.claim(f"claim_{key}", "a", 1)
            tracker.touch("shared", 1)
            tracker.gate("session-end", f"claim_{key}", "a")
        working.release()

    def sweep():
        barrier.wait()
        done = 0
        while done < len(keys):
            clock.advance(0.5)
            tracker.sweep()
            tracker.counts()
            done += working.acquire(blocking=False)

    threads = [threading.Thread(target=use, args=(key,)) for key in keys]
    threads.append(threading.Thread(target=sweep))
    for thread in threads:
        thread.start()
    barrier.wait()
    for thread in threads:
        thread.join(60)
    assert not lost
    clock.advance(1)
    tracker.sweep()
    assert set(tracker.bypasses()) == set(rows(store, BypassEntry)) == set(keys)
    assert not tracker.claims()
    assert not rows(store, ClaimEntry)


def test_d38_of_many_claimants_one_wins(clock):
    for _ in range(50):
        tracker = SessionTracker(clock=clock)
        barrier = threading.Barrier(8)
        grants = []

        def claim(owner, tracker=tracker, barrier=barrier, grants=grants):
            barrier.wait()
            grants.append(tracker.claim("ses_1", owner))

        threads = [threading.Thread(target=claim, args=(f"o{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sum(grant.ok for grant in grants) == 1
        assert {grant.owner for grant in grants} == {tracker.claims()["ses_1"].owner}


def test_d39_a_bypass_survives_a_restart_with_the_time_it_had_left(tracker, clock, store):
    tracker.touch("ses_1")
    tracker.claim("ses_2", "a")
    tracker.bypass("ses_2", 2 * TTL)
    clock.advance(3600)
    after, next_clock = restart(store, clock)
    assert after.gate("user-prompt", "ses_1", "x").bypassed
    assert after.claim("ses_2", "b").owner == "a"
    next_clock.advance(TTL - 3600)
    assert not after.is_bypassed("ses_1")
    assert after.is_bypassed("ses_2")
    after.claim("ses_2", "b")
    assert not after.is_bypassed("ses_2"), "whose it was survives too"


def test_d39_time_while_no_process_ran_counts(tracker, clock, store):
    tracker.touch("ses_1")
    clock.advance(TTL)
    after, _ = restart(store, clock)
    before = store.writes
    assert not after.is_bypassed("ses_1")
    assert store.writes == before
    after.sweep()
    assert not store.load()


def test_d39_a_second_tracker_on_the_store_removes_nothing_the_first_refreshed(
    tracker, clock, store
):
    tracker.touch("ses_1")
    second = SessionTracker(store=store, clock=clock)
    clock.advance(TTL - 1)
    tracker.touch("ses_1")
    clock.advance(1)
    assert second.sweep().bypasses == 1
    assert set(rows(store, BypassEntry)) == {"ses_1"}


def sweepers():
    return [t for t in threading.enumerate() if t.name == "understudy-tracker-sweeper"]


def test_d40_start_and_stop_are_idempotent_and_stop_leaves_no_thread(tracker):
    tracker.stop()
    for _ in range(3):
        tracker.start()
        tracker.start()
        assert len(sweepers()) == 1
        assert sweepers()[0].daemon
        tracker.stop()
        tracker.stop()
        assert not sweepers()
    tracker.touch("ses_1")
    assert tracker.is_bypassed("ses_1")


def test_d40_racing_starts_and_stops_leave_one_thread_or_none(tracker):
    barrier = threading.Barrier(6)

    def race(call):
        barrier.wait()
        for _ in range(50):
            call()

    calls = [tracker.start, tracker.stop] * 3
    threads = [threading.Thread(target=race, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(sweepers()) <= 1
    tracker.stop()
    assert not sweepers()


def test_d40_the_sweeper_sweeps_and_outlives_a_failing_store(clock, store, caplog):
    tracker = SessionTracker(store=store, clock=clock, sweep_interval_s=0.001)
    tracker.touch("ses_1", 60)
    clock.advance(60)
    failed, removed = threading.Event(), threading.Event()

    def fail_then_work():
        if store.full and failed.is_set():
            store.full = False
            removed.set()
        failed.set()

    store.full, store.on_write = True, fail_then_work
    tracker.start()
    try:
        assert removed.wait(30)
    finally:
        tracker.stop()
    assert not store.load()
    assert any(r.levelno == logging.WARNING and r.exc_info for r in caplog.records)
    assert not sweepers()


def test_d41_a_bypass_silences_hooks_only(tracker, clock):
    tracker.touch("ses_1")
    assert tracker.claim("ses_1", "a")
    assert tracker.renew("ses_1", "a")
    assert tracker.claims()
    assert tracker.claim("ses_1", "b").owner == "a"
    assert tracker.release("ses_1", "a")


def test_d42_a_bypass_of_one_key_never_affects_another(tracker):
    keys = ["ses_1", "ses_10", "ses", "Ses_1", "ses_1:sub"]
    tracker.touch("ses_1")
    assert [key for key in keys if tracker.is_bypassed(key)] == ["ses_1"]
    for key in keys[1:]:
        assert tracker.gate("user-prompt", key, "a").action == "run"
    tracker.bypass("ses_10")
    tracker.unbypass("ses_1")
    assert [key for key in keys if tracker.is_bypassed(key)] == ["ses_10"]
    tracker.touch("ses_1")
    tracker.release("ses_10", "a")
    assert [key for key in keys if tracker.is_bypassed(key)] == ["ses_1"]


def test_forgetting_a_deleted_session_leaves_neither_claim_nor_bypass(tracker, store):
    tracker.claim("ses_1", "a")
    tracker.touch("ses_1")
    tracker.touch("ses_2")
    tracker.forget("ses_1")
    assert not tracker.claims()
    assert list(tracker.bypasses()) == ["ses_2"]
    assert [row.key for row in store.load()] == ["ses_2"]


@pytest.mark.parametrize("interval_s", [0, -1, math.nan, math.inf])
def test_an_unusable_sweep_interval_is_refused(interval_s):
    with pytest.raises(InvalidInput):
        SessionTracker(sweep_interval_s=interval_s)


def test_a_virtual_clock_never_goes_back(clock):
    start = clock.monotonic_s()
    for _ in range(10):
        clock.advance(0.1)
    assert clock.monotonic_s() - start == 1.0
    with pytest.raises(InvalidInput):
        clock.advance(-1)
    clock.jump_wall(-3600)
    assert clock.monotonic_s() - start == 1.0
