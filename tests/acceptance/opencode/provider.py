"""A provider of language models that plays by the script, for servers that take an OpenAI address.

What it answers is in the last thing said: see ``Provider.answer``.
"""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORD_S = 0.05
SUMMARY = "Goal: to see what becomes of it. Done: the words were said. Next: go on."


class Provider:
    """``url`` is what to give as the base address; ``running`` counts streams being written."""

    def __init__(self) -> None:
        self.running = 0
        self.ended_s = 0.0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: dict):
        """The pieces of an answer: texts, pauses in seconds, and one call of a tool as a dict."""
        said = _said(request)
        if re.search(r"title generator", json.dumps(request["messages"][:1])):
            return ["A title"]
        if re.search(r"summar|compact", said, re.IGNORECASE) and "say-" not in said:
            return [0.5, SUMMARY]
        if "words-400" in said:
            return [piece for n in range(400) for piece in (f"word{n} ", WORD_S)]
        for word, command in (("ask-bash", "echo ask-first"), ("sleep-bash", "sleep 60")):
            if word in said:
                if request["messages"][-1]["role"] == "tool":
                    return ["The command has ended."]
                return [_arguments(request, command)]
        found = re.findall(r"say-\w+", said)
        return [0.1, f"You said: {found[-1] if found else said[:40]}"]

    def _handler(self):
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.close_connection = True
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                with provider._lock:
                    provider.running += 1
                try:
                    for line in _chunks(request["model"], provider.answer(request)):
                        self.wfile.write(line)
                        self.wfile.flush()
                except OSError:
                    pass
                finally:
                    with provider._lock:
                        provider.running -= 1
                        provider.ended_s = time.monotonic()

        return Handler


def _said(request: dict) -> str:
    for message in reversed(request["messages"]):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return "\n".join(each.get("text", "") for each in content)
    return ""


def _arguments(request: dict, command: str) -> dict:
    """What this server's bash takes."""
    tools = {each["function"]["name"]: each["function"] for each in request["tools"]}
    given = {"command": command, "description": "Runs a command"}
    known = tools["bash"]["parameters"]["properties"]
    return {name: value for name, value in given.items() if name in known}


def _chunks(model: str, pieces):
    def chunk(delta, finish=None, **more):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        return b"data: %s\n\n" % json.dumps({**body, "choices": [choice], **more}).encode()

    yield chunk({"role": "assistant", "content": ""})
    finish = "stop"
    for piece in pieces:
        if isinstance(piece, float):
            time.sleep(piece)
        elif isinstance(piece, dict):
            call = {"name": "bash", "arguments": json.dumps(piece)}
            made = {"id": f"call_{time.time_ns()}", "type": "function", "function": call}
            yield chunk({"tool_calls": [{"index": 0, **made}]})
            finish = "tool_calls"
        else:
            yield chunk({"content": piece})
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    yield chunk({}, finish, usage=usage)
    yield b"data: [DONE]\n\n"
