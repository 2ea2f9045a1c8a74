"""What the tests here share, and what they may import."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cast import Tools


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.db"


@pytest.fixture
def tools():
    """None that waits outlives its test."""
    tools = Tools()
    yield tools
    tools.release.set()
