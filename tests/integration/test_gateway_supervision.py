"""What the gateway tells beyond OpenCode: supervision, the tracker, the journal, its document."""

from serving import say

from understudy import RestartPolicy
from understudy.actors import session_actor
from understudy.errors import UnderstudyError
from understudy.gateway.http.app import ENDPOINTS

QUICK = RestartPolicy(intensity=2, backoff_s=0.001, max_backoff_s=0.001)


def crash(server, session_id):
    """Make the session's actor die until it is given up on."""
    session = server.runtime.session(session_id)
    while session_id not in server.runtime.quarantined():
        try:
            session._crash()
        except UnderstudyError:
            continue


def test_a_session_given_up_on_is_listed_and_reset(served):
    server = served(restart=QUICK)
    client = server.client()
    session = client.post("/session").json()["id"]
    crash(server, session)
    [told] = client.get("/understudy/quarantine").json()
    assert told["sessionID"] == session
    assert told["reason"]
    assert client.get(f"/understudy/session/{session}").json()["type"] == "quarantined"
    refused = client.post(f"/session/{session}/message", json=say("x"))
    assert (refused.status_code, refused.json()["name"]) == (409, "SessionQuarantined")
    assert client.post(f"/understudy/session/{session}/reset").json() is True
    assert client.get("/understudy/quarantine").json() == []
    assert client.post(f"/session/{session}/message", json=say("x")).status_code == 200
    assert client.get("/understudy/state").json()["restarts"] > 0


def test_prompts_are_told_with_their_outcomes(served):
    client = served().client()
    session = client.post("/session").json()["id"]
    client.post(f"/session/{session}/message", json=say("one", messageID="msg_one"))
    [told] = client.get(f"/understudy/session/{session}/prompts").json()
    assert (told["messageID"], told["outcome"]) == ("msg_one", "answered")
    assert client.get("/understudy/session/ses_none/prompts").status_code == 404
    assert client.get("/understudy/dead-letters").json() == []


def test_a_prompt_that_keeps_crashing_its_session_is_a_dead_letter(served, monkeypatch):
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if type(command).__name__ == "StepFinished" and "poison" in str(command.parts):
            raise RuntimeError("poisoned")
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    policy = RestartPolicy(backoff_s=0.001, quarantine_after=9)
    client = served(on_restart="resume", restart=policy).client()
    session = client.post("/session").json()["id"]
    failed = client.post(f"/session/{session}/message", json=say("poison", messageID="msg_bad"))
    assert "keeps crashing" in failed.json()["info"]["error"]["data"]["message"]
    assert client.post(f"/session/{session}/message", json=say("food")).status_code == 200
    [letter] = client.get("/understudy/dead-letters").json()
    assert (letter["messageID"], letter["outcome"]) == ("msg_bad", "failed")


def test_claims_and_bypasses_are_told(served):
    server = served()
    client = server.client()
    server.runtime.tracker.claim("ses_a", "memory")
    server.runtime.tracker.bypass("ses_b", allow_unknown=True)
    [claim] = client.get("/understudy/claims").json()
    assert (claim["key"], claim["owner"]) == ("ses_a", "memory")
    assert [each["key"] for each in client.get("/understudy/bypasses").json()] == ["ses_b"]


def test_the_journal_is_read_a_page_at_a_time(served):
    client = served().client()
    session = client.post("/session").json()["id"]
    client.post(f"/session/{session}/message", json=say("one"))
    told, after = [], 0
    while page := client.get(f"/understudy/journal?after={after}&limit=4").json()["events"]:
        assert len(page) <= 4
        told += page
        after = page[-1]["cursor"]
    assert [each["cursor"] for each in told] == list(range(1, len(told) + 1))
    assert told[0]["type"] == "session.created"
    assert {each["sessionID"] for each in told} == {session}


def test_the_document_names_every_endpoint_once(served):
    client = served().client()
    document = client.get("/doc").json()
    assert document["openapi"].startswith("3.1")
    named = {(m.upper(), path) for path, each in document["paths"].items() for m in each}
    assert named == {(each.method, each.path) for each in ENDPOINTS}
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len({each["operationId"] for each in operations}) == len(operations)
    assert all(each["summary"] for each in operations)
    prompt = document["paths"]["/session/{sessionID}/message"]["post"]["requestBody"]
    assert prompt["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/NewPrompt"
    }
