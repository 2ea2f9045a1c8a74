"""The same experiments on OpenCode and on understudy, side by side, as one table.

Each experiment is a function of a contender that has been started, and of the provider of its
model; it yields what it looked at with what it saw.
"""

# ruff: noqa: T201 - it is a command

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
from contenders import Contender, Events, OpenCode, Understudy, session_of
from provider import Provider

Seen = Iterator[tuple[str, str]]
ALLOW = [{"permission": "bash", "pattern": "*", "action": "allow"}]
ASK = [{"permission": "bash", "pattern": "*", "action": "ask"}]


def start(one: Contender, _: Provider) -> Seen:
    """Ready when a client can list sessions."""
    times = []
    for _ in range(3):
        one.kill()
        times.append(one.start())
    yield "start until sessions can be listed", f"{statistics.median(times):.1f} s"
    yield "memory, idle", f"{one.memory_mb():.0f} MB"


def kill_in_a_turn(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    events = Events(one)
    one.prompt_async(session_id, "words-400 say-first")
    one.until(partial(_has_said, events, session_id, 20))
    one.prompt_async(session_id, "say-second")
    time.sleep(0.3)
    one.kill()
    events.close()
    one.start()
    events = Events(one)
    time.sleep(3)
    events.close()
    answers = _answers(one, session_id)
    broken = answers[0]
    ended = bool(broken["info"]["time"].get("completed"))
    error = broken["info"].get("error", {}).get("name", "no error")
    yield (
        "`kill -9` while it answers: the answer after the restart",
        f"closed, {error}" if ended else "open for ever",
    )
    kept = len(_text(broken).split())
    yield "… words of it that were kept, of some 20 shown", str(kept)
    told = any(each["info"].get("role") == "assistant" for each in _infos(events, session_id))
    yield "… a client that reconnects is told", "yes" if told else "no"
    second = "say-second" in "".join(map(_text, answers))
    yield "… the prompt that waited behind it", "answered" if second else "not answered"
    reply = one.prompt(session_id, "say-third")
    yield "… the next prompt", _verdict(reply, "say-third")


def kill_in_a_tool(one: Contender, _: Provider) -> Seen:
    session_id = one.client.post("/session", json={"permission": ALLOW}).json()["id"]
    one.prompt_async(session_id, "sleep-bash")
    one.until(lambda: _tool_status(one, session_id) == "running")
    one.kill()
    one.start()
    time.sleep(2)
    yield (
        "`kill -9` while a tool runs: the tool after the restart",
        _tool_status(one, session_id),
    )


def pending_permission(one: Contender, _: Provider) -> Seen:
    session_id = one.client.post("/session", json={"permission": ASK}).json()["id"]
    one.prompt_async(session_id, "ask-bash")
    one.until(lambda: bool(one.client.get("/permission").json()))
    one.kill()
    one.start()
    time.sleep(2)
    left = one.client.get("/permission").json()
    yield "a permission that waits over a `kill -9`", "still waits" if left else "gone"
    for each in left:
        one.client.post(f"/permission/{each['id']}/reply", json={"reply": "once"})
    done = bool(left) and one.until(lambda: _tool_status(one, session_id) == "completed")
    yield (
        "… answered after the restart",
        "the tool ran" if done else f"the tool's state: {_tool_status(one, session_id)}",
    )


def delete_while_it_answers(one: Contender, provider: Provider) -> Seen:
    stopped, late, back = [], 0, 0
    for _ in range(5):
        session_id = one.create()
        events = Events(one)
        one.prompt_async(session_id, "words-400")
        one.until(partial(_has_said, events, session_id, 10))
        one.client.delete(f"/session/{session_id}")
        gone_s = time.monotonic()
        one.until(lambda: provider.running == 0, 25)
        stopped.append(max(0.0, provider.ended_s - gone_s))
        time.sleep(1)
        seen = [event for _, _, event in events.seen if session_of(event) == session_id]
        types = [event["type"] for event in seen]
        late += len(types) - 1 - types.index("session.deleted")
        back += session_id in one.listed()
        events.close()
    yield "delete while it answers: the model's stream ends after", f"{max(stopped):.2f} s"
    yield "… events of the session after `session.deleted`, 5 runs", str(late)
    yield "… of 5 listed again", str(back)


def five_deletes(one: Contender, _: Provider) -> Seen:
    """The reproduction of anomalyco/opencode#5517."""
    with ThreadPoolExecutor(5) as pool:
        for runs, running in ((200, False), (50, True)):
            ghosts = failed = 0
            took = []
            for _ in range(runs):
                ids = [one.create() for _ in range(5)]
                if running:
                    list(pool.map(lambda each: one.prompt_async(each, "words-400"), ids))
                began = time.monotonic()
                answers = list(pool.map(lambda each: one.client.delete(f"/session/{each}"), ids))
                took.append(time.monotonic() - began)
                failed += sum(each.status_code != 200 for each in answers)
                ghosts += len(one.listed() & set(ids))
            what = f"five deletes at once, {runs} times" + (", in turns" if running else "")
            yield f"{what}: listed afterwards; refused", f"{ghosts}; {failed}"
            yield (
                f"… time for the five{', in turns' if running else ''}, median",
                f"{statistics.median(took) * 1000:.0f} ms",
            )
            if running:
                time.sleep(2)
                yield "… still busy after two seconds", str(len(one.statuses()))


def concurrent_prompts(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    words = [f"say-{name}" for name in ("ann", "bob", "cid", "dot", "eve")]
    with ThreadPoolExecutor(5) as pool:
        replies = list(pool.map(lambda word: one.prompt(session_id, word), words))
    own = sum(
        reply.status_code == 200 and word in _text(reply.json())
        for word, reply in zip(words, replies, strict=True)
    )
    yield "five prompts to one session at once: answered with their own answer", f"{own} of 5"
    said = " ".join(map(_text, _answers(one, session_id)))
    yield "… answers in the transcript", f"{sum(word in said for word in words)} of 5"


def overlapping_compactions(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    for _ in range(3):
        one.prompt(session_id, "say-" + "longer" * 400)
    body = dict(one.model)
    path = f"/session/{session_id}/summarize"
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(one.client.post, path, json=body) for _ in range(3)]
        time.sleep(0.2)
        prompted = pool.submit(one.prompt, session_id, "say-meanwhile")
        results = [_settled(each) for each in calls]
        reply = prompted.result()
    found = one.messages(session_id)
    markers = sum(part["type"] == "compaction" for each in found for part in each["parts"])
    summaries = [each for each in found if each["info"].get("summary") is True]
    yield "three compactions at once: answers", ", ".join(sorted(results))
    yield "… markers; summaries written", f"{markers}; {len(summaries)}"
    yield "… a prompt meanwhile", _verdict(reply, "say-meanwhile")
    yield "… the next prompt", _verdict(one.prompt(session_id, "say-after"), "say-after")
    yield "… idle in the end", "yes" if one.idle(session_id) else "no"


def kill_in_a_compaction(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    one.prompt(session_id, "say-" + "longer" * 400)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(
            one.client.post, f"/session/{session_id}/summarize", json=dict(one.model)
        )
        one.until(lambda: any(_is_marker(each) for each in one.messages(session_id)))
        time.sleep(0.2)
        one.kill()
        with suppress(httpx.TransportError):
            call.result()
    one.start()
    time.sleep(1)
    open_ones = sum(
        not each["info"]["time"].get("completed")
        for each in one.messages(session_id)
        if each["info"]["role"] == "assistant"
    )
    yield "`kill -9` in a compaction: messages left open", str(open_ones)
    yield "… the next prompt", _verdict(one.prompt(session_id, "say-again"), "say-again")


def reconnecting_stream(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    events, witness = Events(one), Events(one)
    one.prompt(session_id, "say-one")
    last = next((number for _, number, _ in reversed(events.seen) if number), None)
    events.close()
    one.prompt(session_id, "say-two")
    headers = {"Last-Event-ID": last} if last else {}
    again = Events(one, **headers)
    one.prompt(session_id, "say-three")
    time.sleep(1)
    kept = ("message.updated", "message.part.updated", "session.")
    truth = [e["id"] for e in witness.all(session_id=session_id) if e["type"].startswith(kept)]
    got = [e["id"] for each in (events, again) for e in each.all(session_id=session_id)]
    for each in (again, witness):
        each.close()
    missed = sum(each not in got for each in truth)
    yield "a stream that reconnects: events missed meanwhile", f"{missed} of {len(truth)}"


def mistakes(one: Contender, _: Provider) -> Seen:
    session_id = one.create()
    body = one.body("say-x") | {"model": {"providerID": "nobody", "modelID": "nothing"}}
    reply = one.client.post(f"/session/{session_id}/message", json=body)
    yield "an unknown model", _refused(reply)
    body = {"parts": [{"type": "text", "text": "say-y"}]}
    reply = one.client.post(f"/session/{session_id}/message", json=body)
    yield "… the next prompt, which names none", _verdict(reply, "say-y")
    reply = one.client.post(f"/session/{session_id}/message", json=one.body("x") | {"agent": "no"})
    yield "an unknown agent", _refused(reply)
    yield "an id that is no session's", _refused(one.client.get("/session/nonsense"))
    yield "an unknown path", _refused(one.client.get("/no/such/path"))
    malformed = one.client.post("/session", content=b"{", headers={"content-type": "text/json"})
    yield "a body that is not JSON", _refused(malformed)


def termination(one: Contender, _: Provider) -> Seen:
    ids = [one.create() for _ in range(40)]
    for each in ids[:20]:
        one.prompt_async(each, "words-400")
    time.sleep(0.5)
    with ThreadPoolExecutor(8) as pool:
        deletes = [pool.submit(one.client.delete, f"/session/{each}") for each in ids[10:]]
        took_s = one.terminate()
    gone = {
        each
        for each, call in zip(ids[10:], deletes, strict=True)
        if call.exception() is None and call.result().status_code == 200
    }
    one.start()
    time.sleep(1)
    yield "SIGTERM in turns and deletes: ends after", f"{took_s:.1f} s"
    yield "… deletes acknowledged, but listed after the restart", str(len(gone & one.listed()))
    open_ones = sum(
        not answer["info"]["time"].get("completed")
        for each in ids[:10]
        for answer in _answers(one, each)
    )
    yield "… answers left open, of 10 running", str(open_ones)


EXPERIMENTS: tuple[Callable[[Contender, Provider], Seen], ...] = (
    start,
    kill_in_a_turn,
    kill_in_a_tool,
    pending_permission,
    kill_in_a_compaction,
    delete_while_it_answers,
    five_deletes,
    concurrent_prompts,
    overlapping_compactions,
    reconnecting_stream,
    mistakes,
    termination,
)


def main(names: list[str]) -> int:
    """Run the experiments named, or all, and print the table."""
    chosen = [each for each in EXPERIMENTS if not names or each.__name__ in names]
    rows: dict[str, dict[str, str]] = {}
    contenders = (OpenCode, Understudy)
    for experiment in chosen:
        for kind in contenders:
            with tempfile.TemporaryDirectory() as folder:
                for what, value in _seen(experiment, kind, Path(folder)):
                    key = f"{experiment.__name__}: {what}"
                    rows.setdefault(key, {"what": what})[kind.name] = value
                    print(f"{kind.name}: {what}: {value}", file=sys.stderr, flush=True)
    print(f"| what | {' | '.join(each.name for each in contenders)} |")
    print("|---|---|---|")
    for row in rows.values():
        print(f"| {row['what']} | {' | '.join(row.get(each.name, '') for each in contenders)} |")
    return 0


def _seen(experiment, kind: type[Contender], folder: Path) -> Seen:
    provider = Provider()
    one = kind(folder, provider.url)
    try:
        one.start()
        yield from experiment(one, provider)
    finally:
        one.kill()
        one.client.close()
        provider.close()


# --- reading answers ---------------------------------------------------------------------------


def _has_said(events: Events, session_id: str, words: int) -> bool:
    return len(events.all("message.part.delta", session_id)) > words


def _answers(one: Contender, session_id: str) -> list[dict]:
    return [each for each in one.messages(session_id) if each["info"]["role"] == "assistant"]


def _text(message: dict) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def _infos(events: Events, session_id: str) -> list[dict]:
    return [each["properties"] for each in events.all("message.updated", session_id)]


def _is_marker(message: dict) -> bool:
    return any(part["type"] == "compaction" for part in message["parts"])


def _tool_status(one: Contender, session_id: str) -> str:
    found = [
        part["state"]["status"]
        for each in one.messages(session_id)
        for part in each["parts"]
        if part["type"] == "tool"
    ]
    return found[-1] if found else "none"


def _verdict(reply: httpx.Response, word: str) -> str:
    if reply.status_code != 200:
        return _refused(reply)
    said = _text(reply.json())
    if word in said:
        return "answered"
    return f"another answer: {said[:40]!r}" if said else "an empty answer"


def _refused(reply: httpx.Response) -> str:
    if "json" not in reply.headers.get("content-type", ""):
        kind = reply.headers.get("content-type", "no body").partition(";")[0]
        return f"{reply.status_code}, {kind}"
    body = reply.json()
    name = body.get("name") or body.get("_tag") if isinstance(body, dict) else None
    return f"{reply.status_code} {name or ''}".strip()


def _settled(call) -> str:
    with suppress(httpx.TransportError):
        return str(call.result().status_code)
    return "no answer"
