"""Stories: what the journal says of one session, from its creation on, as decoded JSON."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from understudy.gateway.fold import KEYS, Row, Tables, is_open, no_tables

QUEUED = float("inf")  # where messages without a turn stand in a transcript


class Story:
    """One life of a session id.

    Attributes:
        limited: its runtimes have the limits that ``rules`` names.
        tables: its records, folded from its events.
        places: when each message and part was first told of: their order in the transcript.
        accepted, started, settled: message ids of prompts; the first in order.
        newborn: nothing but its creation has been committed.
        idle_told: ``session.idle`` came after the last time it was busy.
        titles: every title it had.
        used: tokens of its finished answers, and what it was born with.
        cost: what they cost.
        edited: the messages that a part was taken out of.
        heard: every text it ever had.
        copied: what people said in it when it was made: a fork's.
        cut_short: the conversations before the last answers that ended with an error.
        summaries: ids of the summaries each marker had, by the marker's part.
        failed: a compaction failed, and that was not counted yet.
        follow_up: a compaction took effect after which the work is to go on, and does not yet.
        crashes: of its actor, in a row, as the last one said; ``forgivable`` since an answer.
        condemned: that was one too many, and it is not in quarantine yet.
        reset_at: the cursor of its last reset.
        lives: the epoch in which each answer was begun.
        turns: the prompt that each turn was started for.
        hidden: the messages that its last revert took back; ``reverted_at``: its cursor.
        summarised: ids of the summaries that a model was asked for.
        crashed_s, quarantined_s: when its actor last died, and when it was put in quarantine.
    """

    def __init__(self, session_id: str, number: int = 1, *, limited: bool = False) -> None:
        self.id = session_id
        self.limited = limited
        self.number = number
        self.tables: Tables = no_tables()
        self.places: dict[str, int] = {}
        self.deleted = False
        self.newborn = True
        self.quarantined = False
        self.quarantined_s = 0.0
        self.status = "idle"
        self.idle_told = True
        self.accepted: list[str] = []
        self.started: set[str] = set()
        self.settled: set[str] = set()
        self.titles: list[str] = []
        self.used = 0
        self.heard: set[str] = set()
        self.cost = 0.0
        self.edited: set[str] = set()
        self.copied: list[str] = []
        self.cut_short: deque[list[str]] = deque(maxlen=16)
        self.summaries: dict[str, set[str]] = {}
        self.crashes = 0
        self.forgivable = True
        self.condemned = False
        self.reset_at = 0
        self.lives: dict[str, int] = {}
        self.turns: dict[int, str] = {}
        self.hidden: set[str] = set()
        self.reverted_at = 0
        self.summarised: set[str] = set()
        self.failed = False
        self.follow_up = False
        self.crashed_s = 0.0

    @property
    def record(self) -> Row:
        return self.tables["session"].get(self.id, {})

    # --- what is open --------------------------------------------------------------------------

    def open_rows(self) -> Iterator[tuple[str, Row]]:
        for table, rows in self.tables.items():
            for record in rows.values():
                if is_open(table, record):
                    yield table, record

    def busy(self) -> bool:
        return any(True for _ in self.open_rows())

    def running(self) -> bool:
        """Something is under way. A runtime that closes leaves prompts queued, and is idle."""
        return any(table != "inbox" or "turn" in record for table, record in self.open_rows())

    def hosts(self) -> list[Row]:
        """Prompts that were started and have no outcome."""
        prompts = self.tables["inbox"]
        return [prompts[m] for m in self.started - self.settled if m in prompts]

    def unsettled(self) -> list[str]:
        return [each for each in self.accepted if each not in self.settled]

    def waiting(self, when_busy: str) -> list[str]:
        """Prompts of a kind that were accepted and neither started nor settled, in order."""
        prompts = self.tables["inbox"]
        return [
            each
            for each in self.accepted
            if each not in self.started
            and each not in self.settled
            and prompts[each].get("when_busy", "queue") == when_busy
        ]

    def open_messages(self) -> list[Row]:
        return [each for each in self.tables["message"].values() if is_open("message", each)]

    def asks_people(self, call: Row | None = None) -> bool:
        """A person is asked, by this call or by any."""
        return any(
            is_open("ask", ask) and (call is None or ask.get("callID") == call["callID"])
            for ask in self.tables["ask"].values()
        )

    def open_answer(self) -> Row | None:
        """The answer that is being written, if it is no summary."""
        return next((each for each in self.open_messages() if not each.get("summary")), None)

    def is_silent(self, message: Row) -> bool:
        """Its model has said nothing yet."""
        said = ("text", "reasoning", "tool")
        return not any(part["type"] in said for part in self.parts_of(message["id"]))

    # --- its transcript ------------------------------------------------------------------------

    def transcript(self) -> list[Row]:
        """Messages in order; those whose turn has not come are last."""
        return sorted(
            self.tables["message"].values(),
            key=lambda message: (message.get("turn", QUEUED), self.places[message["id"]]),
        )

    def is_talk(self, message: Row) -> bool:
        """A model is to see it: it is no machinery, its turn has come, nobody withdrew it."""
        if "turn" not in message or message.get("withdrawn") or message.get("summary"):
            return False
        return not any(part["type"] == "compaction" for part in self.parts_of(message["id"]))

    def parts_of(self, message_id: str) -> list[Row]:
        parts = self.tables["part"].values()
        mine = [part for part in parts if part["messageID"] == message_id]
        return sorted(mine, key=lambda part: self.places[part["id"]])

    def text_of(self, message_id: str) -> str:
        return "".join(p["text"] for p in self.parts_of(message_id) if p["type"] == "text")

    def said(self) -> list[str]:
        """What people said, in order, as far as their turn has come."""
        texts = [
            self.text_of(message["id"])
            for message in self.transcript()
            if message["role"] == "user" and "turn" in message
        ]
        return [text for text in texts if text]

    # --- being told ----------------------------------------------------------------------------

    def put(self, table: str, record: Row, cursor: int) -> None:
        key = record[KEYS[table]]
        self.places.setdefault(key, cursor)
        self.tables[table][key] = record
        if table == "part" and record["type"] == "text":
            self.heard.add(record["text"])

    def remove_message(self, message_id: str) -> None:
        self.tables["message"].pop(message_id, None)
        for part in self.parts_of(message_id):
            self.remove_part(part["id"])

    def remove_part(self, part_id: str) -> None:
        self.tables["part"].pop(part_id, None)
        self.places.pop(part_id, None)

    def end(self) -> None:
        self.deleted = True
        self.quarantined = False
        self.tables = no_tables()
        self.status = "idle"


def outcome(table: str, record: Row) -> str | None:
    """How something ended that may end once only; None while it has not."""
    if is_open(table, record):
        return None
    if table == "part" and record["type"] == "tool":
        return f"{record['state']['status']}: {record['state'].get('output')}"
    if table == "part" and record["type"] == "compaction":
        return str(record["state"])
    return str(record.get("outcome" if table == "inbox" else "replied"))
