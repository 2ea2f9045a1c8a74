"""OpenCode's own clients, found or installed, and driven against a server."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("@opencode-ai/sdk@1.18.33", "opencode-ai@1.18.33", "playwright-core@1.65.1")
VARIABLE = "UNDERSTUDY_OPENCODE_CLIENTS"
"""A folder whose node_modules has them."""
DEADLINE_S = 90.0
INSTALL_S = 300.0


class Missing(Exception):
    """A client is not installed here."""


def folder() -> Path:
    """The folder that UNDERSTUDY_OPENCODE_CLIENTS names. Raises ``Missing``."""
    name = os.environ.get(VARIABLE)
    if not name or not Path(name, "node_modules").is_dir():
        raise Missing(f"set {VARIABLE} to a folder with node_modules of {', '.join(PACKAGES)}")
    return Path(name).absolute()


def install(into: Path) -> None:
    """Fetch the clients with npm. Raises ``Missing``."""
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("there is no npm here")
    into.mkdir(parents=True, exist_ok=True)
    options = ["--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run([npm, "install", *options, *PACKAGES], cwd=into, check=True, timeout=INSTALL_S)


def sdk(root: Path, url: str, directory: Path) -> dict:
    """Drive the SDK's two generations; what each saw."""
    node = shutil.which("node")
    if node is None or not (root / "node_modules" / "@opencode-ai" / "sdk").is_dir():
        raise Missing("the SDK, or node, is not here")
    done = subprocess.run(
        [node, HERE / "sdk.mjs", url, directory],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def binary(root: Path) -> Path:
    """OpenCode itself. Raises ``Missing``."""
    cpu = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"opencode-{platform.system().lower()}-{cpu}"
    for package in (name, f"{name}-baseline"):
        path = root / "node_modules" / package / "bin" / "opencode"
        if path.exists():
            return path
    raise Missing("opencode is not here")


def environment(home: Path) -> dict[str, str]:
    home.mkdir(parents=True, exist_ok=True)
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    own = {"HOME": str(home), "TERM": "xterm-256color", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    return kept | own


def run_attached(root: Path, url: str, home: Path, *words: str) -> str:
    """What ``opencode run --attach`` prints, without colours."""
    done = subprocess.run(
        [binary(root), "run", "--attach", url, *words],
        cwd=home,
        env=environment(home),
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


class Terminal:
    """A TUI in a pseudo-terminal of tmux: keys go in, the screen comes out."""

    def __init__(self, root: Path, url: str, home: Path) -> None:
        self._tmux = shutil.which("tmux")
        if self._tmux is None:
            raise Missing("there is no tmux here")
        self._socket = str(home / "tmux")
        self._env = environment(home)
        self._do(
            *("new-session", "-d", "-x", "120", "-y", "40"),
            f"exec {binary(root)} attach {url} 2>{home}/tui.err",
        )

    def _do(self, *arguments: str) -> str:
        command = [self._tmux, "-S", self._socket, *arguments]
        done = subprocess.run(command, env=self._env, check=False, capture_output=True, text=True)
        return done.stdout

    def screen(self) -> str:
        return self._do("capture-pane", "-p")

    def type(self, text: str) -> None:
        self._do("send-keys", "-l", text)
        self.until(lambda screen: text in screen)
        self._do("send-keys", "Enter")

    def press(self, *keys: str) -> None:
        self._do("send-keys", *keys)

    def until(self, wanted, timeout_s: float = DEADLINE_S) -> str:
        """Wait for words on the screen, or until this is true of it."""
        sees = wanted if callable(wanted) else lambda screen: wanted in screen
        deadline = time.monotonic() + timeout_s
        while not sees(screen := self.screen()):
            assert time.monotonic() < deadline, f"never seen: {wanted}\n{screen}"
            time.sleep(0.1)
        return screen

    def close(self) -> None:
        self._do("kill-server")
