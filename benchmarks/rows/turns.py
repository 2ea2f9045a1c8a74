"""Whole turns: under load against durable workflows, alone, and streaming."""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from benchmarks import stage
from benchmarks.floors import Tape, one_row_ms, over_sqlite
from benchmarks.measure import Figure, Run, cores, figure, interleaved, row, skipped, versus
from benchmarks.peers import Dbos, LangGraph, try_peer
from understudy import Runtime
from understudy.actors.models.protocol import Finish, ModelEvent, ModelRequest, TextDelta


@row("turns")
def turns(run: Run) -> Iterator[Figure]:
    """Prompt, model step, tool call, model step; all durable, all published, 64 sessions."""
    dbos, no_dbos = try_peer("dbos", lambda: Dbos(run.path()))
    graph, no_graph = try_peer("langgraph.checkpoint.sqlite", lambda: LangGraph(run.path()))
    count = run.size(1_500, 384)
    with stage.runtime(run.path(), model=stage.InstantModel(calls_tool=True)) as runtime:
        runtime.create_session().prompt("warm").result(timeout_s=10)
        tape = Tape(runtime)
        contenders = {
            "ours": lambda: tape.record(lambda: _turns(runtime, count, tape.start)),
            "alone": lambda: count / tape.replayed_s(run.path()),
            "commit": lambda: one_row_ms(run.path()),
        }
        if dbos is not None:
            contenders["dbos"] = lambda: dbos.rate(run.size(200, 64))
        if graph is not None:
            contenders["graph"] = lambda: graph.rate(run.size(300, 100))
        for where in cores():
            medians = interleaved(run.rounds // 2 + 1, contenders)
            ours = medians["ours"]
            what = f"whole turns, 64 sessions in flight, {where}"
            yield figure(what, ours, "/s", "at least", 800)
            for name, label, limit, why in (
                ("dbos", "DBOS, 3 steps, 64 in flight", 8.0, no_dbos),
                ("graph", "LangGraph, 3 nodes, SQLite", 5.0, no_graph),
            ):
                if why is None:
                    yield versus(f"whole turns, {where}", ours, "/s", label, medians[name], limit)
                else:
                    yield skipped(f"whole turns against {label}, {where}", why)
            yield over_sqlite(medians)
    if dbos is not None:
        dbos.close()


def _turns(runtime: Runtime, count: int, started: Callable[[], None] = lambda: None) -> float:
    """Turns per second, four in each session: a workflow of the peers has no history at all."""

    async def play() -> float:
        made = [await runtime.create_session() for _ in range(-(-count // 4))]
        left = iter(made)

        async def one() -> None:
            for session in left:
                for _ in range(4):
                    turn = await session.prompt("What is 1 + 2?")
                    await turn.result(timeout_s=60)

        started()
        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(64)))
        return 4 * len(made) / (time.perf_counter() - start)

    return asyncio.run(play())


@row("alone")
def alone(run: Run) -> Iterator[Figure]:
    """One turn with one tool call and nothing else to do, from a thread that waits for it."""
    with stage.runtime(run.path(), model=stage.InstantModel(calls_tool=True)) as runtime:
        times = []
        session = runtime.create_session()
        for number in range(run.size(400, 120)):
            if number % 20 == 0:
                session = runtime.create_session()  # a short history: that is another row
                session.prompt("warm").result(timeout_s=10)
            start = time.perf_counter()
            session.prompt("What is 1 + 2?").result(timeout_s=10)
            times.append((time.perf_counter() - start) * 1000)
    yield figure(
        "one turn alone, p50",
        statistics.median(times),
        "ms",
        "at most",
        5.0,
        f"p99 {statistics.quantiles(times, n=100)[98]:.1f} ms",
    )


class Ticker:
    """Wakes every stream at each tick with one timer, so that the model itself costs little."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = 0.0
        self.late_s = 0.0

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._next_s = loop.time() + self._every_s
            self._timer = loop.call_at(self._next_s, self._tick, loop)
        waiting = loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.late_s = max(self.late_s, loop.time() - self._next_s)
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)
        self._timer = None
        if waiting:
            self._next_s += self._every_s
            self._timer = loop.call_at(self._next_s, self._tick, loop)


class StreamingModel(stage.InstantModel):
    """So many deltas a second for so long, once every session is there; in five staggered groups.

    ``began`` are the wall and processor time of that moment, ``ended`` the wall time of the last
    delta.
    """

    def __init__(self, *, sessions: int, deltas: int, per_s: int) -> None:
        super().__init__()
        self._sessions = sessions
        self._deltas = deltas
        self._everybody = asyncio.Event()
        self.began = (0.0, 0.0)
        self.ended = 0.0
        self._groups = [Ticker(1 / per_s) for _ in range(5)]
        self._given = 0

    @property
    def late_s(self) -> float:
        return max(group.late_s for group in self._groups)

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]:
        self._given += 1
        mine = self._given
        if mine == self._sessions:
            self.began = (time.perf_counter(), time.process_time())
            self._everybody.set()
        await self._everybody.wait()
        ticker = self._groups[mine % len(self._groups)]
        await asyncio.sleep(mine % len(self._groups) * 0.02 / len(self._groups))
        for _ in range(self._deltas):
            await ticker.tick()
            yield TextDelta("token ")
        self.ended = time.perf_counter()
        yield Finish("stop")


@row("streaming")
def streaming(run: Run) -> Iterator[Figure]:
    """2,000 sessions at 50 deltas a second each: does it keep up, and what does that cost."""
    yield from _streamed(run, "")
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield from _streamed(run, ", collector told to wait")
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _streamed(run: Run, how: str) -> Iterator[Figure]:
    sessions, seconds, per_s = 2_000, run.size(10, 4), 50
    deltas = seconds * per_s
    floor_cores, floor_s, floor_late_s = _model_alone(sessions, deltas, per_s)
    model = StreamingModel(sessions=sessions, deltas=deltas, per_s=per_s)
    with stage.runtime(run.path(), model=model) as runtime:
        turns = [runtime.create_session().prompt("Go on.") for _ in range(sessions)]
        while not model.began[0]:
            time.sleep(0.01)
        for turn in turns:
            turn.result(timeout_s=300)
        start, cpu = model.began
        took_s = time.perf_counter() - start
        used = (time.process_time() - cpu) / took_s
    pace = seconds / (model.ended - start)
    rate = f"{sessions:,} sessions at {per_s} deltas/s{how}"
    yield figure(f"{rate}: pace of real time", pace, "×", "at least", 0.95)
    yield Figure(
        what=f"… and from the last delta of all to the end of {sessions:,} turns",
        value=took_s - (model.ended - start),
        unit="s",
        note="they end at one and the same moment",
    )
    yield Figure(
        what=f"{rate}: cores used",
        value=used,
        unit="cores",
        against="the model alone in an asyncio loop",
        base=floor_cores,
        ratio=used / floor_cores,
        target="≤ 1 cores",
        met=used <= 1.0,
        note=f"the model alone took {floor_s:.1f} s for {seconds} s",
    )
    yield Figure(
        what=f"{rate}: longest the loop was late",
        value=model.late_s * 1000,
        unit="ms",
        against="the model alone in an asyncio loop",
        base=floor_late_s * 1000,
        target="≤ 50 ms",
        met=model.late_s <= 0.05,
    )


def _model_alone(sessions: int, deltas: int, per_s: int) -> tuple[float, float, float]:
    """The floor: the same streams read by nobody: cores, seconds, longest lateness."""
    model = StreamingModel(sessions=sessions, deltas=deltas, per_s=per_s)
    request = ModelRequest("ses_floor", "", ())

    async def read() -> None:
        async for _ in model.stream(request):
            pass

    async def everyone() -> None:
        await asyncio.gather(*(read() for _ in range(sessions)))

    thread = threading.Thread(target=lambda: asyncio.run(everyone()))
    thread.start()
    thread.join()
    start, cpu = model.began
    took_s = time.perf_counter() - start
    return (time.process_time() - cpu) / took_s, took_s, model.late_s
