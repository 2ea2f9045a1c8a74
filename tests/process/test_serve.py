"""``understudy serve`` as a process: started, told to stop, killed, started again."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import understudy

PATIENCE_S = 20.0
SERVED = Path(__file__).parents[1] / "acceptance" / "opencode" / "served.py"


class Process:
    """A server in a process of its own; ``command`` makes it from the port it is to take."""

    def __init__(self, folder, *command, **environment):
        env = {k: v for k, v in os.environ.items() if not k.endswith("_SERVER_PASSWORD")}
        env |= {"PYTHONPATH": str(Path(understudy.__file__).parents[1]), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, command)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.search(r"listening on (http://\S+)", line)
        if found is None:
            self.process.wait(PATIENCE_S)
            raise AssertionError(line + self.process.stderr.read())
        self.client = httpx.Client(base_url=found[1], timeout=PATIENCE_S, trust_env=False)

    def end(self, number):
        """Send a signal and wait: the exit code, the seconds it took, what was complained of."""
        started = time.monotonic()
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=PATIENCE_S)
        self.client.close()
        return self.process.returncode, time.monotonic() - started, complaints


@pytest.fixture
def server(tmp_path):
    """``server()``: a server on one database with the scripted acts of ``served.py``."""
    started = []
    (tmp_path / "work").mkdir()

    def start(*command, **environment):
        command = command or (SERVED, tmp_path / "served.db", tmp_path / "work")
        started.append(Process(tmp_path, *command, **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def say(text):
    return {"parts": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("name", ["serve", "server"])
def test_the_command_serves_the_directory_it_is_given(server, tmp_path, name):
    options = ("--port", "0", "--database", "a.db", "--directory", "work")
    one = server("-m", "understudy", name, *options, UNDERSTUDY_MODEL="scripted")
    assert one.client.get("/path").json()["directory"] == str(tmp_path / "work")
    code, took_s, complaints = one.end(signal.SIGTERM)
    assert code == 0
    assert took_s < 5
    assert "no password" in complaints
    assert "Traceback" not in complaints


@pytest.mark.parametrize(
    ("options", "asks"),
    [((), ["bash"]), (("--allow", "bash"), []), (("--ask", "edit"), ["bash", "edit"])],
)
def test_shell_commands_ask_first_unless_they_are_allowed(server, options, asks):
    one = server("-m", "understudy", "serve", "--port", "0", "--database", "a.db", *options)
    [agent] = one.client.get("/agent").json()
    rules = [each["permission"] for each in agent["permission"] if each["action"] == "ask"]
    assert rules == asks


def test_a_password_of_the_environment_is_asked_for(server):
    options = ("-m", "understudy", "serve", "--port", "0", "--database", "a.db")
    one = server(*options, OPENCODE_SERVER_PASSWORD="secret")
    assert one.client.get("/session").status_code == 401
    assert one.client.get("/session", auth=("opencode", "secret")).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_settles_every_turn_within_five_seconds(server, number):
    one = server()
    made = [one.client.post("/session").json()["id"] for _ in range(6)]
    waiting = ThreadPoolExecutor(6)

    def prompt(session):
        return one.client.post(f"/session/{session}/message", json=say("sleep-bash")).json()

    answers = [waiting.submit(prompt, session) for session in made[:3]]
    stream = httpx.stream("GET", f"{one.client.base_url}/event", timeout=PATIENCE_S)
    with stream as response:
        lines = response.iter_lines()
        assert "server.connected" in next(lines)
        for session in made[3:]:
            one.client.post(f"/session/{session}/prompt_async", json=say("long-stream"))
        _until_busy(one, made)
        deleting = [waiting.submit(one.client.delete, f"/session/{each}") for each in made[3:]]
        code, took_s, complaints = one.end(number)
    assert code == 0, complaints
    assert took_s < 5
    assert "Traceback" not in complaints, complaints
    for answer in answers:
        assert answer.result(PATIENCE_S)["name"] == "MessageAbortedError"
    for deleted in deleting:
        assert deleted.exception(PATIENCE_S) or deleted.result().status_code in (200, 503)
    waiting.shutdown()
    again = server()
    for session in made[:3]:
        parts = [
            part
            for each in again.client.get(f"/session/{session}/message").json()
            for part in each["parts"]
        ]
        assert not [p for p in parts if p.get("state", {}).get("status") in ("pending", "running")]


def _until_busy(one, made):
    deadline = time.monotonic() + PATIENCE_S
    while set(one.client.get("/session/status").json()) != set(made):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_after_a_kill_the_turn_is_closed_and_clients_that_come_back_are_told(server):
    one = server()
    session = one.client.post("/session").json()["id"]
    one.client.post(f"/session/{session}/prompt_async", json=say("sleep-bash"))
    one.client.post(f"/session/{session}/prompt_async", json=say("and then?"))
    deadline = time.monotonic() + PATIENCE_S
    while '"running"' not in one.client.get(f"/session/{session}/message").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    one.end(signal.SIGKILL)
    again = server()
    told = []
    done = threading.Event()

    def follow():
        url = f"{again.client.base_url}/global/event"
        with httpx.stream("GET", url, timeout=PATIENCE_S) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    told.append(json.loads(line[6:])["payload"])
                if told and told[-1]["type"] == "session.idle":
                    done.set()
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert done.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    closed = [e["properties"]["info"] for e in told if e["type"] == "message.updated"]
    assert any(each.get("error", {}).get("name") == "InterruptedError" for each in closed)
    states = [
        event["properties"]["part"]["state"]["status"]
        for event in told
        if event["type"] == "message.part.updated" and "state" in event["properties"]["part"]
    ]
    assert "error" in states
    deadline = time.monotonic() + PATIENCE_S
    while again.client.get("/session/status").json() != {}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    last = again.client.get(f"/session/{session}/message").json()[-1]
    assert "You said: and then?" in json.dumps(last)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hostname", "0.0.0.0"), "--insecure"),
        (("--directory", "nowhere"), "there is no directory"),
        (("--hostname", "203.0.113.7", "--insecure"), "cannot be served"),
        (("--model", "nonsense"), "nonsense"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(tmp_path, options, words):
    env = os.environ | {"PYTHONPATH": str(Path(understudy.__file__).parents[1])}
    env.pop("OPENCODE_SERVER_PASSWORD", None)
    command = [sys.executable, "-m", "understudy", "serve", "--port", "0", *options]
    done = subprocess.run(
        [*command, "--database", "a.db"],
        cwd=tmp_path,
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
