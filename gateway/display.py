"""What people see: with rich and a terminal a live bar and drawn tables, else plain lines."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

PLAIN_EVERY_S: Final = 1.0


class Counts(msgspec.Struct):
    """How far the demo is, and what happened so far."""

    total: int
    answered: int = 0
    interrupted: int = 0
    crashes: int = 0
    restarts: int = 0
    kills: int = 0
    events: int = 0
    in_flight: int = 0


class Progress(Protocol):
    """Shows how far something is. ``say`` is for what happens once."""

    def update(self, counts: Counts) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


def is_rich() -> bool:
    """Whether standard output is a terminal that rich can draw on, and rich is there."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def progress(*, quiet: bool = False) -> Progress:
    if quiet:
        return Silence()
    return DrawnProgress() if is_rich() else PlainProgress()


class Silence:
    """For machines that read the result only."""

    def update(self, counts: Counts) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class PlainProgress:
    """A line a second."""

    def __init__(self) -> None:
        self._due = 0.0
        self._last = ""

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        line = f"{counts.answered}/{counts.total} answered, {tally(counts)}"
        if line != self._last and (now >= self._due or counts.answered == counts.total):
            self._due, self._last = now + PLAIN_EVERY_S, line
            self.say(line)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """A bar on a terminal: how far it is beside it, and a line below."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(highlight=False), transient=True, refresh_per_second=12)
        self._live.start()

    def draw(self, *, done: float, total: float, beside: str, below: str) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1)
        line.add_column(justify="right")
        line.add_row(ProgressBar(total=total, completed=done), beside)
        self._live.update(Group(line, Text(below, style="dim", overflow="ellipsis")))

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False)

    def close(self) -> None:
        self._live.stop()


class DrawnProgress(Bar):
    """A bar with the counts below it."""

    def update(self, counts: Counts) -> None:
        beside = f"{counts.answered}/{counts.total} answered"
        self.draw(done=counts.answered, total=counts.total, beside=beside, below=tally(counts))


def tally(counts: Counts) -> str:
    return (
        f"{counts.in_flight} in flight, {counts.interrupted} interrupted, "
        f"{counts.crashes} crashes, {counts.kills} kills, {counts.events:,} events"
    )


# --- tables ------------------------------------------------------------------------------------


def table(
    rows: Sequence[Sequence[Any]], *, heads: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Print rows in columns; those numbered in ``right`` are aligned to the right.

    Of columns with heads only the last is ever shortened: a narrow terminal gets plain lines.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [[head.upper() for head in heads], *cells] if heads else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
    if is_rich() and _fits(widths, heads):
        _draw(cells, heads, right, widths)
        return
    for line in lines:
        padded = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(padded).rstrip())


def _fits(widths: list[int], heads: Sequence[str]) -> bool:
    if not heads:
        return True
    drawn = sum(widths[:-1]) + len(heads[-1]) + 3 * len(heads) + 1
    return drawn <= shutil.get_terminal_size().columns


def _draw(
    cells: list[list[str]], heads: Sequence[str], right: Sequence[int], widths: list[int]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.ROUNDED, show_header=bool(heads))
    for number in range(len(cells[0]) if cells else len(heads)):
        head = heads[number] if heads else ""
        drawn.add_column(
            head,
            justify="right" if number in right else "left",
            overflow="ellipsis" if heads else "fold",
            no_wrap=bool(heads),
            min_width=widths[number] if heads and number < len(heads) - 1 else None,
        )
    for row in cells:
        drawn.add_row(*map(Text, row))
    Console(highlight=False).print(drawn)


def emphasise(line: str, *, good: bool) -> None:
    """Print a verdict; in colour where that is wanted."""
    if is_rich():
        from rich.console import Console

        Console(highlight=False).print(line, style="bold green" if good else "bold red")
    else:
        print(line)


def plain(text: str, *, one_line: bool = False) -> str:
    """Text without what could command a terminal."""
    if one_line:
        text = " ".join(text.split())
    return "".join(each for each in text if each.isprintable() or each in "\n\t")
