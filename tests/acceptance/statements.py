"""The statements of docs/requirements.md, the tests that name them, and the table of both."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "docs" / "requirements.md"
GUARANTEES = ROOT / "docs" / "guarantees.md"
BEGIN, END = "<!-- written by the tests: begin -->", "<!-- end -->"

ARGUED: Mapping[str, str] = {}
"""Statements that no test proves, and why."""

_STATEMENT = re.compile(r"- \*\*([A-DF]\d+)\*\* (.+)")
_TAG = re.compile(r"(?:[abcd]\d{2}|f\d{3})_")
_TAGGED = re.compile(rf"test_((?:{_TAG.pattern}(?:and_)?)+)")


class Statement(NamedTuple):
    """A statement, for example C12, under its heading."""

    number: str
    what: str
    heading: str


class Proof(NamedTuple):
    """A test function: its file, below the tests' folder, and its name."""

    file: str
    name: str


def statements() -> list[Statement]:
    found, heading = [], ""
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif match := _STATEMENT.fullmatch(line):
            found.append(Statement(match[1], match[2], heading))
    return found


def numbers(name: str) -> list[str]:
    """What a test says it proves: ``test_c13_c14_…``, ``test_c13_and_c14_…``."""
    match = _TAGGED.match(name)
    tags = _TAG.findall(match[1]) if match else []
    return [f"{tag[0].upper()}{int(tag[1:-1])}" for tag in tags]


def tests() -> dict[str, list[Proof]]:
    """Every test that names a statement, by statement, whether or not this run selects it."""
    found: dict[str, list[Proof]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT / "tests").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for number in numbers(node.name):
                    found[number].append(Proof(file, node.name))
    return {number: sorted(set(group)) for number, group in found.items()}


class Row(NamedTuple):
    """A statement in the page's table."""

    number: str
    what: str
    proofs: list[Proof]
    result: str


class Results:
    """How the cases of this run's tests ended."""

    def __init__(self) -> None:
        self._worst: dict[str, str] = {}

    def add(self, node_id: str, outcome: str) -> None:
        """Called for set-up, call and tear-down of a case; whatever is no pass stays."""
        if self._worst.get(node_id, "passed") == "passed":
            self._worst[node_id] = outcome

    def of(self, proofs: list[Proof]) -> str | None:
        """For example "12 passed"; None unless all of these tests were run."""
        cases = {node_id: proof for node_id in self._worst if (proof := _proof(node_id)) in proofs}
        if set(cases.values()) != set(proofs):
            return None
        counts = Counter(self._worst[node_id] for node_id in cases)
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def _proof(node_id: str) -> Proof:
    path, _, name = node_id.partition("::")
    file = path.removeprefix("tests/")
    return Proof(file, name.rpartition("::")[2].partition("[")[0])


def table(results: Results, before: Mapping[str, str]) -> str:
    """Every statement, what it says, the tests that prove it, and how they ended.

    ``before`` are earlier results, for what this run left out.
    """
    found = tests()
    lines: list[str] = []
    for heading, group in groupby(statements(), key=lambda each: each.heading):
        lines += ["", f"### {heading}", "", "| | what | tests | result |", "|---|---|---|---|"]
        for each in group:
            proofs = found.get(each.number, [])
            argument = ARGUED.get(each.number, "")
            result = "argued" if argument else "no test"
            if proofs:
                result = results.of(proofs) or before.get(each.number, "not run")
            lines.append(
                f"| {each.number} | {each.what} | {_cell(proofs) or argument} | {result} |"
            )
    return "\n".join(lines).strip()


def _cell(proof: list[Proof]) -> str:
    return "<br>".join(
        f"{file}: " + ", ".join(f"`{test.name}`" for test in group)
        for file, group in groupby(proof, key=lambda test: test.file)
    )


def parts(page: str) -> tuple[str, str, str]:
    """A page before, in and after the table."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    assert after or page.endswith(END + "\n"), "the page has a place for the table"
    return before + BEGIN, inside, END + after


def write(page: Path, results: Results) -> None:
    """Bring a page up to date."""
    text = page.read_text(encoding="utf-8")
    before, _, after = parts(text)
    earlier = {row.number: row.result for row in rows(text) if row.proofs}
    page.write_text(f"{before}\n\n{table(results, earlier)}\n\n{after}", encoding="utf-8")


def rows(page: str) -> Iterator[Row]:
    """What a page's table says."""
    for line in parts(page)[1].splitlines():
        if re.match(r"\| [A-DF]\d", line):
            number, what, cell, result = (each.strip() for each in line.strip("|").split("|"))
            proofs = [
                Proof(group.partition(": ")[0], name)
                for group in cell.split("<br>")
                for name in re.findall(r"`(\w+)`", group)
            ]
            yield Row(number, what, proofs, result)
