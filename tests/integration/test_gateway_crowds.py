"""Many connections at once, and those that do not read: told, dropped, and able to resume."""

import asyncio
import json
import re
import socket
import threading

from serving import Stream, say

from understudy.actors.models.acts import Say
from understudy.actors.models.scripted import ScriptedModel
from understudy.gateway.http import events

PATIENCE_S = 15.0
REQUEST = b"GET /event%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def ids_in(data):
    return [int(each) for each in re.findall(rb"^id: (\d+)$", data, re.MULTILINE)]


def told_in(data):
    """Every event but the connection's own, also those without a cursor."""
    return re.findall(rb'"id":"(evt_\w+)","type":"(?!server)', data)


async def read_until(reader, wanted):
    data = b""
    while wanted not in data[-200_000:]:
        piece = await reader.read(65536)
        assert piece, "the stream ended"
        data += piece
    return data


def test_three_hundred_connections_each_get_every_event(served):
    server = served(ScriptedModel([[Say("an answer of some words", chunks=4)]] * 5))
    client = server.client()
    port = int(server.url.rpartition(":")[2])
    opened = threading.Event()

    async def listen():
        pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        for _, writer in pairs:
            writer.write(REQUEST % b"")
        await asyncio.gather(*(read_until(reader, b"server.connected") for reader, _ in pairs))
        opened.set()
        told = await asyncio.gather(*(read_until(reader, b"the end") for reader, _ in pairs))
        for _, writer in pairs:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in pairs), return_exceptions=True)
        return told

    found = []
    thread = threading.Thread(
        target=lambda: found.extend(asyncio.run(asyncio.wait_for(listen(), 2 * PATIENCE_S))),
        daemon=True,
    )
    thread.start()
    assert opened.wait(PATIENCE_S)
    url = f"/session/{client.post('/session').json()['id']}"
    for number in range(5):
        client.post(f"{url}/message", json=say(f"prompt {number}"))
    client.post("/session", json={"title": "the end"})
    thread.join(2 * PATIENCE_S)
    journal = client.get("/understudy/journal", params={"limit": 1000}).json()["events"]
    truth = [each["cursor"] for each in journal]
    assert len(found) == 300
    for data in found:
        assert ids_in(data) == truth
        assert told_in(data) == told_in(found[0])


def test_a_client_that_stops_reading_is_told_where_to_resume(served, monkeypatch, eventually):
    monkeypatch.setattr(events, "STALLED_S", 0.2)
    server = served()
    client = server.client()
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE_S)
        sock.connect(("127.0.0.1", port))
        sock.sendall(REQUEST % b"")
        data = sock.recv(1024)
        url = f"/session/{client.post('/session').json()['id']}"
        connections = lambda: client.get("/understudy/state").json()["connections"]  # noqa: E731
        assert connections() == 1
        for _ in range(8):
            client.post(f"{url}/message", json=say("long " * 40_000))
        eventually(lambda: connections() == 0)
        client.post(f"{url}/message", json=say("after the cut"))
        while piece := sock.recv(65536):
            data += piece
    last = [line for line in data.split(b"\n") if line.startswith(b"data: ")][-1]
    note = json.loads(last[6:])
    assert note["type"] == "events.overflow"
    cursor = note["properties"]["cursor"]
    seen = ids_in(data)
    assert seen[-1] == cursor
    rest = Stream(client, f"/event?after={cursor}")
    rest.until(lambda event: "after the cut" in json.dumps(event))
    rest.until("session.idle")
    rest.close()
    journal = client.get("/understudy/journal", params={"limit": 1000}).json()["events"]
    truth = [each["cursor"] for each in journal if each["cursor"] >= seen[0]]
    assert [*seen, *rest.ids][: len(truth)] == truth
    assert client.get("/understudy/state").json()["dropped"] == 1


def test_what_a_connection_holds_is_bounded(served, monkeypatch):
    monkeypatch.setattr(events, "CHUNK_BYTES", 1000)
    sizes = []
    take = events.Connection.take

    async def taking(connection):
        chunk = await take(connection)
        sizes.append(len(chunk.data) if chunk is not None else 0)
        return chunk

    monkeypatch.setattr(events.Connection, "take", taking)
    client = served().client()
    stream = Stream(client)
    url = f"/session/{client.post('/session').json()['id']}"
    client.post(f"{url}/message", json=say("hi"))
    stream.until("session.idle")
    stream.close()
    longest = max(len(json.dumps(event)) for event in stream.seen)
    assert 0 < max(sizes) < 1000 + longest + 100
