"""The two servers that are compared: started, killed and started again by the same script."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import clients
import httpx

import understudy

DEADLINE_S = 60.0
MODEL = {"providerID": "mock", "modelID": "fast"}


class Contender:
    """A server with a database and a directory of its own. ``model`` is what prompts may name."""

    name = ""
    model = MODEL

    def __init__(self, folder: Path, provider_url: str) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.provider_url = provider_url
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def start(self) -> float:
        """Start, and how many seconds it took until sessions could be listed."""
        began = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.work,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while True:
            with suppress(httpx.TransportError):
                # One that comes very early is never answered by some: ask again.
                if self.client.get("/session", timeout=1.0).status_code == 200:
                    return time.monotonic() - began
            assert time.monotonic() < began + DEADLINE_S, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """``kill -9``, of the server and of whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def terminate(self) -> float:
        """SIGTERM, and how many seconds it took to end; it is killed after fifteen."""
        began = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        return time.monotonic() - began

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    # --- what every experiment needs ---------------------------------------------------------

    def create(self) -> str:
        return self.client.post("/session", json={}).json()["id"]

    def body(self, text: str) -> dict:
        return {"model": self.model, "parts": [{"type": "text", "text": text}]}

    def prompt(self, session_id: str, text: str) -> httpx.Response:
        return self.client.post(f"/session/{session_id}/message", json=self.body(text))

    def prompt_async(self, session_id: str, text: str) -> None:
        path = f"/session/{session_id}/prompt_async"
        self.client.post(path, json=self.body(text)).raise_for_status()

    def messages(self, session_id: str) -> list[dict]:
        return self.client.get(f"/session/{session_id}/message").json()

    def listed(self) -> set[str]:
        return {each["id"] for each in self.client.get("/session?limit=10000").json()}

    def statuses(self) -> dict:
        return self.client.get("/session/status").json()

    def until(self, true, timeout_s: float = 20.0) -> bool:
        """Whether it became true in time."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def idle(self, session_id: str, timeout_s: float = 20.0) -> bool:
        return self.until(lambda: session_id not in self.statuses(), timeout_s)


class OpenCode(Contender):
    name = "OpenCode 1.18.33"

    def command(self) -> list[str]:
        return [str(clients.binary(clients.folder())), "serve", "--port", str(self.port)]

    def environment(self) -> dict[str, str]:
        home = self.folder / "home"
        settings = home / ".config" / "opencode" / "opencode.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        limit = {"context": 200_000, "output": 8192}
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "Mock",
            "options": {"baseURL": self.provider_url, "apiKey": "none"},
            "models": {"fast": {"name": "Fast", "tool_call": True, "limit": limit}},
        }
        config = {
            "model": "mock/fast",
            "small_model": "mock/fast",
            "share": "disabled",
            "autoupdate": False,
            "provider": {"mock": provider},
            "permission": {"bash": {"*": "allow", "echo ask-first": "ask"}},
        }
        settings.write_text(json.dumps(config))
        return clients.environment(home) | {"OPENCODE_DISABLE_MODELS_FETCH": "1"}


class Understudy(Contender):
    name = "understudy"
    model = {"providerID": "openai", "modelID": "fast"}

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--database", str(self.folder / "a.db")]
        return [sys.executable, "-m", "understudy", "serve", "--model", "openai/fast", *options]

    def environment(self) -> dict[str, str]:
        sources = str(Path(understudy.__file__).parents[1])
        address = {"OPENAI_BASE_URL": self.provider_url, "OPENAI_API_KEY": "none"}
        return {**os.environ, "PYTHONPATH": sources, **address}


class Events:
    """The events of ``/event`` as they arrive, each with when it did."""

    def __init__(self, contender: Contender, **headers: str) -> None:
        self.seen: list[tuple[float, str | None, dict]] = []
        self._client = httpx.Client(base_url=contender.url, timeout=None, trust_env=False)
        self._context = self._client.stream("GET", "/event", headers=headers)
        self._response = self._context.__enter__()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        contender.until(lambda: bool(self.seen))

    def _read(self) -> None:
        number = None
        with suppress(httpx.HTTPError, httpx.StreamError, OSError, RuntimeError):
            for line in self._response.iter_lines():
                if line.startswith("id: "):
                    number = line[4:]
                elif line.startswith("data: "):
                    self.seen.append((time.monotonic(), number, json.loads(line[6:])))

    def all(self, kind: str = "", session_id: str = "") -> list[dict]:
        return [
            event
            for _, _, event in list(self.seen)
            if event["type"].startswith(kind)
            and (not session_id or session_of(event) == session_id)
        ]

    def close(self) -> None:
        with suppress(OSError):
            stream = self._response.extensions["network_stream"]
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        with suppress(Exception):
            self._client.close()


def session_of(event: dict) -> str:
    properties = event["properties"]
    for found in (properties, properties.get("info", {}), properties.get("part", {})):
        if "sessionID" in found:
            return found["sessionID"]
    return properties.get("info", {}).get("id", "")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
