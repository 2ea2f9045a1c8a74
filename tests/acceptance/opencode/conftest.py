"""A server in a process for clients to be driven against; clients that are not here are skipped."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import understudy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import clients  # noqa: E402 - beside this file


@pytest.fixture
def root():
    try:
        return clients.folder()
    except clients.Missing as reason:
        pytest.skip(str(reason))


class Server:
    """``served.py`` on one port, to be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        self.port = "0"
        self.start()

    def start(self):
        sources = str(Path(understudy.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, HERE / "served.py", self.folder / "a.db", self.work, self.port],
            env={**os.environ, "PYTHONPATH": sources},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]
        self.port = self.url.rpartition(":")[2]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.end()


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def tui(root, server, home):
    try:
        terminal = clients.Terminal(root, server.url, home)
    except clients.Missing as reason:
        pytest.skip(str(reason))
    yield terminal
    terminal.close()
