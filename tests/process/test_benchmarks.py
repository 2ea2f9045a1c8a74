"""``python -m benchmarks`` from a checkout: a table, JSON and a chart."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]


def benchmarks(*args):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *args],
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
