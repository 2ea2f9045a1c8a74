"""Hundreds of sessions at once, in one process, on a handful of threads.

An idle session costs a few kilobytes and no thread. Sessions that commit at the same time share
a transaction, so five hundred do not wait for five hundred disk writes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from pathlib import Path

from understudy import Reply, Runtime, model_from


async def converse(runtime: Runtime, number: int) -> Reply:
    session = await runtime.create_session(title=f"Session {number}")
    turn = await session.prompt(f"I am number {number}. Say so.")
    return await turn.result(timeout_s=60)


async def spawn(path: Path, count: int) -> None:
    async with Runtime(path, model=model_from()) as runtime:
        started_s = time.perf_counter()
        replies = await asyncio.gather(*(converse(runtime, n) for n in range(count)))
        took_s = time.perf_counter() - started_s
        mine = sum(f"number {n}." in reply.text for n, reply in enumerate(replies))
        print(f"{count} sessions, {len(replies)} answers, {mine} of them to their own prompt")
        print(f"{runtime.live_sessions()} live actors on {threading.active_count()} threads")
        print(f"{count / took_s:.0f} sessions a second, created, prompted and answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="how many sessions (300)")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(spawn(Path(folder) / "agent.db", parser.parse_args().count))


if __name__ == "__main__":
    main()
