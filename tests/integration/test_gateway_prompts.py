"""Prompts over HTTP: durable when accepted, queued, each with its own answer."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Stream, say, text_of

from understudy.actors.models.acts import Call, Fail, Gate, Say, Stall, Wait
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.errors import ModelError


def bash(command):
    return ScriptedModel(
        lambda r: Say("done") if steps_taken(r) else Call("bash", {"command": command})
    )


def make(client):
    return f"/session/{client.post('/session').json()['id']}"


def test_each_of_many_prompts_at_once_gets_its_own_answer(served):
    client = served().client()
    session = make(client)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda n: client.post(f"{session}/message", json=say(f"prompt {n}")).json(), range(8)
        )
    assert [text_of(each) for each in answers] == [f"prompt {n}" for n in range(8)]
    roles = [each["info"]["role"] for each in client.get(f"{session}/message").json()]
    assert roles == ["user", "assistant"] * 8


def test_a_prompt_is_durable_before_it_is_acknowledged(served):
    server = served(ScriptedModel(lambda _: Stall()))
    client = server.client()
    session = make(client)
    body = say("kept", messageID="msg_mine", parts=[])
    body["parts"] = [{"id": "prt_mine", "type": "text", "text": "kept"}]
    accepted = client.post(f"{session}/prompt_async", json=body)
    assert (accepted.status_code, accepted.content) == (204, b"")
    [prompt] = server.runtime.engine.store.read.prompts(session.rpartition("/")[2])
    assert prompt.message_id == "msg_mine"
    message = client.get(f"{session}/message/msg_mine").json()
    assert message["parts"][0]["id"] == "prt_mine"


def test_a_prompt_sent_twice_is_one_prompt(served):
    client = served().client()
    session = make(client)
    first, again = (
        client.post(f"{session}/message", json=say("once", messageID="msg_a")).json()
        for _ in range(2)
    )
    assert first == again
    assert len(client.get(f"{session}/message").json()) == 2
    other = client.post(f"{session}/message", json=say("other", messageID="msg_a"))
    assert (other.status_code, other.json()["name"]) == (409, "PromptConflict")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"parts": "nope"}, 400),
        ({"parts": []}, 400),
        ({}, 400),
        ({"parts": [{"type": "text"}]}, 400),
        ({"parts": [{"type": "riddle", "text": "x"}]}, 400),
        (say("x", model={"providerID": "no", "modelID": "such"}), 400),
        (say("x", messageID="../../etc"), 400),
        (say("   "), 400),
        ({"parts": [{"type": "file", "url": "http://["}]}, 400),
        ({"parts": [{"type": "file", "url": "file:///" + "a" * 5000}]}, 400),
        ({"parts": [{"type": "file", "url": "file:///a%00b"}]}, 400),
    ],
)
def test_an_unusable_prompt_changes_nothing(served, body, status):
    client = served().client()
    session = make(client)
    refused = client.post(f"{session}/message", json=body)
    assert refused.status_code == status
    assert refused.json()["name"] == "BadRequest"
    assert refused.json()["data"]["message"]
    assert client.get(f"{session}/message").json() == []
    assert text_of(client.post(f"{session}/message", json=say("fine")).json()) == "fine"


def test_malformed_json_is_refused(served):
    client = served().client()
    refused = client.post(f"{make(client)}/message", content=b'{"parts": [')
    assert (refused.status_code, refused.json()["name"]) == (400, "BadRequest")


def test_a_session_that_is_not_there_is_not_found(served):
    client = served().client()
    for method, url in (
        ("GET", "/session/ses_x"),
        ("DELETE", "/session/ses_x"),
        ("GET", "/session/ses_x/message"),
        ("POST", "/session/ses_x/abort"),
        ("GET", "/session/odd-id"),
    ):
        answer = client.request(method, url)
        assert answer.status_code == 404, url
        assert answer.json()["name"] == "NotFoundError"
        assert answer.json()["data"]["message"].startswith("Session not found: ")
    assert client.post("/session/ses_x/message", json=say("x")).status_code == 404


def test_an_abort_ends_the_stream_and_the_tools_processes(served, tmp_path, eventually):
    mark = tmp_path / "alive"
    server = served(bash(f"echo $$ > {mark}; sleep 60"))
    client = server.client()
    session = make(client)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(client.post(f"{session}/message", json=say("go")))
    )
    thread.start()
    eventually(lambda: mark.exists() and mark.read_text().strip())
    assert client.get("/session/status").json() == {session.rpartition("/")[2]: {"type": "busy"}}
    assert client.post(f"{session}/abort").json() is True
    thread.join(10)
    info = answers[0].json()["info"]
    assert answers[0].status_code == 200
    assert info["error"]["name"] == "MessageAbortedError"
    assert info["time"]["completed"]
    assert client.get("/session/status").json() == {}
    pid = int(mark.read_text())
    eventually(lambda: not _alive(pid))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_model_that_fails_is_an_answer_with_an_error(served):
    model = ScriptedModel(lambda _: Fail(ModelError("it exploded")))
    client = served(model).client()
    answer = client.post(f"{make(client)}/message", json=say("x"))
    assert answer.status_code == 200
    assert "it exploded" in answer.json()["info"]["error"]["data"]["message"]


def test_a_prompt_whose_session_is_deleted_is_told(served):
    gate = Gate()
    client = served(ScriptedModel(lambda _: [Wait(gate), Say("never")])).client()
    session = make(client)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, f"{session}/message", json=say("x"))
        gate.wait_reached()
        assert client.delete(session).json() is True
        assert answer.result(10).status_code == 404


def test_the_users_own_command_runs_without_a_model(served):
    server = served(ScriptedModel("unused"), permissions={"bash": "ask"})
    client = server.client()
    session = make(client)
    answer = client.post(f"{session}/shell", json={"agent": "build", "command": "echo hi"}).json()
    [tool] = [part for part in answer["parts"] if part["type"] == "tool"]
    assert (tool["tool"], tool["state"]["output"]) == ("bash", "hi\n")
    assert server.runtime.engine.models[0].calls == 0


def test_no_model_may_use_the_users_tool(served, tmp_path):
    mark = tmp_path / "mark"
    model = ScriptedModel(
        lambda r: Say("done") if steps_taken(r) else Call("shell", {"command": f"touch {mark}"})
    )
    client = served(model, permissions={"bash": "deny"}).client()
    answer = client.post(f"{make(client)}/message", json=say("x")).json()
    assert text_of(answer) == "done"
    assert not mark.exists()


def test_a_message_without_a_reply_is_only_kept(served):
    server = served()
    client = server.client()
    session = make(client)
    kept = client.post(f"{session}/message", json=say("remember", noReply=True)).json()
    assert (kept["info"]["role"], text_of(kept)) == ("user", "remember")
    assert server.runtime.engine.models[0].calls == 0


def test_a_command_of_the_directory_is_a_prompt(served, tmp_path):
    folder = tmp_path / "work" / ".opencode" / "command"
    folder.mkdir(parents=True)
    (folder / "greet.md").write_text("---\ndescription: say hello\n---\nGreet $1 and $ARGUMENTS")
    client = served().client()
    shown = {each["name"]: each["description"] for each in client.get("/command").json()}
    assert shown["greet"] == "say hello"
    body = {"command": "greet", "arguments": "Ada Bob"}
    answer = client.post(f"{make(client)}/command", json=body).json()
    assert text_of(answer) == "Greet Ada and Ada Bob"
    refused = client.post(f"{make(client)}/command", json={"command": "../../x", "arguments": ""})
    assert refused.status_code == 400


def test_a_file_of_the_directory_is_taken_in_and_no_other(served, tmp_path):
    client = served().client()
    (tmp_path / "work" / "a.txt").write_text("inside")
    (tmp_path / "b.txt").write_text("outside")
    session = make(client)

    def attach(path):
        part = {"type": "file", "mime": "text/plain", "url": f"file://{path}", "filename": "f"}
        body = say("look")
        body["parts"].append(part)
        return client.post(f"{session}/message", json=body)

    assert attach(tmp_path / "work" / "a.txt").status_code == 200
    [_, file] = client.get(f"{session}/message").json()[0]["parts"]
    assert base64.b64decode(file["url"].partition(",")[2]) == b"inside"
    assert attach(tmp_path / "b.txt").status_code == 400


# --- permissions -------------------------------------------------------------------------------


def test_a_permission_is_asked_answered_and_told(served):
    client = served(bash("echo hi"), permissions={"bash": "ask"}).client()
    session = make(client)
    stream = Stream(client)
    stream.until("server.connected")
    client.post(f"{session}/prompt_async", json=say("go"))
    asked = stream.until("permission.asked")["properties"]
    assert asked["permission"] == "bash"
    assert asked["metadata"]["command"] == "echo hi"
    assert client.get("/permission").json() == [asked]
    reply = client.post(f"/permission/{asked['id']}/reply", json={"reply": "once"})
    assert reply.json() is True
    replied = stream.until("permission.replied")["properties"]
    assert replied == {
        "sessionID": asked["sessionID"],
        "requestID": asked["id"],
        "reply": "once",
    }
    stream.until("session.idle")
    assert client.get("/permission").json() == []
    again = client.post(f"/permission/{asked['id']}/reply", json={"reply": "once"})
    assert (again.status_code, again.json()["name"]) == (409, "AskClosed")
    stream.close()


def test_a_permission_waits_over_a_restart(served, path):
    server = served(bash("echo hi"), permissions={"bash": "ask"})
    client = server.client()
    session = make(client)
    stream = Stream(client)
    stream.until("server.connected")
    client.post(f"{session}/prompt_async", json=say("go"))
    asked = stream.until("permission.asked")["properties"]
    server.stop()
    again = served(bash("echo hi"), permissions={"bash": "ask"}).client()
    assert [each["id"] for each in again.get("/permission").json()] == [asked["id"]]
    stream = Stream(again)
    stream.until("server.connected")
    url = f"{session}/permissions/{asked['id']}"
    assert again.post(url, json={"response": "once"}).json() is True
    stream.until("session.idle")
    stream.close()
