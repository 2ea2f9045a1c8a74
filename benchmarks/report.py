"""The table, the JSON and the chart."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec

from benchmarks.measure import Figure

HEADINGS = ("what", "figure", "against", "its figure", "ratio", "target", "met")


def machine() -> str:
    """The machine, in one line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB; {platform.system()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def cells(each: Figure) -> tuple[str, ...]:
    return (
        each.what,
        number(each.value, each.unit),
        each.against,
        number(each.base, each.unit),
        number(each.ratio, "×"),
        each.target,
        {True: "yes", False: "NO", None: ""}[each.met],
    )


def markdown(figures: Sequence[Figure]) -> str:
    """The table as Markdown, notes below their rows' figures."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(cells(each))} |" for each in figures if each.value is not None]
    return "\n".join(lines)


def table(figures: Sequence[Figure]) -> str:
    """The table as text, aligned."""
    rows = [HEADINGS, *(cells(each) for each in figures if each.value is not None)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"  {each.what}: {each.note}" for each in figures if each.note]
    return "\n".join(lines)


def write(path: Path, figures: Sequence[Figure], *, quick: bool, took_s: float) -> None:
    """JSON, and the chart beside it."""
    content = {
        "machine": machine(),
        "python": sys.version,
        "quick": quick,
        "took_s": round(took_s, 1),
        "figures": figures,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
    path.with_suffix(".svg").write_text(chart(figures))
    path.with_suffix(".md").write_text(f"{machine()}\n\n{markdown(figures)}\n")


_BAR, _LEFT, _WIDTH = 22, 600, 380


def chart(figures: Sequence[Figure]) -> str:
    """How far each figure is from its target: the line is the target, to the right is better."""
    drawn = [(each, score) for each in figures if (score := _score(each)) is not None]
    height = 50 + _BAR * len(drawn)
    width = _LEFT + _WIDTH + 110
    middle = _LEFT + _WIDTH / 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{middle}" y="18" text-anchor="middle" fill="#555">target</text>',
        f'<text x="{_LEFT + _WIDTH}" y="18" text-anchor="end" fill="#555">4 × as good</text>',
    ]
    for index, (each, score) in enumerate(drawn):
        top = 28 + index * _BAR
        length = _WIDTH / 4 * min(score, 4.0)
        colour = "#3a7d44" if each.met else "#c0504d"
        words = each.what + (f" / {each.against}" if each.ratio and "×" in each.target else "")
        lines += [
            f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(words)}</text>',
            f'<rect x="{_LEFT}" y="{top + 3}" width="{length:.1f}" height="{_BAR - 6}"',
            f' fill="{colour}"/>',
            f'<text x="{_LEFT + length + 6:.1f}" y="{top + 14}">{escape(_label(each))}</text>',
        ]
    line = f'<line x1="{middle}" y1="24" x2="{middle}" y2="{height - 18}"'
    lines.append(f'{line} stroke="#333" stroke-dasharray="4 3"/>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _label(each: Figure) -> str:
    if each.ratio is not None and "×" in each.target:
        return number(each.ratio, "×")
    return number(each.value, each.unit)


def _score(each: Figure) -> float | None:
    """How many times as good as its target a figure is."""
    if each.met is None or each.value is None:
        return None
    of_ratio = each.ratio is not None and each.target.endswith("×") and each.unit != "×"
    value = each.ratio if of_ratio else each.value
    limit = float(each.target.split()[1].replace(",", ""))
    if value is None or not value:
        return 4.0
    return value / limit if each.target.startswith("≥") else limit / value
