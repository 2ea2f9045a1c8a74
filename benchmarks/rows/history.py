"""Cost against history: the same work beside little and beside much."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import stage
from benchmarks.measure import Figure, Run, flat, row
from understudy import CompactionRules, Runtime, Session
from understudy.store.changes import Change
from understudy.store.events import PartUpdated
from understudy.store.records import TextPart


@row("history")
def history(run: Run) -> Iterator[Figure]:
    """Append, accept and turn in a session of 10 and of 20,000 messages.

    The long one was compacted at its end, as a session of that size is, so that the model is given
    about as much in both: what is left is the cost of the history itself.
    """
    long = run.size(20_000, 4_000)
    path, short_path = run.path(), run.path()
    rules = CompactionRules(auto=False, tail=60)
    for home, messages in ((path, long), (short_path, 10)):
        with stage.runtime(home, model=stage.InstantModel()) as runtime:
            runtime.create_session(session_id="ses_grown").prompt("What?").result(timeout_s=10)
        stage.lengthened(home, "ses_grown", messages)
    with (
        stage.runtime(path, model=stage.InstantModel(), compaction=rules) as runtime,
        stage.runtime(short_path, model=stage.InstantModel(), compaction=rules) as other,
    ):
        grown, short = runtime.session("ses_grown"), other.session("ses_grown")
        assert len(grown.messages()) == long
        grown.compact().result(timeout_s=60)
        for session in (grown, short):
            session.prompt("warm").result(timeout_s=10)
        contenders = {"short": (other, short), "long": (runtime, grown)}
        for what, times in _interleaved(run, contenders).items():
            yield flat(
                f"{what} in a session of {long:,} messages",
                times["long"],
                "ms",
                "… of 10",
                times["short"],
                1.2,
            )


def _interleaved(
    run: Run, contenders: dict[str, tuple[Runtime, Session]]
) -> dict[str, dict[str, float]]:
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(run.size(60, 20)):
        for name, (runtime, session) in contenders.items():
            for what, work in (("append", _append), ("accept", _accept), ("turn", _turn)):
                each = work(runtime, session) * 1000
                times.setdefault(what, {}).setdefault(name, []).append(each)
    return {
        what: {name: statistics.median(each) for name, each in by_name.items()}
        for what, by_name in times.items()
    }


def _append(runtime: Runtime, session: Session) -> float:
    """A part to the newest message, straight to the store, durable."""
    engine = runtime.engine
    actor = engine.registry.actor(session.id)
    assert actor is not None and actor.state is not None
    part = TextPart(id=engine.new_id("prt"), session_id=session.id, message_id="msg_x", text="x")
    fact = PartUpdated(session_id=session.id, part=part, time=engine.clock.wall_ms())
    change = Change(
        session_id=session.id,
        owner=engine.id,
        epoch=actor.epoch,
        seq=actor.state.seq,
        time_ms=engine.clock.wall_ms(),
        facts=(fact,),
    )
    start = time.perf_counter()
    done: list[object] = []
    engine.store.commit(change, lambda _, __, error: done.append(error))
    engine.store.run(lambda _: None)
    took_s = time.perf_counter() - start
    assert done == [None], done
    # The actor did not see this append: it is told, so that its next change has the right number.
    actor.state = type(actor.state)(
        **{
            name: getattr(actor.state, name) if name != "seq" else actor.state.seq + 1
            for name in actor.state.__struct_fields__
        }
    )
    return took_s


def _accept(_: Runtime, session: Session) -> float:
    start = time.perf_counter()
    turn = session.prompt("What is 1 + 2?")
    took_s = time.perf_counter() - start
    turn.result(timeout_s=10)
    return took_s


def _turn(_: Runtime, session: Session) -> float:
    start = time.perf_counter()
    session.prompt("What is 1 + 2?").result(timeout_s=10)
    return time.perf_counter() - start


@row("store")
def store(run: Run) -> Iterator[Figure]:
    """The same in a store of 100 and of 1,000,000 sessions; and the list of the newest."""
    many = run.size(1_000_000, 50_000)
    small, large = run.path(), run.path()
    stage.filled(small, 100)
    stage.filled(large, many)
    with (
        stage.runtime(small, model=stage.InstantModel()) as few,
        stage.runtime(large, model=stage.InstantModel()) as much,
    ):
        times: dict[str, dict[str, list[float]]] = {}
        homes = {"few": (few, few.create_session()), "much": (much, much.create_session())}
        for _ in range(run.size(60, 20)):
            for name, (runtime, session) in homes.items():
                for what, work in _WORK.items():
                    each = work(runtime, session) * 1000
                    times.setdefault(what, {}).setdefault(name, []).append(each)
    for what, by_name in times.items():
        yield flat(
            f"{what} in a store of {many:,} sessions",
            statistics.median(by_name["much"]),
            "ms",
            "… of 100",
            statistics.median(by_name["few"]),
            1.2,
        )


def _create(runtime: Runtime, _: Session) -> float:
    start = time.perf_counter()
    runtime.create_session()
    return time.perf_counter() - start


def _list(runtime: Runtime, _: Session) -> float:
    start = time.perf_counter()
    runtime.sessions(limit=100)
    return time.perf_counter() - start


_WORK = {
    "append": _append,
    "accept": _accept,
    "turn": _turn,
    "create": _create,
    "list of 100 newest": _list,
}


def size(path: Path) -> int:
    """What a file takes on disk, in bytes; 0 when it is not there."""
    return path.stat().st_size if path.exists() else 0
