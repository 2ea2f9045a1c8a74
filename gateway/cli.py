"""The ``understudy`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from understudy.errors import UnderstudyError

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 well, 1 an error or a finding, 2 wrong usage, 130 Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except UnderstudyError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has seen enough; the interpreter must not flush into the void at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    from understudy import __version__

    parser = argparse.ArgumentParser(
        prog="understudy",
        description="understudy: a runtime for the sessions of AI-agent apps that never get stuck.",
    )
    parser.add_argument("--version", action="version", version=f"understudy {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _demo(commands)
    return parser


def _demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="run hundreds of sessions, crash and kill them, and audit what is left",
        description="Runs hundreds of sessions with real tools on real files in another process, "
        "crashes actors, kills the process with SIGKILL and starts it again, then audits the "
        "database without understudy's own code. Needs no key and no network. Killed itself, it "
        "goes on where it was when started again with the same --database.",
    )
    add = parser.add_argument
    add("--root", metavar="DIR", help="whose files are looked at (the current directory)")
    add("--sessions", type=int, default=300, metavar="N", help="how many (%(default)s)")
    add("--kills", type=int, default=3, metavar="N", help="of the process (%(default)s)")
    add("--crashes", type=int, default=12, metavar="N", help="of actors (%(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of what is left to chance (%(default)s)")
    add("--database", metavar="FILE", help="keep it here (a temporary file that is removed)")
    add("--keep", action="store_true", help="do not remove the temporary files")
    add("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.set_defaults(command=_run_demo)


def _run_demo(args: argparse.Namespace) -> int:
    from understudy.gateway.demo.command import demo

    return demo(args)


if __name__ == "__main__":
    sys.exit(main())
