"""``understudy chaos kill``: a real process works hard, is killed, frozen, starved, and checked."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from understudy.errors import InvalidInput
from understudy.gateway import display
from understudy.gateway.chaos.life import PATIENCE_S, Broken, Life, Nursery
from understudy.gateway.chaos.rounds import KINDS, OFTEN, Round
from understudy.testing.watch import Finding

ROUNDS_OF_A_FILE: Final = 25
FINDINGS_SHOWN: Final = 12


class Result(msgspec.Struct, frozen=True):
    """What a round came to. ``counts`` are the prompts accepted in it, and the outcomes."""

    number: int
    kind: str
    counts: Counter[str]
    restarts: int
    whole_s: list[float]
    seconds: float
    findings: list[Finding]
    missed: str = ""


class Rounds:
    """Round after round, on a file that grows old and then on a new one.

    Args:
        folder: where files are made; those of a failing round stay, the others go.
        kinds: names of ``KINDS``.
        patience_s: how long processes may take to settle before that counts as broken.
        planted: a program that breaks the runtime on purpose in every worker, for tests.
        begun: called with number and kind when a round begins.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        kinds: Sequence[str] = (),
        patience_s: float = PATIENCE_S,
        planted: str = "",
        begun: Callable[[int, str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.kept: list[Path] = []
        self._kinds = tuple(kinds) or tuple(KINDS)
        self._patience_s = patience_s
        self._planted = planted
        self._begun = begun
        self._nursery = Nursery(folder / "log")
        self._life: Life | None = None
        self._age = 0
        self._lives = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_life()
        self._nursery.close()

    def order(self) -> Iterator[str]:
        """The kinds in turn: each once, then some once more, always in another order."""
        chance = random.Random(self.seed)
        while True:
            yield from chance.sample(self._kinds, len(self._kinds))
            often = [kind for kind in OFTEN if kind in self._kinds]
            yield from chance.sample(often, len(often))

    def play(self, rounds: int) -> Iterator[Result]:
        for number, kind in zip(range(1, rounds + 1), self.order(), strict=False):
            if self._begun is not None:
                self._begun(number, kind)
            yield self._play(number, kind)

    def _play(self, number: int, kind: str) -> Result:
        began = time.monotonic()
        seed = f"{self.seed}/{number}"
        life = self._life_for(kind, random.Random(f"{seed}/file"))
        before, restarts, whole = life.counts(), life.restarts, len(life.whole_s)
        life.book.turn_page()
        played = Round(life, kind, seed)
        try:
            played.run()
            life.check()
        except Broken as broken:
            life.findings.append(broken.finding)
            with contextlib.suppress(OSError):
                life.check()
        findings, life.findings = life.findings, []
        after = life.counts()
        after.subtract(before)
        result = Result(
            number=number,
            kind=kind,
            counts=after,
            restarts=life.restarts - restarts,
            whole_s=life.whole_s[whole:],
            seconds=time.monotonic() - began,
            findings=findings,
            missed=played.missed,
        )
        if findings:
            self._keep(number)
        return result

    def _life_for(self, kind: str, chance: random.Random) -> Life:
        self._age += 1
        new = kind == "start" and chance.random() < 0.3
        if self._life is not None and (new or self._age > ROUNDS_OF_A_FILE):
            self._end_life()
        if self._life is None:
            self._lives += 1
            self._age = 1
            folder = self.folder / f"file-{self._lives}"
            self._life = Life(
                folder,
                self._nursery,
                resume=chance.random() < 0.3,
                patience_s=self._patience_s,
                planted=self._planted,
            )
        return self._life

    def _end_life(self, *, remove: bool = True) -> None:
        """Let go of the file: whoever has it is killed."""
        life, self._life = self._life, None
        if life is None:
            return
        for worker in list(self._nursery.started):
            if worker is not self._nursery.spare:
                self._nursery.bury(worker)
        if life.watch is not None:
            life.watch.close()
        if remove:
            shutil.rmtree(life.folder.parent, ignore_errors=True)

    def _keep(self, number: int) -> None:
        """Put the files of a failing round aside, as they are now."""
        assert self._life is not None, "it has failed with a file"
        folder = self._life.folder.parent
        self._end_life(remove=False)
        kept = self.folder / f"round-{number}"
        folder.rename(kept)
        shutil.copy(self._nursery.log, kept / "log")
        self.kept.append(kept)


# --- the command ---------------------------------------------------------------------------------


def kill(args: argparse.Namespace) -> int:
    """Play the rounds; 1 if any of them broke a guarantee."""
    kinds = _kinds(args.kinds)
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="understudy-chaos-", dir=args.keep))
    print(f"seed {args.seed}", flush=True)
    shown = Shown(args.rounds, args.minutes)
    results: list[Result] = []
    kept: list[Path] = []
    # Ended politely, it must not leave a file system mounted.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Rounds(folder, seed=args.seed, kinds=kinds, begun=shown.begun) as rounds:
            for result in rounds.play(args.rounds or sys.maxsize):
                results.append(result)
                shown.over(result)
                if result.findings:
                    kept = rounds.kept
                    shown.say(_findings(result, kept[-1], args))
                if shown.time_is_up:
                    break
    finally:
        signal.signal(signal.SIGTERM, before)
        shown.close()
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    _summarise(results)
    broken = sum(bool(result.findings) for result in results)
    words = f"{len(results)} rounds, {broken} of them broke a guarantee, {shown.seconds:,.0f} s"
    display.emphasise(words, good=not broken)
    return 1 if broken else 0


def _kinds(given: str | None) -> tuple[str, ...]:
    kinds = tuple(filter(None, (given or "").split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"no kind {kind!r}; there are {', '.join(KINDS)}", field="kinds")
    return kinds


class Shown:
    """What people see while rounds are played: a bar on a terminal, else a line a round."""

    def __init__(self, rounds: int, minutes: float | None) -> None:
        self._rounds = rounds
        self._limit_s = 60.0 * minutes if minutes else None
        self._began = time.monotonic()
        self._bar = display.Bar() if display.is_rich() else None
        self._accepted = self._starts = self._done = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def time_is_up(self) -> bool:
        return self._limit_s is not None and self.seconds >= self._limit_s

    def begun(self, number: int, kind: str) -> None:
        """A round begins."""
        if self._bar is not None:
            done, total, beside = self._done, self._rounds, f"{self._done}/{self._rounds} rounds"
            if not total:
                done, total = int(self.seconds), int(self._limit_s or 1)
                beside = f"{self._done} rounds, {self.seconds:.0f}/{total} s"
            below = f"{kind}: {self._accepted:,} prompts accepted, {self._starts:,} processes"
            self._bar.draw(done=done, total=total, beside=beside, below=below)

    def over(self, result: Result) -> None:
        self._done += 1
        self._accepted += result.counts["accepted"]
        self._starts += result.restarts
        if self._bar is None:
            self.say(_line(result, self._rounds))

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.say(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _line(result: Result, rounds: int) -> str:
    number = f"{result.number}/{rounds}" if rounds else str(result.number)
    whole = f"whole again in {max(result.whole_s, default=0.0):.2f} s"
    accepted = f"{result.counts['accepted']} prompts"
    missed = f", {result.missed} was not reached" if result.missed else ""
    return f"{number:>9} {result.kind:<7} {accepted:>11}, {whole}, {result.seconds:.1f} s{missed}"


def _findings(result: Result, kept: Path, args: argparse.Namespace) -> str:
    """What was broken, where its files are, and how to play it again."""
    shown = [f"  {guarantee}: {what}" for guarantee, what in result.findings[:FINDINGS_SHOWN]]
    more = len(result.findings) - len(shown)
    kinds = f" --kinds {args.kinds}" if args.kinds else ""
    return "\n".join(
        (
            f"Round {result.number} ({result.kind}) broke a guarantee:",
            *shown,
            *([f"  and {more} more"] if more else []),
            f"  kept: {kept} (db/agent.db with its -wal, ledger, log)",
            f"  again: understudy chaos kill --seed {args.seed} --rounds {result.number}{kinds}",
        )
    )


def _summarise(results: Sequence[Result]) -> None:
    by_kind: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    rows = [_row(kind, by_kind[kind]) for kind in KINDS if kind in by_kind]
    if len(rows) > 1:
        rows.append(_row("all", results))
    heads = (
        *("kind", "rounds", "accepted", "answered", "interrupted", "starts", "broken"),
        *("whole again", "a round"),
    )
    display.table(rows, heads=heads, right=range(1, len(heads)))


def _row(kind: str, results: Sequence[Result]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    whole = [seconds for result in results for seconds in result.whole_s]
    return (
        kind,
        str(len(results)),
        *(f"{counts[name]:,}" for name in ("accepted", "answered", "interrupted")),
        f"{sum(result.restarts for result in results):,}",
        str(sum(bool(result.findings) for result in results)),
        f"{statistics.median(whole):.2f} s" if whole else "",
        f"{statistics.median(result.seconds for result in results):.1f} s",
    )
