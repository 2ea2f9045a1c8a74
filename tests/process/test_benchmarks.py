"""``python -m benchmarks`` from a checkout: a table, JSON and a chart."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]

REPLAYS = """
import sqlite3, sys
from pathlib import Path
from benchmarks import stage
from benchmarks.floors import Tape

def written(path):
    tables = ("journal", "message", "part", "inbox", "claim", "session")
    connection = sqlite3.connect(path)
    return [connection.execute(f"SELECT * FROM {each} ORDER BY 1, 2").fetchall() for each in tables]

def play():
    session = runtime.create_session()
    tape.start()
    return session.prompt("What is 1 + 2?").result(timeout_s=30).text

ours, again = Path(sys.argv[1], "ours.db"), Path(sys.argv[1], "again.db")
with stage.runtime(ours, model=stage.InstantModel(calls_tool=True)) as runtime:
    tape = Tape(runtime)
    print(tape.record(play))
    assert tape.replayed_s(again) > 0
    assert written(ours) == written(again)
    print(len(written(again)[0]))
"""


def benchmarks(*args):
    return python("-m", "benchmarks", *args)


def python(*args):
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_rows_are_measured_written_and_drawn(tmp_path):
    output = tmp_path / "figures.json"
    done = benchmarks("--quick", "--output", str(output), "import")
    assert done.returncode == 0, done.stderr
    assert "RSS of an open, empty runtime" in done.stdout
    report = msgspec.json.decode(output.read_bytes())
    assert {each["row"] for each in report["figures"]} == {"import"}
    assert report["machine"] in done.stdout
    measured = [each for each in report["figures"] if each["value"] is not None]
    assert all(each["value"] > 0 and each["met"] in (True, False) for each in measured)
    assert output.with_suffix(".svg").read_text().count("<rect") == len(measured) + 1
    assert "| import |" in output.with_suffix(".md").read_text()


def test_a_row_that_is_not_there_is_refused_by_name():
    done = benchmarks("nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_a_peer_that_is_not_installed_is_said_to_be_so_wherever_it_would_be():
    asked = "from benchmarks.peers import missing; print(missing('nowhere.near.this'))"
    done = python("-c", asked)
    assert "nowhere.near.this is not installed" in done.stdout, done.stderr


def test_the_floor_writes_what_the_runtime_wrote(tmp_path):
    done = python("-c", REPLAYS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    text, changes = done.stdout.splitlines()
    assert text == "It is 3."
    assert int(changes) >= 4  # created, begun, called, answered
