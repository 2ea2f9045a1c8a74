"""The demo keeps its promises: when it kills its worker, and when it is killed itself."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE_S = 90.0
TOLD = ("lost", "duplicated", "stuck", "wrong", "other")


def demo(database: Path, root: Path, *options: str) -> list[str]:
    place = ("--database", str(database), "--root", str(root))
    return [sys.executable, "-m", "understudy", "demo", *place, *options]


def finish(command: list[str]) -> tuple[int, dict]:
    done = subprocess.run(  # noqa: PLW1510 - the caller judges the exit status
        [*command, "--json"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files to ask about, and some that nobody should."""
    folder = tmp_path / "root"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("the\n", encoding="utf-8")
    (folder / "binary").write_bytes(b"\0\xff" * 100)
    for number in range(1, 12):
        text = "".join(f"the line {n}\nother\n" for n in range(number))
        (folder / f"file {number}.txt").write_text(text, encoding="utf-8")
    (folder / "no_newline.txt").write_text("\r\nthe end\rof it", encoding="utf-8")
    return folder


def accepted(database: Path) -> list[str]:
    """The prompts in the ledger, by message id."""
    ledger = database.with_name(f"{database.name}.ledger")
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    entries = [json.loads(line) for line in lines]
    return [entry["accepted"] for entry in entries if entry["kind"] == "accepted"]


def test_as_many_kills_as_were_asked_for_though_there_is_little_to_do(tmp_path: Path, root: Path):
    command = demo(tmp_path / "demo.db", root, "--sessions", "2", "--kills", "3", "--crashes", "0")
    code, verdict = finish(command)
    assert code == 0, verdict
    assert (verdict["kills"], verdict["answered"]) == (3, 2)


def test_kills_and_crashes_lose_and_double_nothing(tmp_path: Path, root: Path):
    database = tmp_path / "demo.db"
    command = demo(database, root, "--sessions", "30", "--kills", "2", "--crashes", "4")
    code, verdict = finish(command)
    assert code == 0, verdict
    assert {name: verdict[name] for name in TOLD} == dict.fromkeys(TOLD, 0)
    assert (verdict["sessions"], verdict["answered"], verdict["checked"]) == (30, 40, 40)
    assert verdict["kills"] == 2
    # A crash just before a kill may leave its restart, or even its record, to nobody.
    assert 0 < verdict["restarts"] <= verdict["crashes"] <= 4
    assert verdict["interrupted"] > 0
    assert verdict["accepted"] == verdict["answered"] + verdict["interrupted"]
    examined = subprocess.run(
        [sys.executable, "-m", "understudy", "doctor", "--database", str(database)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert examined.returncode == 0, examined.stdout

    # Again, with nothing left to do, and then with a lie in the books: the verdict is earned.
    assert finish(command)[0] == 0
    effects = database.with_name("demo.db.effects")
    with effects.open("a", encoding="utf-8") as file:
        file.write(effects.read_text(encoding="utf-8").splitlines()[0] + "\n")
    code, verdict = finish(command)
    assert (code, verdict["duplicated"]) == (1, 1)


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the parent", "everybody"])
def test_a_demo_that_is_killed_goes_on_where_it_was(tmp_path: Path, root: Path, kill):
    database = tmp_path / "demo.db"
    command = demo(database, root, "--sessions", "30", "--kills", "1", "--crashes", "2")
    chance = random.Random(kill.__name__)
    for life in (1, 2):
        goal = len(accepted(database)) + chance.randint(5, 15)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_S
        while len(accepted(database)) < goal:
            assert process.poll() is None, f"life {life} ended with {process.returncode}"
            assert time.monotonic() < deadline
            select.select([], [], [], 0.01)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    before = set(accepted(database))
    code, verdict = finish(command)
    assert code == 0, verdict
    assert {name: verdict[name] for name in TOLD} == dict.fromkeys(TOLD, 0)
    assert (verdict["runs"], verdict["answered"], verdict["checked"]) == (3, 40, 40)
    assert before <= set(accepted(database))


def test_another_applications_database_is_left_alone(tmp_path: Path, root: Path):
    database = tmp_path / "theirs.db"
    database.write_bytes(b"precious")
    done = subprocess.run(
        demo(database, root), check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert "no database of the demo" in done.stderr
    assert database.read_bytes() == b"precious"


def test_a_worker_that_keeps_dying_is_said_and_judged(tmp_path: Path, root: Path):
    database = tmp_path / "demo.db"
    command = demo(database, root, "--sessions", "3", "--kills", "0", "--crashes", "0")
    assert finish(command)[0] == 0
    for each in tmp_path.glob("demo.db-*"):
        each.unlink()
    database.write_bytes(b"no database any more" * 500)
    code, verdict = finish(command)
    assert (code, verdict["stuck"], verdict["answered"]) == (1, 1, 0)
    assert any("not a database" in each["what"] for each in verdict["broken"])
    [stuck] = [each["what"] for each in verdict["broken"] if each["kind"] == "stuck"]
    assert "StoreUnreadable" in stuck


def test_ctrl_c_ends_it_and_its_worker(tmp_path: Path, root: Path):
    database = tmp_path / "demo.db"
    process = subprocess.Popen(
        demo(database, root, "--sessions", "300"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not accepted(database):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
