"""Claims and bypasses: a second reading of the tracker's rules, and what is done to it.

What a call changed is known to lie between two moments, because the store takes its time; what may
be either is not asked. A key whose change failed halfway is not asked about any more.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.actors.tracker import SessionTracker
    from understudy.testing.process import Process
    from understudy.testing.stage import Stage

_OWNERS: Final = ("ann", "bob")
_VERBS: Final = (
    "claim",
    "claim",
    "claim",
    "renew",
    "release",
    "bypass",
    "bypass",
    "touch",
    "unbypass",
    "look",
    "look",
)
_TTLS_S: Final = (3.0, 20.0, 90.0)
_PAUSES_S: Final = (0.0, 1.0, 4.0, 12.0)
_HOOK_S: Final = 6.0  # from its gate to its running, at most
_SLACK_S: Final = 0.01  # what a stored expiry may lose to rounding


class _Entry:
    """A claim or a bypass: whose, for how long, and when it ends: not before, not after."""

    def __init__(self, owner: str | None, ttl_s: float, least_s: float, most_s: float) -> None:
        self.owner = owner
        self.ttl_s = ttl_s
        self.least_s = least_s
        self.most_s = most_s

    def extend(self, least_s: float, most_s: float) -> None:
        self.least_s, self.most_s = max(self.least_s, least_s), max(self.most_s, most_s)


class _Call(NamedTuple):
    """One call to a tracker, begun at ``before_s``, and its answer."""

    verb: str
    key: str
    owner: str
    ttl_s: float
    before_s: float
    answer: bool
    alone: bool  # its process was the only one when it was begun


class _Book:
    """What one runtime should know, or the file: by key."""

    def __init__(self) -> None:
        self.claims: dict[str, _Entry] = {}
        self.bypasses: dict[str, _Entry] = {}

    def copy(self) -> _Book:
        book = _Book()
        for mine, theirs in ((book.claims, self.claims), (book.bypasses, self.bypasses)):
            for key, entry in theirs.items():
                lost_s = entry.least_s - _SLACK_S
                mine[key] = _Entry(entry.owner, entry.ttl_s, lost_s, entry.most_s + _SLACK_S)
        return book


class Tracking:
    """Calls to the tracker, each answer held against the rules."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._books: dict[Process, _Book] = {}
        self._file = _Book()
        self._unsure: set[str] = set()
        self._calls_of: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # when a key was bypassed, by ``working_s``

    def started(self, process: Process) -> None:
        """A runtime knows what the file says, none of it for longer than it was saved for."""
        self._books[process] = self._file.copy()

    def forget(self, session_id: str) -> None:
        """A session with this key was deleted: somewhere in between its entries go."""
        self._unsure.add(session_id)

    def knew(self, session_id: str) -> int:
        """How often anybody has begun or ended a call about it."""
        return self._calls_of[session_id]

    def hooked(self, session_id: str) -> None:
        """A hook of a session ran here and now: it was not bypassed a moment ago."""
        process = self._stage.running()
        book = self._books.get(process) if process is not None else None
        entry = book.bypasses.get(session_id) if book is not None else None
        since_s = self._since.get(session_id) if entry is not None else None
        if entry is None or since_s is None or session_id in self._unsure:
            return
        if not self._stage.steady:
            return
        if since_s + _HOOK_S < self._stage.working_s and self._stage.now_s < entry.least_s:
            self._found(f"a hook of {session_id} ran, which is bypassed")

    def act(self, process: Process, a: int, b: int) -> None:
        """Do something to the tracker in a process."""
        key = ("k0", "k1", "s0", "s1")[a % 4 | (2 if self._stage.settings.hooks else 0)]
        self._stage.spawn(process, self._calls(process, key, random.Random(a << 16 | b)))

    async def _calls(self, process: Process, key: str, chance: random.Random) -> None:
        """A few calls, in a thread that may wait, as a host would make them."""
        loop = asyncio.get_running_loop()
        for _ in range(8):
            verb, owner = chance.choice(_VERBS), chance.choice(_OWNERS)
            ttl_s = chance.choice(_TTLS_S)
            await loop.run_in_executor(None, self._try, process, verb, key, owner, ttl_s)
            self._stage.seen[f"tracker {verb}"] += 1
            await asyncio.sleep(chance.choice(_PAUSES_S))

    def _try(self, process: Process, verb: str, key: str, owner: str, ttl_s: float) -> None:
        self._calls_of[key] += 1
        tracker, book = process.runtime.tracker, self._books[process]
        before_s, alone = self._stage.now_s, len(self._stage.alive()) == 1
        answer: Any = None
        try:
            if verb == "claim":
                answer = tracker.claim(key, owner, ttl_s).ok
            elif verb in ("renew", "release"):
                answer = getattr(tracker, verb)(key, owner)
            elif verb == "bypass":
                answer = tracker.bypass(key, ttl_s, allow_unknown=True)
            elif verb == "touch":
                tracker.touch(key, ttl_s)
            elif verb == "unbypass":
                answer = tracker.unbypass(key)
        except BaseException as error:
            self._unsure.add(key)  # it may have been stored, or not
            if isinstance(error, UnderstudyError):
                return
            raise
        finally:
            self._calls_of[key] += 1
        if key in self._unsure or not self._stage.steady:
            return
        self._account(book, _Call(verb, key, owner, ttl_s, before_s, bool(answer), alone))
        if key not in self._unsure:
            self._look(tracker, book, key)

    # --- the rules -------------------------------------------------------------------------------

    def _account(self, book: _Book, call: _Call) -> None:
        """Hold the answer against what was known, then know what the call changed."""
        key, now_s = call.key, self._stage.now_s
        claim = self._live(book.claims, key, call.before_s)
        bypass = self._live(book.bypasses, key, call.before_s)
        if call.verb in ("claim", "renew", "release"):
            self._check_claim(call, claim)
        if call.verb == "claim" and call.answer:
            self._claimed(book, call, claim, bypass)
        elif call.verb == "renew" and call.answer and claim is not None:
            self._renewed(claim, bypass, call, claim.ttl_s)
        elif call.verb == "release" and call.answer:
            book.claims.pop(key, None)
            book.bypasses.pop(key, None)
        elif call.verb in ("bypass", "touch"):
            entry = _Entry(None, call.ttl_s, call.before_s + call.ttl_s, now_s + call.ttl_s)
            if bypass is not None:
                entry.extend(bypass.least_s, bypass.most_s)
                entry.ttl_s = max(call.ttl_s, bypass.ttl_s)
            if bypass is None or now_s >= bypass.least_s:
                self._since[key] = self._stage.working_s
            book.bypasses[key] = entry
        elif call.verb == "unbypass":
            if not call.answer and bypass is not None and now_s < bypass.least_s:
                self._found(f"{key} was bypassed, and is unknown")
            book.bypasses.pop(key, None)
        if call.verb != "look":
            self._save(book, key, alone=call.alone)

    def _check_claim(self, call: _Call, claim: _Entry | None) -> None:
        live = claim is not None and self._stage.now_s < claim.least_s
        dead = claim is None or call.before_s >= claim.most_s
        mine = claim is not None and claim.owner == call.owner
        what = f"{call.verb} of {call.key} by {call.owner}"
        if call.verb == "claim":
            if call.answer and live and not mine:
                self._found(f"{what}, while {claim and claim.owner} holds it")
            if not call.answer and (dead or mine):
                self._found(f"{what} was refused, and nobody else holds it")
        elif call.answer and (dead or not mine):
            self._found(f"{what}, who does not hold it")
        elif not call.answer and live and mine:
            self._found(f"{what}, who holds it, was refused")

    def _claimed(
        self, book: _Book, call: _Call, claim: _Entry | None, bypass: _Entry | None
    ) -> None:
        now_s = self._stage.now_s
        if claim is not None and claim.owner == call.owner and now_s < claim.least_s:
            claim.ttl_s = call.ttl_s
            self._renewed(claim, bypass, call, call.ttl_s)
        elif claim is not None and call.before_s < claim.most_s:
            self._unsure.add(call.key)  # renewed or new: nobody can say
        else:
            least_s, most_s = call.before_s + call.ttl_s, now_s + call.ttl_s
            book.claims[call.key] = _Entry(call.owner, call.ttl_s, least_s, most_s)

    def _renewed(self, claim: _Entry, bypass: _Entry | None, call: _Call, ttl_s: float) -> None:
        claim.extend(call.before_s + ttl_s, self._stage.now_s + ttl_s)
        if bypass is not None and self._stage.now_s < bypass.least_s:
            bypass.extend(claim.least_s, claim.most_s)
        elif bypass is not None:
            bypass.most_s = max(bypass.most_s, claim.most_s)  # if it was still live

    def _live(self, entries: dict[str, _Entry], key: str, at_s: float) -> _Entry | None:
        """The entry, if it may have been live at that time; what was over then is forgotten."""
        entry = entries.get(key)
        if entry is not None and at_s >= entry.most_s:
            del entries[key]
            return None
        return entry

    def _save(self, book: _Book, key: str, *, alone: bool) -> None:
        """What a call changed is durable when it returns."""
        for mine, file in ((book.claims, self._file.claims), (book.bypasses, self._file.bypasses)):
            entry = mine.get(key)
            if entry is not None:
                file[key] = _Entry(entry.owner, entry.ttl_s, entry.least_s, entry.most_s)
            else:
                file.pop(key, None)
        if not alone or len(self._stage.alive()) > 1:
            self._unsure.add(key)  # two runtimes with one key: each has its own view of it

    def _look(self, tracker: SessionTracker, book: _Book, key: str) -> None:
        """What the tracker shows is what the rules say."""
        now_s = self._stage.now_s
        shown = tracker.claims().get(key), tracker.is_bypassed(key)
        claim = self._live(book.claims, key, now_s)
        bypass = self._live(book.bypasses, key, now_s)
        if claim is None and shown[0] is not None:
            self._found(f"{key} is claimed by {shown[0].owner}, and should be free")
        held = shown[0].owner if shown[0] is not None else None
        if claim is not None and now_s < claim.least_s and held != claim.owner:
            self._found(f"{key} is claimed by {held}, not {claim.owner}")
        if bypass is None and shown[1]:
            self._found(f"{key} is bypassed, and should not be")
        if bypass is not None and now_s < bypass.least_s and not shown[1]:
            self._found(f"{key} is not bypassed, and should be")

    def _found(self, what: str) -> None:
        self._stage.found("claims and bypasses end by their own time", what)
