"""A server of the gateway in a thread, and clients of it."""

import asyncio
import json
import queue
import socket
import threading
import time

import httpx

from understudy.gateway.http.app import application
from understudy.gateway.http.serve import Server, build, config, listen

PATIENCE_S = 15.0  # a bound on failures; nothing waits that long when all is well


class Served:
    """A started server; ``client()`` gives clients of it, ``stop()`` ends it as SIGTERM would."""

    def __init__(self, database, directory, *models, access=None, **options):
        options.setdefault("durability", "normal")
        self.gateway = build(database, models=list(models), directory=str(directory), **options)
        self.runtime = self.gateway.runtime.start()
        sock = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.server = Server(self.gateway, config(application(self.gateway, **(access or {}))))
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[sock])), daemon=True
        )
        self.thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not self.server.started:  # bound already, but not yet listening
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.002)
        self._clients = []

    def client(self, **options):
        client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False, **options)
        self._clients.append(client)
        return client

    def stop(self):
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the server did not end"
        for client in self._clients:
            client.close()


class Stream:
    """The events of a connection as they arrive; ``seen`` keeps them."""

    def __init__(self, client, path="/event", **options):
        self.seen = []
        self.ids = []
        self._queue = queue.SimpleQueue()
        self._context = client.stream("GET", path, **options)
        self.response = self._context.__enter__()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            data = ""
            for line in self.response.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(int(line[4:]))
                elif line.startswith("data: "):
                    data = line[6:]
                elif data:
                    self._queue.put(json.loads(data))
                    data = ""
        except (httpx.HTTPError, httpx.StreamError, OSError):
            pass
        self._queue.put(None)

    def next(self, timeout_s=PATIENCE_S):
        """The next event; None at the end of the stream."""
        event = self._queue.get(timeout=timeout_s)
        if event is not None:
            self.seen.append(event)
        return event

    def until(self, wanted):
        """The next event of this type, or for which this is true."""
        matches = wanted if callable(wanted) else lambda event: event["type"] == wanted
        while (event := self.next()) is not None:
            if matches(event):
                return event
        raise AssertionError(f"the stream ended before {wanted}: {self.types()}")

    def rest(self):
        """Everything up to the end of the stream."""
        while self.next() is not None:
            pass
        return self.seen

    def types(self):
        return [event["type"] for event in self.seen]

    def close(self):
        network = self.response.extensions["network_stream"]
        network.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self.response.close()


def text_of(answer):
    return "".join(part["text"] for part in answer["parts"] if part["type"] == "text")


def say(text, **more):
    """The body of a prompt."""
    return {"parts": [{"type": "text", "text": text}], **more}
