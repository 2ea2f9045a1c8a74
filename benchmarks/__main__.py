"""``python -m benchmarks [name …]``: every row of the table in ``docs/performance.md``.

Each row runs in a process of its own, one after the other, so that none inherits another's threads,
memory or garbage; a row that hangs is ended and said so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_CHECKOUT / "src"))

from benchmarks import report, rows  # noqa: E402, F401 - rows enters what can be run
from benchmarks.measure import ROWS, Figure, Run  # noqa: E402

LIMIT_S = 240.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Exit code 0 when everything was measured, 1 when a row failed."""
    args = _parser().parse_args(argv)
    if args.child:
        return _child(args.names[0], args.child, quick=args.quick)
    names = args.names or list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"No such row: {', '.join(unknown)}. There are: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    start = time.monotonic()
    figures, failed = [], []
    print(report.machine(), file=sys.stderr)
    for place, name in enumerate(names):
        _progress(place, len(names), name, time.monotonic() - start)
        found = _measured(name, quick=args.quick)
        figures += found
        if not found:
            failed.append(name)
    took_s = time.monotonic() - start
    _progress(len(names), len(names), "done", took_s)
    print(report.machine())
    print(report.table(figures))
    print(f"{took_s:.0f} s. Figures are medians over interleaved rounds; read them as ratios.")
    if args.output:
        report.write(Path(args.output), figures, quick=args.quick, took_s=took_s)
        print(f"Written: {args.output}, and beside it .svg and .md")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"rows to run: {', '.join(ROWS)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="smaller: under two minutes for all")
    parser.add_argument(
        "--output",
        default="benchmarks.json",
        metavar="FILE",
        help="JSON; chart and Markdown go beside it (%(default)s; '' for none)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _measured(name: str, *, quick: bool) -> list[Figure]:
    """Run one row in a process of its own; empty when it failed."""
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as directory:
        command = [sys.executable, "-m", "benchmarks", name, "--child", directory]
        try:
            done = subprocess.run(
                command + ["--quick"] * quick,
                cwd=_CHECKOUT,
                env={**os.environ, "PYTHONPATH": str(_CHECKOUT / "src")},
                timeout=LIMIT_S,
                check=False,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: not done within {LIMIT_S:g} s", file=sys.stderr)
            return []
        answer = Path(directory) / "figures.json"
        if not answer.exists():
            print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr)
            return []
        return msgspec.json.decode(answer.read_bytes(), type=list[Figure])


def _child(name: str, directory: str, *, quick: bool) -> int:
    figures = list(ROWS[name](Run(Path(directory), quick)))
    for each in figures:
        each.row = name
    (Path(directory) / "figures.json").write_bytes(msgspec.json.encode(figures))
    os._exit(0)  # thousands of peers' threads are not waited for


def _progress(done: int, total: int, name: str, took_s: float) -> None:
    """A bar that is drawn over itself on a terminal, else a line for each row."""
    filled = 30 * done // total
    bar = f"[{'█' * filled}{'·' * (30 - filled)}] {done}/{total} {took_s:4.0f} s  {name:<12}"
    if sys.stderr.isatty():
        print(f"\r{bar}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    else:
        print(bar, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
