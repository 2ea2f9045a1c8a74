"""What is promised is proved, and the page that says so is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import statements
from statements import Proof, Results

from understudy import CompactionRules, Limits, RestartPolicy, Retention
from understudy.actors.leases import DEFAULT_TTL_S

HOW = "run all tests with --guarantees docs/guarantees.md"


def test_there_are_140_statements_and_the_field_failures_with_a_number_each():
    numbers = [each.number for each in statements.statements()]
    assert len(numbers) == len(set(numbers))
    for letter, count in {"A": 30, "B": 26, "C": 41, "D": 43}.items():
        assert [n for n in numbers if n[0] == letter] == [
            f"{letter}{n}" for n in range(1, count + 1)
        ]
    assert len([number for number in numbers if number[0] == "F"]) == 98


def test_every_statement_has_a_test_or_an_argument():
    proved = set(statements.tests()) | set(statements.ARGUED)
    assert [each.number for each in statements.statements() if each.number not in proved] == []


def test_every_test_that_names_a_statement_names_one_that_is_there():
    known = {each.number for each in statements.statements()}
    assert set(statements.tests()) - known == set()


def test_the_page_lists_exactly_the_tests_that_exist():
    page = statements.GUARANTEES.read_text(encoding="utf-8")
    listed = {row.number: (row.what, row.proofs) for row in statements.rows(page)}
    proofs = statements.tests()
    there = {e.number: (e.what, proofs.get(e.number, [])) for e in statements.statements()}
    assert listed == there, HOW


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("test_c12_a_summary", ["C12"]),
        ("test_d20_d21_d22_rotation", ["D20", "D21", "D22"]),
        ("test_f074_requests", ["F74"]),
        ("test_f046_and_f047_an_abort", ["F46", "F47"]),
        ("test_a3_too_short", []),
        ("test_class_e12_is_none", []),
        ("test_a_day_c12_later", []),
    ],
)
def test_a_test_says_in_its_name_what_it_proves(name: str, numbers: list[str]):
    assert statements.numbers(name) == numbers


def test_results_are_counted_by_case_and_a_failure_is_never_hidden():
    results = Results()
    case = "tests/unit/test_x.py::test_c01_it[{}]"
    for number, outcomes in enumerate(
        (["passed"] * 3, ["passed", "failed", "passed"], ["skipped"])
    ):
        for outcome in outcomes:
            results.add(case.format(number), outcome)
    results.add("tests/unit/test_y.py::TestIt::test_c01_it", "failed")
    one, other = Proof("unit/test_x.py", "test_c01_it"), Proof("unit/test_y.py", "test_c01_it")
    assert results.of([one]) == "1 failed, 1 passed, 1 skipped"
    assert results.of([one, other]) == "2 failed, 1 passed, 1 skipped"
    assert results.of([one, Proof("unit/test_z.py", "test_c01_it")]) is None


def test_the_table_is_written_between_its_marks_and_read_back(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n{statements.BEGIN}\nwhat stood here\n{statements.END}\nafter\n", encoding="utf-8"
    )
    statements.write(page, Results())
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "what stood here" not in text
    rows = list(statements.rows(text))
    assert [row.number for row in rows] == [each.number for each in statements.statements()]
    assert {row.number: row.proofs for row in rows if row.proofs} == statements.tests()


def test_a_run_of_some_tests_leaves_the_results_of_the_others(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{statements.BEGIN}\n{statements.END}\n", encoding="utf-8")
    proofs, first, second = statements.tests(), Results(), Results()
    for number, outcome, results in (("C1", "failed", first), ("C2", "passed", second)):
        for proof in proofs[number]:
            results.add(f"tests/{proof.file}::{proof.name}", outcome)
        statements.write(page, results)
    rows = {row.number: row.result for row in statements.rows(page.read_text(encoding="utf-8"))}
    assert rows["C1"] == f"{len(proofs['C1'])} failed"
    assert rows["C2"] == f"{len(proofs['C2'])} passed"
    assert rows["C3"] == "not run"


def test_d43_the_defaults_are_these():
    """Whoever changes one changes it here too, and says why."""
    assert DEFAULT_TTL_S == 4 * 3600
    assert Limits() == Limits(
        steps=100,
        calls_per_step=64,
        repeated_calls=4,
        model_attempts=5,
        retry_s=600.0,
        stream_idle_s=120.0,
        tool_s=600.0,
        turn_s=None,
        resume_attempts=3,
        queue=1000,
        prompt_bytes=8 * 1024 * 1024,
        tool_output=50_000,
        answer_chars=4 * 1024 * 1024,
        depth=64,
    )
    assert CompactionRules() == CompactionRules(
        auto=True, reserve=None, tail=8_000, attempts=2, failures=2, prune=False
    )
    assert Retention() == Retention(age_s=7 * 24 * 3600.0, events=1_000_000)
    assert RestartPolicy() == RestartPolicy(
        restart="transient",
        intensity=5,
        period_s=60.0,
        quarantine_after=5,
        backoff_s=0.05,
        max_backoff_s=30.0,
    )
