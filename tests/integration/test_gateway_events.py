"""Events over HTTP: framed as clients need, resumable, bounded, each encoded once."""

import asyncio
import socket
import time
from types import SimpleNamespace

import msgspec
import pytest
from serving import PATIENCE_S, Stream, say

from understudy.actors import live_text
from understudy.actors.models.acts import Gate, Say, Wait
from understudy.actors.models.scripted import ScriptedModel
from understudy.errors import StoreError
from understudy.gateway.http import events


def make(client, **query):
    return f"/session/{client.post('/session', params=query).json()['id']}"


def raw(server, path, headers=""):
    """A connection that speaks for itself."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode())
    return sock


def test_a_stream_is_framed_for_the_oldest_client(served):
    server = served()
    sock = raw(server, "/event")
    data = b""
    while b"server.connected" not in data:
        data += sock.recv(65536)
    client = server.client()
    client.post(f"{make(client)}/message", json=say("hi"))
    while b"session.idle" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    # Chunks have lines of their own; the events' lines end with LF alone.
    lines = [line for line in body.split(b"\n") if line.startswith((b"data: ", b"id: "))]
    assert lines
    assert not any(line.endswith(b"\r") for line in lines)
    sock.close()


def test_a_turn_is_told_in_order_and_idle_last_and_once(served):
    client = served(ScriptedModel([[Say("a long enough answer", chunks=4)]])).client()
    session = make(client)
    stream = Stream(client)
    stream.until("server.connected")
    client.post(f"{session}/message", json=say("hi"))
    client.post("/session", json={"title": "after"})
    stream.until("session.created")
    types = [kind for kind in stream.types() if not kind.startswith("prompt.")]
    assert types[:4] == [
        "server.connected",
        "message.updated",
        "message.part.updated",
        "session.status",
    ]
    assert types[-2:] == ["session.idle", "session.created"]
    assert types.count("session.idle") == 1
    identities = [event["id"] for event in stream.seen]
    assert len(set(identities)) == len(identities)
    stream.close()


def test_an_answer_is_told_before_its_prompt_is_answered(served):
    client = served().client()
    stream = Stream(client)
    stream.until("server.connected")
    session = make(client)
    client.post(f"{session}/message", json=say("hi"))
    deadline = time.monotonic() + 0.2
    kinds = []
    while "session.idle" not in kinds:
        kinds.append(stream.next(timeout_s=max(0.01, deadline - time.monotonic()))["type"])
    stream.close()


@pytest.mark.parametrize("how", ["after", "header"])
def test_a_stream_resumes_without_a_gap_or_a_double(served, how):
    server = served()
    client = server.client()
    whole = Stream(client)
    whole.until("server.connected")
    first = Stream(client)
    first.until("server.connected")
    session = make(client)
    client.post(f"{session}/message", json=say("one"))
    first.until("session.idle")
    first.close()
    cursor = first.ids[-1]
    client.post(f"{session}/message", json=say("two"))
    again = (
        Stream(client, f"/event?after={cursor}")
        if how == "after"
        else Stream(client, headers={"Last-Event-ID": str(cursor)})
    )
    again.until("server.connected")
    client.post(f"{session}/message", json=say("three"))
    client.post("/session", json={"title": "the end"})

    def is_end(event):
        return event["properties"].get("info", {}).get("title") == "the end"

    again.until(is_end)
    whole.until(is_end)
    assert first.ids + again.ids == whole.ids
    assert whole.ids == list(range(1, whole.ids[-1] + 1))
    told = {event["id"]: event for event in whole.seen}
    assert all(told[event["id"]] == event for event in again.seen if event["id"] in told)
    whole.close()
    again.close()


def test_a_cursor_nobody_gave_out_is_told_as_a_gap(served):
    client = served().client()
    stream = Stream(client, "/event?after=999999")
    assert stream.until("events.gap")["properties"]["after"] == 999999
    make(client)
    stream.until("session.created")
    stream.close()
    for wrong in (b"-1", b"x", b"nan", b"\xb2", b"1e30", b"9" * 5000):
        assert client.get("/event", headers={"Last-Event-ID": wrong}).status_code == 400, wrong
        for path in ("/event", "/understudy/journal"):
            after = wrong.decode("latin-1")
            assert client.get(path, params={"after": after}).status_code == 400, (path, wrong)


def test_a_text_joined_in_its_middle_is_told_as_it_stands(served):
    gate, rest = Gate(), Gate()
    answer = [Say("first half ", chunks=2), Wait(gate), Say("second half", chunks=2), Wait(rest)]
    server = served(ScriptedModel([answer]))
    client = server.client()
    session = make(client)
    client.post(f"{session}/prompt_async", json=say("go"))
    gate.wait_reached()
    stream = Stream(client, "/event?after=0")
    told = stream.until(
        lambda e: (
            e["type"] == "message.part.updated"
            and e["properties"]["part"].get("text") == "first half "
        )
    )
    part = told["properties"]["part"]["id"]
    gate.open()
    rest.wait_reached()
    text = "first half "
    while text != "first half second half":
        event = stream.until(lambda e: e["type"].startswith("message.part."))["properties"]
        if event.get("partID") == part and event["offset"] == len(text):
            text += event["delta"]
        elif event.get("part", {}).get("id") == part:  # what was said before the stream followed
            text = event["part"]["text"]
        assert "first half second half".startswith(text)
    rest.open()
    stream.until("session.idle")
    stream.close()


def test_a_client_that_appends_shows_the_beginning_of_the_text_at_every_moment(served, monkeypatch):
    # The text is written down over and over, each time beside deltas that come meanwhile.
    monkeypatch.setattr(live_text, "FLUSH_AFTER_S", 0.005)
    monkeypatch.setattr(live_text, "FLUSH_EVERY_S", 0.005)
    whole = "".join(f"{number} " for number in range(6000))
    client = served(ScriptedModel([[Say(whole, chunks=3000)]])).client()
    session = make(client)
    stream = Stream(client)
    stream.until("server.connected")
    client.post(f"{session}/message", json=say("go"))
    stream.until("session.idle")
    stream.close()
    text = ""
    for event in stream.seen:
        about = event["properties"]
        if event["type"] == "message.part.delta":
            text += about["delta"]
        elif event["type"] == "message.part.updated" and "time" in about["part"]:
            text = about["part"].get("text", text)
        assert whole.startswith(text)
    assert text == whole


@pytest.mark.parametrize("query", ["", "?after=0"])
def test_who_joins_is_told_nothing_older_than_what_came_before(served, query, eventually):
    gate = Gate()
    server = served(ScriptedModel([[Say("first half "), Wait(gate), Say("second half")]]))
    gateway, client = server.gateway, server.client()
    session = make(client)
    client.post(f"{session}/prompt_async", json=say("go"))
    gate.wait_reached()
    eventually(lambda: "first half" in client.get(f"{session}/message").text)
    read = gateway.read

    async def late(work):
        """What was read, when it is no longer so."""
        found = await read(work)
        gate.open()
        await asyncio.to_thread(eventually, it_is_over)
        return found

    def it_is_over():
        return not server.runtime.statuses() and gateway.hub.cursor >= server.runtime.cursor

    gateway.read = late
    stream = Stream(client, f"/global/event{query}")
    stream.until(lambda event: event["payload"]["type"] == "session.idle")
    eventually(lambda: gateway.hub.connections)
    gateway.read = read
    client.post("/session", json={"title": "after"})
    stream.until(lambda event: event["payload"]["type"] == "session.created")
    stream.close()
    status, text = "", ""
    for event in (each["payload"] for each in stream.seen):
        about = event["properties"]
        if event["type"] == "session.status":
            status = about["status"]["type"]
        elif event["type"] == "message.part.delta":
            text += about["delta"]
        elif event["type"] == "message.part.updated" and "start" in about["part"].get("time", {}):
            text = about["part"].get("text", text)
    assert (status, text) == ("idle", "first half second half")


@pytest.mark.parametrize("moments", range(8))
def test_a_stream_ends_whenever_its_client_hangs_up(moments):
    # Also in the very moment in which an event comes, or has just been sent.
    async def scene():
        hung_up, sent = asyncio.Event(), asyncio.Event()

        async def receive():
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.set()

        async def told(*_):
            return []

        hub = events.Hub(gateway)
        gateway.hub, gateway.recap = hub, told
        stream = events.EventStream(gateway, "/", None)
        task = asyncio.create_task(stream({"method": "GET"}, receive, send))
        for _ in range(50):
            await asyncio.sleep(0)
        assert hub.connections
        hub.broadcast(events.control("some.news", {}, "/"))
        for _ in range(moments):
            await asyncio.sleep(0)
        hung_up.set()
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        for each in asyncio.all_tasks() - {asyncio.current_task()}:
            each.cancel()
        assert done
        assert not hub.connections

    engine = SimpleNamespace(store=SimpleNamespace(read=None))
    gateway = SimpleNamespace(directory="/", runtime=SimpleNamespace(engine=engine))
    asyncio.run(scene())


def test_streams_go_on_after_the_journal_could_not_be_read(served, monkeypatch, caplog, eventually):
    monkeypatch.setattr(events, "RETRY_S", 0.01)
    server = served()
    client = server.client()
    stream = Stream(client)
    stream.until("server.connected")
    everyone = server.runtime.engine.publisher._all
    (subscription,) = (each for each in everyone if each._limit == events._SUBSCRIPTION)
    page, failures = subscription._page, iter(range(3))

    def failing():
        if next(failures, None) is not None:
            raise StoreError("disk I/O error")
        return page()

    monkeypatch.setattr(subscription, "_page", failing)
    subscription.fall_behind()
    make(client)
    stream.until("session.created")
    stream.close()
    again = Stream(client)
    again.until("server.connected")
    eventually(lambda: server.gateway.hub.connections)
    make(client)
    again.until("session.created")
    again.close()
    assert "disk I/O error" in caplog.text


def test_a_stream_that_breaks_off_is_logged(served, caplog):
    server = served()

    async def broken(_):
        raise RuntimeError("no recap today")

    server.gateway.recap = broken
    stream = Stream(server.client())
    assert [event["type"] for event in stream.rest()] == ["server.connected"]
    stream.response.close()
    assert "no recap today" in caplog.text


def test_a_stream_is_of_one_directory_and_the_global_one_of_all(served, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    client = served().client()
    here, there = Stream(client), Stream(client, "/event", params={"directory": str(other)})
    everywhere = Stream(client, "/global/event")
    for stream in (here, there):
        stream.until("server.connected")
    everywhere.until(lambda event: event["payload"]["type"] == "server.connected")
    make(client)
    make(client, directory=str(other))
    created = [
        everywhere.until(lambda event: event["payload"]["type"] == "session.created")
        for _ in range(2)
    ]
    assert [event["directory"] for event in created] == [str(tmp_path / "work"), str(other)]
    assert here.until("session.created") == created[0]["payload"]
    assert there.until("session.created") == created[1]["payload"]
    for stream in (here, there, everywhere):
        stream.close()


def test_a_slow_client_is_told_and_dropped_and_nobody_waits_for_it(served, monkeypatch):
    monkeypatch.setattr(events, "BUFFER_BYTES", 1_000_000)
    server = served(ScriptedModel(lambda _: Say("x" * 400_000, chunks=20)))
    client = server.client()
    slow = raw(server, "/event")
    data = b""
    while b"server.connected" not in data:
        data += slow.recv(1024)
    quick = Stream(client)
    quick.until("server.connected")
    for _ in range(40):
        client.post(f"{make(client)}/message", json=say("go"))
        quick.until("session.idle")
    slow.settimeout(10)
    while piece := slow.recv(1 << 20):
        data += piece
        if data.endswith(b"0\r\n\r\n"):
            break
    [told] = [line for line in data.split(b"\n") if b'"events.overflow"' in line]
    properties = msgspec.json.decode(told.removeprefix(b"data: "))["properties"]
    cursors = [int(line[4:]) for line in data.split(b"\n") if line.startswith(b"id: ")]
    assert properties["cursor"] == cursors[-1]
    assert properties["dropped"] > 0
    resumed = Stream(client, f"/event?after={properties['cursor']}")
    resumed.until("session.idle")
    assert resumed.ids[0] == cursors[-1] + 1
    for stream in (quick, resumed):
        stream.close()
    slow.close()


def test_an_event_is_encoded_once_for_all_connections(served, monkeypatch):
    server = served()
    client = server.client()
    encoded = []
    whole = events.Hub.item
    monkeypatch.setattr(
        events.Hub, "item", lambda self, event: encoded.append(event) or whole(self, event)
    )
    streams = [Stream(client) for _ in range(20)]
    for stream in streams:
        stream.until("server.connected")
    make(client)
    for stream in streams:
        stream.until("session.created")
    assert len(encoded) == 1
    for stream in streams:
        stream.close()


def test_streams_end_when_the_server_does(served):
    server = served()
    stream = Stream(server.client())
    stream.until("server.connected")
    server.stop()
    stream.rest()
    assert stream.types() == ["server.connected"]
