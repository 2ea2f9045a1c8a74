"""Every method of OpenCode's SDKs is answered: served, or refused in words that clients can show.

``opencode/methods.txt`` lists the requests of both generations of the JavaScript SDK, 1.18.33, each
with whether it is served here.
"""

import logging
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from serving import PATIENCE_S, Stream, say

from understudy.actors.models.acts import Call, Gate, Say, Wait
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.gateway.http import files
from understudy.gateway.http.gateway import SEARCHES

LINES = (Path(__file__).parent / "opencode" / "methods.txt").read_text().splitlines()
METHODS = [line.split()[:3] for line in LINES]
RULE = {"response": "once"}
BODIES = {
    "/log": {"service": "test", "level": "info", "message": "hello"},
    "/session/{sessionID}/message": say("hi"),
    "/session/{sessionID}/prompt_async": say("hi"),
    "/session/{sessionID}/command": {"command": "init", "arguments": ""},
    "/session/{sessionID}/shell": {"command": "echo hi", "agent": "build"},
    "/session/{sessionID}/message/{messageID}/part/{partID}": {"text": "changed"},
    "/permission/{requestID}/reply": {"reply": "once"},
    "/session/{sessionID}/permissions/{permissionID}": {"response": "once"},
    "/question/{requestID}/reply": {"answers": [["yes"]]},
}
QUERIES = {"/find": {"pattern": "x"}, "/file/content": {"path": "a.txt"}}
NOBODY_ASKS = re.compile(r"/question/.*|/permission/.*|.*/permissions/.*")


def play(request):
    if request.purpose == "summary":
        return Say("Short.")
    if request.turns and "ask" in str(request.turns[-1]) and steps_taken(request) == 0:
        return Call("bash", {"command": "echo asked"})
    return Say("answer " * 400)


def test_every_method_of_the_sdks_is_answered_in_json(served, tmp_path):
    client = served(ScriptedModel(play)).client()
    (tmp_path / "work" / "a.txt").write_text("x")
    wrong = []
    for expected, method, path in METHODS:
        if path in ("/event", "/global/event"):
            continue
        session_id = client.post("/session").json()["id"]
        told = client.post(f"/session/{session_id}/message", json=say("hi")).json()
        names = {
            "sessionID": session_id,
            "messageID": told["info"]["id"],
            "partID": next(each["id"] for each in told["parts"] if each["type"] == "text"),
        }
        place = re.sub(r"\{(\w+)\}", lambda found, n=names: n.get(found[1], "some_id"), path)
        body = BODIES.get(path, {})
        if path.endswith("/revert"):
            body = {"messageID": names["messageID"]}
        sent = {} if method in ("GET", "DELETE") else {"json": body}
        reply = client.request(method, place, params=QUERIES.get(path), **sent)
        if expected == "served" and NOBODY_ASKS.fullmatch(path) and method == "POST":
            ok = reply.status_code == 404 and reply.json()["name"] == "NotFoundError"
        elif expected == "served":
            ok = reply.status_code in (200, 204)
        else:
            ok = reply.status_code in (404, 405) and bool(reply.json()["data"]["message"])
        json_or_nothing = "json" in reply.headers.get("content-type", "") or not reply.content
        if not (ok and json_or_nothing):
            wrong.append((expected, method, path, reply.status_code, reply.text[:200]))
    assert wrong == []


def test_what_is_not_served_says_why(served):
    reply = served().client().post("/pty", json={})
    assert reply.json()["name"] == "NotFoundError"
    assert "there are no terminals here" in reply.json()["data"]["message"]


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def tree(served, tmp_path):
    work = tmp_path / "work"
    (work / "src" / "inner").mkdir(parents=True)
    (work / "src" / "Main.py").write_text("first\nsecond été line\n")
    (work / "src" / "inner" / "blob").write_bytes(b"\0\1\2")
    (work / "node_modules").mkdir()
    (work / "node_modules" / "main.js").write_text("second")
    (tmp_path / "secret").write_text("second")
    (work / "link").symlink_to(tmp_path / "secret")
    return served().client()


def test_text_is_found_with_its_place_in_the_line(tree):
    [found] = tree.get("/find", params={"pattern": "l[a-z]+e"}).json()
    assert (found["path"]["text"], found["line_number"]) == ("src/Main.py", 2)
    assert found["absolute_offset"] == 6
    [inner] = found["submatches"]
    line = found["lines"]["text"].encode()
    assert line[inner["start"] : inner["end"]] == b"line" == inner["match"]["text"].encode()
    assert tree.get("/find", params={"pattern": "("}).status_code == 400


def test_names_are_found_the_likest_first(tree):
    def found(**query):
        return tree.get("/find/file", params=query).json()

    assert found(query="main") == ["src/Main.py"]
    assert found(query="src", dirs="true")[0] == "src/"
    assert found(query="smp") == ["src/Main.py"]
    assert found(query="src", type="directory") == ["src/", "src/inner/"]
    assert found(query="nothing-like-it") == []


def test_files_are_listed_and_read_in_the_directory_and_nowhere_else(tree):
    listed = tree.get("/file", params={"path": ""}).json()
    assert [(each["name"], each["type"], each["ignored"]) for each in listed] == [
        ("node_modules", "directory", True),
        ("src", "directory", False),
        ("link", "file", False),
    ]
    read = tree.get("/file/content", params={"path": "src/Main.py"}).json()
    assert read == {"type": "text", "content": "first\nsecond été line\n"}
    blob = tree.get("/file/content", params={"path": "src/inner/blob"}).json()
    assert (blob["type"], blob["encoding"], blob["content"]) == ("binary", "base64", "AAEC")
    for path in ("../secret", "link", "/etc/passwd", "src", "gone"):
        reply = tree.get("/file/content", params={"path": path})
        assert (reply.status_code, reply.json()["name"]) == (400, "BadRequest"), path
    assert tree.get("/file", params={"path": ".."}).status_code == 400


def test_a_name_that_is_no_text_hides_no_other(tree, tmp_path):
    (tmp_path / "work" / ".opencode" / "command").mkdir(parents=True)
    for name in (b"odd \xff", b".opencode/command/odd\xff.md", b".opencode/command/fine.md"):
        (tmp_path / "work" / os.fsdecode(name)).write_text("odd words")
    assert "odd ?" in [each["name"] for each in tree.get("/file").json()]
    assert "odd ?" in tree.get("/find/file", params={"query": "odd"}).json()
    found = tree.get("/find", params={"pattern": "odd words"}).json()
    assert "odd ?" in [each["path"]["text"] for each in found]
    assert [each["name"] for each in tree.get("/command").json()] == ["fine", "init"]


def test_a_command_that_is_no_file_holds_nobody_up(tree, tmp_path):
    folder = tmp_path / "work" / ".opencode" / "command"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.md")
    (folder / "fine.md").write_text("fine")
    try:
        found = tree.get("/command").json()
    finally:  # whoever reads it is let go
        with suppress(OSError):
            os.close(os.open(folder / "pipe.md", os.O_WRONLY | os.O_NONBLOCK))
    assert [each["name"] for each in found] == ["fine", "init"]


def test_searches_that_nobody_waits_for_hold_nobody_up(tree, tmp_path, monkeypatch, eventually):
    begun, over = [], threading.Event()

    def slow(*_):
        begun.append(1)
        over.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(files, "_lines", slow)
    (tmp_path / "other").mkdir()
    address = (tree.base_url.host, tree.base_url.port)
    typed = [socket.create_connection(address) for _ in range(40)]
    try:
        for each in typed:
            each.sendall(b"GET /find?pattern=x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: len(begun) == SEARCHES)
        for each in typed:
            each.close()
        other = tree.post("/session", params={"directory": str(tmp_path / "other")})
        assert other.status_code == 200
    finally:
        over.set()
    assert tree.get("/find", params={"pattern": "x"}).json() == []
    assert len(begun) == SEARCHES + 1


@pytest.mark.parametrize(
    "route",
    ["/path", "/project/current", "/session", "/file", "/find/file", "/command", "/vcs"],
)
def test_a_directory_that_cannot_be_is_no_fault_of_the_server(served, route):
    reply = served().client().get(route, params={"directory": "/" + "a" * 5000})
    assert reply.status_code in (200, 400)


# --- the server --------------------------------------------------------------------------------


def test_settings_are_told_and_a_change_of_them_is_refused(served):
    client = served().client()
    now = client.get("/config").json()
    assert client.patch("/config", json={"model": now["model"]}).json() == now
    refused = client.patch("/config", json={"model": "other/one", "theme": "dark"})
    assert refused.status_code == 400
    assert "model, theme" in refused.json()["data"]["message"]
    assert client.patch("/config", json=[]).status_code == 400


def test_a_disposed_instance_has_its_clients_ask_anew_and_ends_nothing(served):
    gate = Gate()
    server = served(ScriptedModel([[Say("a"), Wait(gate), Say("b")]]))
    client = server.client()
    stream, everywhere = Stream(client), Stream(client, "/global/event")
    for each in (stream, everywhere):
        each.next()
    url = f"/session/{client.post('/session').json()['id']}"
    client.post(f"{url}/prompt_async", json=say("go"))
    gate.wait_reached()
    assert client.post("/instance/dispose").json() is True
    told = stream.until("server.instance.disposed")
    assert told["properties"] == {"directory": server.gateway.directory}
    everywhere.until(lambda event: event["payload"]["type"] == "server.instance.disposed")
    gate.open()
    stream.until("session.idle")
    for each in (stream, everywhere):
        each.close()


def test_a_clients_log_line_is_logged_on_one_line(served, caplog):
    caplog.set_level(logging.DEBUG, logger="understudy.clients")
    client = served().client()
    line = {"service": "web", "level": "error", "message": "it\nbroke", "extra": {"a": 1}}
    assert client.post("/log", json=line).json() is True
    [record] = [each for each in caplog.records if each.name == "understudy.clients"]
    assert (record.levelname, record.getMessage()) == ("ERROR", r"'web': 'it\nbroke'")
    assert client.post("/log", json={**line, "level": "loud"}).status_code == 400


# --- agents, models, todos, changes --------------------------------------------------------------


@pytest.mark.parametrize("route", ["message", "prompt_async", "shell"])
def test_an_agent_that_is_not_listed_is_refused_and_leaves_nothing(served, route):
    client = served().client()
    assert client.post("/session", json={"agent": "nobody"}).status_code == 400
    url = f"/session/{client.post('/session').json()['id']}"
    body = {"command": "echo hi", "agent": "nobody", **say("hi")}
    reply = client.post(f"{url}/{route}", json=body)
    assert reply.status_code == 400
    assert "nobody" in reply.json()["data"]["message"]
    assert client.get(f"{url}/message").json() == []
    assert client.post(f"{url}/{route}", json={**body, "agent": "build"}).status_code < 300


def test_a_summary_is_written_by_the_model_that_was_asked_for(served):
    models = [ScriptedModel(play, provider_id="mock", model_id=name) for name in ("one", "two")]
    client = served(*models).client()
    url = f"/session/{client.post('/session').json()['id']}"
    client.post(f"{url}/message", json=say("hi"))
    unknown = {"providerID": "mock", "modelID": "three"}
    assert client.post(f"{url}/summarize", json=unknown).status_code == 400
    wanted = {"providerID": "mock", "modelID": "two"}
    assert client.post(f"{url}/summarize", json=wanted).json() is True
    [summary] = [
        each["info"]
        for each in client.get(f"{url}/message").json()
        if each["info"].get("summary") is True
    ]
    assert summary["modelID"] == "two"


def todo(content, status="pending"):
    return {"content": content, "status": status, "priority": "medium"}


def test_todos_are_kept_and_told(served, path):
    lists = [[todo("a"), todo("b")], [todo("a", "completed"), todo("b", "in_progress")]]

    def write(request):
        step = steps_taken(request)
        return Call("todowrite", {"todos": lists[step]}) if step < 2 else Say("done")

    server = served(ScriptedModel(write))
    client = server.client()
    stream = Stream(client)
    url = f"/session/{client.post('/session').json()['id']}"
    assert client.get(f"{url}/todo").json() == []
    client.post(f"{url}/message", json=say("go"))
    for each in lists:
        assert stream.until("todo.updated")["properties"]["todos"] == each
    stream.until("session.idle")
    after = Stream(client, "/event?after=0")
    after.until("session.idle")
    assert after.types().count("todo.updated") == 2
    for each in (stream, after):
        each.close()
    copy = client.post(f"{url}/fork").json()["id"]
    server.stop()
    again = served(ScriptedModel(write)).client()
    assert again.get(f"{url}/todo").json() == lists[1]
    assert again.get(f"/session/{copy}/todo").json() == lists[1]


def test_the_diff_is_what_the_file_tools_changed(served, tmp_path):
    calls = [
        Call("write", {"path": "new.txt", "content": "one\ntwo\n"}),
        Call("edit", {"path": "new.txt", "old": "two", "new": "three"}),
        Call("edit", {"path": "gone.txt", "old": "x", "new": "y"}),
    ]

    acts = [*([each] for each in calls), [Say("-")], [Say("-")]]
    client = served(ScriptedModel(acts)).client()
    url = f"/session/{client.post('/session').json()['id']}"
    client.post(f"{url}/message", json=say("work", messageID="msg_work"))
    client.post(f"{url}/message", json=say("rest", messageID="msg_rest"))
    [changed] = client.get(f"{url}/diff").json()
    assert (tmp_path / "work" / "new.txt").read_text() == "one\nthree\n"
    assert (changed["file"], changed["status"]) == ("new.txt", "added")
    assert (changed["additions"], changed["deletions"]) == (3, 1)
    assert "+three" in changed["patch"]
    assert client.get(f"{url}/diff", params={"messageID": "msg_work"}).json() == [changed]
    assert client.get(f"{url}/diff", params={"messageID": "msg_rest"}).json() == []
    assert client.get(f"{url}/diff", params={"messageID": "msg_none"}).status_code == 404
