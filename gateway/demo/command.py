"""``understudy demo``: sets the stage, runs the conductor, shows the verdict."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import msgspec

import understudy
from understudy.errors import InvalidInput, StoreError
from understudy.gateway import display
from understudy.gateway.demo.conductor import Conductor
from understudy.gateway.demo.files import choose
from understudy.gateway.demo.ledger import Ledger
from understudy.gateway.demo.tasks import Plan
from understudy.gateway.demo.verdict import Verdict, judge, rows

FINDINGS_SHOWN = 20


def demo(args: argparse.Namespace) -> int:
    """Exit code 0 if every promise was kept."""
    if args.database is not None:
        return _perform(args, Path(args.database).absolute())[0]
    folder = Path(tempfile.mkdtemp(prefix="understudy-demo-"))
    keep = args.keep
    try:
        code, good = _perform(args, folder / "demo.db")
        keep = keep or not good
        return code
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _perform(args: argparse.Namespace, database: Path) -> tuple[int, bool]:
    if not database.parent.is_dir():
        raise InvalidInput(f"{database.parent} is not a directory", field="database")
    plan = Plan(
        database=database,
        root=_root(args.root, database.name),
        sessions=args.sessions,
        kills=args.kills,
        crashes=args.crashes,
        seed=args.seed,
    )
    started = time.monotonic()
    progress = display.progress(quiet=args.json)
    try:
        with closing(Ledger(plan.beside("ledger"))) as ledger:
            conductor = Conductor(plan, ledger, progress)
            if not args.json:
                progress.say(_announce(conductor))
            conductor.run()
            progress.close()
            if conductor.failure and not database.exists():
                raise StoreError(conductor.failure, path=str(database))
            verdict = judge(conductor, seconds=time.monotonic() - started)
    finally:
        progress.close()
    _show(verdict, args, database)
    return (0 if verdict.good else 1), verdict.good


def _root(given: str | None, leave_out: str) -> Path:
    """What was asked for, else the current directory, else understudy's own sources."""
    if given is not None:
        root = Path(given)
        if not root.is_dir():
            raise InvalidInput(f"{root} is not a directory", field="root")
        return root
    try:
        choose(Path.cwd(), seed=0, leave_out=leave_out)
    except InvalidInput:
        return Path(understudy.__file__).parent
    return Path.cwd()


def _announce(conductor: Conductor) -> str:
    tasks = conductor.tasks.values()
    sessions = len({task.session for task in tasks})
    return (
        f"{sessions} sessions answer {len(tasks)} questions about files in {conductor.root},\n"
        f"while actors are crashed and the whole process is killed."
    )


def _show(verdict: Verdict, args: argparse.Namespace, database: Path) -> None:
    if args.json:
        print(msgspec.json.encode(verdict).decode())
        return
    display.table(rows(verdict), right=(1,))
    if verdict.good:
        display.emphasise("Nothing lost, nothing duplicated, nothing stuck.", good=True)
    else:
        display.emphasise(f"{len(verdict.broken)} promises were broken:", good=False)
        for each in verdict.broken[:FINDINGS_SHOWN]:
            print(f"  {each.kind}: {each.session_id} {each.what}")
        if len(verdict.broken) > FINDINGS_SHOWN:
            print(f"  … and {len(verdict.broken) - FINDINGS_SHOWN} more")
    if args.database is not None or args.keep or not verdict.good:
        print(f"The database: {database} (look around: understudy sessions --database …)")
