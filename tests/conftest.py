"""Every run knows which statements it proved; with ``--guarantees PAGE`` it writes them down."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "acceptance"))

import statements


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guarantees",
        type=Path,
        metavar="PAGE",
        help="rewrite the page's table of statements, tests and results: docs/guarantees.md",
    )


class Recorder:
    """Keeps what pytest reports, and writes the page at the end."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._results = statements.Results()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._results.add(report.nodeid, report.outcome)

    def pytest_sessionfinish(self) -> None:
        statements.write(self._page, self._results)


def pytest_configure(config: pytest.Config) -> None:
    # What is started in the background may be told to ignore these, and so are its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if page := config.getoption("--guarantees"):
        config.pluginmanager.register(Recorder(page), "guarantees")
