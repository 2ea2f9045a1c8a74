"""What real clients were answered, recorded, is answered here too: every field, with its type.

``opencode/recorded.jsonl`` holds one sample of each shape, from OpenCode 1.18.33: answers with the
requests they belong to, and events.
"""

import re
from pathlib import Path

import msgspec
import pytest
from serving import Stream, say

from understudy.actors.models.acts import Call, Fail, Say, Think, Wait
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.errors import ModelError

LINES = (Path(__file__).parent / "opencode" / "recorded.jsonl").read_bytes().splitlines()
MODEL = {"modelID": "scripted", "providerID": "scripted"}
RECORDED = [msgspec.json.decode(line) for line in LINES]

# What no client needs, found by leaving it out: snapshots and diffs, which are not kept here, the
# provider's own words about an error, and what only that provider's configuration says.
NOT_HERE = re.compile(
    r"(info|body|\[\])\.summary\.(additions|deletions|files)|.*\.summary|.*\.variant|.*\.snapshot"
    r"|.*\.revert\.(snapshot|diff)|.*\.error\.data\.(?!message).*|.*\.data\.(kind|ref)"
    r"|.*\.metadata\.(truncated|description)|.*\.input\.description|.*\.model|.*\.agent"
    r"|(body|\[\])\.vcs|.*\.(variants|options|permission|provider|enabled_providers|models)\..*"
    r"|.*\.(enabled_providers|small_model|prompt|hidden|parentID|mode|experimental|compaction)"
    r"|.*\.time\.(start|end)|.*\.default\..*"
)


def missing(real, ours, path):
    """The fields of ``real`` that ``ours`` lacks or has with another type."""
    if isinstance(real, dict):
        if not isinstance(ours, dict):
            return [f"{path} is no object"]
        return [
            each
            for key, value in real.items()
            if not NOT_HERE.fullmatch(f"{path}.{key}")
            for each in (
                missing(value, ours[key], f"{path}.{key}") if key in ours else [f"{path}.{key}"]
            )
        ]
    if isinstance(real, list):
        if not isinstance(ours, list):
            return [f"{path} is no list"]
        return [each for part in real[:1] for each in missing(part, _like(part, ours), f"{path}[]")]
    kinds = {int: "number", float: "number"}
    if kinds.get(type(real), type(real)) != kinds.get(type(ours), type(ours)):
        return [f"{path} is {ours!r}, not {real!r}"]
    return []


def _like(real, ours):
    """The one of our list to compare with: of the same type, where there are types."""
    same = [each for each in ours if isinstance(each, dict) and each.get("type") == _type(real)]
    return same[0] if same else next(iter(ours), real)


def _type(value):
    return value.get("type") if isinstance(value, dict) else None


def play(request):
    text = str(request.turns[-1])
    if request.purpose == "summary":
        return [Say("A summary", chunks=2)]
    if "run-bash" in text and not steps_taken(request):
        return [
            Say("I will", chunks=2),
            Wait(0.05),
            Call("bash", {"command": "echo hi; sleep 0.3"}),
        ]
    if "llm-error" in text:
        return Fail(ModelError("exploded"))
    return [Think("hm"), Say("well, "), Wait(0.2), Say("done", chunks=2), Wait(0.05)]


class Flow:
    """One walk through everything the recordings have; ``answers`` by what was asked."""

    def __init__(self, server):
        self.client = server.client()
        self.answers = {}
        stream = Stream(self.client)
        stream.until("server.connected")
        self._session()
        self._edit()
        self._ask()
        self.ask("GET", "/config")
        for path in ("/config/providers", "/agent", "/project/current", "/path", "/provider"):
            self.ask("GET", path)
        self.ask("GET", "/global/health")
        self.client.post("/session", json={"title": "the end"})
        stream.until(lambda e: e["properties"].get("info", {}).get("title") == "the end")
        self.events = stream.seen
        stream.close()

    def ask(self, method, path, body=None, **ids):
        url = path
        for name, value in ids.items():
            url = url.replace(f"{{{name}}}", value)
        answer = self.client.request(method, url, **({} if body is None else {"json": body}))
        self.answers.setdefault((method, path, answer.status_code), []).append(answer)
        return answer.json() if answer.content else None

    def _session(self):
        self.ask("GET", "/session")
        rule = {"permission": "bash", "pattern": "*", "action": "allow"}
        made = self.ask("POST", "/session", {"title": "flow", "permission": [rule]})
        ses = self.ses = made["id"]
        self.ask("GET", "/session/{ses}", ses=ses)
        self.ask("PATCH", "/session/{ses}", {"title": "renamed"}, ses=ses)
        for text in ("hello", "run-bash", "llm-error"):
            self.ask("POST", "/session/{ses}/message", say(text), ses=ses)
        self.ask("GET", "/session/{ses}/message", ses=ses)
        self.ask("POST", "/session/{ses}/message", {"parts": "nope"}, ses=ses)
        self.ask("POST", "/session/{ses}/message", say("x"), ses="ses_nope")
        self.ask("GET", "/session/{ses}", ses="ses_nope")
        self.client.post(f"/session/{ses}/prompt_async", json=say("run-bash"))
        self.ask("GET", "/session/status")
        self.ask("POST", "/session/{ses}/abort", ses=ses)
        self.ask("POST", "/session", {"parentID": ses, "title": "child"})
        self.ask("GET", "/session/{ses}/children", ses=ses)
        first = self.client.get(f"/session/{ses}/message").json()[0]["info"]["id"]
        self.ask("GET", "/session/{ses}/message/{msg}", ses=ses, msg=first)
        self.ask("POST", "/session/{ses}/fork", ses=ses)
        self.ask("POST", "/session/{ses}/revert", {"messageID": first}, ses=ses)
        self.ask("POST", "/session/{ses}/unrevert", ses=ses)
        self.ask("GET", "/session/{ses}/todo", ses=ses)
        self.ask("GET", "/session/{ses}/diff", ses=ses)
        self.ask("POST", "/session/{ses}/shell", {"command": "echo hi"}, ses=ses)
        self.ask("POST", "/session/{ses}/summarize", MODEL, ses=ses)
        self.ask("GET", "/session/{ses}", ses=ses)
        self.ask("GET", "/session")

    def _edit(self):
        answer = self.ask("POST", "/session/{ses}/message", say("edit"), ses=self.ses)
        msg, prt = answer["info"]["id"], answer["parts"][-2]
        url, ids = "/session/{ses}/message/{msg}", {"ses": self.ses, "msg": msg, "prt": prt["id"]}
        self.ask("PATCH", url + "/part/{prt}", {**prt, "text": "edited"}, **ids)
        self.ask("DELETE", url + "/part/{prt}", **ids)
        self.ask("DELETE", url, **ids)
        copy = self.ask("POST", "/session/{ses}/fork", ses=self.ses)["id"]
        for _ in range(2):
            self.ask("DELETE", "/session/{ses}", ses=copy)

    def _ask(self):
        rule = {"permission": "bash", "pattern": "*", "action": "ask"}
        stream = Stream(self.client)
        stream.until("server.connected")
        ses = self.ask("POST", "/session", {"permission": [rule]})["id"]
        for answered in (self._reply, self._respond):
            self.client.post(f"/session/{ses}/prompt_async", json=say("run-bash"))
            asked = stream.until("permission.asked")["properties"]
            self.ask("GET", "/permission")
            answered(asked)
            stream.until("session.idle")
        stream.close()

    def _reply(self, asked):
        self.ask("POST", "/permission/{per}/reply", {"reply": "once"}, per=asked["id"])

    def _respond(self, asked):
        ids = {"ses": asked["sessionID"], "per": asked["id"]}
        self.ask("POST", "/session/{ses}/permissions/{per}", {"response": "reject"}, **ids)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    from serving import Served

    home = tmp_path_factory.mktemp("flow")
    server = Served(home / "a.db", home, ScriptedModel(play))
    yield Flow(server)
    server.stop()


# A model that does not exist is a mistake of the request here, and nothing is left behind.
ANSWERS = [each for each in RECORDED if each["kind"] == "response" and each["status"] < 500]


@pytest.mark.parametrize(
    "real", ANSWERS, ids=lambda each: f"{each['method']} {each['path']} {each['status']}"
)
def test_an_answer_has_every_field_clients_know(flow, real):
    ours = flow.answers[real["method"], real["path"], real["status"]]
    found = [missing(_anonymous(real["body"]), _anonymous(each.json()), "body") for each in ours]
    assert [] in found, found


def _anonymous(body):
    """Answers that are keyed by session ids, with the same key for all."""
    if isinstance(body, dict) and all(key.startswith("ses_") for key in body):
        return list(body.values())
    return body


def kind_of(event):
    """What tells the shapes of one event type apart."""
    properties = event["properties"]
    part = properties.get("part", {})
    role = properties.get("info", {}).get("role")
    done = "completed" in properties.get("info", {}).get("time", {})
    return event["type"], role, done, part.get("type"), part.get("state", {}).get("status")


EVENTS = [each for each in RECORDED if each["kind"] == "event"]


@pytest.mark.parametrize("real", EVENTS, ids=lambda each: "-".join(map(str, kind_of(each))))
def test_an_event_has_every_field_clients_know(flow, real):
    ours = [each for each in flow.events if kind_of(each) == kind_of(real)]
    assert ours, f"no {kind_of(real)}"
    found = [missing(real["properties"], each["properties"], "body") for each in ours]
    assert [] in found, found[:3]
