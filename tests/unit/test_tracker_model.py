"""The session tracker against a model of its rules, over random histories and restarts."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from understudy.actors.clock import VirtualClock
from understudy.actors.tracker import SessionTracker
from understudy.store.tracker_entries import MemoryTrackerStore

KEYS = st.sampled_from(["k1", "k2"])
OWNERS = st.sampled_from(["a", "b"])
TTLS = st.sampled_from([16, 32, 64, 160])
STEPS = st.sampled_from([1, 4, 15, 16, 17, 64, 200])
JUMPS = st.sampled_from([-(10**6), -100, 100, 10**6])


class TrackerHistory(RuleBasedStateMachine):
    """The model: key -> [owner, ttl, expiry], in whole seconds since the history began."""

    def __init__(self):
        super().__init__()
        self.clock = VirtualClock(monotonic_s=0)
        self.store = MemoryTrackerStore()
        self.tracker = SessionTracker(store=self.store, clock=self.clock, default_ttl_s=64)
        self.now = 0
        self.claims = {}
        self.bypasses = {}

    def live(self, table, key):
        lease = table.get(key)
        return lease if lease and self.now < lease[2] else None

    def model_renew(self, key, ttl):
        claim, bypass = self.live(self.claims, key), self.live(self.bypasses, key)
        claim[1:] = ttl, max(claim[2], self.now + ttl)
        if bypass:
            bypass[2] = max(bypass[2], claim[2])

    def model_claim(self, key, owner, ttl, renewed_ttl):
        claim, bypass = self.live(self.claims, key), self.live(self.bypasses, key)
        if claim and claim[0] != owner:
            return False
        if claim:
            self.model_renew(key, renewed_ttl or claim[1])
            return True
        if bypass and bypass[0] not in (None, owner):
            del self.bypasses[key]
        self.claims[key] = [owner, ttl, self.now + ttl]
        return True

    @rule(key=KEYS, owner=OWNERS, ttl=TTLS)
    def claim(self, key, owner, ttl):
        grant = self.tracker.claim(key, owner, ttl)
        assert grant.ok == self.model_claim(key, owner, ttl, ttl)
        assert grant.owner == self.claims[key][0]

    @rule(key=KEYS, owner=OWNERS)
    def renew(self, key, owner):
        claim = self.live(self.claims, key)
        mine = bool(claim and claim[0] == owner)
        assert self.tracker.renew(key, owner) == mine
        if mine:
            self.model_renew(key, claim[1])

    @rule(key=KEYS, owner=OWNERS)
    def release(self, key, owner):
        claim = self.live(self.claims, key)
        mine = bool(claim and claim[0] == owner)
        assert self.tracker.release(key, owner) == mine
        if mine:
            del self.claims[key]
            self.bypasses.pop(key, None)

    @rule(key=KEYS, ttl=TTLS, internal=st.booleans())
    def bypass(self, key, ttl, internal):
        claim, bypass = self.live(self.claims, key), self.live(self.bypasses, key)
        known = bool(claim or bypass or internal)
        assert self.tracker.bypass(key, ttl, allow_unknown=internal) == known
        if known:
            owner = bypass[0] if bypass else claim[0] if claim else None
            _, old_ttl, expiry = bypass or [None, 0, 0]
            self.bypasses[key] = [
                None if internal else owner,
                max(ttl, old_ttl),
                max(expiry, self.now + ttl),
            ]

    @rule(key=KEYS)
    def touch(self, key):
        bypass = self.live(self.bypasses, key)
        ttl = bypass[1] if bypass else 64
        self.tracker.touch(key)
        self.bypasses[key] = [None, ttl, max(self.now + ttl, bypass[2] if bypass else 0)]

    @rule(key=KEYS)
    def unbypass(self, key):
        live = self.live(self.bypasses, key) is not None
        assert self.tracker.unbypass(key) == live
        self.bypasses.pop(key, None)

    @rule(key=KEYS)
    def forget(self, key):
        self.tracker.forget(key)
        self.claims.pop(key, None)
        self.bypasses.pop(key, None)

    @rule(key=KEYS, owner=OWNERS, ends=st.booleans())
    def hook(self, key, owner, ends):
        claim, bypassed = self.live(self.claims, key), bool(self.live(self.bypasses, key))
        mine = bool(claim and claim[0] == owner)
        verdict = self.tracker.gate("session-end" if ends else "user-prompt", key, owner)
        assert verdict.released == (ends and mine)
        if verdict.released:
            del self.claims[key]
        if bypassed:
            assert verdict.action == "no-op"
        elif claim and not mine:
            assert (verdict.action, verdict.owner) == ("conflict", claim[0])
        else:
            assert verdict.action == "run"
            if not ends:
                self.model_claim(key, owner, 64, None)

    @rule(seconds=STEPS)
    def pass_time(self, seconds):
        self.clock.advance(seconds)
        self.now += seconds

    @rule(seconds=JUMPS)
    def set_the_wall_clock(self, seconds):
        self.clock.jump_wall(seconds)
        self.tracker.sweep()

    @rule()
    def sweep(self):
        self.tracker.sweep()

    @precondition(lambda self: self.now > 0)
    @rule(jump=st.sampled_from([0, -(10**6)]))
    def restart(self, jump):
        """A claim that hooks renewed may come back a sixteenth of its ttl short; else nothing."""
        self.clock = VirtualClock(monotonic_s=7, wall_ms=self.clock.wall_ms() + jump * 1000)
        self.tracker = SessionTracker(store=self.store, clock=self.clock, default_ttl_s=64)
        if jump:
            # While nobody looked, no time can be told to have passed: all start with what was
            # left when they were saved. That is at most their ttl, and never nothing.
            self.adopt(self.bypasses, self.tracker.bypasses(), later=True)
            self.adopt(self.claims, self.tracker.claims(), later=True)
            self.tracker.sweep()
        else:
            self.adopt(self.claims, self.tracker.claims(), later=False)

    def adopt(self, model, real, *, later):
        for key, lease in list(model.items()):
            if self.live(model, key) is None and not later:
                continue
            left = 0
            if key in real:
                left = round((real[key].expires_at_ms - self.clock.wall_ms()) / 1000)
            short = lease[2] - (self.now + left)
            assert short <= lease[1] / 16
            if not later:
                assert short >= 0
            lease[2] = self.now + left
        assert later or set(real) <= set(model)
        if later:
            for key in set(real) - set(model):
                entry = real[key]
                left = round((entry.expires_at_ms - self.clock.wall_ms()) / 1000)
                model[key] = [entry.owner, entry.ttl_s, self.now + left]

    @invariant()
    def same_as_the_model(self):
        for model, real in (
            (self.claims, self.tracker.claims()),
            (self.bypasses, self.tracker.bypasses()),
        ):
            assert {
                key: (e.owner, e.ttl_s, round((e.expires_at_ms - self.clock.wall_ms()) / 1000))
                for key, e in real.items()
            } == {
                key: (owner, ttl, expiry - self.now)
                for key, (owner, ttl, expiry) in model.items()
                if self.now < expiry
            }
        counts = self.tracker.counts()
        assert counts.claims == len(self.tracker.claims())
        assert counts.bypasses == len(self.tracker.bypasses())
        assert all(self.tracker.is_bypassed(key) for key in self.tracker.bypasses())

    def teardown(self):
        self.clock.advance(10_000)
        self.tracker.sweep()
        assert not self.store.load()


TestTrackerHistory = TrackerHistory.TestCase
TestTrackerHistory.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, derandomize=True
)
