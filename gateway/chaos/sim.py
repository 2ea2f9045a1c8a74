"""``understudy chaos sim``: seeds of the simulator, one after the other or side by side."""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final

from understudy.testing import Result, Simulation, shrink

_CHUNK: Final = 20


def simulate(args: argparse.Namespace) -> int:
    """Run the seeds; 1 if any of them broke a guarantee."""
    seeds = range(args.seed, args.seed + args.seeds)
    print(f"seed {seeds.start}, {len(seeds)} seeds of about {args.steps} steps", flush=True)
    began = time.monotonic()
    broken = events = 0
    for result in _results(seeds, args.steps, args.processes, keep_trace=args.trace):
        events += result.events
        if result.findings:
            broken += 1
            _report(result, trace=args.trace)
        elif args.trace:
            print(*result.trace, f"digest {result.digest}", sep="\n")
    seconds = time.monotonic() - began
    print(
        f"{len(seeds)} seeds, {events} events in {seconds:.1f} s "
        f"({len(seeds) / max(seconds, 1e-9):.1f} seeds/s): {broken} broke a guarantee"
    )
    return 1 if broken else 0


def _results(seeds: range, steps: int, processes: int, *, keep_trace: bool) -> Iterator[Result]:
    """In the order of the seeds, whoever ran them."""
    processes = min(processes or os.cpu_count() or 1, 1 + len(seeds) // _CHUNK)
    if processes == 1:
        for seed in seeds:
            yield _run(seed, steps=steps, keep_trace=keep_trace)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        run = functools.partial(_run, steps=steps, keep_trace=keep_trace)
        yield from pool.map(run, seeds, chunksize=_CHUNK)


def _run(seed: int, *, steps: int, keep_trace: bool) -> Result:
    return Simulation(seed, steps=steps, keep_trace=keep_trace).run()


def _report(result: Result, *, trace: bool) -> None:
    """The finding first, then the least that is needed for it."""
    print(f"\nseed {result.seed} broke a guarantee:", flush=True)
    for guarantee, what in result.findings:
        print(f"  {guarantee}: {what}")
    smallest = shrink(result)
    print(f"  {len(smallest.script)} of {len(result.script)} acts are needed:")
    for act in smallest.script:
        print(f"    {act}")
    if trace:
        print(*smallest.trace, sep="\n")
    print()
