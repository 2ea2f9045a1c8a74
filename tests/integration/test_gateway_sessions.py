"""Sessions over HTTP: made, listed, changed, copied, deleted, each in its directory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Stream, say, text_of

from understudy.actors.models.acts import Call, Gate, Say, Wait
from understudy.actors.models.scripted import ScriptedModel, steps_taken


def ids(client, **query):
    return [each["id"] for each in client.get("/session", params=query).json()]


def test_a_session_needs_no_body_and_ignores_what_it_does_not_know(served):
    client = served().client()
    bare = client.post("/session")
    assert bare.status_code == 200
    assert bare.json()["title"].startswith("New session - ")
    odd = client.post("/session", json={"title": "Odd", "nonsense": {"a": 1}, "share": True})
    assert odd.json()["title"] == "Odd"
    assert ids(client) == [odd.json()["id"], bare.json()["id"]]


@pytest.mark.parametrize("route", ["fork", "abort", "unrevert"])
def test_what_clients_post_without_a_body_is_accepted(served, route):
    client = served().client()
    session = client.post("/session").json()
    assert client.post(f"/session/{session['id']}/{route}").status_code == 200


def test_the_first_prompt_names_a_session_once(served):
    client = served().client()
    session = client.post("/session").json()
    client.post(f"/session/{session['id']}/message", json=say("Fix the   build\nplease"))
    assert client.get(f"/session/{session['id']}").json()["title"] == "Fix the build please"
    client.post(f"/session/{session['id']}/message", json=say("And now the tests"))
    assert client.get(f"/session/{session['id']}").json()["title"] == "Fix the build please"


def test_a_session_is_renamed_archived_and_given_rules(served):
    client = served().client()
    url = f"/session/{client.post('/session').json()['id']}"
    rule = {"permission": "bash", "pattern": "*", "action": "ask"}
    changed = client.patch(url, json={"title": "Renamed", "permission": [rule]}).json()
    assert changed["title"] == "Renamed"
    assert changed["permission"] == [rule]
    assert client.patch(url, json={"time": {"archived": 5}}).json()["time"]["archived"] > 0
    assert ids(client) == []
    assert len(ids(client, archived="true")) == 1


def test_rules_that_are_added_at_once_are_all_kept(served):
    client = served().client()
    session = f"/session/{client.post('/session').json()['id']}"
    rules = [{"permission": name, "pattern": "*", "action": "deny"} for name in "abcdefgh"]
    with ThreadPoolExecutor(len(rules)) as pool:
        list(pool.map(lambda rule: client.patch(session, json={"permission": [rule]}), rules))
    kept = client.get(session).json()["permission"]
    assert sorted(kept, key=lambda rule: rule["permission"]) == rules


def test_lists_are_newest_first_limited_and_searched(served):
    client = served().client()
    made = [client.post("/session", json={"title": f"Number {n}"}).json()["id"] for n in range(5)]
    assert ids(client, limit=2) == [made[4], made[3]]
    assert ids(client, search="number 3") == [made[3]]
    assert ids(client, start=2_000_000_000_000_000) == []


def test_children_are_listed_and_go_with_their_parent(served):
    client = served().client()
    parent = client.post("/session").json()["id"]
    child = client.post("/session", json={"parentID": parent}).json()
    assert child["parentID"] == parent
    assert [each["id"] for each in client.get(f"/session/{parent}/children").json()] == [
        child["id"]
    ]
    assert ids(client, roots="true") == [parent]
    assert client.delete(f"/session/{parent}").json() is True
    assert client.get(f"/session/{child['id']}").status_code == 404


def test_a_fork_copies_up_to_a_message(served):
    client = served().client()
    session = client.post("/session", json={"title": "Origin"}).json()["id"]
    for text in ("one", "two"):
        client.post(f"/session/{session}/message", json=say(text))
    second = client.get(f"/session/{session}/message").json()[2]["info"]["id"]
    copy = client.post(f"/session/{session}/fork", json={"messageID": second}).json()
    assert copy["title"] == "Origin (fork #1)"
    told = [text_of(each) for each in client.get(f"/session/{copy['id']}/message").json()]
    assert told == ["one", "one"]


def test_a_revert_hides_until_it_is_undone(served):
    client = served().client()
    session = client.post("/session").json()["id"]
    client.post(f"/session/{session}/message", json=say("one"))
    first = client.get(f"/session/{session}/message").json()[0]["info"]["id"]
    reverted = client.post(f"/session/{session}/revert", json={"messageID": first}).json()
    assert reverted["revert"] == {"messageID": first}
    assert "revert" not in client.post(f"/session/{session}/unrevert").json()


def test_messages_and_parts_are_edited_while_the_session_rests(served):
    gate = Gate()
    model = ScriptedModel(lambda r: [Wait(gate)] if "wait" in str(r.turns[-1]) else Say("yes"))
    client = served(model).client()
    session = client.post("/session").json()["id"]
    answer = client.post(f"/session/{session}/message", json=say("one")).json()
    [part] = [each for each in answer["parts"] if each["type"] == "text"]
    url = f"/session/{session}/message/{answer['info']['id']}"
    edited = client.patch(f"{url}/part/{part['id']}", json={**part, "text": "edited"}).json()
    assert edited == {**part, "text": "edited"}
    assert text_of(client.get(url).json()) == "edited"
    assert client.delete(f"{url}/part/{part['id']}").json() is True
    assert client.delete(f"{url}/part/{part['id']}").status_code == 404
    client.post(f"/session/{session}/prompt_async", json=say("wait"))
    gate.wait_reached()
    assert client.delete(url).status_code == 409
    gate.open()
    client.post(f"/session/{session}/abort")
    assert client.delete(url).json() is True
    assert client.get(url).status_code == 404


def test_sessions_of_a_program_are_listed_with_those_of_clients(served, opened):
    runtime = opened()
    own = runtime.create_session(title="of a program")
    runtime.close()
    client = served().client()
    made = client.post("/session").json()["id"]
    assert ids(client) == [made, own.id]
    assert ids(client, limit=1) == [made]
    assert client.get(f"/session/{own.id}").json()["directory"].endswith("/work")


# --- directories -------------------------------------------------------------------------------


def test_sessions_belong_to_one_directory(served, tmp_path):
    other = tmp_path / "other place"
    other.mkdir()
    client = served().client()
    here = client.post("/session").json()
    by_query = client.post("/session", params={"directory": str(other)}).json()
    header = {"x-opencode-directory": str(other).replace(" ", "%20")}
    by_header = client.post("/session", headers=header).json()
    assert {by_query["directory"], by_header["directory"]} == {str(other)}
    assert ids(client) == [here["id"]]
    assert ids(client, directory=str(other)) == [by_header["id"], by_query["id"]]
    nowhere = client.post("/session", params={"directory": str(tmp_path / "nowhere")})
    assert nowhere.status_code == 400


def write_once(request):
    if steps_taken(request):
        return Say("done")
    path = str(request.turns[-1].content[0].text)
    return [
        Call("write", {"path": path, "content": "x"}),
        Call("bash", {"command": "pwd"}),
    ]


def test_tools_work_in_the_sessions_directory_and_files_stay_in_it(served, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    server = served(ScriptedModel(write_once))
    client = server.client()
    session = client.post("/session", params={"directory": str(other)}).json()["id"]
    client.post(f"/session/{session}/message", json=say("a.txt"))
    assert (other / "a.txt").read_text() == "x"
    client.post(f"/session/{session}/message", json=say("../work/b.txt"))
    assert not (tmp_path / "work" / "b.txt").exists()
    tools = [
        part["state"]
        for each in client.get(f"/session/{session}/message").json()
        for part in each["parts"]
        if part["type"] == "tool"
    ]
    assert [each["status"] for each in tools] == ["completed", "completed", "error", "completed"]
    assert tools[1]["output"].strip() == str(other)
    assert "outside the workspace" in tools[2]["error"]


# --- ghosts ------------------------------------------------------------------------------------


def delete_five(client, pool, *, running):
    """Create five sessions, delete all five at once, list: what is left of them."""
    made = [client.post("/session").json()["id"] for _ in range(5)]
    if running:
        for session in made:
            client.post(f"/session/{session}/prompt_async", json=say("go"))
    start = threading.Barrier(5)

    def delete(session):
        start.wait(10)
        return client.delete(f"/session/{session}").status_code

    assert list(pool.map(delete, made)) == [200] * 5
    return [session for session in ids(client) if session in made]


def test_five_sessions_deleted_at_once_leave_no_ghost(served):
    client = served().client()
    with ThreadPoolExecutor(5) as pool:
        assert [delete_five(client, pool, running=False) for _ in range(40)] == [[]] * 40


async def endless(request):
    for number in range(100_000):
        yield Say(f"word{number} ", chunks=1)
        yield Wait(0.001)


def test_five_running_sessions_deleted_at_once_leave_no_ghost_and_no_word(served):
    server = served(ScriptedModel(endless))
    client = server.client()
    stream = Stream(client)
    stream.until("server.connected")
    with ThreadPoolExecutor(5) as pool:
        assert [delete_five(client, pool, running=True) for _ in range(10)] == [[]] * 10
    client.post("/session", json={"title": "the last"})
    stream.until(lambda e: e["properties"].get("info", {}).get("title") == "the last")
    gone = set()
    for event in stream.seen:
        session = event["properties"].get("sessionID")
        assert session not in gone, f"{event['type']} follows the deletion"
        if event["type"] == "session.deleted":
            gone.add(session)
    assert len(gone) == 50
    stream.close()
