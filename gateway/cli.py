"""The ``understudy`` command."""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from understudy.errors import InvalidInput, UnderstudyError

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 well, 1 an error or a finding, 2 wrong usage, 130 Ctrl-C."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model says what a terminal may not show
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
    _run(commands)
    _serve(commands)
    _looking(commands)
    _doctor(commands)
    _chaos(commands)
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
    add("--sessions", type=_some, default=300, metavar="N", help="how many (%(default)s)")
    add("--kills", type=_count, default=3, metavar="N", help="of the process (%(default)s)")
    add("--crashes", type=_count, default=12, metavar="N", help="of actors (%(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of what is left to chance (%(default)s)")
    add("--database", metavar="FILE", help="keep it here (a temporary file that is removed)")
    add("--keep", action="store_true", help="do not remove the temporary files")
    add("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.set_defaults(command=_run_demo)


def _run_demo(args: argparse.Namespace) -> int:
    from understudy.gateway.demo.command import demo

    return demo(args)


def _run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="answer one prompt, with tools for files and commands",
        description="Answers one prompt with a model and the tools read, write, edit, list, glob, "
        "grep and bash. Before it changes files or runs commands it asks, on a terminal; without "
        "one they are refused. Exit code 0 when answered, 1 when not, 128 and its number after a "
        "signal: 130 after Ctrl-C.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to do; - reads it from the input")
    add = parser.add_argument
    add("--model", metavar="SPEC", help="openai/…, anthropic/… or scripted ($UNDERSTUDY_MODEL)")
    add("--directory", metavar="DIR", help="where the tools work (the current directory)")
    add("--session", metavar="ID", help="go on in this session instead of a new one")
    add("--yes", "--allow-all", action="store_true", help="never ask: allow every tool")
    _add_database(parser)
    parser.set_defaults(command=_run_run)


def _run_run(args: argparse.Namespace) -> int:
    from understudy.gateway.run import run

    return run(args)


def _serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        aliases=["server"],
        help="serve sessions over HTTP to OpenCode's clients",
        description="Serves sessions over HTTP and server-sent events, in OpenCode's protocol. "
        "$OPENCODE_SERVER_PASSWORD or $UNDERSTUDY_SERVER_PASSWORD is asked of every client, and "
        "must be set to be reachable from other machines. Ends within five seconds of SIGTERM.",
    )
    add = parser.add_argument
    add("--port", type=_port, default=4096, metavar="N", help="0 takes any (%(default)s)")
    add("--hostname", default="127.0.0.1", metavar="HOST", help="(%(default)s)")
    add("--directory", metavar="DIR", help="where clients work that name none (the current one)")
    add(
        "--model",
        action="append",
        metavar="SPEC",
        help="openai/…, anthropic/… or scripted ($UNDERSTUDY_MODEL); again for more to choose from",
    )
    add("--ask", action="append", metavar="PERMISSION", help="ask before: edit, …; again (bash)")
    add("--allow", action="append", metavar="PERMISSION", help="do not ask before: bash; again")
    add("--cors", action="append", metavar="ORIGIN", help="let pages of this origin call; again")
    add("--insecure", action="store_true", help="let other machines in without a password")
    _add_database(parser)
    parser.set_defaults(command=_run_serve)


def _run_serve(args: argparse.Namespace) -> int:
    # The program is never garbage: the collector need not look at it, now or while it serves.
    gc.disable()
    try:
        from understudy.gateway.http.serve import serve
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "understudy":
            raise
        raise InvalidInput("serving needs the extra: pip install 'understudy[server]'") from error
    finally:
        gc.freeze()
        gc.enable()
    return serve(args)


def _looking(commands: Any) -> None:
    """Commands that look and touch nothing; they may look at a database in use."""
    parser = commands.add_parser("sessions", help="list sessions")
    add = parser.add_argument
    add("--limit", type=_some, default=50, metavar="N", help="how many at most (%(default)s)")
    _add_looking(parser, "sessions")
    parser = commands.add_parser("show", help="print a session's transcript")
    parser.add_argument("session", metavar="SESSION")
    _add_looking(parser, "show")
    parser = commands.add_parser("events", help="print the journal of events")
    parser.add_argument("--after", type=_count, default=0, metavar="N", help="after this cursor")
    parser.add_argument("--follow", action="store_true", help="go on as events are committed")
    parser.add_argument("--session", metavar="ID", help="of this session only")
    _add_looking(parser, "events")


def _add_looking(parser: argparse.ArgumentParser, name: str) -> None:
    def command(args: argparse.Namespace) -> int:
        from understudy.gateway import inspect

        handler = logging.StreamHandler()
        handler.setFormatter(_WithoutTraceback())
        logging.basicConfig(handlers=[handler])
        return int(getattr(inspect, name)(args))

    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    _add_database(parser)
    parser.set_defaults(command=command)


class _WithoutTraceback(logging.Formatter):
    """An app's log wants the traceback of a damaged row; who looks at a list does not."""

    def format(self, record: logging.LogRecord) -> str:
        return f"understudy: {record.getMessage()}"


def _doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="examine a database, and repair it",
        description="Examines a database and touches nothing; exit code 1 if there are problems. "
        "With --repair damaged rows and rows that belong to nothing are moved into a file beside "
        "the database (FILE.damaged-….jsonl) and put back from the journal where it knows them, "
        "what dead runtimes left is removed, and what was cut short is closed. Nothing is started: "
        "what waits for the next start goes on waiting. A quarantine is never lifted.",
    )
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_database(parser)
    parser.set_defaults(command=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from understudy.gateway.doctor import doctor

    return doctor(args)


def _chaos(commands: Any) -> None:
    parser = commands.add_parser("chaos", help="provoke failures on purpose")
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    _sim(kinds)
    _kill(kinds)
    soak = kinds.add_parser(
        "soak",
        help="steady load with crashes: does anything grow?",
        description="Runs turns in a temporary database with a scripted model, crashes actors and "
        "aborts turns on the way, and measures memory, descriptors, threads, the log and the "
        "journal. Exit code 1 when something still grows at the end.",
    )
    soak.add_argument("--minutes", type=_minutes, default=10.0, metavar="N", help="(%(default)s)")
    soak.add_argument("--seed", type=int, default=1, metavar="S", help="(%(default)s)")
    soak.add_argument("--plot", metavar="FILE", help="draw what was measured, as SVG")
    soak.add_argument("--json", action="store_true", help="print JSON and nothing else")
    soak.set_defaults(command=_run_soak)


def _sim(kinds: Any) -> None:
    parser = kinds.add_parser(
        "sim",
        help="simulate the runtime by seed, with every kind of fault",
        description="Runs the real runtime in one thread, where a seeded generator decides what "
        "happens next: which actor, which commit, which delivery, crash, kill, freeze or failing "
        "store. Checks the guarantees after every commit, then takes the faults away and waits for "
        "everything to settle. A seed that breaks a guarantee is shrunk. Exit code 1 if one did.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="S", help="the first seed (%(default)s)")
    add("--seeds", type=_some, default=100, metavar="N", help="how many (%(default)s)")
    add("--steps", type=_some, default=300, metavar="M", help="with faults, each (%(default)s)")
    add("--processes", type=_count, default=0, metavar="P", help="side by side (one a processor)")
    add("--trace", action="store_true", help="print what happened, step by step")
    parser.set_defaults(command=_run_sim)


def _kill(kinds: Any) -> None:
    parser = kinds.add_parser(
        "kill",
        help="kill, freeze and starve real processes, and check what is left",
        description="A process works hard on a real file, in real threads. Round by round it is "
        "killed at a random moment or a named point, frozen past its lease while another takes "
        "over, left without room on the disk, or killed again and again as it starts. Each time a "
        "new process makes the file whole, and what callers were promised is checked without "
        "understudy's own code. Kinds of rounds: kill, point, start, loop, close, freeze, nap, "
        "two, full. Exit code 1 if a guarantee was broken; the files of such rounds are kept.",
    )
    add = parser.add_argument
    add("--rounds", type=_some, metavar="N", help="how many (100, or as --minutes allow)")
    add("--minutes", type=_minutes, metavar="M", help="begin no round after so long")
    add("--seed", type=int, default=1, metavar="S", help="of what is left to chance (%(default)s)")
    add("--kinds", metavar="A,B", help="only these kinds of rounds")
    add("--keep", metavar="DIR", help="keep the files of failing rounds here (a temporary one)")
    parser.set_defaults(command=_run_kill)


def _run_kill(args: argparse.Namespace) -> int:
    from understudy.gateway.chaos.kill import kill

    if args.rounds is None:
        args.rounds = 0 if args.minutes else 100
    return kill(args)


def _run_sim(args: argparse.Namespace) -> int:
    from understudy.gateway.chaos.sim import simulate

    return simulate(args)


def _run_soak(args: argparse.Namespace) -> int:
    from understudy.gateway.chaos.soak import soak

    return soak(args)


def _add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--database",
        metavar="FILE",
        help="the database ($UNDERSTUDY_DATABASE, or else understudy/understudy.db in "
        "$XDG_DATA_HOME or ~/.local/share)",
    )


def _port(text: str) -> int:
    return _whole(text, most=65_535)


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes, more than 0")


def _count(text: str) -> int:
    return _whole(text)


def _some(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, *, least: int = 0, most: int = sys.maxsize) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        until = "" if most == sys.maxsize else f" to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}{until}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
