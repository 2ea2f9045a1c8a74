"""Who outside works with a session, and whose hooks must stay silent.

Outside integrations announce themselves with *claims*, and call the runtime through hooks. The
runtime's own sessions (summaries, extraction) trigger the same hooks, which would start more such
sessions: a loop. A *bypass* breaks it: hooks of that session are no-ops until the bypass expires.

The rules, in one place:

- A claim and a bypass expire each by its own time; ``now >= expiry`` is expired, everywhere, at
  once. Durations are monotonic: setting the wall clock changes nothing while the process lives.
- Nothing shortens an expiry. Renewing a claim extends a live bypass to at least the claim's
  expiry; it never creates or revives one.
- A bypass ends early by ``unbypass``, by its claim's ``release``, by ``forget``, or when another
  owner takes over an expired claim that the bypass came with. The end of a session does not end it.
- Only its owner may renew or release a claim.

Answers the reports collected in Signet-AI/signetai#502.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from understudy.actors.clock import Clock, SystemClock
from understudy.actors.leases import DEFAULT_TTL_S, Counts, Lease, Leases, Swept, sane_ttl_s
from understudy.errors import InvalidInput
from understudy.store.tracker_entries import BypassEntry, ClaimEntry, TrackerStore

SWEEP_INTERVAL_S: Final = 15 * 60.0
MAX_KEY_LENGTH: Final = 512
KEY_PREFIX: Final = "session:"

_STOP_TIMEOUT_S: Final = 5.0
# A hook's renewal is written when the stored expiry lags by this part of the claim's ttl.
_LAG: Final = 1 / 16

logger = logging.getLogger("understudy.tracker")


class Grant(msgspec.Struct, frozen=True):
    """The answer to a claim: true if granted. ``owner`` holds the claim now, whoever asked."""

    ok: bool
    owner: str

    def __bool__(self) -> bool:
        return self.ok


class Verdict(msgspec.Struct, frozen=True):
    """What to do with a hook.

    Attributes:
        action: "run" it; answer with its empty "no-op" at once (the session is bypassed); or
            refuse it, a "conflict".
        owner: on a conflict, the live owner of the session's claim.
        released: this was the session's end, and the claim was given up. Presence can go too.
    """

    action: Literal["run", "no-op", "conflict"]
    owner: str | None = None
    released: bool = False

    @property
    def bypassed(self) -> bool:
        return self.action == "no-op"


def normalise_key(key: str | None) -> str | None:
    """The one spelling of a session's key, for claims, bypasses and hooks alike.

    White space around it and the prefix ``session:`` (any number of them) go; case stays. What is
    left empty is no key: None. Raises ``InvalidInput`` if it is no string or is longer than 512.
    """
    key = _text(key, "a session key")
    while key.startswith(KEY_PREFIX):
        key = key.removeprefix(KEY_PREFIX).strip()
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidInput(f"a session key has at most {MAX_KEY_LENGTH} characters")
    return key or None


def is_session_end(hook: str) -> bool:
    """True for ``session-end``, ``session_end``, ``SessionEnd`` and the like."""
    return "".join(filter(str.isalnum, hook)).lower() == "sessionend"


class SessionTracker:
    """Claims and bypasses by session key, and the gate every hook passes. Thread-safe.

    Without a store it forgets everything at exit. With one, a call that changes something returns
    after the change is durable (see ``TrackerStore``) and raises the store's error if it is not.
    Reading, and a hook of a bypassed session, wait for no store. A ``ttl_s`` that makes no sense,
    None among them, is the default. Raises ``InvalidInput`` for a key that is no key.
    """

    def __init__(
        self,
        *,
        store: TrackerStore | None = None,
        clock: Clock | None = None,
        default_ttl_s: float = DEFAULT_TTL_S,
        sweep_interval_s: float = SWEEP_INTERVAL_S,
    ) -> None:
        if sane_ttl_s(default_ttl_s, default_s=math.nan) != default_ttl_s:
            raise InvalidInput(f"not a usable default_ttl_s: {default_ttl_s!r}")
        if not 0 < sweep_interval_s < math.inf:
            raise InvalidInput(f"not a usable sweep_interval_s: {sweep_interval_s!r}")
        self._clock = clock or SystemClock()
        self._leases = Leases(store=store, clock=self._clock)
        self._default_ttl_s = default_ttl_s
        self._sweep_interval_s = sweep_interval_s
        self._lifecycle = threading.Lock()
        self._sweeper: threading.Thread | None = None
        self._stopping = threading.Event()

    # --- claims --------------------------------------------------------------------------------

    def claim(self, key: str, owner: str, ttl_s: float | None = None) -> Grant:
        """Claim the session for ``owner``, or refresh the claim ``owner`` has.

        Refused, naming the owner, while somebody else's claim is live. Taking over an expired
        claim does not inherit a bypass that came with it.
        """
        if not (name := _text(owner, "an owner")):
            raise InvalidInput("a claim needs an owner")
        return self._grant(_required(key), name, self._ttl_s(ttl_s))

    def renew(self, key: str, owner: str) -> bool:
        """Give ``owner``'s live claim its whole ttl again, and a live bypass at least as long.

        False, and nothing changes, if ``owner`` has no live claim.
        """
        name = normalise_key(key)
        with self._leases.writing:
            if claim := self._owned(name, owner):
                self._renew(claim)
        return claim is not None

    def release(self, key: str, owner: str) -> bool:
        """End ``owner``'s live claim and the session's bypass. False if ``owner`` has none."""
        name = normalise_key(key)
        with self._leases.writing:
            if claim := self._owned(name, owner):
                self._leases.drop(claim, self._leases.bypass(claim.entry.key))
        return claim is not None

    def _grant(self, key: str, owner: str, ttl_s: float | None) -> Grant:
        """Claim or renew. Without ``ttl_s`` it is a hook's activity."""
        with self._leases.writing:
            claim, bypass = self._leases.claim(key), self._leases.bypass(key)
            if claim and claim.entry.owner != owner:
                return Grant(ok=False, owner=claim.entry.owner)
            if claim:
                self._renew(claim, ttl_s=ttl_s, lazy=ttl_s is None)
                return Grant(ok=True, owner=owner)
            if bypass and bypass.entry.owner not in (None, owner):
                self._leases.drop(bypass=bypass)
            ttl_s = self._default_ttl_s if ttl_s is None else ttl_s
            entry = ClaimEntry(key=key, owner=owner, ttl_s=ttl_s)
            self._leases.put([self._leases.lease(entry, self._clock.monotonic_s() + ttl_s)])
        return Grant(ok=True, owner=owner)

    def _renew(
        self, claim: Lease[ClaimEntry], *, ttl_s: float | None = None, lazy: bool = False
    ) -> None:
        """Hold ``writing``. A lazy renewal is written only once it has gained enough."""
        entry = msgspec.structs.replace(claim.entry, ttl_s=ttl_s or claim.entry.ttl_s)
        expires_s = max(claim.expires_s, self._clock.monotonic_s() + entry.ttl_s)
        bypass = self._leases.bypass(entry.key)
        longer = bypass and bypass.expires_s < expires_s and not lazy
        if lazy and expires_s - claim.saved_s < entry.ttl_s * _LAG:
            self._leases.put([Lease(entry, expires_s, claim.saved_s)], durable=False)
        else:
            self._leases.put(
                [self._leases.lease(entry, expires_s)],
                [self._leases.lease(bypass.entry, expires_s)] if bypass and longer else [],
            )

    def _owned(self, key: str | None, owner: str | None) -> Lease[ClaimEntry] | None:
        claim = None if key is None else self._leases.claim(key)
        return claim if claim and claim.entry.owner == _text(owner, "an owner") else None

    # --- bypasses ------------------------------------------------------------------------------

    def bypass(self, key: str, ttl_s: float | None = None, *, allow_unknown: bool = False) -> bool:
        """Silence the session's hooks for ``ttl_s`` from now; never for less than before.

        False, and nothing is stored, if the session is neither claimed nor bypassed: most likely a
        wrong key. With ``allow_unknown`` the bypass needs no claim and belongs to the session
        itself, so it also survives a takeover of the claim.
        """
        name, ttl_s = _required(key), self._ttl_s(ttl_s)
        with self._leases.writing:
            claim, bypass = self._leases.claim(name), self._leases.bypass(name)
            if not (claim or bypass or allow_unknown):
                logger.warning("not bypassed, no such session: key=%s", name)
                return False
            owner = claim.entry.owner if claim else None
            expires_s = self._clock.monotonic_s() + ttl_s
            if bypass:
                owner = bypass.entry.owner
                expires_s = max(expires_s, bypass.expires_s)
                ttl_s = max(ttl_s, bypass.entry.ttl_s)
            entry = BypassEntry(key=name, owner=None if allow_unknown else owner, ttl_s=ttl_s)
            self._leases.put(bypasses=[self._leases.lease(entry, expires_s)])
        logger.debug("bypassed: key=%s ttl_s=%g claimed=%s", name, ttl_s, claim is not None)
        return True

    def touch(self, key: str, ttl_s: float | None = None) -> None:
        """Apply an internal session's bypass again, for its whole ttl: before each send.

        A bypass that has lapsed is created anew, with ``ttl_s``.
        """
        bypass = self._leases.bypass(_required(key))
        if ttl_s is None and bypass:
            ttl_s = bypass.entry.ttl_s
        self.bypass(key, ttl_s, allow_unknown=True)

    def unbypass(self, key: str) -> bool:
        """End a bypass now: the next hook runs. False if there was none."""
        if (name := normalise_key(key)) is None:
            return False
        with self._leases.writing:
            if bypass := self._leases.bypass(name):
                self._leases.drop(bypass=bypass)
                logger.debug("unbypassed: key=%s", name)
        return bypass is not None

    def is_bypassed(self, key: str | None) -> bool:
        """True while the session's hooks are silenced. Never waits for the store."""
        name = normalise_key(key)
        return name is not None and self._leases.bypass(name) is not None

    def knows(self, key: str | None) -> bool:
        """Whether the key has a live claim or bypass. Never waits for the store."""
        name = normalise_key(key)
        return name is not None and (
            self._leases.claim(name) is not None or self._leases.bypass(name) is not None
        )

    def forget(self, key: str) -> None:
        """Drop claim and bypass, whoever owns them: the session was deleted."""
        if (name := normalise_key(key)) is not None:
            with self._leases.writing:
                self._leases.drop(self._leases.claim(name), self._leases.bypass(name))

    # --- the hook gate -------------------------------------------------------------------------

    def gate(self, hook: str, key: str | None, owner: str | None = None) -> Verdict:
        """Decide about a hook that came in, before anything is done for it.

        A hook without a key runs, and is matched to no session. A bypassed session's hook is a
        no-op and leaves everything as it is. Otherwise a hook is activity: it claims an unclaimed
        session for ``owner`` and renews ``owner``'s claim; without an owner it just runs. The
        session's end releases ``owner``'s claim, also under a bypass, and keeps the bypass: hooks
        that come late are still no-ops. It never releases a claim of somebody else.
        """
        name, who, ends = normalise_key(key), _text(owner, "an owner"), is_session_end(hook)
        if name is None:
            return Verdict("run")
        if self._leases.bypass(name):
            return Verdict("no-op", released=ends and self._end(name, who).released)
        if not who:
            return Verdict("run")
        if ends:
            return self._end(name, who)
        grant = self._grant(name, who, None)
        return Verdict("run") if grant else Verdict("conflict", owner=grant.owner)

    def _end(self, key: str, owner: str) -> Verdict:
        claim = self._leases.claim(key)
        if claim is None:
            return Verdict("run")
        if claim.entry.owner != owner:
            return Verdict("conflict", owner=claim.entry.owner)
        with self._leases.writing:
            if claim := self._owned(key, owner):
                self._leases.drop(claim)
        return Verdict("run", released=claim is not None)

    # --- views ---------------------------------------------------------------------------------

    def claims(self) -> Mapping[str, ClaimEntry]:
        """The active sessions: a read-only snapshot of live claims by key."""
        return self._leases.claims()

    def bypasses(self) -> Mapping[str, BypassEntry]:
        """A read-only snapshot of live bypasses by key."""
        return self._leases.bypasses()

    def counts(self) -> Counts:
        """Live entries now; what has expired does not count, swept or not."""
        return self._leases.counts()

    # --- sweeping ------------------------------------------------------------------------------

    def sweep(self) -> Swept:
        """Drop what has expired, rows included. Live entries stay, just refreshed ones too.

        If the wall clock was set since the entries were saved, saves them again. Raises the store's
        error after freeing the memory; the next sweep tries the rows again.
        """
        with self._leases.writing:
            swept = self._leases.sweep()
        if swept.claims or swept.bypasses:
            left = self.counts()
            logger.info(
                "swept: expired_claims=%d expired_bypasses=%d"
                " live_claims=%d live_bypasses=%d live_bypass_only=%d",
                swept.claims,
                swept.bypasses,
                left.claims,
                left.bypasses,
                left.bypass_only,
            )
        return swept

    def start(self) -> None:
        """Sweep every ``sweep_interval_s`` in a daemon thread, until ``stop``. Idempotent."""
        with self._lifecycle:
            if self._sweeper is None:
                self._stopping = threading.Event()
                self._sweeper = threading.Thread(
                    target=self._sweep_until,
                    args=(self._stopping,),
                    name="understudy-tracker-sweeper",
                    daemon=True,
                )
                self._sweeper.start()

    def stop(self) -> None:
        """Stop the sweeper and wait for its thread. Idempotent; the tracker stays usable."""
        with self._lifecycle:
            sweeper, self._sweeper = self._sweeper, None
            self._stopping.set()
            if sweeper is not None and sweeper is not threading.current_thread():
                sweeper.join(_STOP_TIMEOUT_S)

    def _sweep_until(self, stopping: threading.Event) -> None:
        while not stopping.wait(self._sweep_interval_s):
            try:
                self.sweep()
            except Exception:
                logger.warning("the sweep failed and will be tried again", exc_info=True)

    def _ttl_s(self, ttl_s: float | None) -> float:
        return sane_ttl_s(ttl_s, default_s=self._default_ttl_s)


def _required(key: str | None) -> str:
    if (name := normalise_key(key)) is None:
        raise InvalidInput("a session key is needed")
    return name


def _text(value: str | None, what: str) -> str:
    """Without white space around it; none is empty."""
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{what} is a string, not {type(value).__name__}")
    return (value or "").strip()
