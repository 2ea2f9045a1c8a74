"""Rules about single events: what may follow what, in one session's story.

Each rule gets the story before the event and says what is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from understudy.gateway.fold import KEYS, Row, is_open
from understudy.testing.story import Story, outcome

Finding: TypeAlias = tuple[str, str]
"""(the guarantee that was broken, what was found)."""

QUEUE: Final = 4  # prompts that may wait
MODEL_ATTEMPTS: Final = 3
ATTEMPTS: Final = 5  # of a prompt or a summary, at most: with those after restarts
TOOL_S: Final = 15.0  # of a call, without what it waits for people
IDLE_S: Final = 10.0  # that a model may say nothing
STEPS: Final = 6  # of a turn, for each actor that carries it on
BREAKER: Final = 2  # failed compactions in a row after which there are no automatic ones
CUT_SHORT: Final = {"MessageAbortedError", "InterruptedError", "TurnTimeoutError"}
_OUTCOMES: Final = {"answered", "interrupted", "failed"}


# --- records -----------------------------------------------------------------------------------


def put(story: Story, table: str, record: Row) -> Iterator[Finding]:
    """A record is new, or changed."""
    key = record[KEYS[table]]
    old = story.tables[table].get(key)
    if old is not None and is_open(table, record) and not is_open(table, old):
        yield "one terminal state", f"{table} {key} is open again"
    if old is not None and outcome(table, old) not in (None, outcome(table, record)):
        yield "one terminal state", f"{table} {key} ended twice"
    elif old is not None and record.get("type") == "tool" and not is_open(table, old):
        yield "one terminal state", f"{table} {key} is written after its end"
    if table == "part":
        yield from _part(story, record, old)
    elif table == "message" and _is_over(old) and old != record:
        yield "a finished answer stays", key
    elif table == "session" and old is not None and record["title"] != old["title"]:
        if record["title"] in story.titles:
            yield "no update is lost", f"the title is {record['title']!r} again"
    elif table == "ask" and old is None and not is_open("ask", record):
        yield "asked before answered", key


def _is_over(message: Row | None) -> bool:
    return (
        message is not None and message["role"] == "assistant" and not is_open("message", message)
    )


def _part(story: Story, part: Row, old: Row | None) -> Iterator[Finding]:
    if part["messageID"] not in story.tables["message"]:
        yield "parts have messages", part["id"]
    elif part["type"] in ("text", "reasoning") and old is not None:
        ended = not is_open("part", old)
        if not part["text"].startswith(old["text"]) or (ended and part["text"] != old["text"]):
            yield "text only grows", f"{part['id']}: {old['text']!r}, then {part['text']!r}"
    elif part["type"] == "tool" and not story.newborn:
        yield from _call(part, old)
    elif part["type"] == "compaction":
        yield from _marker(story, part, old)
    elif part["type"] == "retry" and old is None:
        if _has_text(story, part["messageID"]):
            yield "a retry repeats nothing", f"{part['messageID']} has text already"
        if story.limited and part["attempt"] >= MODEL_ATTEMPTS:
            yield "attempts are bounded", f"{part['messageID']}: {part['attempt']} failed"


def _has_text(story: Story, message_id: str) -> bool:
    parts = story.parts_of(message_id)
    return any(part["type"] in ("text", "reasoning") and part["text"] for part in parts)


def _call(part: Row, old: Row | None) -> Iterator[Finding]:
    before = old["state"]["status"] if old is not None else None
    now = part["state"]["status"]
    if now == "completed" and before not in ("running", now):
        yield "a call's start comes first", f"{part['id']} is completed and was {before}"
    if now == "pending" and before == "running":
        yield "a call's start comes first", f"{part['id']} is pending and was running"


def _marker(story: Story, part: Row, old: Row | None) -> Iterator[Finding]:
    summaries = story.summaries.setdefault(part["id"], set())
    if part["summaryID"] is not None:
        summaries.add(part["summaryID"])
    if max(len(summaries), part["attempts"]) > ATTEMPTS:
        yield "a compaction ends", f"{part['id']}, attempt {len(summaries)}"
    failures = story.record.get("compaction_failures", 0)
    became_auto = part["auto"] and not (old is not None and old["auto"])
    if became_auto and not story.newborn and failures >= BREAKER:
        yield "the breaker breaks", f"{part['id']} after {failures} failures"
    if part["state"] == "committed" and (old is None or old["state"] != "committed"):
        summary = story.tables["message"].get(part["summaryID"] or "")
        empty = summary is not None and not story.text_of(summary["id"]).strip()
        # A fork's copy names its summary before it is there.
        if (summary is None and not story.newborn) or empty:
            yield "no empty summary", f"{part['id']} is committed"
        yield from _between(story, part)
        if summary is not None and ("error" in summary or is_open("message", summary)):
            yield "no failed summary", f"{part['id']} is committed"


def _between(story: Story, marker: Row) -> Iterator[Finding]:
    """What is kept begins where the summary ends."""
    order = [message["id"] for message in story.transcript() if story.is_talk(message)]
    end, start = marker["headEndID"], marker["tailStartID"]
    if end in order and start in order and order.index(start) != order.index(end) + 1:
        yield "no message is lost between summary and tail", f"{end}, {start}"


# --- prompts -----------------------------------------------------------------------------------


def prompt(story: Story, kind: str, info: Row) -> Iterator[Finding]:
    """A prompt was accepted, started or settled."""
    message_id = info["messageID"]
    if kind == "prompt.accepted":
        if message_id in story.accepted:
            yield "accepted once", message_id
        if story.quarantined:
            yield "a quarantined session rests", f"{message_id} is accepted"
        yield from _full(story, info)
        return
    if message_id not in story.accepted:
        yield "accepted first", f"{kind} {message_id}"
    if message_id in story.settled:
        yield "one outcome per prompt", f"{kind} after the outcome of {message_id}"
    if kind == "prompt.settled":
        if info.get("outcome") not in _OUTCOMES:
            yield "one outcome per prompt", f"{message_id}: {info.get('outcome')}"
        yield from _answered(story, info)
        yield from _cut_short(story, info)
        return
    if story.quarantined:
        yield "a quarantined session rests", f"{message_id} is started"
    if info.get("attempts", 0) > ATTEMPTS:
        yield "attempts are bounded", f"{message_id}: {info['attempts']}"
    if message_id not in story.started:
        yield from _order(story, info)


def _full(story: Story, info: Row) -> Iterator[Finding]:
    """There is no room for it; the runtime's own prompts need none."""
    if story.tables["message"].get(info["messageID"], {}).get("synthetic"):
        return
    when_busy = info.get("when_busy", "queue")
    if when_busy == "reject" and story.busy():
        yield "who would rather not wait does not", f"{info['messageID']} is accepted"
    waiting = [each for each in story.unsettled() if each not in story.started]
    if story.limited and len(waiting) >= QUEUE:
        yield "queues are bounded", f"{info['messageID']} after {waiting}"


def _answered(story: Story, info: Row) -> Iterator[Finding]:
    if info.get("outcome") != "answered":
        return
    reply = story.tables["message"].get(info.get("reply_id") or "")
    if reply is None or is_open("message", reply) or "error" in reply:
        yield "an answer is there", f"{info['messageID']} is answered by {info.get('reply_id')}"


def _cut_short(story: Story, info: Row) -> Iterator[Finding]:
    """Who asked is told which answer was cut short."""
    if info.get("outcome") == "answered" or "turn" not in info:
        return
    steps = [
        each
        for each in story.tables["message"].values()
        if each["role"] == "assistant" and each["turn"] == info["turn"] and not each.get("summary")
    ]
    last = max(steps, key=lambda step: story.places[step["id"]], default=None)
    cut = last is not None and last.get("error", {}).get("name") in CUT_SHORT
    if last is not None and cut and info.get("reply_id") != last["id"]:
        yield "an end says where", f"{info['messageID']}: {info.get('reply_id')}"


def _order(story: Story, info: Row) -> Iterator[Finding]:
    """Who was accepted before, of the same kind, goes first; who interrupts, before the others."""
    when_busy = info.get("when_busy", "queue")
    message_id = info["messageID"]
    for earlier in story.waiting(when_busy):
        if earlier == message_id:
            break
        yield "FIFO", f"{message_id} passed {earlier}"
    if when_busy in ("queue", "reject") and (first := story.waiting("interrupt")):
        yield "interruptions go first", f"{message_id} passed {first[0]}"
    if when_busy != "steer" and (running := story.hosts()):
        yield "one turn at a time", f"{message_id} starts beside {running[0]['messageID']}"


def opened(story: Story, message: Row, epoch: int) -> Iterator[Finding]:
    """An answer is begun: who steers has joined by now. An actor counts the steps it has seen."""
    if message.get("summary"):
        marker = story.parts_of(message["parentID"])
        if not any(part["type"] == "compaction" for part in marker):
            yield "a summary names its marker", f"{message['id']}: {message['parentID']}"
        return
    if message["parentID"] != story.turns.get(message["turn"]):
        yield "an answer names its prompt", f"{message['id']}: {message['parentID']}"
    if late := story.waiting("steer"):
        yield "steering joins the next step", f"{late[0]} waits while {message['id']} begins"
    steps = [
        each
        for each in story.tables["message"].values()
        if each.get("parentID") == message["parentID"] and "error" not in each
        if story.lives.get(each["id"]) == epoch
    ]
    if story.limited and len(steps) >= STEPS:
        yield "steps are bounded", f"step {len(steps) + 1} of {message['parentID']}"


def unreverted(story: Story, record: Row) -> Iterator[Finding]:
    """A revert ends, and nobody took it back: what it hid is gone."""
    if "revert" in story.record and "revert" not in record:
        for hidden in story.hidden & story.tables["message"].keys():
            yield "a revert is final", f"{hidden} is shown again"


# --- supervision -------------------------------------------------------------------------------


def crashed(story: Story, consecutive: int) -> Iterator[Finding]:
    """Crashes are counted one by one; only an answer or a reset starts the count again."""
    expected = 1 if story.forgivable else story.crashes + 1
    if consecutive != expected:
        yield "crashes are counted", f"{consecutive} after {story.crashes}"


def restarted(story: Story, now_s: float, backoff_s: float) -> Iterator[Finding]:
    """Not before its pause; jitter takes up to half of it."""
    pause_s = backoff_s * 2.0 ** max(0, story.crashes - 1) / 2.0
    if now_s - story.crashed_s < min(15.0, pause_s) - 1e-3:
        yield "restarts back off", f"after {now_s - story.crashed_s:.3f} s, not {pause_s:g} s"
