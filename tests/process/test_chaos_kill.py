"""Real processes, killed, frozen and starved: the guarantees hold, and the harness can tell."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from understudy.gateway.chaos.disk import SmallDisk
from understudy.gateway.chaos.kill import Rounds
from understudy.gateway.chaos.rounds import KINDS
from understudy.gateway.cli import main

PLANTED = Path(__file__).parents[1] / "simulation"
WORDS = Counter({"accepted": 1, "answered": 1, "interrupted": 1})


def test_a_round_of_each_kind_breaks_nothing(tmp_path: Path):
    with Rounds(tmp_path, seed=1) as rounds:
        results = list(rounds.play(len(KINDS)))
    assert {result.kind for result in results} == set(KINDS)
    assert [result.findings for result in results if result.findings] == []
    total = sum((result.counts for result in results), Counter())
    assert WORDS.keys() <= total.keys(), "nothing was at stake"
    assert [path.name for path in tmp_path.iterdir()] == ["log"], "nothing is left behind"


def test_a_full_disk_is_played_where_mounting_is_not_permitted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(SmallDisk, "possible", staticmethod(lambda: False))
    with Rounds(tmp_path, seed=1, kinds=["full"]) as rounds:
        [result] = rounds.play(1)
    assert result.findings == []


# --- it can fail -------------------------------------------------------------------------------


def planted(folder: Path, name: str) -> str:
    """A program that plants a bug of the simulator's list in every worker."""
    program = folder / "planted.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(PLANTED)!r})\nfrom planted import PLANTED\n"
        f"next(bug for bug in PLANTED if bug.name == {name!r}).plant().__enter__()\n"
    )
    return str(program)


def found_in(folder: Path, kind: str, program: str) -> set[str]:
    """The guarantees that a few rounds report as broken, up to the first round that does."""
    (folder / "rounds").mkdir()
    options = {"planted": program, "patience_s": 4.0}
    with Rounds(folder / "rounds", seed=3, kinds=[kind], **options) as rounds:
        for result in rounds.play(6):
            if result.findings:
                [kept] = rounds.kept
                assert (kept / "db" / "agent.db").exists()
                assert (kept / "ledger").exists()
                assert (kept / "log").exists()
                return {guarantee for guarantee, _ in result.findings}
    return set()


@pytest.mark.parametrize(
    ("bug", "kind", "guarantees"),
    [
        ("answer before commit", "kill", {"lost"}),
        ("leave rows behind", "kill", {"orphan"}),
        ("drop the inbox on restart", "kill", {"stuck"}),
        ("forget the epoch check", "freeze", {"fenced", "journal", "one outcome per prompt"}),
    ],
)
def test_a_planted_bug_is_reported(tmp_path: Path, bug: str, kind: str, guarantees: set[str]):
    assert guarantees & found_in(tmp_path, kind, planted(tmp_path, bug))


# --- the command -------------------------------------------------------------------------------


def test_the_command_says_its_seed_first_sums_up_and_cleans_up(tmp_path: Path, capsys):
    (tmp_path / "mine").write_text("precious")
    options = ["--seed", "5", "--kinds", "kill", "--keep", str(tmp_path)]
    assert main(["chaos", "kill", "--rounds", "1", *options]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 5"
    assert lines[1].split()[:2] == ["1/1", "kill"]
    assert lines[2].split()[:3] == ["KIND", "ROUNDS", "ACCEPTED"]
    assert lines[-1].startswith("1 rounds, 0 of them broke a guarantee")


def test_an_unknown_kind_is_refused(capsys):
    assert main(["chaos", "kill", "--kinds", "kill,maim"]) == 1
    assert "no kind 'maim'" in capsys.readouterr().err


@pytest.mark.skipif(not SmallDisk.possible(), reason="mounting needs root on Linux")
def test_a_small_disk_is_full_and_keeps_what_is_in_it(tmp_path: Path):
    database = tmp_path / "a.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE kept (what)")
    disk = SmallDisk(tmp_path)
    if not disk.mount():
        pytest.skip("mounting is not permitted here")
    try:
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "more").write_bytes(b"\1" * 8_192)
        (tmp_path / "more").unlink()
        disk.free()
        (tmp_path / "later").write_text("there is room again")
    finally:
        disk.unmount()
    assert (tmp_path / "later").read_text() == "there is room again"
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("kept",)]
    assert not tmp_path.is_mount()
