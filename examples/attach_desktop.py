"""A desktop app's connection to a running server: prompts go out, events come in, none is lost.

    understudy serve &
    python attach_desktop.py http://127.0.0.1:4096

Without an address it starts a server of its own, stops it after an answer and starts it again, to
show that the window goes on where it was.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import httpx

PATIENCE_S = 30.0


class Window:
    """What a person would see: the transcript of one session, kept up to date by events alone."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)
        self.session_id = self.http.post("/session").json()["id"]
        self.texts: dict[str, str] = {}
        self.idle = threading.Event()
        self.connected = threading.Event()
        self.closing = False
        self.cursor = self.http.get("/understudy/state").json()["cursor"]
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        """Read events; when the connection breaks, go on after the last one that was read."""
        while not self.closing:
            try:
                query = {"after": str(self.cursor)}
                with self.http.stream("GET", "/event", params=query) as response:
                    for line in response.iter_lines():
                        if line.startswith("id: "):
                            self.cursor = int(line[4:])
                        elif line.startswith("data: "):
                            self._show(json.loads(line[6:]))
            except httpx.HTTPError:
                time.sleep(0.1)
            self.connected.clear()

    def _show(self, event: dict[str, Any]) -> None:
        about = event["properties"]
        if event["type"] == "server.connected":
            self.connected.set()
        elif about.get("sessionID") != self.session_id:
            return
        elif event["type"] == "message.part.updated" and about["part"]["type"] == "text":
            self.texts[about["part"]["id"]] = about["part"]["text"]
        elif event["type"] == "message.part.delta":
            self.texts[about["partID"]] = self.texts.get(about["partID"], "") + about["delta"]
        elif event["type"] == "permission.asked":
            print(f"allowing: {', '.join(about['patterns'])}")
            self.http.post(f"/permission/{about['id']}/reply", json={"reply": "once"})
        elif event["type"] == "session.idle":
            self.idle.set()

    def prompt(self, text: str) -> None:
        """Send a prompt. It is on the server's disk when this returns."""
        assert self.connected.wait(PATIENCE_S), "no connection"
        self.idle.clear()
        body = {"parts": [{"type": "text", "text": text}]}
        self.http.post(f"/session/{self.session_id}/prompt_async", json=body).raise_for_status()

    def wait(self) -> str:
        """Wait until the session rests; all that was said."""
        assert self.idle.wait(PATIENCE_S), "the session did not come to rest"
        return "\n".join(self.texts.values())

    def close(self) -> None:
        self.closing = True
        self.http.close()


class OwnServer:
    """A server on a temporary database, which can be stopped and started at the same address."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.port = "0"

    def start(self) -> str:
        command = [sys.executable, "-m", "understudy", "serve", "--model", "scripted"]
        options = ["--database", f"{self.folder}/agent.db", "--directory", self.folder]
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            [*command, "--port", self.port, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+:(\d+)", self.process.stdout.readline())
        assert found is not None, "the server says where it listens"
        self.port = found[1]
        return found[0]

    def stop(self) -> None:
        with self.process:
            self.process.terminate()


def demonstrate() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = OwnServer(folder)
        window = Window(server.start())
        window.prompt("Hello")
        window.wait()
        server.stop()
        print("the server is gone")
        server.start()
        print("the server is back")
        window.prompt("Are you still there?")
        print(window.wait())
        window.close()
        server.stop()


def main() -> None:
    if not sys.argv[1:]:
        demonstrate()
        return
    window = Window(sys.argv[1])
    for line in sys.stdin:
        window.prompt(line)
        print(window.wait())
    window.close()


if __name__ == "__main__":
    main()
