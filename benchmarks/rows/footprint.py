"""Footprint: import, an empty runtime, and what the journal takes on disk."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import stage
from benchmarks.measure import Figure, Run, figure, interleaved, row
from benchmarks.rows.history import size
from benchmarks.rows.turns import _turns
from understudy import Retention

# peewee loads psycopg where it is installed, and a peer brings it along: 23 MB of somebody else's.
_WITHOUT = "import sys; sys.modules['psycopg'] = sys.modules['psycopg2'] = None\n"
_IMPORT = _WITHOUT + (
    "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
)
_EMPTY = f"""
{_WITHOUT}
import os
from understudy import Runtime
with Runtime(sys.argv[1], model="scripted"):
    pages = int(open("/proc/self/statm").read().split()[1])
    print(pages * os.sysconf("SC_PAGE_SIZE"))
"""


@row("import")
def importing(run: Run) -> Iterator[Figure]:
    """A process of its own for each look, so that nothing is loaded yet; bytecode is there."""
    floor = "asyncio, pykka, peewee, blinker, tenacity, msgspec"
    bytecode = run.path().with_suffix(".bytecode")

    def took(names: str) -> float:
        return float(_python(bytecode, _IMPORT.format(names))) * 1000

    took("understudy")  # writes the bytecode, of the dependencies too
    took(floor)
    medians = interleaved(
        run.size(9, 5), {"ours": lambda: took("understudy"), "floor": lambda: took(floor)}
    )
    result = figure("import", medians["ours"], "ms", "at most", 120)
    result.against, result.base = "its dependencies and asyncio alone", medians["floor"]
    result.ratio = medians["ours"] / medians["floor"]
    yield result
    sizes = [int(_python(bytecode, _EMPTY, str(run.path()))) for _ in range(4)][1:]
    yield figure(
        "RSS of an open, empty runtime", statistics.median(sizes) / 1e6, "MB", "at most", 40
    )


def _python(bytecode: Path, code: str, *args: str) -> str:
    """Run code as an installed package runs: from bytecode, whatever the environment says."""
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, env=env
    )
    return done.stdout.strip()


@row("journal")
def journal(run: Run) -> Iterator[Figure]:
    """The journal and the log after many turns, with a retention of 100,000 events."""
    turns = run.size(100_000, 2_000)
    deadline = time.monotonic() + run.size(150, 20)
    kept = run.size(100_000, 5_000)
    path = run.path()
    played, wal = 0, 0
    retention = Retention(events=kept)
    with stage.runtime(path, model=stage.InstantModel(), retention=retention) as runtime:
        while played < turns and time.monotonic() < deadline:
            _turns(runtime, 1_000)
            played += 1_000
            runtime.engine.store.trim_journal(retention)
            wal = max(wal, size(Path(f"{path}-wal")))
        runtime.engine.store.run(lambda _: None)
        oldest, newest = runtime.engine.store.read.cursors()
        held = size(path)
    what = f"events kept after {played:,} turns"
    yield figure(what, newest - oldest + 1, "", "at most", kept + 10_000)
    yield figure(f"log (WAL) at its largest in {played:,} turns", wal / 1e6, "MB", "at most", 64)
    yield Figure(what=f"database after {played:,} turns", value=held / 1e6, unit="MB")


assert os.name == "posix", "benchmarks read /proc"
